"""`vidgen <command> ...`: finds the command's module and runs it."""

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

__all__ = ["main", "run"]

_COMMANDS = {
    "train": "train what an experiment config describes, or resume it",
    "config": "show every option of an experiment with its value, type and meaning",
    "sample": "generate videos from prompts with a trained run",
    "evaluate": "score a VAE on videos, or a video model on prompts",
    "average": "average a run's weights over another length, from its snapshots",
    "encode": "turn a video into latents of a VAE",
    "decode": "turn latents back into a video",
    "import": "turn a checkpoint of Wan into a folder that everything here reads",
    "export": "turn a run or a checkpoint into files of other programs",
    "data": "check a folder of videos, or write clips or latents of them as records",
    "preflight": "tell whether a run fits a TPU slice, without a TPU",
    "demo": "train a tiny model on the sprite world and sample from it",
}
_USER_ERRORS = (UserError, OSError, flags.Error)


class _Terminated(BaseException):
    """SIGTERM was received. No `Exception`, as KeyboardInterrupt is none: nothing on the way takes it."""


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """The exit status of a command's `main`: 2, after one line on stderr, for errors that users can mend.

    Those are a `UserError` (`ConfigError` and the like), an OSError (a missing file) and a wrong flag.
    Anything else is a defect and keeps its traceback; VIDGEN_TRACEBACK=1 keeps every traceback. SIGINT and
    SIGTERM end a command as exceptions, so that it removes what it has half written: 130 and 143.

    Args:
      command: takes the arguments after the program's name; returns its exit status, None being 0.
      argv: those arguments; the process's own where not given.
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
      argv: arguments after the program's name; the process's own where not given.
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
    return run(lambda rest: importlib.import_module(_module(name)).main(rest), arguments[1:])


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
        "Environment: VIDGEN_LOG=debug|info|warning, VIDGEN_TRACEBACK=1 (tracebacks of user errors too).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
