"""`vidgen import`: a checkpoint of another program to a folder that everything here reads."""

import argparse
import sys
from collections.abc import Sequence

from vidgen.cli.main import run
from vidgen.core import limits
from vidgen.core.paths import path_option

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen import Wan2.1-T2V-1.3B-Diffusers --to models/wan
  vidgen import wan2.1_t2v_1.3B_bf16.safetensors --parts Wan2.1-T2V-1.3B-Diffusers --to models/wan

What is written is diffusers' layout: vidgen.load, `vidgen sample --checkpoint`, `run.init_from` and `vidgen
export` take it, and so does diffusers. Pickles (.pth, .bin) are refused, for loading one can run any code.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)

    # What needs jax is imported late: --help and wrong options answer at once.
    from vidgen.parallel.mesh import MeshOptions
    from vidgen.pipeline.importing import import_checkpoint

    import_checkpoint(
        arguments.source,
        arguments.to,
        mesh=MeshOptions(data=1, fsdp=-1).build(),
        parts=arguments.parts,
        num_heads=arguments.num_heads,
    )
    print(arguments.to)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen import",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="DIR_OR_FILE",
        type=path_option,
        help="a checkpoint for diffusers or of Wan's authors, or a transformer in one safetensors file",
    )
    parser.add_argument("--to", required=True, type=path_option, help="a new folder")
    parser.add_argument(
        "--parts",
        type=path_option,
        help="a checkpoint for diffusers that VAE, text encoder, tokenizer and scheduler are taken from",
    )
    parser.add_argument(
        "--num-heads", type=limits.HEADS, help="of a transformer in one file whose heads are not 128 wide"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
