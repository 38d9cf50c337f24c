"""`vidgen import`: converts a checkpoint of another program to diffusers' layout, which all commands read."""

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

The output has diffusers' layout: vidgen.load, `vidgen sample --checkpoint`, `run.init_from`, `vidgen export`
and diffusers read it. Pickles (.pth, .bin) are refused, because loading one can run any code.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
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
        help="a checkpoint in diffusers' or Wan's own layout, or a transformer in one safetensors file",
    )
    parser.add_argument("--to", required=True, type=path_option, help="a new folder")
    parser.add_argument(
        "--parts",
        type=path_option,
        help="a diffusers checkpoint that provides the VAE, text encoder, tokenizer and scheduler",
    )
    parser.add_argument(
        "--num-heads",
        type=limits.HEADS,
        help="attention heads, for a transformer in one file whose head dim is not 128",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
