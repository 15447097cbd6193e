"""Variables are chosen by regular expressions that are searched in `variable.path`."""

import re
from collections.abc import Iterable, Sequence


def as_patterns(argument: str, patterns: str | Sequence[str]) -> list[str]:
    """One pattern or several, as a list; `argument` is what an error calls them."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{argument} must be regular expressions, got {pattern!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{argument} must be regular expressions, got {pattern!r}: {error}."
            ) from None
    return patterns


def matched(argument: str, pattern: str, variables: Iterable) -> list[int]:
    """Indices of the variables that the pattern matches; none is an error."""
    paths = [v.path for v in variables]
    indices = [i for i, path in enumerate(paths) if re.search(pattern, path)]
    if not indices:
        raise ValueError(
            f"{argument}: {pattern!r} matches no variable. Correct it; the paths are "
            f"{some(paths)}."
        )
    return indices


def some(paths: Sequence[str]) -> str:
    """The first paths, for an error."""
    return ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
