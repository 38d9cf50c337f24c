"""Sampling defaults of a model in diffusers' layout: vidgen's sampling.json and diffusers' scheduler."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

from vidgen.ckpt.json_files import write_json
from vidgen.core.config import resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.core.files import read_json
from vidgen.core.limits import SHIFT
from vidgen.core.logging import get_logger
from vidgen.diffusion.shift import shift_at
from vidgen.models.dit.config import DiTConfig
from vidgen.models.text_to_video import latent_shape
from vidgen.models.video_vae.config import VAEConfig
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.published import SamplingDefaults, published
from vidgen.sampling.steppers import AnyStepper, Euler, UniPC
from vidgen.sampling.time_grid import TimeGrid

__all__ = [
    "SAMPLING",
    "copy_sampling",
    "read_defaults",
    "read_scheduler",
    "write_defaults",
    "write_scheduler",
]

_log = get_logger(__name__)

SAMPLING = "sampling.json"
"""`SamplingDefaults` as JSON; diffusers ignores the file."""
_SCHEDULER = pathlib.Path("scheduler") / "scheduler_config.json"
_CONVERTED_SHIFT = 3.0
"""Shift that diffusers' conversion wrote for models with two transformers; the authors use a larger one."""
_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def write_defaults(folder: pathlib.Path, defaults: SamplingDefaults) -> None:
    """Writes sampling.json."""
    write_json(folder / SAMPLING, to_dict(defaults))


def copy_sampling(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies sampling.json from one folder to another, if it exists.

    Raises:
      UserError: the file is damaged.
    """
    if (source / SAMPLING).exists():
        write_defaults(target, _read(source / SAMPLING))


def write_scheduler(
    folder: pathlib.Path, defaults: SamplingDefaults, dit: DiTConfig, vae: VAEConfig
) -> list[str]:
    """Writes diffusers' scheduler with the shift for the default size: UniPC for `UniPC`, otherwise Euler.

    Returns:
      The scheduler's entry in model_index.json: library and class.
    """
    shift = _shift(defaults, dit, vae)
    if isinstance(defaults.options.stepper, UniPC):
        name, values = "UniPCMultistepScheduler", {**_UNIPC, "flow_shift": shift}
    else:
        name, values = "FlowMatchEulerDiscreteScheduler", {"shift": shift}
    write_json(folder / _SCHEDULER, {"_class_name": name, "num_train_timesteps": 1000, **values})
    return ["diffusers", name]


def read_defaults(
    folder: pathlib.Path | str, dit: DiTConfig, vae: VAEConfig, *, experts: bool
) -> SamplingDefaults:
    """Sampling defaults of the model in `folder`: those of sampling.json if it exists.

    Otherwise they are the authors' published defaults, found by the shape of the transformer, with the
    stepper and shift of the folder's scheduler. For Wan 2.2's A14B a scheduler shift of 3, which diffusers'
    conversion writes for all models, is replaced by the authors' shift.

    Args:
      dit: config of the transformer.
      experts: whether the model has two transformers.

    Raises:
      FileNotFoundError: the scheduler has no configuration.
      UserError: the scheduler or one of its options is not supported; sampling.json is damaged.
    """
    folder = pathlib.Path(folder)
    scheduler = read_scheduler(folder / "scheduler")
    if (folder / SAMPLING).exists():
        defaults = _read(folder / SAMPLING)
        shift, scheduler_shift = _shift(defaults, dit, vae), scheduler.grid.shift
        if isinstance(scheduler_shift, float) and not math.isclose(shift, scheduler_shift, rel_tol=1e-6):
            _log.warning(
                "%s has a shift of %g, %s one of %g, which is used",
                folder / _SCHEDULER,
                scheduler_shift,
                SAMPLING,
                shift,
            )
        return defaults
    row = published(dit, experts=experts)
    if row is None:
        # An unknown model gets the size and frame rate of the Wan model with the same VAE compression.
        large = vae.spatial_factor == 16
        size, fps = ((121, 704, 1280), 24.0) if large else ((81, 480, 832), 16.0)
        return SamplingDefaults(
            num_frames=size[0],
            height=size[1],
            width=size[2],
            fps=fps,
            options=dataclasses.replace(scheduler, guidance_scale=5.0),
        )
    shift = scheduler.grid.shift
    if experts and shift == _CONVERTED_SHIFT:
        shift = row.options.grid.shift
        _log.info(
            "%s has the shift 3 of diffusers' conversion; the authors' shift of %s is used",
            folder / _SCHEDULER,
            shift,
        )
    grid = dataclasses.replace(row.options.grid, shift=shift, convention=scheduler.grid.convention)
    return dataclasses.replace(
        row, options=dataclasses.replace(row.options, grid=grid, stepper=scheduler.stepper)
    )


def read_scheduler(folder: pathlib.Path | str) -> SamplingOptions:
    """Sampling options (stepper, timesteps) equal to a diffusers scheduler, for 50 steps.

    Raises:
      FileNotFoundError: the scheduler has no configuration.
      UserError: the scheduler or one of its options is not supported.
    """
    path = pathlib.Path(folder) / "scheduler_config.json"
    values = read_json(path, remedy="give the folder `scheduler` of a checkpoint of Wan")
    kinds: dict[str, tuple[AnyStepper, Literal["unipc", "flow_match_euler"], str, dict[str, Any]]] = {
        "UniPCMultistepScheduler": (
            UniPC(),
            "unipc",
            "flow_shift",
            {
                **_UNIPC,
                "solver_order": 2,
                "solver_type": "bh2",
                "predict_x0": True,
                "lower_order_final": True,
                "thresholding": False,
                "use_dynamic_shifting": False,
            },
        ),
        "FlowMatchEulerDiscreteScheduler": (
            Euler(),
            "flow_match_euler",
            "shift",
            {"use_dynamic_shifting": False, "stochastic_sampling": False, "invert_sigmas": False},
        ),
    }
    kind = values.get("_class_name")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}: scheduler {kind!r} is not supported; expected one of {', '.join(kinds)}")
    stepper, convention, shift, expected = kinds[kind]
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise UserError(f"{path}: {name}={values[name]!r} is not supported; expected {value!r}")
    number = float(SHIFT.check(values.get(shift, 1.0), f"{path}: {shift}"))
    return SamplingOptions(grid=TimeGrid(num_steps=50, shift=number, convention=convention), stepper=stepper)


def _read(path: pathlib.Path) -> SamplingDefaults:
    remedy = "export the model again, or remove the file to sample as the scheduler says"
    return resolve(SamplingDefaults, read_json(path, remedy=remedy), where=str(path))


def _shift(defaults: SamplingDefaults, dit: DiTConfig, vae: VAEConfig) -> float:
    """The timestep shift at the default size."""
    shift = defaults.options.grid.shift
    tokens = math.prod(dit.token_grid(*latent_shape(vae, dit, defaults.size)[:3]))
    return 1.0 if shift is None else float(shift_at(shift, tokens))
