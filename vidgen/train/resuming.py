"""Which options may differ when a run goes on."""

import fnmatch
import pathlib
from collections.abc import Mapping
from typing import Any

from vidgen.core.config import ConfigError
from vidgen.core.logging import get_logger

__all__ = ["MAY_CHANGE", "check_changes"]

_log = get_logger(__name__)

MAY_CHANGE = (
    # How the work is divided, which changes results by rounding alone.
    "mesh.*",
    "task.dit.sequence.*",
    "task.dit.attention",
    "task.dit.remat",
    "run.num_threads",
    # Where files are.
    "data.path",
    "data.captions",
    "data.clips.path",
    "data.clips.captions",
    "run.init_from",
    "task.vae",
    "task.perceptual_weights",
    "task.text_encoder.path",
    "task.text_encoder.cache",
    # How long, and how often what happens.
    "run.num_steps",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep",
    "run.keep_every",
    "run.power_law.every",
    # How previews, and later users, sample.
    "task.sampling.*",
    # What gets a run over a bad place.
    "run.schedule_steps",
    "run.grad_clip",
    "run.skip_steps",
    "run.stop_after_nonfinite",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "task.adversary.optimizer.learning_rate",
    "task.adversary.optimizer.adam_learning_rate",
)
"""Keys of the options that may differ when a run goes on; `*` stands for all keys of a section."""


def check_changes(old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path | str) -> None:
    """Logs the options of a run that differ from those that it was started with.

    Args:
      old, new: nested options, as `vidgen.core.config.to_dict` gives them.
      workdir: the run's, for messages.

    Raises:
      ConfigError: some differ that may not; they are named.
    """
    flat_old, flat_new = _flatten(old), _flatten(new)
    keys = [
        key
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key, _ABSENT) != flat_new.get(key, _ABSENT)
    ]
    shown = {key: f"{key} {flat_old.get(key, _ABSENT)!r} -> {flat_new.get(key, _ABSENT)!r}" for key in keys}
    refused = [key for key in keys if not any(fnmatch.fnmatchcase(key, known) for known in MAY_CHANGE)]
    if refused:
        raise ConfigError(
            f"{workdir} belongs to a run with another config; these keys differ (there -> now): "
            f"{', '.join(shown[key] for key in refused)}. Use another --workdir, or the config of that run."
        )
    for text in shown.values():
        _log.info("the run goes on with another option: %s", text)


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
