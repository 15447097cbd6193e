"""Fine-tuning on CLUE, examples a second: our length buckets and a `transformers` Trainer.

    python benchmarks/clue_throughput.py --data path/to/clue
    python benchmarks/clue_throughput.py --data path/to/clue --layers 2 --hidden 128 --accuracy

`--data` holds tnews/ and ocnli/ with the official files; the peer needs
`pip install torch transformers accelerate`.

Ours is examples/clue: its encoder, its batches of at most five lengths, its optimizer, `fit`.
The Trainer pads every batch to its longest row (`DataCollatorWithPadding`), of rows in random
order, or grouped by length (`train_sampling_strategy="group_by_length"`, formerly
`group_by_length=True`). Both train the same BERT from scratch, the same head (mean over
tokens, dropout, dense) on the same examples, with a vocabulary of the training sentences,
AdamW (fused in PyTorch), linear warm-up and decay, and the settings that examples/clue has for
the task; the batch size is a flag.

An epoch is timed whole: batches made, forward, backward, update; not the tokenising. Every
length has been seen once before, in the warm-up, whose seconds include compilation. Prints, in
CPU time of one core, medians of several turns:

- examples a second of training, and the ratio of ours to each way of the Trainer;
- tokens an example after padding, beside those of no padding at all;
- seconds of the warm-up;
- rows tokenised a second, by `WordPieceTokenizer` and by `BertTokenizer`: TNEWS sentences,
  OCNLI pairs;
- GFLOP/s of a product of 2048 x 256 and 256 x 1024, to tell what the kernels can do;
- kernels and versions.

With `--accuracy` both train for `--epochs` epochs from the same weights, those of a new
`BertModel` as `save_pretrained` writes them and a head drawn once; printed are the loss on the
official dev before training, which is the same if the models are, and the accuracy after it.

On AMD processors the MKL of stock PyTorch avoids AVX-512, and AVX2 where there is no AVX-512,
while TensorFlow and JAX do not. Ratios to PyTorch are fair there only with a library that
defines `int mkl_serv_intel_cpu_true(void) { return 1; }`, given by `--preload`.

examples/clue has glibc keep freed memory (memory.py there), which saves much time. So has the
Trainer here, unless `--default-malloc` is given.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "clue")]

import numpy as np
from bert_step import imports, processor, tensorflow_kernels, versions
from measure import cpu_ms, pin_to_one_core, report, take_turns
from memory import keep_freed
from run import select_backend

TRAIN_FILES = {"tnews": "train.json", "ocnli": "train.50k.json"}
OURS = {"ours, TF graph": "tensorflow", "ours, JAX": "jax"}
PEERS = {"Trainer": "random", "Trainer, grouped": "group_by_length"}
HEAD_DROPOUT, DEV = 0.1, 2000  # rows of dev to tokenise


def main() -> None:
    arguments = parse()
    if not imports(arguments.transformers, ["torch", "transformers", "accelerate"]):
        sys.exit("pip install torch transformers accelerate, or give --transformers PYTHON")
    if arguments.preload:
        os.environ["LD_PRELOAD"] = str(arguments.preload.resolve())
    print(processor())
    turns = 1 if arguments.accuracy else arguments.turns
    with tempfile.TemporaryDirectory() as folder:
        for task in arguments.tasks:
            directory = Path(folder) / task
            options = json.dumps(prepare(arguments.data / task, directory, arguments))
            cases = {
                name: (
                    arguments.transformers if name in PEERS else None,
                    OURS.get(name, "torch"),
                    ["case", name, str(directory), options],
                )
                for name in (*OURS, *PEERS)
            }
            figures = in_turns(cases, turns, logs=Path(folder))
            print(
                f"\n{task}: {arguments.examples:,} examples, epochs: {arguments.epochs}, "
                f"batch {arguments.batch_size}, {arguments.layers} layers x {arguments.hidden}"
            )
            (print_accuracy if arguments.accuracy else print_throughput)(figures)


def in_turns(cases: dict, turns: int, logs: Path) -> dict:
    """As `take_turns`, of processes that live through all turns: they compile only once.

    A case prints its constant figures when it is ready, and then a line of further ones for
    every line that it reads. Its medians are returned; those of a failed case are left out.

    Args:
        logs: directory for what the cases write to standard error.
    """
    processes, seen = {}, {}
    for name, (python, backend, arguments) in cases.items():
        with (logs / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(
                [python or sys.executable, "-u", __file__, *arguments],
                env=os.environ | {"KERAS_BACKEND": backend},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        seen[name] = [next_figures(processes[name])]  # one after the other
    for _ in range(turns):
        for name, process in processes.items():
            if seen[name][-1]:
                print("go", file=process.stdin, flush=True)
                seen[name].append(next_figures(process))
    for name, process in processes.items():
        process.communicate()
        if process.returncode:
            text = (logs / f"{name}.log").read_text()
            print(f"{name} failed:\n{text[-2000:]}", file=sys.stderr)
    return {name: medians(runs) for name, runs in seen.items() if all(runs)}


def next_figures(process: subprocess.Popen) -> dict:
    """The next line of figures; none if the process has failed."""
    # A Trainer prints dicts, too, in single quotes.
    lines = (line for line in process.stdout if line.startswith('{"'))
    return json.loads(next(lines, "{}"))


def medians(runs: list[dict]) -> dict:
    constant, *turns = runs
    return constant | {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}


def print_throughput(figures: dict) -> None:
    print(
        f"{'case':18}{'examples/s':>11}{'tokens':>8}{'unpadded':>9}{'warm-up s':>11}"
        f"{'tokenised/s':>13}{'GFLOP/s':>9}  kernels; versions"
    )
    for name, case in figures.items():
        print(
            f"{name:18}{case['rate']:11.1f}{case['tokens']:8.1f}{case['unpadded']:9.1f}"
            f"{case['warm_up_s']:11.1f}{case['tokenised']:13,.0f}{case['gflops']:9.1f}"
            f"  {case['kernels']}; {case['versions']}"
        )
    for peer in PEERS.keys() & figures.keys():
        ratios = (
            f"{name.removeprefix('ours, ')} {figures[name]['rate'] / figures[peer]['rate']:.2f}"
            for name in OURS.keys() & figures.keys()
        )
        print(f"ours / {peer}: {', '.join(sorted(ratios))}")


def print_accuracy(figures: dict) -> None:
    print(f"{'case':18}{'dev loss before':>16}{'dev accuracy':>14}{'minutes':>9}")
    for name, case in figures.items():
        print(f"{name:18}{case['before']:16.5f}{case['accuracy']:14.2%}{case['minutes']:9.1f}")


def prepare(source: Path, directory: Path, arguments: argparse.Namespace) -> dict:
    """The official files with fewer training examples, and the BERT to start from.

    Returns: what every case is told.
    """
    train, chosen = TRAIN_FILES[source.name], random.Random(arguments.seed)
    directory.mkdir()
    for file in source.resolve().iterdir():
        if file.name != train:
            (directory / file.name).symlink_to(file)
    lines = (source / train).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if json.loads(line)["label"] != "-"]
    lines = chosen.sample(lines, min(arguments.examples, len(lines)))
    (directory / train).write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ("layers", "hidden", "batch_size", "epochs", "seed", "accuracy", "keep_freed")
    options = {name: getattr(arguments, name) for name in names}
    # In a process of its own: the main one has no backend and is not pinned to a core.
    case = (arguments.transformers, "torch", ["save", str(directory), json.dumps(options)])
    take_turns(__file__, {"save": case}, rounds=1)
    return options


def save(directory: Path, options: dict) -> None:
    """Vocabulary and weights, as a directory of a pretrained model."""
    import torch
    from transformers import BertConfig, BertModel

    from keras_ext.text import build_vocabulary

    data, settings = task_and_settings(directory, options)
    vocabulary = build_vocabulary(data.train.texts())
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.hidden // 64),
        intermediate_size=4 * settings.hidden,
        max_position_embeddings=settings.max_length,
    )
    torch.manual_seed(options["seed"])
    BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    report(tokens=len(vocabulary))


def task_and_settings(directory: Path, options: dict) -> tuple:
    """The task's data, and the settings of examples/clue from scratch."""
    from settings import resolve

    names = ("layers", "hidden", "batch_size", "epochs")
    settings = resolve(
        directory.name,
        "scratch",
        {"head_dropout": HEAD_DROPOUT, "pooling": "mean", **{n: options[n] for n in names}},
    )
    return importlib.import_module(directory.name).load(directory), settings


def run_case(name: str, directory: Path, options: dict) -> None:
    pin_to_one_core()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if name in OURS:
        select_backend(OURS[name])
    elif options["keep_freed"]:
        keep_freed()
    data, settings = task_and_settings(directory, options)
    shape = (settings.hidden, len(data.labels))
    kernel = np.random.default_rng(options["seed"]).normal(0, 0.02, shape).astype("float32")
    make = trainer_case if name in PEERS else keras_case
    case = make(name, directory, data, settings, options["seed"], kernel)
    if options["accuracy"]:
        before, _ = case.evaluate()
        report(before=before)
    else:
        report(warm_up_s=seconds(case.warm_up), **case.description)
    for _ in sys.stdin:
        trained = seconds(case.train)
        if options["accuracy"]:
            _, accuracy = case.evaluate()
            report(minutes=trained / 60, accuracy=accuracy)
            continue
        texts = columns(data.dev.inputs[:DEV])
        tokenise = cpu_ms(lambda texts=texts: case.tokenise(texts), repeats=3, warmup=1)
        report(
            rate=len(data.train) * settings.epochs / trained,
            tokens=case.tokens() / len(data.train),
            tokenised=1e3 * len(texts[0]) / tokenise,
            gflops=2 * 2048 * 256 * 1024 / cpu_ms(case.product) / 1e6,
        )


def seconds(function: Callable) -> float:
    """CPU seconds of one call."""
    return cpu_ms(function, repeats=1, warmup=0) / 1e3


@dataclass
class Case:
    """A model with its data: what can be done with it, and what is said of it.

    Attributes:
        warm_up: see every length once.
        train: all epochs.
        evaluate: loss and accuracy on dev.
        tokenise: a list of texts, or one of texts and one of pairs.
        tokens: those of an epoch, padding included.
        product: of matrices of 2048 x 256 and 256 x 1024.
        description: the figures that do not change.
    """

    warm_up: Callable[[], None]
    train: Callable[[], None]
    evaluate: Callable[[], tuple[float, float]]
    tokenise: Callable[[list[list[str]]], object]
    tokens: Callable[[], float]
    product: Callable[[], object]
    description: dict


def keras_case(name: str, directory: Path, data, settings, seed: int, kernel) -> Case:
    import classification
    import encoder
    import finetune
    import keras

    keras.utils.set_random_seed(seed)
    start = {"model": str(directory), "family": None, "vocab": None, "cased": False}
    tokenizer, trunk = encoder.build(start, settings, data)
    rows = [classification.encode(tokenizer, s, data, settings) for s in data.splits[:2]]
    train, dev = finetune.make_batches(rows, settings, seed)
    jit = finetune.resolve_jit("auto")
    inputs, outputs = classification.build_model(trunk, data, settings)
    model = finetune.compiled_model(inputs, outputs, classification, settings, len(train), jit)
    model.get_layer("classifier").set_weights([kernel, 0 * kernel[0]])
    order = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, logs: train.set_epoch(e))

    def fit():
        model.fit(train, epochs=settings.epochs, shuffle=False, verbose=0, callbacks=[order])

    def evaluate():
        scores = classification.score(finetune.predict(model, dev), data.dev, rows[1])
        return scores["loss"], scores["accuracy"]

    lengths = [train[i][0][0].shape[1] for i in range(len(train))]

    class OneOfEachLength(keras.utils.PyDataset):
        chosen = tuple(lengths.index(length) for length in dict.fromkeys(lengths))

        def __len__(self):
            return len(self.chosen)

        def __getitem__(self, index):
            return train[self.chosen[index]]

    def warm_up():
        model.fit(OneOfEachLength(), shuffle=False, verbose=0)

    x, y = (keras.ops.ones(shape) for shape in ((2048, 256), (256, 1024)))
    return Case(
        warm_up,
        fit,
        evaluate,
        tokenise=lambda texts: tokenizer.encode_batch(*texts, max_length=settings.max_length),
        tokens=lambda: settings.batch_size * sum(lengths),
        product=lambda: keras.ops.convert_to_numpy(keras.ops.matmul(x, y)),
        description={
            "unpadded": mean_length(rows[0].token_ids),
            "kernels": "XLA" if jit else tensorflow_kernels(),
            "versions": versions(keras.backend.backend(), "keras"),
        },
    )


def trainer_case(name: str, directory: Path, data, settings, seed: int, kernel) -> Case:
    import torch
    import transformers
    from torch.nn import Dropout, Linear, Module
    from torch.nn.functional import cross_entropy

    tokenizer = transformers.BertTokenizer.from_pretrained(directory)

    class Classifier(Module):
        def __init__(self):
            super().__init__()
            model = transformers.BertModel
            self.bert = model.from_pretrained(directory, add_pooling_layer=False)
            self.dropout = Dropout(settings.head_dropout)
            self.dense = Linear(*kernel.shape)
            self.dense.weight.data = torch.from_numpy(kernel.T.copy())
            self.dense.bias.data.zero_()
            self.tokens = 0

        def forward(self, input_ids, attention_mask, labels):
            self.tokens += input_ids.numel()
            hidden = self.bert(input_ids, attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(hidden.dtype)  # (batch, length, 1)
            vector = (hidden * mask).sum(1) / mask.sum(1)
            logits = self.dense(self.dropout(vector))
            return {"loss": cross_entropy(logits, labels), "logits": logits}

    def tokenise(texts):
        return tokenizer(
            *texts, truncation=True, max_length=settings.max_length, return_token_type_ids=False
        )["input_ids"]

    def dataset(split):
        rows = zip(tokenise(columns(split.inputs)), split.answers, strict=True)
        return [{"input_ids": ids, "labels": label} for ids, label in rows]

    train, dev = map(dataset, data.splits[:2])
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    model = Classifier()
    options = transformers.TrainingArguments(
        output_dir=str(directory / "trainer"),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_epsilon=1e-7,  # as Keras has it
        max_grad_norm=0,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,  # below 1: a part of all steps
        train_sampling_strategy=PEERS[name],
        seed=seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def trainer(rows):
        return transformers.Trainer(
            model,
            options,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            train_dataset=rows,
        )

    prepared = trainer(train)

    def fit():
        model.tokens = 0
        prepared.train()

    def evaluate():
        logits = prepared.predict(sorted(dev, key=lambda row: len(row["input_ids"])))
        loss = logits.metrics["test_loss"]
        return loss, float(np.mean(logits.predictions.argmax(1) == logits.label_ids))

    def warm_up():
        trainer(train[: 5 * settings.batch_size]).train()

    x, y = torch.ones(2048, 256), torch.ones(256, 1024)
    preloaded = ", preloaded library" if os.environ.get("LD_PRELOAD") else ""
    return Case(
        warm_up,
        fit,
        evaluate,
        tokenise,
        tokens=lambda: model.tokens / settings.epochs,
        product=lambda: x @ y,
        description={
            "unpadded": mean_length([row["input_ids"] for row in train]),
            "kernels": f"MKL, ATen with {torch.backends.cpu.get_cpu_capability()}{preloaded}",
            "versions": versions("torch", "transformers"),
        },
    )


def mean_length(rows: list[list[int]]) -> float:
    return statistics.mean(map(len, rows))


def columns(inputs: list) -> list[list[str]]:
    """Texts, or texts and pairs."""
    return [inputs] if isinstance(inputs[0], str) else [*map(list, zip(*inputs, strict=True))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory that holds tnews/ and ocnli/")
    add("--tasks", nargs="+", choices=TRAIN_FILES, default=list(TRAIN_FILES))
    add("--layers", type=int, default=4)
    add("--hidden", type=int, default=256)
    add("--batch-size", type=int, default=32)
    add("--examples", type=int, default=1280, help="training examples (default: 1280)")
    add("--epochs", type=int, default=1)
    add("--turns", type=int, default=3, help="how often each case runs (default: 3)")
    add("--accuracy", action="store_true", help="dev accuracy, one turn, instead of speed")
    add("--seed", type=int, default=0)
    add("--transformers", default=sys.executable, metavar="PYTHON", help="its interpreter")
    add(
        "--default-malloc",
        dest="keep_freed",
        action="store_false",
        help="leave the Trainer's memory to the defaults of glibc, as it is installed",
    )
    add("--preload", type=Path, metavar="FILE", help="library to preload, for PyTorch")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["case"]:
        run_case(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))
    elif sys.argv[1:2] == ["save"]:
        save(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main()
