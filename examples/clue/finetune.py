"""Train a task, keep the best epoch, write its submission files."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import encoder
import keras
import numpy as np
import theseus_compression
from data import Rows, TaskData
from progress import EpochProgress
from record import Record, weights_only
from rich.console import Console
from run_directory import RunDirectory, replacing
from schedule import WarmupDecay
from settings import Settings

from keras_ext.optimizers import (
    AccumOptimizer,
    ClipOptimizer,
    EMAOptimizer,
    RelativeAdafactor,
)
from keras_ext.text import BucketedBatches, choose_lengths, row_sizes
from keras_ext.training import with_objective

OPTIMIZERS = {
    "adamw": keras.optimizers.AdamW,
    "adafactor": keras.optimizers.Adafactor,
    # Not factored, with momentum: as the reference code has it.
    "relative_adafactor": partial(RelativeAdafactor, beta_1=0.9, min_dim_size_to_factor=10**6),
    "lamb": keras.optimizers.Lamb,
    "lion": keras.optimizers.Lion,
}


def finetune(
    task, config: dict[str, Any], settings: Settings, data: TaskData, run: RunDirectory
) -> None:
    """Train, or go on training, and write all results.

    Args:
        task: the module of the task.
        config: the model, the vocabulary, the seed and `jit_compile`.
        settings: how to train.
        data: the files of the task.
        run: the directory to write to, which may hold a state to continue from.
    """
    keras.utils.clear_session()  # one process may run several tasks
    keras.utils.set_random_seed(config["seed"])
    head = importlib.import_module(task.HEAD.format(head=settings.head))
    tokenizer, trunk = encoder.build(config, settings, data)
    rows = [head.encode(tokenizer, split, data, settings) for split in data.splits]
    run.create(tokenizer.vocabulary)
    train, dev, *tests = make_batches(rows, settings, config["seed"])
    jit_compile = resolve_jit(config["jit_compile"])
    if config["theseus"]:
        teacher = Path(config["theseus"])
        trunk, inputs, outputs = theseus_compression.training_model(
            trunk, head, data, settings, teacher
        )
    else:
        inputs, outputs = head.build_model(trunk, data, settings)
    model = compiled_model(inputs, outputs, head, settings, len(train), jit_compile)

    def evaluate(model: keras.Model) -> dict[str, float]:
        return head.score(predict(model, dev, head.decode), data.dev, rows[1])

    record = Record(run, head.METRIC, evaluate, averaged=settings.ema > 0)
    updates = settings.epochs * len(train) // settings.accum
    replacement = [theseus_compression.schedule(updates)] if config["theseus"] else []
    train_model(model, train, settings, record, *replacement)
    weights_only(model).load_weights(run / "best.weights.h5")
    if config["theseus"]:
        small = theseus_compression.successor(model, trunk, head, data, settings)
        with replacing(run / "successor.weights.h5") as partial:
            small.save_weights(partial)
    for name, batches, row in zip(data.tests, tests, rows[2:], strict=True):
        outputs = predict(model, batches, head.decode)
        answers = head.predictions(outputs, data.tests[name], row, data)
        run.write_text(name, task.FORMAT.write(data.tests[name], answers))
    run.write_json("result.json", {"metric": head.METRIC, **record.best})


def compiled_model(
    inputs: list,
    outputs: keras.KerasTensor,
    head,
    settings: Settings,
    batches: int,
    jit_compile: bool,
) -> keras.Model:
    """The model as it is trained, in `batches` batches an epoch."""
    # Micro-batches weigh by their real rows: the last one of an epoch has fewer.
    model = with_objective(keras.Model(inputs, outputs), [])
    model.compile(
        make_optimizer(settings, batches),
        jit_compile=jit_compile,
        **head.compile_arguments(settings),
    )
    return model


def train_model(
    model: keras.Model,
    train: BucketedBatches,
    settings: Settings,
    record: Record,
    *callbacks: keras.callbacks.Callback,
) -> None:
    """`fit`, from where the record's state stands."""
    model.optimizer.build(model.trainable_variables)
    record.restore(model)
    console, done = Console(), len(record.history)
    console.print(
        f"{model.count_params():,} weights, {len(train.token_ids):,} examples, "
        f"{len(train)} batches an epoch of lengths {', '.join(map(str, train.lengths))}"
        + (f", continuing after epoch {done}" if done else ""),
        highlight=False,
        soft_wrap=True,
    )
    if done == settings.epochs:
        return

    def start_epoch(epoch: int, logs: dict | None = None) -> None:
        train.set_epoch(epoch)
        if keras.backend.backend() == "torch":  # its dropout has no state but the global one
            keras.utils.set_random_seed(train.seed + epoch)

    order = keras.callbacks.LambdaCallback(on_epoch_begin=start_epoch)
    examples = len(train.token_ids)
    with EpochProgress(console, settings.epochs, examples, record) as progress:
        model.fit(
            train,
            epochs=settings.epochs,
            initial_epoch=done,
            shuffle=False,  # the batches come shuffled, by seed and epoch
            verbose=0,
            callbacks=[order, *callbacks, record, progress],
        )


def make_batches(rows: list[Rows], settings: Settings, seed: int) -> list[BucketedBatches]:
    """Shuffled train, dev, and every test, all of the same few lengths."""
    lengths = choose_lengths([n for split in rows for n in row_sizes(split.token_ids)])
    # Rounded up, the last one may be longer than the model's positions.
    lengths = [min(length, settings.max_length) for length in lengths]
    common = {"batch_size": settings.batch_size, "lengths": lengths}
    train, *others = rows
    train = BucketedBatches(train.token_ids, train.targets, seed=seed, **common)
    return [train, *(BucketedBatches(split.token_ids, **common) for split in others)]


def make_optimizer(settings: Settings, batches: int) -> keras.optimizers.Optimizer:
    """The optimizer and schedule for `batches` batches an epoch."""
    updates = settings.epochs * batches // settings.accum
    rate = WarmupDecay(
        settings.learning_rate,
        total=updates,
        warmup=int(settings.warmup * updates),
        kind=settings.schedule,
    )
    optimizer = OPTIMIZERS[settings.optimizer](rate, weight_decay=settings.weight_decay or None)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    if settings.clip:
        optimizer = ClipOptimizer(optimizer, settings.clip)
    if settings.ema:
        optimizer = EMAOptimizer(optimizer, settings.ema)
    # Also for one batch an update: on TensorFlow it gives Adam the right gradient of tokens
    # that occur more than once. What is left over at the end is not used: the weights that
    # count were saved before.
    return AccumOptimizer(optimizer, settings.accum, remainder="drop")


def predict(
    model: keras.Model, batches: BucketedBatches, decode: Callable | None = None
) -> np.ndarray | list:
    """Outputs in the order of the file, without padded rows.

    Args:
        decode: outputs of a batch -> one object a row, where outputs are too large to be kept
            or differ in shape by length.
    """
    if decode is None:
        return batches.restore(model.predict(batches, verbose=0))
    every = (batches[index][0] for index in range(len(batches)))
    return batches.restore([row for x in every for row in decode(model.predict_on_batch(x))])


def resolve_jit(choice: str) -> bool:
    """Whether to compile by XLA. "auto": on JAX, and on TensorFlow where there is a GPU.

    On a CPU TensorFlow's own graph is as fast, and compiles in seconds where XLA takes
    minutes for five lengths. (Keras's "auto" asks for XLA there.)
    """
    if choice != "auto":
        return choice == "on"
    if keras.backend.backend() == "tensorflow":
        return bool(keras.distribution.list_devices("gpu"))
    return keras.backend.backend() == "jax"
