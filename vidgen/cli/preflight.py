"""`vidgen preflight`: whether a training run, or decoding a video, fits a TPU slice, before it is rented."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core.config import ConfigError, resolve
from vidgen.preflight.topology import prepare_environment, topology_devices

__all__ = ["main"]

_EPILOG = """\
examples:
  vidgen preflight --config=experiments/vae/wan.py --topology=v5e:4x4
  vidgen preflight --config=experiments/dit/t2v_1b.py --vae=experiments/vae/wan.py --topology=v5p:2x2x4
  vidgen preflight --config=experiments/dit/sprites.py --config.task.vae=runs/vae --topology=v6e:2x2
  vidgen preflight --config=experiments/vae/wan.py --topology=v5e:2x4 --decode=1441x1080x1920

The real training step is compiled for the slice by libtpu; no TPU, no weights and no clips are needed. Any
value of the config is changed by --config.section.key=value: --config.mesh.data=2 --config.mesh.fsdp=8.
With --decode, it is the VAE's decoder, streaming, frames cut over all devices, instead of the step.
The last line is one JSON object. docs/tpu.md explains the numbers.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.

    Returns:
      0 when the step fits and its state lies on the devices as asked, 1 when not.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    prepare_environment()  # Before anything imports jax, which configs do.
    values = load_config(arguments.config, overrides)
    vae = load_config(arguments.vae, []) if arguments.vae else None
    devices = topology_devices(arguments.topology)

    from vidgen.preflight.compile import compile_step
    from vidgen.preflight.report import make_report
    from vidgen.train.experiment import Experiment

    if "path" in values["data"]:
        values["data"]["path"] = values["data"]["path"] or "unread"  # No clip is looked at.
    experiment = resolve(Experiment, values)
    frozen = _vae_config(experiment, vae)
    if arguments.decode:
        from vidgen.preflight.decode import compile_decode

        config = getattr(experiment.task, "model", frozen)
        report = compile_decode(config, devices, arguments.decode, arguments.topology)
    else:
        mesh = experiment.mesh.build(devices)
        report = make_report(compile_step(experiment, mesh, frozen), experiment, arguments.topology)
    if not arguments.json:
        print(report.table())
    print(report.to_json())
    return 0 if report.ok else 1


def _vae_config(experiment: Any, values: dict[str, Any] | None) -> Any:
    """The shape of the VAE that the task reads, from the config of its training or from its folder."""
    from vidgen.models.video_vae.config import VAEConfig
    from vidgen.train.text_to_video_task import TextToVideoTask
    from vidgen.train.vae_folder import has_vae, vae_config

    if not isinstance(experiment.task, TextToVideoTask):
        return None
    if values is not None:
        return resolve(VAEConfig, values["task"]["model"], where="vae.task.model")
    if not has_vae(experiment.task.vae):
        raise ConfigError(
            f"config.task.vae: {experiment.task.vae} holds no VAE. Correct it, or give the config that "
            "the VAE is trained with: --vae=experiments/vae/wan.py"
        )
    return vae_config(experiment.task.vae)


def _video(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"\d+x\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected frames, height and width, as 1441x1080x1920")
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen preflight",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="the experiment, as vidgen train takes it"
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="the slice, as v5e:4x4, v5p:2x2x4, v6e:8x8, tpu7x:2x2x1",
    )
    parser.add_argument(
        "--vae",
        metavar="FILE[:ARG]",
        help="config of the frozen VAE's own training, where config.task.vae is not on this machine",
    )
    parser.add_argument(
        "--decode",
        type=_video,
        metavar="TxHxW",
        help="frames, height and width of a video to decode, as 1441x1080x1920",
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))
