"""`vidgen config`: lists every option of an experiment with its value, type and meaning."""

import argparse
import sys
import textwrap
from collections.abc import Sequence

from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core.config import resolve
from vidgen.core.describe import Field, fields_of, find_classes, list_values

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen config show experiments/dit/sprites.py:tiny
  vidgen config show experiments/vae/folder.py --docs --config.data.path=my_clips --config.run.batch_size=16
  vidgen config fields                (the fields of an experiment)
  vidgen config fields task.dit       (the fields below config.task.dit, with defaults)
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.action == "fields":
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    from vidgen.train.experiment import Experiment

    if arguments.action == "show":
        experiment = resolve(Experiment, load_config(arguments.config, overrides))
        for field in list_values(experiment, "config"):
            print(_line(field, docs=arguments.docs))
        return 0
    place = arguments.place.removeprefix("config.")
    for cls in find_classes(Experiment, "" if place == "config" else place):
        print(f"{cls.__name__}:")
        for field in fields_of(cls):
            print(textwrap.indent(_line(field, docs=True), "  "))
    return 0


def _line(field: Field, *, docs: bool) -> str:
    line = f"{field.name} = {field.value}  ({field.type})"
    if not docs or not field.doc:
        return line
    return "\n".join([line, *textwrap.wrap(field.doc, 100, initial_indent="    ", subsequent_indent="    ")])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen config",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser(
        "show", help="list every option of an experiment with its value", allow_abbrev=False
    )
    show.add_argument("config", metavar="FILE[:ARG]", help="the experiment, as for `vidgen train`")
    show.add_argument("--docs", action="store_true", help="print the meaning of each option too")
    fields = actions.add_parser(
        "fields", help="list the fields that can be set, with defaults", allow_abbrev=False
    )
    fields.add_argument("place", nargs="?", default="", metavar="PLACE", help="such as task.dit or run")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
