"""What the command lines here have in common: one-line errors and their exit statuses.

0 done, 1 the machine failed (full disk), 2 a mistake in the call or the data, 130 interrupted.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises where argparse prints the usage and exits."""

    def __init__(self, description: str | None, **kwargs):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def exit_status(work: Callable[[], object], extra: str = "clue", resumable: bool = True) -> int:
    """Do the work; the exit status, with one line to standard error where it is not 0.

    Args:
        extra: of keras-ext, what a missing package is part of.
        resumable: whether the same command with --resume goes on with the work.
    """
    resume = "the same command with --resume goes on" if resumable else "run it again"
    try:
        work()
    except UserError as error:
        return _fail(2, f"{error}")
    except ImportError as error:
        return _fail(2, f"{error}: pip install 'keras-ext[{extra}]' and the backend")
    except OSError as error:
        return _fail(1, f"{error}: when that is mended, {resume}")
    except KeyboardInterrupt:
        return _fail(130, f"interrupted: {resume}")
    return 0


def _fail(status: int, message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status
