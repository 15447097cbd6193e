"""What training objectives cost in steps of a small BERT.

    python benchmarks/objectives.py

A BERT of 2 x 128, 32 texts of 32 tokens, Adam. A process per backend, in which the objectives
take turns; prints CPU milliseconds on one core, and the ratio to a plain step.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import cpu_ms_in_turns, pin_to_one_core, report, take_turns
from optimizers import IN_KERAS_BACKEND

MODES = IN_KERAS_BACKEND | {"torch": "torch"}
ROWS, LENGTH, CLASSES = 32, 32, 15
SIZES = {
    "vocab_size": 21128,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
}
PLAIN = "plain"


def training_step(objectives, jit):
    import keras
    import numpy as np

    from keras_ext.models import build_transformer_model
    from keras_ext.training import with_objective

    keras.utils.set_random_seed(0)
    encoder = build_transformer_model(SIZES)
    head = keras.layers.Dense(CLASSES, "softmax")
    model = keras.Model(encoder.inputs, head(encoder.output[:, 0]))
    if objectives:
        model = with_objective(model, objectives)
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=jit)
    rng = np.random.default_rng(0)
    x = rng.integers(1, SIZES["vocab_size"], (ROWS, LENGTH)).astype("int32")
    x = [keras.ops.convert_to_tensor(a) for a in (x, np.zeros_like(x))]
    y = keras.ops.convert_to_tensor(rng.integers(0, CLASSES, ROWS).astype("int32"))
    return lambda: model.train_on_batch(x, y)


def run_mode(mode):
    pin_to_one_core()
    from keras_ext.training import FGM, VAT, GradientPenalty, RDrop

    cases = {
        PLAIN: [],
        "FGM, matrix": [FGM("token_embedding", 0.5)],
        "FGM, output": [FGM("token_embedding", 0.5, on="output")],
        "R-Drop": [RDrop()],
        "FGM of R-Drop": [FGM("token_embedding", 0.5), RDrop()],
        "GradientPenalty, output": [GradientPenalty("token_embedding", on="output")],
        "VAT, output": [VAT("token_embedding", on="output")],
    }
    jit = mode in ("TF XLA", "JAX")
    steps = {name: training_step(objectives, jit) for name, objectives in cases.items()}
    report(**cpu_ms_in_turns(steps, rounds=9, warmup=3))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1, help="processes per backend")
    arguments = parser.parse_args()
    cases = {mode: (None, backend, ["mode", mode]) for mode, backend in MODES.items()}
    for mode, figures in take_turns(__file__, cases, arguments.turns).items():
        for name, ms in figures.items():
            print(f"{mode:9}{name:26}{ms:8.1f}  {ms / figures[PLAIN]:.2f} of a plain step")


if __name__ == "__main__":
    if sys.argv[1:2] == ["mode"]:
        run_mode(sys.argv[2])
    else:
        main()
