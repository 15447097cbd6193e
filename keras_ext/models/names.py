"""What the weights of a model are called in a checkpoint.

A table maps the path of a model weight to the name of a checkpoint variable:

    "encoder_{i}/feed_forward_norm/beta"    -> "bert/encoder/layer_{i}/output/LayerNorm/beta"
    "nsp/kernel"                            -> "cls/seq_relationship/output_weights.T"
    "encoder_{i}/attention/key_dense/bias"  -> "transformer.h.{i}.attn.c_attn.bias[1/3]"

`{i}` stands for the number of a block (`{i:03d}` for one of three digits), a final `.T` says
that the checkpoint holds the transposed matrix, a final `[1/3]` that the weight is the second
of three parts of that, along the last axis.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import numpy as np

# The number of a block: in encoder_3/, layer_3/, layer03/, layer.3.
BLOCK = re.compile(r"(?<=[_.a-z])\d+(?=[/.])")
NUMBER = re.compile(r"\{i[^}]*\}")
PART = re.compile(r"\[(\d+)/(\d+)\]$")


@dataclasses.dataclass(frozen=True)
class NameTable:
    """How a family of models is named in one format of checkpoints.

    Args:
        weights: path of a model weight -> name of the checkpoint variable.
        ignored: pattern of variables that no model needs -> the reason.
        renamed: pattern -> replacement, applied to the checkpoint's names first, in order.
        fallbacks: pattern -> replacement: a variable to read where one is absent.
        copies: variable that repeats another one -> that.
        outputs: matrices of logits that repeat the token embedding where a model ties them.
        optional: pattern of the layers that a model may lack: those of its heads.
        foreign: pattern of variables, in any format, that a checkpoint of this family never
            has -> what it is then.
    """

    weights: Mapping[str, str]
    ignored: Mapping[str, str]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fallbacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    optional: str = "$"
    foreign: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def source(self, path: str) -> "Source | None":
        """Where a model weight is in a checkpoint; None where it has no name."""
        name = self.weights.get(BLOCK.sub("{i}", path, count=1))
        if name is None:
            return None
        block = BLOCK.search(path)
        return Source.parse(name.format(i=int(block[0])) if block else name)

    def canonical(self, name: str) -> str:
        """The name of a checkpoint variable as the table spells it."""
        return _replaced(name, self.renamed)

    def fallback(self, source: "Source") -> "Source":
        """What to read in the place of what the checkpoint lacks."""
        return Source.parse(_replaced(str(source), self.fallbacks))

    def reason_to_ignore(self, name: str) -> str:
        """Why no weight of the model asked for this variable."""
        for pattern, reason in self.ignored.items():
            if re.search(pattern, name):
                return reason
        known = self.paths(name) or self.output(name) or name in self.copies
        return "not in the model" if known else "unknown"

    def output(self, name: str) -> "Source | None":
        """How the token embedding is read from this variable, if from any."""
        return next((x for x in map(Source.parse, self.outputs) if x.name == name), None)

    def paths(self, name: str) -> list[str]:
        """The weights that a checkpoint variable has a place for."""
        number = BLOCK.search(name)
        return [
            path.replace("{i}", str(int(number[0]))) if number else path
            for path in self._paths.get(BLOCK.sub("{i}", name, count=1), [])
        ]

    @functools.cached_property
    def _paths(self) -> dict[str, list[str]]:
        paths: dict[str, list[str]] = {}
        for path, name in self.weights.items():
            paths.setdefault(NUMBER.sub("{i}", Source.parse(name).name), []).append(path)
        return paths


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint variable, or the part of one, that is a weight.

    Args:
        name: of the variable.
        transposed: whether it is the matrix of the weight transposed.
        part: which part of how many, along the last axis of what is not transposed any more.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read `name`, `name.T`, `name[1/3]` or `name.T[1/3]`."""
        found = PART.search(text)
        text = PART.sub("", text)
        part = (int(found[1]), int(found[2])) if found else None
        return cls(text.removesuffix(".T"), text.endswith(".T"), part)

    def __str__(self) -> str:
        part = "[{}/{}]".format(*self.part) if self.part else ""
        return self.name + ".T" * self.transposed + part

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """That of the weight, for a variable of this shape."""
        if len(stored) == 3 and stored[0] == 1:  # OpenAI's
            stored = stored[1:]
        stored = stored[::-1] if self.transposed else stored
        return stored if self.part is None else (*stored[:-1], stored[-1] // self.part[1])

    def read(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The weight, of this shape, from the values of the variable."""
        if self.transposed:
            stored = stored.T
        if self.part is not None:
            stored = np.split(stored, self.part[1], axis=-1)[self.part[0]]
        return stored.reshape(shape)


def _replaced(name: str, replacements: Mapping[str, str]) -> str:
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name
