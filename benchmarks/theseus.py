"""A training step of BERT-of-Theseus against the steps of its two branches alone.

    python benchmarks/theseus.py

A BERT of 8 blocks, hidden 256, feed-forward 1024, and 4 modules of 2 blocks for 1; batches of
16 sequences of 64, dropout 0.1, AdamW. CPU milliseconds on one core of a step, mean of 40:

    small         the successors alone, in a model without modules
    predecessors  the frozen blocks alone, in a model without modules, where one weight below
                  them is trained: the gradient passes through them, as it does in Theseus
    p = 1, 0.5    the model of `build_theseus_model` under `ConstantReplacement`

Targets: p = 1 over small at most 1.05; p = 0.5 at most 1.15 of the mean of both branches,
weighed as its modules really drew. If both branches were computed, p = 0.5 would be at their
sum, twice the mean. With XLA, TensorFlow runs the branch that was drawn again for its gradient:
p = 0.5 is higher by this forward pass. Compilation is not in the figures.

XLA takes the memory of a whole step at once, and glibc maps blocks of more than 32 MiB anew at
each allocation, which is most of what p = 0.5 costs beyond the mean there. Without page faults:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=268435456.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from measure import options, pin_to_one_core, report, take_turns

BLOCKS, HIDDEN, HEADS, FEED_FORWARD, VOCABULARY = 8, 256, 4, 1024, 1000
BATCH, LENGTH, CLASSES, STEPS, WARMUP = 16, 64, 15, 40, 3
GROUPS = 2
MODES = {"TF graph": ("tensorflow", "graph"), "TF XLA": ("tensorflow", "jit")}
MODES["JAX"] = ("jax", "jit")
MODELS = ("small", "predecessors", "1", "0.5")


def main() -> None:
    turns = options(__doc__).parse_args().turns
    cases = {
        (mode, model): (None, backend, ["case", model, jit])
        for mode, (backend, jit) in MODES.items()
        for model in MODELS
    }
    figures = take_turns(__file__, cases, turns)
    titles = ("small", "predecessors", "p = 1", "p = 0.5")
    print(f"{'ms':10}" + "".join(f"{title:>14}" for title in titles))
    for mode in MODES:
        small, old, one, half = (figures[mode, model] for model in MODELS)
        print(f"{mode:10}" + "".join(f"{f['ms']:14.1f}" for f in (small, old, one, half)))
        share = half["replaced"]
        mean = share * small["ms"] + (1 - share) * old["ms"]
        print(
            f"{'':10}p = 1 over small {one['ms'] / small['ms']:.2f}, p = 0.5 over the mean "
            f"{half['ms'] / mean:.2f} ({share:.0%} replaced)"
        )


def measure(name: str, jit: str) -> None:
    """One case, in a process of its own."""
    pin_to_one_core()
    import keras

    keras.utils.set_random_seed(0)
    model = build(name)
    model.compile(
        keras.optimizers.AdamW(1e-5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit == "jit",
    )
    random = np.random.default_rng(0)
    rows = BATCH * (WARMUP + STEPS)
    ids = random.integers(1, VOCABULARY, (rows, LENGTH)).astype("int32")
    inputs, labels = [ids, np.zeros_like(ids)], random.integers(0, CLASSES, rows)

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch in (WARMUP - 1, WARMUP + STEPS - 1):  # `logs` are numbers: it is done
                self.times = (*getattr(self, "times", ()), time.process_time())
                self.draws = (*getattr(self, "draws", ()), draws(self.model))

    callbacks = [clock := Clock()]
    if name in ("1", "0.5"):
        from keras_ext.training import ConstantReplacement

        callbacks.append(ConstantReplacement(float(name), steps=STEPS + WARMUP))
    model.fit(inputs, labels, BATCH, callbacks=callbacks, verbose=0)
    ms = 1e3 * (clock.times[1] - clock.times[0]) / STEPS
    report(ms=ms, replaced=(clock.draws[1] - clock.draws[0]) / (STEPS * BLOCKS // GROUPS))


def build(name: str):
    import keras

    from keras_ext.models import build_transformer_model
    from keras_ext.training.theseus import build_theseus_model, extract_successor

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": HEADS,
        "intermediate_size": FEED_FORWARD,
        "max_position_embeddings": LENGTH,
    }
    bert = build_transformer_model(config)
    full = keras.Model(bert.inputs, keras.layers.Dense(CLASSES)(bert.output[:, 0]))
    if name in ("1", "0.5"):
        return build_theseus_model(full, GROUPS, float(name), predecessor_dropout=True)
    model = (
        full if name == "predecessors" else extract_successor(build_theseus_model(full, GROUPS))
    )
    for layer in model.layers:
        trained = "encoder" in layer.name if name == "small" else layer.name == "embedding_norm"
        layer.trainable = trained
    return model


def draws(model) -> int:
    """Steps so far of all successors: each draws two dropout masks on its outputs."""
    modules = [layer for layer in model.layers if layer.name.startswith("theseus_")]
    seeds = [module.successor[0].dropout_layer.seed_generator for module in modules]
    return sum(int(seed.state[1]) for seed in seeds) // 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        measure(*sys.argv[2:])
    else:
        main()
