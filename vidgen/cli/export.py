"""`vidgen export`: converts a trained run or a checkpoint to files for other programs."""

import argparse
import sys
from collections.abc import Sequence

from vidgen.cli.main import run
from vidgen.core import limits
from vidgen.core.paths import path_option

__all__ = ["main"]

_FORMATS = ("diffusers", "safetensors", "orbax", "lora", "stablehlo")

_EPILOG = """\
formats:
  diffusers    a folder for diffusers' WanPipeline; vidgen.load and `run.init_from` read it too
  safetensors  one file per model part, with the tensor names of Wan's own checkpoints, as ComfyUI reads them
  orbax        a pytree of arrays
  lora         the LoRA weights of a run with task.lora, in one file
  stablehlo    the sampler for one size as a program that needs only JAX, with its weights

examples:
  vidgen export runs/dit --format diffusers --out models/mine
  vidgen export runs/dit --format stablehlo --out sampler --steps 30 --num-frames 9 --height 64 --width 64
  vidgen export runs/lora --format lora --spelling comfyui --out mine.safetensors
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.
    """
    arguments = _parser().parse_args(argv)

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    if arguments.format == "stablehlo":
        _export_sampler(arguments)
    else:
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


def _export_sampler(arguments: argparse.Namespace) -> None:
    import jax

    from vidgen.parallel.mesh import MeshOptions
    from vidgen.pipeline import load
    from vidgen.pipeline.stablehlo import export_sampler

    pipe = load(arguments.source, mesh=MeshOptions().build(jax.devices()[:1]), dtype=arguments.dtype)
    given = (arguments.num_frames, arguments.height, arguments.width)
    frames, height, width = (d if g is None else g for g, d in zip(given, pipe.size, strict=True))
    export_sampler(
        pipe,
        arguments.out,
        batch_size=arguments.batch_size,
        size=(frames, height, width),
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
    )


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
        type=path_option,
        help="workdir of a run, or a diffusers checkpoint",
    )
    parser.add_argument("--format", choices=_FORMATS, default="diffusers")
    parser.add_argument("--out", required=True, type=path_option, help="a new folder; for lora, a file")
    parser.add_argument(
        "--step", type=limits.STEP, help="checkpoint of the run to export (default: the newest)"
    )
    parser.add_argument(
        "--spelling",
        choices=("peft", "comfyui"),
        default="peft",
        help="tensor names in a LoRA file (default peft)",
    )
    sampler = parser.add_argument_group("stablehlo", "values that the program fixes")
    sampler.add_argument("--num-frames", type=limits.NUM_FRAMES)
    sampler.add_argument("--height", type=limits.SIDE)
    sampler.add_argument("--width", type=limits.SIDE)
    sampler.add_argument("--batch-size", type=limits.BATCH_SIZE, default=1, help="clips per call (default 1)")
    sampler.add_argument("--steps", type=limits.SAMPLER_STEPS)
    sampler.add_argument("--guidance-scale", type=limits.GUIDANCE_SCALE)
    sampler.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of matrix products")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
