"""`vidgen export`: a trained run, or a checkpoint, to files of other programs."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from vidgen.cli.main import run

__all__ = ["main"]

_FORMATS = ("diffusers", "safetensors", "orbax", "lora")

_EPILOG = """\
formats:
  diffusers    a folder that diffusers' WanPipeline reads; vidgen.load and `run.init_from` read it too
  safetensors  one file for each part, with the names of Wan's own checkpoints, as in ComfyUI
  orbax        a pytree of arrays
  lora         the updates of a run with task.lora, in one file

examples:
  vidgen export runs/dit --format diffusers --out models/mine
  vidgen export runs/lora --format lora --spelling comfyui --out mine.safetensors
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)

    # What needs jax is imported late: --help and wrong options answer at once.
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.pipeline.exporting import export

    export(
        arguments.source,
        arguments.out,
        arguments.format,
        mesh=MeshOptions(data=1, fsdp=-1).build(),
        step=arguments.step,
        spelling=arguments.spelling,
    )
    print(arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen export",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="WORKDIR",
        type=pathlib.Path,
        help="of a run; or a checkpoint for diffusers",
    )
    parser.add_argument("--format", choices=_FORMATS, default="diffusers")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a new folder; for lora, a file")
    parser.add_argument("--step", type=int, help="which checkpoint of a run; by default the newest")
    parser.add_argument(
        "--spelling", choices=("peft", "comfyui"), default="peft", help="of the names in a LoRA file"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
