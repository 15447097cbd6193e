"""Train a language model: what mlm.py, lm.py and unilm.py do once the backend is chosen."""

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import keras
import numpy as np
from encoder import small_bert
from errors import UserError
from finetune import resolve_jit
from masking import MaskedText
from matplotlib.figure import Figure
from objectives import application, build_model, make_objective
from packing import import_segmenter, pack, read_lines
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from run_directory import RunDirectory, replacing
from schedule import WarmupDecay
from state import load_state, save_state

from keras_ext.models import save_transformer_model
from keras_ext.text import WordPieceTokenizer, build_vocabulary


def pretrain(config: dict[str, Any], run: RunDirectory) -> None:
    """Train, or go on training, and write all results.

    Args:
        config: the flags of the script.
        run: the directory to write to, which may hold a state to continue from.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(config["seed"])
    vocabulary, rows, starts = prepare(config, run)
    sizes = small_bert(
        len(vocabulary),
        config["layers"],
        config["hidden"],
        positions=config["length"],
        dropout=config["dropout"],
    ) | application(config["family"], config["task"])
    model = build_model(sizes, config["family"], config["task"])
    objective = make_objective(config["task"], vocabulary, model)
    train, held_out = split(rows, starts, objective, config)
    compile_model(model, config)
    history = load_state(run / "state.npz", model)
    console = Console()
    console.print(
        f"{model.count_params():,} weights, {len(train.rows):,} rows of {config['length']} "
        f"tokens, {config['steps'] * config['batch_size'] / len(train.rows):.1f} epochs"
        + (f", continuing after step {history[-1]['step']:,}" if history else ""),
        highlight=False,
        soft_wrap=True,
    )
    with step_bar(console, config["steps"]) as bar:
        first = history[-1]["step"] if history else 0
        for step in range(first, config["steps"], config["save_every"]):
            steps = range(step, min(step + config["save_every"], config["steps"]))
            history.append(train_steps(model, Batches(train, steps), held_out, bar))
            console.print(told(history[-1], config), highlight=False, soft_wrap=True)
            save_transformer_model(model, run / "model")
            save(model, history, run)
    run.write_json("result.json", history[-1])
    (run / "text.npz").unlink(missing_ok=True)


def prepare(
    config: dict[str, Any], run: RunDirectory
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Vocabulary, rows and starts of words: of the run, or made for it from the text."""
    if (run / "text.npz").exists():
        vocabulary = WordPieceTokenizer(run / "vocab.txt").vocabulary
        with np.load(run / "text.npz") as text:
            return vocabulary, text["rows"], text["starts"]
    # Only masks are of whole words.
    segment = import_segmenter() if config["task"] == "mlm" else (lambda text: [text])
    lines = read_lines(config["text"])
    began = time.perf_counter()
    try:
        tokens = config["vocab"] or build_vocabulary(lines)[: config["vocab_size"]]
        tokenizer = WordPieceTokenizer(tokens)
    except (OSError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if tokenizer.token_to_id("[MASK]") is None:
        raise UserError(f"{config['vocab']} lacks [MASK]: give another --vocab, or none")
    rows, starts = pack(lines, tokenizer, segment, config["length"])
    print(
        f"{sum(map(len, lines)):,} characters in {time.perf_counter() - began:.0f} s: "
        f"{np.count_nonzero(rows):,} tokens, {np.count_nonzero(starts):,} words"
    )
    run.create(tokenizer.vocabulary)
    (run / "model").mkdir(exist_ok=True)
    with replacing(run / "model" / "vocab.txt") as partial:
        partial.write_bytes((run / "vocab.txt").read_bytes())
    with replacing(run / "text.npz") as partial:
        np.savez(partial, rows=rows, starts=starts)
    return tokenizer.vocabulary, rows, starts


def split(
    rows: np.ndarray, starts: np.ndarray, objective: Any, config: dict[str, Any]
) -> tuple[MaskedText, tuple]:
    """What to train on, and batches to score with targets that stay the same.

    The latter are whole batches, so that the mean of their losses is that of all predictions.
    """
    size = config["batch_size"]
    rng = np.random.default_rng(config["seed"])
    order = rng.permutation(len(rows))
    count = max(1, round(config["held_out"] * len(rows) / size)) * size
    if len(rows) < count + size:
        raise UserError(
            f"the text fills {len(rows)} rows of {config['length']} tokens, {count} of them "
            "held out. The others are no batch: give more text, or a smaller --batch-size"
        )
    held_out, kept = np.sort(order[:count]), np.sort(order[count:])
    scored = objective(rows[held_out], starts[held_out], rng).batch()
    return MaskedText(rows[kept], starts[kept], objective, size, config["seed"]), scored


class Batches(keras.utils.PyDataset):
    """The batches of some steps."""

    def __init__(self, text: MaskedText, steps: range):
        super().__init__()
        self.text, self.steps = text, steps

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> tuple:
        return self.text.draw(self.steps[index]).batch()


def compile_model(model: keras.Model, config: dict[str, Any]) -> None:
    """AdamW, and the mean cross entropy over the real predictions."""
    rate = WarmupDecay(
        config["learning_rate"],
        total=config["steps"],
        warmup=int(config["warmup"] * config["steps"]),
        kind="linear",
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config["weight_decay"])
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=resolve_jit(config["jit_compile"]),
    )


def train_steps(
    model: keras.Model, batches: Batches, held_out: tuple, bar: Progress
) -> dict[str, Any]:
    """`fit` for some steps; the figures at their end."""
    steps = batches.steps

    def start(epoch: int, logs: dict | None = None) -> None:
        if keras.backend.backend() == "torch":  # its dropout has no state but the global one
            keras.utils.set_random_seed(batches.text.seed + steps.start)

    began = time.perf_counter()
    show = keras.callbacks.LambdaCallback(
        on_epoch_begin=start,
        on_train_batch_end=lambda batch, logs: bar.update(
            bar.task_ids[0], completed=steps[batch] + 1
        ),
    )
    logs = model.fit(batches, shuffle=False, verbose=0, callbacks=[show]).history
    seconds = time.perf_counter() - began
    inputs, targets, weights = held_out
    scores = model.evaluate(
        inputs,
        targets,
        sample_weight=weights,
        batch_size=batches.text.batch_size,
        verbose=0,
        return_dict=True,
    )
    return {
        "step": steps.stop,
        "seconds": round(seconds, 2),
        "steps_per_second": round(len(steps) / seconds, 3),
        **{name: logs[name][0] for name in ("loss", "accuracy")},
        **{f"held_out_{name}": scores[name] for name in ("loss", "accuracy")},
    }


def told(figures: dict[str, Any], config: dict[str, Any]) -> str:
    """The figures in words, with the speed and when the run is expected to end."""
    speed = figures["steps_per_second"]
    left = timedelta(seconds=round((config["steps"] - figures["step"]) / speed))
    tokens = speed * config["batch_size"] * config["length"]
    return (
        f"step {figures['step']:,}/{config['steps']:,}  loss {figures['loss']:.3f}  held out "
        f"{figures['held_out_loss']:.3f}, accuracy {figures['held_out_accuracy']:.2%}  "
        f"{1000 / speed:.0f} ms/step, {tokens:,.0f} tokens/s, "
        f"ends in {left} at {datetime.now() + left:%a %H:%M}"
    )


def save(model: keras.Model, history: list[dict[str, Any]], run: RunDirectory) -> None:
    """Write figures, curve, and last the state: whatever comes after it is written again."""
    run.write_text("metrics.jsonl", "".join(json.dumps(figures) + "\n" for figures in history))
    with replacing(run / "learning_curve.png") as partial:
        plot(history, partial)
    save_state(run / "state.npz", model, history)


def plot(history: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy by step, as a picture."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    steps = [figures["step"] for figures in history]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training text"), (f"held_out_{name}", "held out")):
            axes.plot(steps, [figures[key] for figures in history], label=label)
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def step_bar(console: Console, steps: int) -> Progress:
    """A bar that moves where there is a terminal."""
    bar = Progress(
        "step",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    bar.add_task("", total=steps)
    return bar
