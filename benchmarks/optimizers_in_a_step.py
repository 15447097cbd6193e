"""What optimizer wrappers cost in the whole fine-tuning step of a small BERT.

    python benchmarks/optimizers_in_a_step.py

The model, the batch and the step of bert_step.py. A process per backend, in which the
optimizers take turns; prints CPU milliseconds on one core, and the ratio to the optimizer that
is wrapped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import cpu_ms_in_turns, pin_to_one_core, report, take_turns
from optimizers import IN_KERAS_BACKEND, make

WRAPPERS = (
    "AdamW",
    "AccumOptimizer",
    "global_clipnorm",
    "ClipOptimizer",
    "MultiplierOptimizer",
    "LookaheadOptimizer",
    "EMAOptimizer",
)


def training_step(name, jit):
    import bert_step
    import keras

    encoder, pooled = bert_step.our_encoder("gelu")
    model = keras.Model(encoder.inputs, keras.layers.Dense(bert_step.CLASSES)(pooled))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(make(name), loss, jit_compile=jit)
    token_ids, labels = map(keras.ops.convert_to_tensor, bert_step.batch())
    x = [token_ids, keras.ops.zeros_like(token_ids)]
    return lambda: model.train_on_batch(x, labels)


def run_mode(mode):
    pin_to_one_core()
    steps = {name: training_step(name, jit=mode != "TF graph") for name in WRAPPERS}
    report(**cpu_ms_in_turns(steps, rounds=12, warmup=4))  # a whole cycle of four first


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1, help="processes per backend")
    arguments = parser.parse_args()
    cases = {mode: (None, name, ["mode", mode]) for mode, name in IN_KERAS_BACKEND.items()}
    for mode, figures in take_turns(__file__, cases, arguments.turns).items():
        for name, ms in figures.items():
            ratio = ms / figures[WRAPPERS[0]]
            print(f"{mode:9}{name:26}{ms:8.1f}  {ratio:.2f} of {WRAPPERS[0]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["mode"]:
        run_mode(sys.argv[2])
    else:
        main()
