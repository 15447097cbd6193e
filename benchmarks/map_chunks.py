"""What a contrastive step costs whose encoder runs chunk by chunk, recomputed for the gradient.

    python benchmarks/map_chunks.py

A BERT of 2 x 128, 64 pairs of texts of 32 tokens (two passes with different dropout), Adam; by
`backend.map_chunks` in chunks of a quarter. A process per backend, in which both take turns;
prints CPU milliseconds on one core, and the ratio to the plain step.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import cpu_ms_in_turns, pin_to_one_core, report, take_turns
from objectives import LENGTH, MODES, SIZES

ROWS, CHUNKS = 64, 4


def training_step(chunked, jit):
    import keras
    import numpy as np
    from keras import ops

    from keras_ext import backend
    from keras_ext.models import build_transformer_model

    class Contrastive(keras.Model):
        """Each text is to be next to itself under another dropout."""

        def __init__(self, encoder):
            super().__init__()
            self.encoder = encoder

        def embed(self, tokens, training):
            hidden = self.encoder([tokens, ops.zeros_like(tokens)], training=training)
            return hidden[:, 0]

        def call(self, tokens, training=False):
            if not chunked:
                return self.embed(tokens, training)
            chunks = ops.reshape(tokens, (CHUNKS, -1, LENGTH))
            found = backend.map_chunks(lambda x: self.embed(x, training), chunks)
            return ops.reshape(found, (-1, SIZES["hidden_size"]))

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            other = self(x, training=training)
            a, b = (ops.normalize(v, axis=-1) for v in (y_pred, other))
            scores = 20 * ops.matmul(a, ops.transpose(b))
            return -ops.mean(ops.diagonal(ops.log_softmax(scores)))

    keras.utils.set_random_seed(0)
    model = Contrastive(build_transformer_model(SIZES))
    model.compile("adam", jit_compile=jit)
    tokens = np.random.default_rng(0).integers(1, SIZES["vocab_size"], (ROWS, LENGTH))
    tokens = keras.ops.convert_to_tensor(tokens.astype("int32"))
    return lambda: model.train_on_batch(tokens)


def run_mode(mode):
    pin_to_one_core()
    jit = mode in ("TF XLA", "JAX")
    steps = {name: training_step(name == "chunks", jit) for name in ("plain", "chunks")}
    report(**cpu_ms_in_turns(steps, rounds=9, warmup=3))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=1, help="processes per backend")
    arguments = parser.parse_args()
    cases = {mode: (None, backend, ["mode", mode]) for mode, backend in MODES.items()}
    for mode, figures in take_turns(__file__, cases, arguments.turns).items():
        ratio = figures["chunks"] / figures["plain"]
        print(f"{mode:9}{figures['plain']:8.1f}{figures['chunks']:8.1f}  {ratio:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["mode"]:
        run_mode(sys.argv[2])
    else:
        main()
