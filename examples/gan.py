"""GANs on MNIST digits and on a mixture of eight points: one loss against two, loss by loss.

    python examples/gan.py --data path/to/mnist                # both problems, the whole table
    python examples/gan.py --data path/to/mnist --runs hinge   # some of the losses
    python examples/gan.py --problem mixture                   # needs no data

Each loss trains the same networks twice for the same number of updates: alternating, by an
ordinary training step, and with one loss, by `compile` and `fit`. Pictures of every epoch and
the table go to --output. Runs on TensorFlow, for which the ordinary step is written.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from gan_alternating import AlternatingGAN
from gan_networks import digit_networks, mixture_networks, read_digits, read_mixture
from gan_scores import FID, draw, modes

from keras_ext.losses.gan import GANQP, GANLoss, Hinge, NonSaturating, Relativistic, Wasserstein
from keras_ext.optimizers import MultiplierOptimizer
from keras_ext.training.critic_penalty import CriticPenalty
from keras_ext.training.gan import SingleLossGAN


class Run(NamedTuple):
    """A loss, and what bounds the slope of the discriminator."""

    loss: GANLoss
    critic: str = "plain"  # or "sn", "gn", "gran"
    penalised: bool = False  # by a gradient penalty


RUNS = {
    "hinge": Run(Hinge()),
    "hinge+sn": Run(Hinge(), "sn"),
    "non_saturating": Run(NonSaturating()),
    "relativistic": Run(Relativistic()),
    "wgan+gp": Run(Wasserstein(), penalised=True),
    "wgan+gn": Run(Wasserstein(), "gn"),
    "wgan+gran": Run(Wasserstein(), "gran"),
    "gan_qp": Run(GANQP()),
}


class Problem(NamedTuple):
    """Data, networks for it, and how to judge samples: heading -> text, from the samples."""

    name: str
    data: np.ndarray
    networks: Callable[[str], tuple[keras.Model, keras.Model]]
    judge: Callable[[np.ndarray], dict[str, str]]
    batch_size: int
    epochs: int
    learning_rate: float
    generator_rate: float  # relative to it
    penalty: float  # weight, that of Gulrajani et al.: 10 for images, 0.1 for points
    samples: int


def main() -> None:
    arguments = parse()
    rows = []
    for problem in problems(arguments):
        for name in arguments.runs:
            for way in ("alternating", "one loss"):
                rows.append(train(problem, name, way, arguments))
                print(json.dumps(rows[-1]), flush=True)
        text = table([row for row in rows if row["problem"] == problem.name])
        print(text)
        (arguments.output / f"{problem.name}.md").write_text(text + "\n", encoding="utf-8")


def problems(arguments: argparse.Namespace) -> list[Problem]:
    chosen = []
    if arguments.problem in ("digits", "both"):
        images, labels = read_digits(arguments.data)
        fid = FID(images, labels)
        print(
            f"{len(images)} digits; classifier {fid.accuracy:.1%} on them; FID of one half of "
            f"them to the other {fid.floor:.2f}"
        )
        epochs = arguments.epochs or 10
        chosen.append(
            Problem(
                "digits",
                images,
                digit_networks,
                lambda samples: {"FID": f"{fid(samples):.1f}"},
                batch_size=32,
                epochs=epochs,
                learning_rate=1e-3,
                generator_rate=1.0,
                penalty=10.0,
                samples=5000,
            )
        )
    if arguments.problem in ("mixture", "both"):
        epochs = arguments.epochs or 20

        def judge(samples):
            count, share = modes(samples)
            return {"modes of 8": str(count), "points at a mode": f"{share:.0%}"}

        chosen.append(
            Problem(
                "mixture",
                read_mixture(),
                mixture_networks,
                judge,
                batch_size=256,
                epochs=epochs,
                learning_rate=1e-3,
                generator_rate=0.5,
                penalty=0.1,
                samples=2500,
            )
        )
    return chosen


def train(problem: Problem, name: str, way: str, arguments: argparse.Namespace) -> dict:
    """One training; returns a row of the table."""
    keras.utils.set_random_seed(arguments.seed)
    run = RUNS[name]
    networks = problem.networks(run.critic)
    penalty = CriticPenalty(problem.penalty) if run.penalised else None

    def adam(factor=1.0):
        return keras.optimizers.Adam(factor * problem.learning_rate, beta_1=0.5)

    if way == "one loss":
        gan = SingleLossGAN(*networks, run.loss, penalty, seed=arguments.seed)
        pace = {gan.generator: problem.generator_rate}
        gan.compile(optimizer=MultiplierOptimizer(adam(), pace), jit_compile=False)
    else:
        gan = AlternatingGAN(*networks, run.loss, penalty, seed=arguments.seed)
        gan.compile(adam(), adam(problem.generator_rate), jit_compile=False)
    folder = arguments.output / problem.name / name / way.replace(" ", "_")
    seconds = 0.0
    for epoch in range(1, problem.epochs + 1):
        start = time.perf_counter()
        gan.fit(problem.data, batch_size=problem.batch_size, verbose=0)
        seconds += (time.perf_counter() - start) * (epoch > 1)  # the first one compiles
        samples = gan.generate(100 if problem.data.ndim == 4 else 1000)
        draw(samples, folder / f"epoch_{epoch:02}.png")
    steps = -(-len(problem.data) // problem.batch_size) * max(1, problem.epochs - 1)
    row = {"problem": problem.name, "loss": name, "way": way}
    row |= problem.judge(gan.generate(problem.samples))
    return row | {"ms a step": f"{1e3 * seconds / steps:.1f}"}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each loss, both ways side by side."""
    figures = [key for key in rows[0] if key not in ("problem", "loss", "way")]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = ["| loss | " + " | ".join(f"{f}, {way}" for f in figures for way in ways) + " |"]
    lines.append("|---|" + "---|" * len(figures) * len(ways))
    for loss in dict.fromkeys(row["loss"] for row in rows):
        cells = [row[figure] for figure in figures for row in rows if row["loss"] == loss]
        lines.append(f"| {loss} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder with the files of MNIST")
    parser.add_argument("--problem", choices=("digits", "mixture", "both"), default="both")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--epochs", type=int, help="default: 10 for digits, 20 for the mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/gan"))
    arguments = parser.parse_args()
    if arguments.data is None and arguments.problem != "mixture":
        parser.error("--data must name a folder with MNIST files; or use --problem mixture.")
    return arguments


if __name__ == "__main__":
    main()
