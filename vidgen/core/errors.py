"""The error of wrong input: what a command shows in one line, without a traceback."""

__all__ = ["UserError"]


class UserError(ValueError):
    """Input that cannot be used: a value, a key, a file or a combination of them.

    The message names the culprit, what was found, what is expected and what to do. Commands print the message
    alone and exit with status 2. Any other `ValueError`, one of JAX or NumPy for example, is a defect of the
    program and keeps its traceback.
    """
