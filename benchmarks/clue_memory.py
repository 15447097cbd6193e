"""Peak memory of fine-tuning a BERT of base size with the default settings of every CLUE task.

    python benchmarks/clue_memory.py --data path/to/clue

The longest training examples of each task, two batches of them, one update of the optimizer
(more than two batches an update need no more memory). Prints the peak of the resident memory
of the process, in GiB: Python, TensorFlow and the data included. `--data` holds the
directories of the tasks; one whose training file is absent is left out.
"""

import argparse
import dataclasses
import importlib
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "clue")]

from data import Split
from errors import UserError
from measure import report, take_turns
from run import select_backend
from settings import TASKS, resolve

BASE = {
    "vocab_size": 21128,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
BATCHES = 2


def main() -> None:
    arguments = parse()
    cases = {
        task: (None, arguments.backend, ["--data", str(arguments.data), "--case", task])
        for task in arguments.tasks
        if (arguments.data / task).is_dir()
    }
    figures = take_turns(__file__, cases, rounds=1)
    print("| task | rows of a batch x tokens | batches an update | GiB |\n|---|---|---|---|")
    for task, case in figures.items():
        if case:
            print(f"| {task} | {case['shape']} | {case['accum']} | {case['gib']:.1f} |")


def measure(task: str, directory: Path, backend: str) -> None:
    select_backend(backend)
    import finetune
    import keras

    from keras_ext.models import build_transformer_model
    from keras_ext.text import WordPieceTokenizer, build_vocabulary

    settings = resolve(task, "pretrained", {})
    fast = dataclasses.replace(settings, epochs=1, accum=min(settings.accum, BATCHES))
    module = importlib.import_module(task)
    data = module.load(directory)
    head = importlib.import_module(module.HEAD.format(head=settings.head))
    tokens = build_vocabulary(data.train.texts())[: BASE["vocab_size"]]
    tokenizer = WordPieceTokenizer(tokens)
    # A head may ask whether a split is the one to train on.
    data = dataclasses.replace(data, train=longest(data.train, 4 * settings.batch_size))
    rows = head.encode(tokenizer, data.train, data, settings)
    train = finetune.make_batches([rows, rows], fast, seed=0)[0]
    longest_first = sorted(range(len(train)), key=lambda i: -train[i][0][0].size)

    class Longest(keras.utils.PyDataset):
        def __len__(self):
            return BATCHES

        def __getitem__(self, index):
            return train[longest_first[index]]

    jit = finetune.resolve_jit("auto")
    inputs, outputs = head.build_model(build_transformer_model(BASE), data, settings)
    model = finetune.compiled_model(inputs, outputs, head, fast, BATCHES, jit)
    model.fit(Longest(), shuffle=False, verbose=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    *sizes, length = train[longest_first[0]][0][0].shape
    report(
        gib=peak / 2 ** (30 if sys.platform == "darwin" else 20),
        shape=" x ".join(map(str, (*sizes, length))),
        accum=settings.accum,
    )


def longest(split: Split, count: int) -> Split:
    """The examples with the most characters."""
    sizes = [sum(map(len, Split([example]).texts())) for example in split.inputs]
    order = sorted(range(len(split)), key=lambda i: -sizes[i])[:count]
    return Split([split.inputs[i] for i in order], [split.answers[i] for i in order])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory that holds tnews/, afqmc/ ...")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    add("--case", choices=TASKS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    if not arguments.case:
        main()
    else:
        try:
            measure(arguments.case, arguments.data / arguments.case, arguments.backend)
        except UserError as error:
            sys.exit(f"{error}")
