"""Length buckets against every batch padded to the maximum: training examples per second.

    python benchmarks/bucketing.py --data path/to/tnews/train.json
    python benchmarks/bucketing.py --data path/to/tnews/train.json --layers 2 --hidden 128

The same BERT takes training steps on batches of every bucket length and of the maximum,
in turn, on one pinned core. From the median CPU time of a step at each length follows the
time of a whole epoch: sum of (batches of the length) x (median). First calls, which trace
and compile, are reported apart.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import pin_to_one_core

pin_to_one_core()

import keras
import numpy as np

from keras_ext.models import build_transformer_model
from keras_ext.optimizers import AccumOptimizer
from keras_ext.text import BucketedBatches, WordPieceTokenizer, build_vocabulary

SAMPLE = Path(__file__).parents[1] / "examples" / "clue" / "sample" / "tnews" / "train.json"


def main() -> None:
    arguments = parse()
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["sentence"] for line in lines]
    tokenizer = WordPieceTokenizer(build_vocabulary(texts))
    encodings = tokenizer.encode_batch(texts, max_length=arguments.max_length)
    token_ids = [encoding.token_ids for encoding in encodings]
    labels = np.zeros(len(token_ids), "int32")
    options = {"batch_size": arguments.batch_size, "seed": 0}
    bucketed = BucketedBatches(token_ids, labels, **options)
    padded = BucketedBatches(token_ids, labels, lengths=[arguments.max_length], **options)
    model = build_model(len(tokenizer.vocabulary), arguments)
    batches, first = {}, {}
    for dataset in (bucketed, padded):
        for index in range(len(dataset)):
            batch = dataset[index]
            batches.setdefault(batch[0][0].shape[1], batch)
    for length, batch in sorted(batches.items()):
        first[length] = seconds(model, batch)
    steps = {length: [] for length in batches}
    for _ in range(arguments.repeats):
        for length, batch in batches.items():
            steps[length].append(seconds(model, batch))
    median = {length: statistics.median(times) for length, times in steps.items()}
    report(bucketed, padded, median, first)


def build_model(vocabulary_size: int, arguments: argparse.Namespace) -> keras.Model:
    """A BERT with a classifier on [CLS], compiled as in examples/clue."""
    encoder = build_transformer_model(
        {
            "vocab_size": vocabulary_size,
            "hidden_size": arguments.hidden,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": max(1, arguments.hidden // 64),
            "intermediate_size": 4 * arguments.hidden,
            "max_position_embeddings": arguments.max_length,
        }
    )
    model = keras.Model(encoder.inputs, keras.layers.Dense(15)(encoder.output[:, 0]))
    model.compile(
        AccumOptimizer(keras.optimizers.AdamW(1e-4), 1),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        jit_compile=keras.backend.backend() == "jax",
    )
    return model


def seconds(model: keras.Model, batch: tuple) -> float:
    """CPU seconds of one training step."""
    start = time.process_time()
    model.train_on_batch(*batch)
    return time.process_time() - start


def report(
    bucketed: BucketedBatches, padded: BucketedBatches, median: dict, first: dict
) -> None:
    """Print the steps of every length, and examples per second over an epoch."""
    print(f"{keras.backend.backend()}, Keras {keras.__version__}, one core, CPU time")
    rates = {}
    for name, dataset in (("bucketed", bucketed), ("padded", padded)):
        counts = Counter(dataset[index][0][0].shape[1] for index in range(len(dataset)))
        total = sum(count * median[length] for length, count in counts.items())
        rates[name] = len(dataset.token_ids) / total
        print(f"{name}: {rates[name]:,.0f} examples/s")
        for length, count in sorted(counts.items()):
            figures = f"step {median[length]:.4f} s, first call {first[length]:.1f} s"
            print(f"  length {length:4}: {count:5} batches, {figures}")
    print(f"ratio: {rates['bucketed'] / rates['padded']:.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a TNEWS train.json")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
