"""What gradient accumulation costs the optimizer: 4 micro-steps, k = 4, a small BERT.

    python benchmarks/accumulation_cost.py

Optimizer only (the gradients are given), AdamW, 8.8 million weights: 4 layers, hidden 256,
feed-forward 1024, 21,128 tokens. On TensorFlow the gradient of the token table is sparse, as
in training (2,048 tokens a batch, repeated as they come). Prints CPU milliseconds on one
core for the four micro-steps together, and the ratio of AccumOptimizer to each peer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import cpu_ms, pin_to_one_core, report, take_turns

STEPS = 4
TOKENS, HIDDEN, FEED_FORWARD, LAYERS, BATCH_TOKENS = 21128, 256, 1024, 4, 2048
BLOCK = [(HIDDEN, HIDDEN), (HIDDEN,)] * 4 + [(HIDDEN,)] * 4
BLOCK += [(HIDDEN, FEED_FORWARD), (FEED_FORWARD,), (FEED_FORWARD, HIDDEN), (HIDDEN,)]
SHAPES = [(TOKENS, HIDDEN), (512, HIDDEN), (2, HIDDEN), (HIDDEN,), (HIDDEN,)] + BLOCK * LAYERS


def keras_optimizer(kind):
    import keras

    from keras_ext.optimizers import AccumOptimizer

    if kind == "built-in":
        return keras.optimizers.AdamW(1e-4, gradient_accumulation_steps=STEPS)
    adamw = keras.optimizers.AdamW(1e-4)
    return AccumOptimizer(adamw, STEPS) if kind == "AccumOptimizer" else adamw


def tensorflow_case(kind, xla):
    import keras
    import tensorflow as tf

    variables = [keras.Variable(tf.random.normal(shape) * 0.02) for shape in SHAPES]
    optimizer = keras_optimizer(kind)
    optimizer.build(variables)
    ids = tf.random.uniform((BATCH_TOKENS,), 0, TOKENS, tf.int32)
    rows = tf.random.normal((BATCH_TOKENS, HIDDEN))
    dense = [tf.random.normal(shape) for shape in SHAPES[1:]]

    @tf.function(jit_compile=xla)
    def micro_step():
        table = tf.IndexedSlices(rows, ids, SHAPES[0])
        optimizer.apply([table, *dense], variables)

    def cycle():
        for _ in range(STEPS):
            micro_step()
        variables[-1].numpy()

    return cycle


def jax_case(kind):
    import jax

    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    grads = [jax.random.normal(k, shape) for k, shape in zip(keys, SHAPES, strict=True)]
    weights = [g * 0.02 for g in grads]
    if kind == "optax.MultiSteps":
        import optax

        transform = optax.MultiSteps(optax.adamw(1e-4), STEPS)
        state = transform.init(weights)

        def step(weights, state, grads):
            updates, state = transform.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state
    else:
        import keras

        variables = [keras.Variable(w) for w in weights]
        optimizer = keras_optimizer(kind)
        optimizer.build(variables)
        state = [v.value for v in optimizer.variables]

        def step(weights, state, grads):
            return optimizer.stateless_apply(state, grads, weights)

    # Donated in the order of the outputs; otherwise the copies are what is measured.
    step = jax.jit(step, donate_argnums=(0, 1))
    current = [
        jax.tree.map(lambda x: x.copy(), weights),
        jax.tree.map(lambda x: x.copy(), state),
    ]

    def cycle():
        for _ in range(STEPS):
            current[:] = step(*current, grads)
        jax.block_until_ready(current)

    return cycle


def run_case(backend, kind):
    pin_to_one_core()
    cycle = (
        jax_case(kind) if backend == "jax" else tensorflow_case(kind, backend.endswith("xla"))
    )
    report(cpu_ms=cpu_ms(cycle, repeats=9))


def main():
    kinds = {
        "tensorflow": ["plain", "AccumOptimizer", "built-in"],
        "tensorflow-xla": ["plain", "AccumOptimizer", "built-in"],
        "jax": ["plain", "AccumOptimizer", "built-in", "optax.MultiSteps"],
    }
    cases = {
        f"{backend} {kind}": (None, backend.split("-")[0], [backend, kind])
        for backend, names in kinds.items()
        for kind in names
    }
    medians = take_turns(__file__, cases)
    print(f"{'backend':16}{'optimizer':20}{'CPU ms':>8}   AccumOptimizer / this")
    for backend, names in kinds.items():
        ours = medians[f"{backend} AccumOptimizer"]["cpu_ms"]
        for kind in names:
            time = medians[f"{backend} {kind}"]["cpu_ms"]
            print(f"{backend:16}{kind:20}{time:8.1f}   {ours / time:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run_case(*sys.argv[1:])
    else:
        main()
