"""Compress a Transformer on TNEWS: BERT-of-Theseus against fine-tuning and distillation.

    python examples/theseus.py --data path/to/tnews --seeds 3

The full model, an encoder from scratch, is trained first. Three models of half of its blocks
then start from the same weights, its first half with its embeddings and classifier, and see the
same examples equally often:

    first half      the task's loss alone
    distillation    also the logits of the full model: (1 - a) CE + a T² KL, with a = 0.5, T = 2
    Theseus         half of the epochs in the place of the full model's blocks, with the
                    replacement rate rising linearly from 0.3 to 1; then alone

Accuracy is that of the last epoch on dev, so nothing is selected on it. Seconds are those of
`fit`, compilation included; those of the full model, which all of them need, come on top.
Without --data the bundled sample is used, which only shows that everything runs.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "examples" / "clue")]

from run import SAMPLE, select_backend

select_backend(os.environ.get("KERAS_BACKEND", "tensorflow"))

import classification
import encoder
import finetune
import keras
import numpy as np
import tnews
from data import TaskData
from keras import ops
from settings import Settings, resolve

from keras_ext.text import BucketedBatches
from keras_ext.training import LinearReplacement, build_theseus_model, extract_successor

START, TEMPERATURE, SOFT = 0.3, 2.0, 0.5


def main() -> None:
    arguments = parse()
    data = subset(tnews.load(arguments.data), arguments.examples)
    given = {name: getattr(arguments, name) for name in ("layers", "hidden", "epochs")}
    settings = resolve("tnews", "scratch", given)
    compress = dataclasses.replace(
        settings, epochs=arguments.compress_epochs, learning_rate=arguments.learning_rate
    )
    print(
        f"{len(data.train)} training and {len(data.dev)} dev examples, "
        f"{keras.backend.backend()}, Keras {keras.__version__}"
    )
    results: dict[str, list[tuple]] = {}
    for seed in range(arguments.seeds):
        for name, *figures in experiment(data, settings, compress, seed):
            print(f"seed {seed}  {name:13} {figures[1]:.2%}  {figures[2]:.0f} s", flush=True)
            results.setdefault(name, []).append(figures)
    print("\n| model | weights | dev accuracy | by seed | training |\n|---|---|---|---|---|")
    for name, figures in results.items():
        sizes, accuracies, seconds = zip(*figures, strict=True)
        by_seed = ", ".join(f"{100 * accuracy:.2f}" for accuracy in accuracies)
        mean, time_taken = statistics.mean(accuracies), statistics.mean(seconds)
        print(f"| {name} | {sizes[0]:,} | {mean:.2%} | {by_seed} | {time_taken:.0f} s |")


def experiment(
    data: TaskData, settings: Settings, compress: Settings, seed: int
) -> Iterator[tuple[str, int, float, float]]:
    """(model, weights, dev accuracy, training seconds) of the full model and its successors."""
    keras.utils.set_random_seed(seed)
    scratch = {"model": None, "family": None, "vocab": None, "cased": False}
    tokenizer, trunk = encoder.build(scratch, settings, data)
    rows = [classification.encode(tokenizer, part, data, settings) for part in data.splits]
    batches, dev = finetune.make_batches(rows, settings, seed)

    def result(name: str, model: keras.Model, seconds: float) -> tuple:
        logits = finetune.predict(model, dev)
        return (
            name,
            model.count_params(),
            classification.score(logits, data.dev, rows[1])["accuracy"],
            seconds,
        )

    full = keras.Model(*classification.build_model(trunk, data, settings))
    yield result("full", full, train(full, batches, settings))

    half = extract_successor(build_theseus_model(full))
    yield result("first half", half, train(half, batches, compress))

    half = extract_successor(build_theseus_model(full))
    with_logits = add_logits(batches, full)
    yield result("distillation", half, train(half, with_logits, compress, Distillation()))

    first = dataclasses.replace(compress, epochs=compress.epochs // 2)
    second = dataclasses.replace(compress, epochs=compress.epochs - first.epochs)
    student = build_theseus_model(full)
    rise = LinearReplacement(slope=(1 - START) / (first.epochs * len(batches)), start=START)
    seconds = train(student, batches, first, None, rise)
    half = extract_successor(student)
    yield result("Theseus", half, seconds + train(half, batches, second))


def train(
    model: keras.Model,
    batches: BucketedBatches,
    settings: Settings,
    loss: keras.losses.Loss | None = None,
    *callbacks: keras.callbacks.Callback,
) -> float:
    """Compile and fit as in examples/clue; the seconds it took."""
    model.compile(
        finetune.make_optimizer(settings, len(batches)),
        loss or classification.compile_arguments(settings)["loss"],
        jit_compile=finetune.resolve_jit("auto"),
    )
    order = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, logs: batches.set_epoch(e))
    start = time.perf_counter()
    model.fit(
        batches,
        epochs=settings.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[order, *callbacks],
    )
    return time.perf_counter() - start


class Distillation(keras.losses.Loss):
    """(1 - a) CE(labels, s) + a T² KL(softmax(t / T), softmax(s / T)), up to a constant.

    Targets are one-hot labels and, beside them, the teacher's logits t.
    """

    def __init__(self) -> None:
        super().__init__(reduction="mean_with_sample_weight")

    def call(self, y_true, y_pred):
        labels, teacher = ops.split(y_true, 2, axis=-1)  # (batch, classes) each
        hard = ops.categorical_crossentropy(labels, y_pred, from_logits=True)
        soft = ops.categorical_crossentropy(
            ops.softmax(teacher / TEMPERATURE), y_pred / TEMPERATURE, from_logits=True
        )
        return (1 - SOFT) * hard + SOFT * TEMPERATURE**2 * soft


def add_logits(batches: BucketedBatches, teacher: keras.Model) -> BucketedBatches:
    """The same batches with the teacher's logits beside the labels."""
    options = {"lengths": batches.lengths, "batch_size": batches.batch_size}
    logits = finetune.predict(teacher, BucketedBatches(batches.token_ids, **options))
    targets = np.concatenate([batches.labels, logits], axis=1)
    return BucketedBatches(batches.token_ids, targets, seed=batches.seed, **options)


def subset(data: TaskData, examples: int) -> TaskData:
    """The first training examples of the file (it is not sorted), all of dev, no tests."""
    train = data.train
    train = dataclasses.replace(
        train, inputs=train.inputs[:examples], answers=train.answers[:examples]
    )
    return dataclasses.replace(data, train=train, tests={})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=SAMPLE / "tnews", help="directory of TNEWS")
    add("--seeds", type=int, default=3)
    add("--examples", type=int, default=12000, help="training examples used")
    add("--layers", type=int, default=4, help="blocks of the full model, an even number")
    add("--hidden", type=int, default=64, help="width, a multiple of 64")
    add("--epochs", type=int, default=4, help="of the full model")
    add("--compress-epochs", type=int, default=4, help="of each smaller model")
    add("--learning-rate", type=float, default=5e-4, help="of the smaller models, at its peak")
    return parser.parse_args()


if __name__ == "__main__":
    main()
