"""The error for invalid input, which commands print in one line without a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Invalid input: a value, a key, a file or a combination of them.

    The message names the culprit, what was found, what is expected and what to do. Commands print the message
    alone and exit with status 2. Any other `ValueError`, such as one from JAX or NumPy, is a bug in the
    program and keeps its traceback.
    """
