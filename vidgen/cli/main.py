"""`vidgen <command> ...`: imports the command's module and runs it."""

import contextlib
import difflib
import importlib
import keyword
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from vidgen import __version__
from vidgen.core.accelerators import skip_absent_tpu
from vidgen.core.errors import UserError
from vidgen.core.user_classes import trusting

__all__ = ["main", "run"]

_COMMANDS = {
    "train": "train an experiment, or resume it",
    "config": "show every option of an experiment with its value, type and meaning",
    "sample": "generate videos from prompts",
    "evaluate": "score a VAE on videos, or a video model on prompts",
    "average": "average a run's weights over another length, from its snapshots",
    "encode": "encode a video as latents of a VAE",
    "decode": "decode latents to a video",
    "import": "convert a checkpoint of Wan to diffusers' layout, which all commands read",
    "export": "convert a run or a checkpoint to files for other programs",
    "data": "check a folder of videos, or write clips or their latents as records",
    "preflight": "check, without a TPU, whether a run fits a TPU slice",
    "demo": "train a tiny model on the sprite world and sample from it",
}
_USER_ERRORS = (UserError, OSError, flags.Error)


class _Terminated(BaseException):
    """SIGTERM was received. No `Exception`, like KeyboardInterrupt: `except Exception` does not catch it."""


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main` and returns its exit status; user errors print one line and return 2.

    User errors are `UserError` (`ConfigError` among them), OSError (a missing file) and a wrong flag. Any
    other exception is a defect and propagates with its traceback; VIDGEN_TRACEBACK=1 shows every traceback.
    SIGINT and SIGTERM are raised as exceptions, so that the command removes half-written files; they return
    130 and 143.

    Args:
      command: takes the arguments after the program's name; returns its exit status, None for 0.
      argv: those arguments; `sys.argv[1:]` by default.
    """
    skip_absent_tpu()
    try:
        with _sigterm_raises():
            return command(sys.argv[1:] if argv is None else argv) or 0
    except KeyboardInterrupt:
        print("vidgen: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("vidgen: terminated", file=sys.stderr)
        return 143
    except _USER_ERRORS as error:
        if os.environ.get("VIDGEN_TRACEBACK") == "1":
            raise
        print(f"vidgen: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2


def main(argv: Sequence[str] | None = None) -> int:
    """The `vidgen` program.

    Args:
      argv: arguments after the program's name; `sys.argv[1:]` by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else ""
    if name in ("", "-h", "--help", "help"):
        print(_usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"vidgen {__version__}")
        return 0
    if name not in _COMMANDS:
        closest = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.0)[0]
        print(
            f'vidgen: unknown command "{name}"; did you mean "{closest}"? Commands: {", ".join(_COMMANDS)}',
            file=sys.stderr,
        )
        return 2
    with trusting("--trust" in arguments):
        rest = [argument for argument in arguments[1:] if argument != "--trust"]
        return run(lambda rest: importlib.import_module(_module(name)).main(rest), rest)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _module(command: str) -> str:
    return f"vidgen.cli.{command}_" if keyword.iskeyword(command) else f"vidgen.cli.{command}"


def _usage() -> str:
    lines = ["usage: vidgen <command> [options]", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, summary in _COMMANDS.items()]
    lines += [
        "",
        "`vidgen <command> --help` lists a command's options; `vidgen --version` prints the version.",
        "--trust lets a command import the classes of a run's author, which executes their code.",
        "Environment: VIDGEN_LOG=debug|info|warning, VIDGEN_TRACEBACK=1 (tracebacks of user errors too).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
