"""What a run is made of: one dataclass of settings, one table of defaults by task.

Pretrained encoders are trained as in the reference code; encoders from scratch as a few trials
on dev suggested.

Every field of `Settings` is a flag of run.py (`learning_rate` is `--learning-rate`), and a
flag given wins over the table.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "relative_adafactor", "lamb", "lion")
POOLINGS = ("first", "last", "mean", "max")
HEADS = ("global_pointer", "crf")
ATTENTIONS = ("softmax", "linear", "favor", "polynomial")
SCHEDULES = ("constant", "linear", "cosine")

LEAST = {
    "max_length": 3,
    "stride": 1,
    "batch_size": 1,
    "accum": 1,
    "epochs": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "clip": 0,
    "layers": 1,
    "hidden": 1,
}
PARTS = ("warmup", "ema", "dropout", "head_dropout", "label_smoothing")


def _flag(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a task is trained. The defaults are those of BERT's authors for fine-tuning."""

    max_length: int = _flag(128, "tokens of an example, special ones included")
    stride: int = _flag(128, "tokens from a window of a long text to the next")
    batch_size: int = _flag(32, "examples of a batch")
    accum: int = _flag(1, "batches of an update")
    epochs: int = _flag(3, "passes over the training examples")
    optimizer: str = _flag("adamw", "optimizer", OPTIMIZERS)
    learning_rate: float = _flag(2e-5, "highest learning rate")
    schedule: str = _flag("linear", "how the rate falls after the warm-up", SCHEDULES)
    warmup: float = _flag(0.1, "part of the updates in which the rate rises from zero")
    weight_decay: float = _flag(0.01, "decoupled decay of kernels and embeddings")
    clip: float = _flag(0.0, "highest global norm of a gradient, 0 for any")
    ema: float = _flag(0.0, "momentum of the averaged weights to evaluate with, 0 for none")
    dropout: float = _flag(0.1, "dropout rate inside the encoder")
    head_dropout: float = _flag(0.0, "dropout rate before the classifier")
    pooling: str = _flag("first", "the last layer's [CLS], last token, mean or max", POOLINGS)
    head: str = _flag("global_pointer", "what finds entities", HEADS)
    label_smoothing: float = _flag(0.0, "probability spread over all classes")
    attention: str = _flag("softmax", "attention of the encoder", ATTENTIONS)
    layers: int = _flag(2, "layers of an encoder from scratch")
    hidden: int = _flag(128, "width of an encoder from scratch")

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in PARTS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")


# What the reference baselines of bert4keras train with: Adafactor's relative steps, 32 examples
# an update. 16 at a time leave a BERT of 12 layers within 8 GB (benchmarks/clue_memory.py).
REFERENCE = {
    "batch_size": 16,
    "accum": 2,
    "optimizer": "relative_adafactor",
    "learning_rate": 5e-4,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "epochs": 10,
}
SCRATCH = {
    "learning_rate": 1e-3,
    "pooling": "mean",
    "head_dropout": 0.1,
    "batch_size": 64,
}

# (task, where the encoder comes from) -> what differs from the defaults.
TABLE: dict[tuple[str, str], dict[str, Any]] = {
    ("afqmc", "pretrained"): REFERENCE,
    ("afqmc", "scratch"): SCRATCH,
    ("tnews", "pretrained"): REFERENCE,
    ("tnews", "scratch"): SCRATCH,
    # A few hundred sentences: smaller batches, more passes.
    ("tnews", "sample"): {**SCRATCH, "batch_size": 16, "epochs": 12},
    ("iflytek", "pretrained"): REFERENCE,
    ("iflytek", "scratch"): {**SCRATCH, "epochs": 10},
    ("cmnli", "pretrained"): REFERENCE,
    ("cmnli", "scratch"): SCRATCH,
    ("ocnli", "pretrained"): REFERENCE,
    ("ocnli", "scratch"): SCRATCH,
    ("cluewsc2020", "pretrained"): {**REFERENCE, "epochs": 30},
    ("cluewsc2020", "scratch"): {**SCRATCH, "epochs": 10, "batch_size": 32},
    ("csl", "pretrained"): {**REFERENCE, "max_length": 256, "batch_size": 8, "accum": 4},
    ("csl", "scratch"): {**SCRATCH, "max_length": 256},
    # 32 windows an update, as in the reference code.
    ("cmrc2018", "pretrained"): {**REFERENCE, "max_length": 512, "batch_size": 4, "accum": 8},
    # Little overlap, two epochs and no dropout, for two cores.
    ("cmrc2018", "scratch"): {
        "learning_rate": 1e-3,
        "batch_size": 32,
        "max_length": 256,
        "stride": 224,
        "epochs": 2,
        "dropout": 0.0,
    },
    ("cluener", "pretrained"): {**REFERENCE, "max_length": 256},
    ("cluener", "scratch"): {**SCRATCH, "epochs": 15, "batch_size": 32},
    # 16 questions, or 24 blanks, an update as in the reference code, in batches that leave a
    # BERT of 12 layers within 8 GB: a question of C3 is 4 rows of 512 tokens, a blank 10 of 64.
    ("c3", "pretrained"): {**REFERENCE, "max_length": 512, "batch_size": 1, "accum": 16},
    ("c3", "scratch"): {**SCRATCH, "batch_size": 16, "epochs": 2},
    ("chid", "pretrained"): {
        **REFERENCE,
        "max_length": 64,
        "batch_size": 6,
        "accum": 4,
        "epochs": 5,
    },
    ("chid", "scratch"): {**SCRATCH, "max_length": 64, "batch_size": 16, "epochs": 5},
}

TASKS = tuple(dict.fromkeys(task for task, _ in TABLE))


def resolve(task: str, start: str, given: dict[str, Any]) -> Settings:
    """The settings of a run: defaults, then the table, then the flags given."""
    return Settings(**{**TABLE[task, start], **given})


def add_flags(parser) -> None:
    """One flag for every field."""
    for item in fields(Settings):
        parser.add_argument(
            "--" + item.name.replace("_", "-"),
            type=type(item.default),
            choices=item.metadata["choices"],
            help=f"{item.metadata['help']} (default: by task, otherwise {item.default})",
        )
