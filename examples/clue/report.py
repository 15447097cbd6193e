"""One table of all finished runs beside published scores, with a picture.

    python examples/clue/report.py runs --output report

Writes report.md and report.png: a row for every configuration, mean and deviation where it ran
with several seeds, a column a task; dev scores in percent. Exit status: 0 done, 2 no finished
run found.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from command_line import Parser, exit_status
from errors import UserError
from matplotlib.figure import Figure
from published import DEV
from published import TASKS as PUBLISHED_TASKS
from run_directory import read_config, replacing
from settings import TASKS

Row = dict[str, list[float]]  # task -> scores in percent, one a seed


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("report"), help="without a suffix")

    def work() -> None:
        arguments = parser.parse_args(argv)
        ours = collect(arguments.folder)
        if not ours:
            raise UserError(f"{arguments.folder} holds no finished run: run run.py first")
        rows = ours | {
            name: {
                task: [score]
                for task, score in zip(PUBLISHED_TASKS, scores, strict=True)
                if score is not None
            }
            for name, scores in DEV.items()
        }
        text = table(rows)
        print(text)
        with replacing(arguments.output.with_suffix(".md")) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
        with replacing(arguments.output.with_suffix(".png")) as partial:
            plot(rows, partial)

    return exit_status(work, resumable=False)


def collect(folder: Path) -> dict[str, Row]:
    """The finished runs below a folder, by what they started from."""
    rows: dict[str, Row] = defaultdict(lambda: defaultdict(list))
    for file in sorted(folder.rglob("result.json")):
        config = read_config(file.parent)
        if config is not None:
            result = json.loads(file.read_text(encoding="utf-8"))
            score = 100 * result[f"dev_{result['metric']}"]
            rows[model_name(config)][config["task"]].append(score)
    return rows


def model_name(config: dict[str, Any]) -> str:
    """What a run is compared by: the pretrained model, or the size from scratch."""
    family = f"{config['family']} " if config["family"] else ""
    name = f"{family}from scratch, {config['layers']}x{config['hidden']}"
    if config["model"] is not None:
        name = Path(config["model"]).name
    return f"{name}, half of its blocks" if config["theseus"] else name


def table(rows: dict[str, Row]) -> str:
    """Markdown: a line a model, a column a task; the number of runs where there are several."""
    lines = ["| dev, % | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(task)) for task in TASKS) + " |")
    return "\n".join(lines)


def cell(scores: list[float] | None) -> str:
    if not scores:
        return "-"
    if len(scores) == 1:
        return f"{scores[0]:.2f}"
    return (
        f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} ({len(scores)} runs)"
    )


def plot(rows: dict[str, Row], path: Path) -> None:
    """A PNG of bars: a group a task, a bar a model."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(rows)
    for number, (name, row) in enumerate(rows.items()):
        tasks = [task for task in TASKS if row.get(task)]
        places = [TASKS.index(task) + number * width for task in tasks]
        axes.bar(places, [statistics.mean(row[task]) for task in tasks], width, label=name)
    axes.set(ylabel="dev, %")
    axes.set_xticks([i + 0.4 for i in range(len(TASKS))], TASKS, rotation=20)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
