"""Train on 128 characters, read 1,024: what attention makes of lengths it has never seen.

    python examples/extrapolation.py --text path/to/corpus.txt

Small decoders, one for each method, learn to predict the next character of running text in
pieces of 128. All see the same pieces in the same order, from the same seed. Then they read
held-out text in pieces of 128 to 1,024 characters, none of it repeated:

    RoPE       rotary positions, the baseline
    log-n      and scores times log_128(n) for the n-th character
    KeyNorm    RoPE, keys of length 1, scores not divided by √d
    CosA       RoPE, cosines times 4 ln(128/2) for scores
    HWFA       windows with RoPE, the last layer without positions, and log-n
    ReRoPE     the baseline, not trained again: at inference distances beyond 32 count as 32

Prints how often the next character is right at each length, mean over all of the text, then the
loss in nats, each the mean over the seeds, and draws both.

Method and order to compare with: kexue.fm/archives/9603 and 9859 (24 layers, trained on 512
tokens): baseline 23.2 % and log-n 24.0 % of the tokens at 8 times the length, KeyNorm 47.7,
CosA 47.0, ReRoPE 47.8, HWFA 48.2; all 48.7 to 49.7 % at the length of training.
"""

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_ext.layers import (
    FeedForward,
    MultiHeadAttention,
    ReRoPE,
    RotaryPosition,
    TokenEmbedding,
    TransformerBlock,
    hwfa_layers,
)
from keras_ext.models import replace_attention
from keras_ext.optimizers.schedules import PiecewiseLinear

TRAINED, LENGTHS = 128, (128, 256, 512, 1024)
HEADS, BATCH, UNKNOWN = 4, 32, 0
RATE, WARMUP = 2e-3, 0.1
EVALUATED = 8192  # characters at a time


def kinds(num_layers: int) -> dict[str, list[dict[str, Any]]]:
    """Arguments of the attention of each layer, by method."""

    def alike(**arguments: Any) -> list[dict[str, Any]]:
        return [
            {"causal": True, "position": RotaryPosition(), **arguments}
            for _ in range(num_layers)
        ]

    return {
        "RoPE": alike(),
        "log-n": alike(log_length=TRAINED),
        "KeyNorm": alike(key_norm=True),
        "CosA": alike(query_norm=True, key_norm=True, scale=4 * np.log(TRAINED / 2)),
        "HWFA": hwfa_layers(num_layers, TRAINED),
    }


def main() -> None:
    arguments = parse()
    train, test, vocabulary = read(arguments.text, arguments.characters)
    print(f"{len(train):,} characters to train on, {len(test):,} to read", flush=True)
    results = defaultdict(list)
    for seed in range(arguments.seeds):
        for name, scores in compare(train, test, vocabulary, seed, arguments):
            results[name].append(scores)
            print(f"seed {seed}, {name}:", *(f"{a:.2%}/{n:.3f}" for a, n in scores), flush=True)
    means = {name: np.mean(scores, axis=0) for name, scores in results.items()}
    for i, title in enumerate(("right", "nats")):
        print(f"\n| {title} |", " | ".join(map(str, LENGTHS)), "|")
        print("|---" * (1 + len(LENGTHS)) + "|")
        for name, scores in means.items():
            cells = (f"{100 * x:.1f} %" if i == 0 else f"{x:.3f}" for x in scores[:, i])
            print(f"| {name} |", " | ".join(cells), "|")
    draw(means, arguments.plot)
    print(f"\nplot: {arguments.plot}")


def read(path: Path, characters: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Training text and the last tenth as numbers, and how many there are; 0 is unknown."""
    try:
        text = "".join(path.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--text {path} cannot be read as UTF-8: {error}")
    cut = len(text) - len(text) // 10
    if len(text) - cut <= max(LENGTHS):
        fail(f"--text {path} has {len(text):,} characters: give at least {11 * max(LENGTHS):,}")
    common = Counter(text[:cut]).most_common(characters - 1)
    numbers = {character: i for i, (character, _) in enumerate(common, start=UNKNOWN + 1)}
    encoded = np.array([numbers.get(c, UNKNOWN) for c in text], "int32")
    return encoded[:cut], encoded[cut:], len(common) + 1


def compare(
    train: np.ndarray, test: np.ndarray, vocabulary: int, seed: int, arguments: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Train and evaluate with each method; its name and scores (lengths, 2)."""
    starts = np.random.default_rng(seed).integers(
        0, len(train) - TRAINED, arguments.steps * BATCH
    )
    pieces = train[starts[:, None] + np.arange(TRAINED + 1)]
    for name, layers in kinds(arguments.layers).items():
        keras.utils.set_random_seed(seed)
        model = decoder(vocabulary, arguments.width, layers)
        prepare(model, arguments.steps)
        start = time.perf_counter()
        model.fit(pieces[:, :-1], pieces[:, 1:], BATCH, shuffle=False, verbose=0)
        print(f"{time.perf_counter() - start:.0f} s", end="; ")
        yield name, evaluate(model, test)
        if name == "RoPE":
            rectified = replace_attention(model, with_rerope)
            prepare(rectified, arguments.steps)
            yield "ReRoPE", evaluate(rectified, test)


def decoder(vocabulary: int, width: int, layers: list[dict[str, Any]]) -> keras.Model:
    """Token ids (batch, length) -> logits of the next one (batch, length, vocabulary)."""
    inputs = keras.Input((None,), dtype="int32")
    embedding = TokenEmbedding(vocabulary, width, name="token_embedding")
    hidden = keras.layers.LayerNormalization(name="token_norm")(embedding(inputs))
    for i, arguments in enumerate(layers):
        hidden = TransformerBlock(
            MultiHeadAttention(HEADS, width // HEADS, **arguments),
            FeedForward(4 * width),
            name=f"encoder_{i}",
        )(hidden)
    return keras.Model(inputs, embedding(hidden, reverse=True))


def with_rerope(old: MultiHeadAttention) -> MultiHeadAttention:
    position = ReRoPE(window=TRAINED // 4)
    return MultiHeadAttention(old.num_heads, old.key_dim, causal=True, position=position)


def prepare(model: keras.Model, steps: int) -> None:
    warmup = max(1, int(WARMUP * steps))
    rate = PiecewiseLinear({0: 0, warmup: 1, steps: 0}, RATE)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=keras.backend.backend() == "jax",  # on a CPU, XLA slows TensorFlow down
    )


def evaluate(model: keras.Model, test: np.ndarray) -> np.ndarray:
    """Share of right characters and mean loss at each length, (lengths, 2)."""
    test = test[: (len(test) - 1) // max(LENGTHS) * max(LENGTHS) + 1]  # the same at all lengths
    scores = []
    for length in LENGTHS:
        x, y = (part.reshape(-1, length) for part in (test[:-1], test[1:]))
        loss, right = model.evaluate(x, y, EVALUATED // length, verbose=0)
        scores.append((right, loss))
    return np.array(scores)


def draw(means: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for i, (axes, title) in enumerate(
        zip(figure.subplots(1, 2), ("next character right", "loss in nats"), strict=True)
    ):
        for name, scores in means.items():
            axes.plot(LENGTHS, scores[:, i], "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(LENGTHS, map(str, LENGTHS))
        axes.set_xlabel("length; trained on 128")
        axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: fail(f"{message} (see extrapolation.py --help)")
    add = parser.add_argument
    add("--text", type=Path, required=True, help="running text, UTF-8")
    add("--seeds", type=int, default=3, help="number of initial weights and orders of the text")
    add("--steps", type=int, default=800, help=f"updates, each on {BATCH} pieces")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=128)
    add("--characters", type=int, default=2000, help="the most common ones; others are unknown")
    add("--plot", type=Path, default=Path("extrapolation.png"), help="where to draw")
    arguments = parser.parse_args()
    for name in ("seeds", "steps", "layers", "width", "characters"):
        if not getattr(arguments, name) > 0:
            fail(f"{name} must be positive, got {getattr(arguments, name)}")
    if arguments.width % (2 * HEADS):
        fail(f"width must be a multiple of {2 * HEADS}, got {arguments.width}")
    return arguments


def fail(message: str) -> NoReturn:
    """End with status 2 and one line, for what the user can mend."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
