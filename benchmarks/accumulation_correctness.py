"""Who accumulates gradients correctly: AccumOptimizer, Keras's own, optax, bert4keras.

    KERAS_BACKEND=tensorflow python benchmarks/accumulation_correctness.py
    KERAS_BACKEND=jax        python benchmarks/accumulation_correctness.py

Each row trains a small regression for 3 updates, each of 4 micro-batches of 4 rows, and prints
the largest difference of a weight from float64 NumPy trained on the 3 large batches of 16.
A difference below 1e-5 is rounding ("ok"). bert4keras cannot be imported under Keras 3: its
column is a NumPy re-derivation of its rule (update with the previous k gradients at every
k-th step, the first one included; bias correction counts micro-steps). The last column is
Keras itself on the large batches: on TensorFlow it is wrong where tokens repeat.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

import keras
import numpy as np
from keras import ops
from reference import optimizers as numpy_optimizers
from reference.problems import OUTPUTS, VOCABULARY, WIDTH, Regression

from keras_ext.optimizers import AccumOptimizer
from keras_ext.training import with_objective

LR, K, ROWS = 0.05, 4, 48
EPSILON = 1e-12  # Keras and optax add it at different places: too small here to matter
LARGE = [slice(i, i + 16) for i in range(0, ROWS, 16)]
OURS, BUILT_IN, OPTAX = "AccumOptimizer", "Keras built-in", "optax.MultiSteps"
BERT4KERAS, LARGE_BATCH = "bert4keras*", "Keras, batch 16"


def fit(problem, optimizer, batch_size=4, constraint=None):
    """Final weights of the problem's Keras model."""
    if problem.embedding:
        inputs = keras.Input((problem.x.shape[1],), dtype="int32")
        hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(inputs)
        hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    else:
        inputs = hidden = keras.Input((WIDTH,))
    dense = keras.layers.Dense(OUTPUTS, kernel_constraint=constraint)
    model = with_objective(keras.Model(inputs, dense(hidden)), [])
    for variable, value in zip(model.trainable_weights, problem.weights, strict=True):
        variable.assign(value)
    model.compile(optimizer, loss="mse", run_eagerly=keras.backend.backend() == "tensorflow")
    model.fit(problem.x, problem.y, batch_size=batch_size, shuffle=False, verbose=0)
    return [ops.convert_to_numpy(w) for w in model.trainable_weights]


def keras_contestants(problem, make, **fit_arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unfinished cycles are one of the rows
        return {
            OURS: fit(problem, AccumOptimizer(make(), K), **fit_arguments),
            BUILT_IN: fit(problem, make(gradient_accumulation_steps=K), **fit_arguments),
            LARGE_BATCH: fit(problem, make(), batch_size=16, **fit_arguments),
        }


def micro_batches(problem):
    return [slice(i, i + 4) for i in range(0, len(problem.x), 4)]


def optax_contestant(problem, transform):
    import jax
    import jax.numpy as jnp
    import optax

    steps = optax.MultiSteps(transform, K)
    weights = [jnp.asarray(w, jnp.float32) for w in problem.weights]
    state = steps.init(weights)
    for rows in micro_batches(problem):
        grads = problem.gradients([np.asarray(w, float) for w in weights], rows)
        grads = [jnp.asarray(g, jnp.float32) for g in grads]
        updates, state = jax.jit(steps.update)(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    return [np.asarray(w) for w in weights]


def bert4keras_contestant(problem, update, transform=lambda grads: grads):
    weights, state = problem.weights, [{} for _ in problem.weights]
    total = [np.zeros_like(w) for w in weights]
    for t, rows in enumerate(micro_batches(problem)):
        grads = problem.gradients(weights, rows)
        if t % K == 0:
            weights = update(weights, transform([g / K for g in total]), state, t + 1)
            total = grads
        else:
            total = [a + g for a, g in zip(total, grads, strict=True)]
    return weights


def rows():
    """(what is checked, reference weights, {contestant: weights}) one after the other."""
    import optax

    optimizers, adam = keras.optimizers, numpy_optimizers.adam(LR, epsilon=EPSILON)
    for embedding in (False, True):
        problem = Regression(embedding)
        results = keras_contestants(
            problem, lambda **k: optimizers.Adam(LR, epsilon=EPSILON, **k)
        )
        results[OPTAX] = optax_contestant(problem, optax.adam(LR, eps=EPSILON))
        results[BERT4KERAS] = bert4keras_contestant(problem, adam)
        what = "Adam, repeated tokens" if embedding else "Adam"
        yield what, problem.train(adam, LARGE), results

    problem = Regression(embedding=True)

    def clip(grads):
        return numpy_optimizers.clip_global(grads, 0.5)

    clipnorm = {"epsilon": EPSILON, "global_clipnorm": 0.5}
    results = keras_contestants(problem, lambda **k: optimizers.Adam(LR, **clipnorm, **k))
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(LR, eps=EPSILON))
    results[OPTAX] = optax_contestant(problem, clipped)
    results[BERT4KERAS] = bert4keras_contestant(problem, adam, clip)
    yield "Adam, clipped, repeated tokens", problem.train(adam, LARGE, clip), results

    problem = Regression(embedding=False)
    adamw = numpy_optimizers.adam(LR, epsilon=EPSILON, weight_decay=0.1)
    decay = {"epsilon": EPSILON, "weight_decay": 0.1}
    results = keras_contestants(problem, lambda **k: optimizers.AdamW(LR, **decay, **k))
    results[OPTAX] = optax_contestant(problem, optax.adamw(LR, eps=EPSILON, weight_decay=0.1))
    results[BERT4KERAS] = bert4keras_contestant(problem, adamw)
    yield "AdamW, weight decay", problem.train(adamw, LARGE), results

    def decaying(weights, grads, state, t):
        return [w - LR / t * g for w, g in zip(weights, grads, strict=True)]

    schedule = keras.optimizers.schedules.InverseTimeDecay(LR, 1, 1.0)
    results = keras_contestants(problem, lambda **k: optimizers.SGD(schedule, **k))
    results[OPTAX] = optax_contestant(problem, optax.sgd(lambda t: LR / (1 + t)))
    results[BERT4KERAS] = bert4keras_contestant(problem, decaying)
    yield "learning rate 1/(1 + updates)", problem.train(decaying, LARGE), results

    sgd = numpy_optimizers.sgd(LR)

    def averaged(weights, grads, state, t):  # what fit ends with: the moving average
        new = sgd(weights, grads, state, t)
        for w, s in zip(new, state, strict=True):
            s["ema"] = w if t == 1 else 0.5 * s["ema"] + 0.5 * w
        return new

    state = [{} for _ in problem.weights]
    weights = problem.weights
    for t, batch in enumerate(LARGE, start=1):
        weights = averaged(weights, problem.gradients(weights, batch), state, t)
    ema = {"use_ema": True, "ema_momentum": 0.5}
    results = keras_contestants(problem, lambda **k: optimizers.SGD(LR, **ema, **k))
    yield "moving average of the weights", [s["ema"] for s in state], results

    def halved(weights, grads, state, t):
        kernel, bias = sgd(weights, grads, state, t)
        return [kernel / 2, bias]

    results = keras_contestants(
        problem, lambda **k: optimizers.SGD(LR, **k), constraint=lambda w: w / 2
    )
    yield "constraint after an update", problem.train(halved, LARGE), results

    problem = Regression(embedding=False, rows=40)  # 10 micro-batches: 2 are left over
    batches = [slice(0, 16), slice(16, 32), slice(32, 40)]
    results = keras_contestants(problem, lambda **k: optimizers.SGD(LR, **k))
    results[OPTAX] = optax_contestant(problem, optax.sgd(LR))
    results[BERT4KERAS] = bert4keras_contestant(problem, sgd)
    yield "unfinished cycle at the end", problem.train(sgd, batches), results

    problem = Regression(embedding=False, rows=14)  # 4, 4, 4 and 2 rows: one cycle
    results = keras_contestants(problem, lambda **k: optimizers.SGD(LR, **k))
    results[OPTAX] = optax_contestant(problem, optax.sgd(LR))
    results[BERT4KERAS] = bert4keras_contestant(problem, sgd)
    yield "smaller last micro-batch", problem.train(sgd, [slice(None)]), results


def main():
    names = [OURS, BUILT_IN, OPTAX, BERT4KERAS, LARGE_BATCH]
    print(f"{keras.backend.backend()}, Keras {keras.__version__}; * re-derived in NumPy")
    print(f"{'':32}" + "".join(f"{name:>18}" for name in names))
    for what, expected, results in rows():
        cells = []
        for name in names:
            if name not in results:
                cells.append("-")
                continue
            pairs = zip(results[name], expected, strict=True)
            error = max(np.abs(a - b).max() for a, b in pairs)
            cells.append("ok" if error < 1e-5 else f"{error:.1e}")
        print(f"{what:32}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
