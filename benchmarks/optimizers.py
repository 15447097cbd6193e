"""What optimizers cost, what they keep, and how exact they are: ours, Keras's, optax, torch.

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --galore PYTHON --accumulator PYTHON

The options name interpreters with galore-torch and torch, and with gradient-accumulator (it
needs TensorFlow 2.15); default for galore-torch (which needs bitsandbytes): the one that runs
this. A peer that does not import is not measured.

Optimizer only (the gradients are given), 8.8 million weights: 4 layers, hidden 256,
feed-forward 1024, 21,128 tokens. On TensorFlow the gradient of the token table is sparse, as
in training (2,048 tokens a batch, repeated as they come). Accumulation has k = 4. A process
per backend, in which the optimizers take turns. Prints

    ms      CPU milliseconds on one core of a micro-step: median of 9 cycles of 4
    ratio   ms over that of the row named last
    state   megabytes of optimizer state (the weights have 35)
    error   largest difference of a weight from float64 NumPy, after 3 updates of a small
            regression with repeated tokens: where it accumulates, from the large batch

What wrappers cost in a whole training step: optimizers_in_a_step.py.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

from measure import cpu_ms_in_turns, pin_to_one_core, report, take_turns

STEPS, LR, DECAY, CLIP, RANK = 4, 1e-2, 0.01, 0.5, 8
TOKENS, HIDDEN, FEED_FORWARD, LAYERS, BATCH_TOKENS = 21128, 256, 1024, 4, 2048
BLOCK = [(HIDDEN, HIDDEN), (HIDDEN,)] * 4 + [(HIDDEN,)] * 4
BLOCK += [(HIDDEN, FEED_FORWARD), (FEED_FORWARD,), (FEED_FORWARD, HIDDEN), (HIDDEN,)]
SHAPES = [(TOKENS, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,)] + BLOCK * LAYERS

IN_KERAS_BACKEND = {"TF graph": "tensorflow", "TF XLA": "tensorflow", "JAX": "jax"}

# Name -> (of Keras's optimizers and ours, the row it is compared with).
KERAS = {
    "AdamW": (lambda k, e: adamw(k), None),
    "built-in accumulation": (
        lambda k, e: adamw(k, gradient_accumulation_steps=STEPS),
        "AdamW",
    ),
    "AccumOptimizer": (lambda k, e: e.AccumOptimizer(adamw(k), STEPS), "built-in accumulation"),
    "MomentumAccumAdamW": (
        lambda k, e: e.MomentumAccumAdamW(LR, weight_decay=DECAY, accum_steps=STEPS),
        "AccumOptimizer",
    ),
    "SGD momentum": (lambda k, e: k.SGD(LR, 0.9), None),
    "AccumOptimizer of SGD": (
        lambda k, e: e.AccumOptimizer(k.SGD(LR, 0.9), STEPS),
        "SGD momentum",
    ),
    "MomentumAccumSGD": (
        lambda k, e: e.MomentumAccumSGD(LR, 0.9, accum_steps=STEPS),
        "AccumOptimizer of SGD",
    ),
    "Tiger": (lambda k, e: e.Tiger(LR, accum_steps=STEPS), "MomentumAccumSGD"),
    "global_clipnorm": (lambda k, e: adamw(k, global_clipnorm=CLIP), "AdamW"),
    "ClipOptimizer": (lambda k, e: e.ClipOptimizer(adamw(k), CLIP), "global_clipnorm"),
    "ClipOptimizer adaptive": (
        lambda k, e: e.ClipOptimizer(adamw(k), CLIP, kind="adaptive"),
        "global_clipnorm",
    ),
    "MultiplierOptimizer": (lambda k, e: e.MultiplierOptimizer(adamw(k), {".": 0.5}), "AdamW"),
    "LazyOptimizer": (lambda k, e: e.LazyOptimizer(adamw(k)), "AdamW"),
    "LookaheadOptimizer": (lambda k, e: e.LookaheadOptimizer(adamw(k)), "AdamW"),
    "use_ema": (lambda k, e: adamw(k, use_ema=True), "AdamW"),
    "EMAOptimizer": (lambda k, e: e.EMAOptimizer(adamw(k)), "use_ema"),
    "Lamb": (lambda k, e: k.Lamb(LR), "AdamW"),
    "LayerAdaptiveOptimizer": (lambda k, e: e.LayerAdaptiveOptimizer(k.Adam(LR)), "Lamb"),
    "Adafactor": (lambda k, e: k.Adafactor(LR), "AdamW"),
    "RelativeAdafactor": (lambda k, e: e.RelativeAdafactor(LR), "Adafactor"),
    "LoRAOptimizer": (lambda k, e: e.LoRAOptimizer(adamw(k), RANK), "AdamW"),
    "GaLoreOptimizer": (lambda k, e: e.GaLoreOptimizer(adamw(k), RANK), "AdamW"),
}
OPTAX = {
    "optax adamw": "AdamW",
    "optax MultiSteps": "AccumOptimizer",
    "optax clip": "ClipOptimizer",
}
# The peers that need an environment of their own: name -> the row it is compared with.
TORCH = {"galore-torch": None}
TF_2_15 = {"Adam of Keras 2": None, "gradient-accumulator": "Adam of Keras 2"}


def adamw(optimizers, **arguments):
    return optimizers.AdamW(LR, weight_decay=DECAY, **arguments)


def make(name):
    import keras

    from keras_ext import optimizers

    return KERAS[name][0](keras.optimizers, optimizers)


def keras_variables(values):
    """The table first: it has the name that optimizers know a table by."""
    import keras

    return [
        keras.Variable(value, name=f"w{i}" if i else "embeddings")
        for i, value in enumerate(values)
    ]


def tensorflow_cycle(name, xla):
    import tensorflow as tf

    variables = keras_variables(tf.random.normal(shape) * 0.02 for shape in SHAPES)
    optimizer = make(name)
    optimizer.build(variables)
    ids = tf.random.uniform((BATCH_TOKENS,), 0, TOKENS, tf.int32)
    rows = tf.random.normal((BATCH_TOKENS, HIDDEN))
    dense = [tf.random.normal(shape) for shape in SHAPES[1:]]

    @tf.function(jit_compile=xla)
    def micro_step():
        table = tf.IndexedSlices(rows, ids, SHAPES[0])
        if name == "Adafactor":  # Keras's raises on a sparse gradient
            table = tf.convert_to_tensor(table)
        optimizer.apply([table, *dense], variables)

    def cycle():
        for _ in range(STEPS):
            micro_step()
        variables[-1].numpy()

    return cycle, sum(v.numpy().nbytes for v in optimizer.variables)


def jax_arrays():
    import jax

    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    grads = [jax.random.normal(k, shape) for k, shape in zip(keys, SHAPES, strict=True)]
    return [g * 0.02 for g in grads], grads


def jax_cycle(step, weights, state, grads):
    """Four micro-steps of `step(weights, state, grads) -> (weights, state)`."""
    import jax

    # Donated in the order of the outputs; otherwise the copies are what is measured.
    step = jax.jit(step, donate_argnums=(0, 1))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    current = list(jax.tree.map(lambda x: x.copy(), (weights, state)))

    def cycle():
        for _ in range(STEPS):
            current[:] = step(*current, grads)
        jax.block_until_ready(current)

    return cycle, size


def keras_on_jax_cycle(name):
    weights, grads = jax_arrays()
    optimizer = make(name)
    optimizer.build(keras_variables(weights))
    state = [v.value for v in optimizer.variables]

    def step(weights, state, grads):
        return optimizer.stateless_apply(state, grads, weights)

    return jax_cycle(step, weights, state, grads)


def optax_transform(name):
    import optax

    adamw = optax.adamw(LR, weight_decay=DECAY)
    return {
        "optax adamw": adamw,
        "optax MultiSteps": optax.MultiSteps(adamw, STEPS),
        "optax clip": optax.chain(optax.clip_by_global_norm(CLIP), adamw),
    }[name]


def optax_step(name):
    import optax

    transform = optax_transform(name)

    def step(weights, state, grads):
        updates, state = transform.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    return transform.init, step


def optax_cycle(name):
    weights, grads = jax_arrays()
    init, step = optax_step(name)
    return jax_cycle(step, weights, init(weights), grads)


def reference(name):
    """(NumPy update, transform of the gradients) that the optimizer should equal, or None."""
    from reference import optimizers as exact

    def clipped(grads):
        return exact.clip_global(grads, CLIP)

    def unchanged(grads):
        return grads

    decayed = exact.adam(LR, weight_decay=DECAY)
    names = {"AdamW", "built-in accumulation", "AccumOptimizer", "MomentumAccumAdamW"}
    if name in names | {"optax adamw", "optax MultiSteps"}:
        return decayed, unchanged
    if name in {"global_clipnorm", "ClipOptimizer", "optax clip"}:
        return decayed, clipped
    if name in {"SGD momentum", "AccumOptimizer of SGD", "MomentumAccumSGD"}:
        return exact.sgd(LR, 0.9), unchanged
    return {
        "Lamb": (exact.lamb(LR), unchanged),
        "LayerAdaptiveOptimizer": (exact.lamb(LR), unchanged),
    }.get(name)


def error(name):
    """Largest difference of a weight from the reference, or None where there is none."""
    import numpy as np
    from reference.problems import Regression

    known = reference(name)
    if known is None:
        return None
    problem = Regression(embedding=True)
    accumulates = any(word in name.lower() for word in ("accum", "multisteps"))
    size = 4 if accumulates else 4 * STEPS
    micro = [slice(i, i + size) for i in range(0, len(problem.x), size)]
    large = [slice(i, i + 16) for i in range(0, len(problem.x), 16)]
    train = optax_weights if name in OPTAX else keras_weights
    expected = problem.train(known[0], large, known[1])
    pairs = zip(train(name, problem, micro), expected, strict=True)
    return float(max(np.abs(a - b).max() for a, b in pairs))


def keras_weights(name, problem, batches):
    """Weights after training a Keras model: on TensorFlow its gradients are sparse."""
    import keras
    from reference.problems import OUTPUTS, VOCABULARY, WIDTH

    inputs = keras.Input((problem.x.shape[1],), dtype="int32")
    hidden = keras.layers.Embedding(VOCABULARY, WIDTH)(inputs)
    hidden = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model(inputs, keras.layers.Dense(OUTPUTS)(hidden))
    model.set_weights(problem.weights)
    model.compile(make(name), "mse", jit_compile=keras.backend.backend() == "jax")
    size = batches[0].stop
    model.fit(problem.x, problem.y, batch_size=size, shuffle=False, verbose=0)
    return model.get_weights()


def optax_weights(name, problem, batches):
    import jax
    import jax.numpy as jnp
    import numpy as np

    init, step = optax_step(name)
    weights = [jnp.asarray(w, jnp.float32) for w in problem.weights]
    state, step = init(weights), jax.jit(step)
    for rows in batches:
        grads = problem.gradients([np.asarray(w, float) for w in weights], rows)
        weights, state = step(weights, state, [jnp.asarray(g, jnp.float32) for g in grads])
    return [np.asarray(w) for w in weights]


def galore_cycle():
    import torch
    from galore_torch import GaLoreAdamW

    weights = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES]
    projected = [w for w in weights if w.ndim == 2 and min(w.shape) > RANK]
    others = [w for w in weights if not (w.ndim == 2 and min(w.shape) > RANK)]
    galore = {"rank": RANK, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    optimizer = GaLoreAdamW(
        [{"params": others}, {"params": projected, **galore}], lr=LR, weight_decay=DECAY
    )
    for weight in weights:
        weight.grad = torch.randn_like(weight)

    def cycle():
        for _ in range(STEPS):
            optimizer.step()

    cycle()
    size = 0
    for state in optimizer.state.values():
        projector = state.get("projector")
        tensors = [*state.values(), getattr(projector, "ortho_matrix", None)]
        size += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
    return cycle, size


def accumulator_cycle(name):
    """gradient-accumulator, or the plain optimizer, on its TensorFlow and Keras 2."""
    import tensorflow as tf

    optimizer = tf.keras.optimizers.legacy.Adam(LR)  # the wrapper knows no other
    if name == "gradient-accumulator":
        from gradient_accumulator import GradientAccumulateOptimizer

        optimizer = GradientAccumulateOptimizer(optimizer, accum_steps=STEPS)
    variables = [tf.Variable(tf.random.normal(shape) * 0.02) for shape in SHAPES]
    grads = [tf.random.normal(shape) for shape in SHAPES]

    @tf.function
    def micro_step():
        optimizer.apply_gradients(zip(grads, variables, strict=True))

    def cycle():
        for _ in range(STEPS):
            micro_step()
        variables[-1].numpy()

    cycle()
    own = optimizer.variables
    return cycle, sum(v.numpy().nbytes for v in (own() if callable(own) else own))


def cycles(mode):
    """Name -> function that makes a cycle of micro-steps, and the bytes of its state."""
    if mode == "torch":
        return {name: galore_cycle() for name in TORCH}
    if mode == "TF 2.15":
        return {name: accumulator_cycle(name) for name in TF_2_15}
    if mode == "JAX":
        optax = OPTAX if importlib.util.find_spec("optax") else ()
        ours = {name: keras_on_jax_cycle(name) for name in KERAS}
        return ours | {name: optax_cycle(name) for name in optax}
    xla = mode == "TF XLA"
    slow = {"GaLoreOptimizer"} if xla else ()  # XLA's SVD on a CPU takes minutes
    return {name: tensorflow_cycle(name, xla) for name in KERAS if name not in slow}


def run_mode(mode):
    pin_to_one_core()
    found = cycles(mode)
    times = cpu_ms_in_turns({name: cycle for name, (cycle, _) in found.items()}, rounds=9)
    figures = {}
    for name, (_, size) in found.items():
        figures |= {f"{name}: ms": times[name] / STEPS, f"{name}: state": size / 1e6}
        if (wrong := error(name)) is not None:
            figures[f"{name}: error"] = wrong
    report(**figures)


def imports(python, *modules):
    code = f"import importlib.util as u; exit(not all(map(u.find_spec, {modules})))"
    return python and not subprocess.run([python, "-c", code]).returncode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--galore", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--accumulator", metavar="PYTHON")
    parser.add_argument("--turns", type=int, default=1, help="processes per backend")
    parser.add_argument(
        "--modes", nargs="+", default=IN_KERAS_BACKEND, choices=IN_KERAS_BACKEND
    )
    arguments = parser.parse_args()

    cases = {mode: (None, IN_KERAS_BACKEND[mode], ["mode", mode]) for mode in arguments.modes}
    if imports(arguments.galore, "torch", "galore_torch", "bitsandbytes"):
        cases["torch"] = (arguments.galore, "torch", ["mode", "torch"])
    if imports(arguments.accumulator, "gradient_accumulator"):
        cases["TF 2.15"] = (arguments.accumulator, "tensorflow", ["mode", "TF 2.15"])
    print(f"{'':9}{'optimizer':26}{'ms':>8}{'state MB':>10}{'error':>10}  ratio")
    for mode, figures in take_turns(__file__, cases, arguments.turns).items():
        print_mode(mode, figures)


def print_mode(mode, figures):
    peers = {name: peer for name, (_, peer) in KERAS.items()} | OPTAX | TORCH | TF_2_15
    for name, peer in peers.items():
        if f"{name}: ms" not in figures:
            continue
        ms, state, wrong = (figures.get(f"{name}: {key}") for key in ("ms", "state", "error"))
        ratio = f"{ms / figures[f'{peer}: ms']:.2f} of {peer}" if peer else ""
        wrong = "-" if wrong is None else f"{wrong:.0e}"
        print(f"{mode:9}{name:26}{ms:8.1f}{state:10.1f}{wrong:>10}  {ratio}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["mode"]:
        run_mode(sys.argv[2])
    else:
        main()
