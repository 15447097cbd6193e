"""Which variables: regular expressions, layers, variables, or a list of these.

A regular expression is searched in `variable.path`, so "encoder_1" also matches encoder_10:
write "encoder_1/". A layer or a model stands for all its variables. A saved configuration
holds regular expressions only: of a layer, one that matches exactly the paths of its weights.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import keras

Selectable: TypeAlias = str | keras.layers.Layer | keras.Variable


class Selection:
    """Variables chosen by an argument; an error calls them by its name.

    Args:
        argument: name of the argument.
        chosen: a regular expression, a layer, a variable, or a list of these; None for nothing.

    Raises:
        ValueError: `chosen` is none of these, or no regular expression.
    """

    def __init__(self, argument: str, chosen: Selectable | Sequence[Selectable] | None) -> None:
        self.argument = argument
        if chosen is None:
            chosen = []
        self.parts = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
        for part in self.parts:
            self._check(part)

    def _check(self, part: Any) -> None:
        if isinstance(part, (keras.layers.Layer, keras.Variable)):
            return
        accepted = f"{self.argument} must be regular expressions, layers or variables"
        if not isinstance(part, str):
            raise ValueError(f"{accepted}, got {part!r}.")
        try:
            re.compile(part)
        except re.error as error:
            raise ValueError(f"{accepted}, got {part!r}: {error}.") from None

    def indices(self, variables: Sequence) -> list[int]:
        """Places of the chosen variables in a list.

        Raises:
            ValueError: a part matches no variable, or variables inside and outside of it have
                the same path, so that a saved optimizer could not tell them apart.
        """
        found: set[int] = set()
        for part in self.parts:
            found.update(self._matched(part, variables))
        return sorted(found)

    def _matched(self, part: Any, variables: Sequence) -> list[int]:
        pattern = self._pattern(part)
        matched = [i for i, v in enumerate(variables) if re.search(pattern, v.path)]
        if not isinstance(part, str):
            inside = {id(v) for v in _weights(part)}
            outside = [variables[i] for i in matched if id(variables[i]) not in inside]
            if outside:
                raise ValueError(
                    f"{self.argument}: two variables have the path {outside[0].path}, one in "
                    f"{shown(part)} and one outside, so that a saved optimizer could not tell "
                    "them apart. Give their layers different names."
                )
        if not matched:
            raise ValueError(
                f"{self.argument}: {shown(part)} matches no variable. Correct it; the paths "
                f"are {some([v.path for v in variables])}."
            )
        return matched

    def _pattern(self, part: Any) -> str:
        if isinstance(part, str):
            return part
        if not _weights(part):
            raise ValueError(
                f"{self.argument}: {shown(part)} has no weights yet. Build the model first, or "
                "use a regular expression."
            )
        return f"^({'|'.join(re.escape(v.path) for v in _weights(part))})$"

    def config(self) -> list[str]:
        """Regular expressions that choose the same."""
        return [self._pattern(part) for part in self.parts]


def _weights(part: Any) -> list:
    return [part] if isinstance(part, keras.Variable) else part.weights


def shown(part: Any) -> str:
    """A part of a selection, or several, for an error."""
    if isinstance(part, (list, tuple)):
        return " ".join(map(shown, part))
    if not isinstance(part, (keras.layers.Layer, keras.Variable)):
        return repr(part)
    kind = "layer" if isinstance(part, keras.layers.Layer) else "variable"
    return f"{kind} {part.name!r}"


def some(paths: Iterable[str]) -> str:
    """The first paths, for an error."""
    paths = list(paths)
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
