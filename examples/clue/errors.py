"""The one exception that users are meant to see."""


class UserError(Exception):
    """Something the user can mend: run.py prints it as one line and exits with status 2."""
