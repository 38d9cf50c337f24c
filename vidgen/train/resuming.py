"""Options that may differ when a run resumes."""

import fnmatch
import pathlib
from collections.abc import Mapping
from typing import Any

from vidgen.core.config import ConfigError
from vidgen.core.logging import get_logger

__all__ = ["MAY_CHANGE", "check_changes"]

_log = get_logger(__name__)

MAY_CHANGE = (
    # Distribution of the work: changes results by rounding only.
    "mesh.*",
    "task.dit.sequence.*",
    "task.dit.attention",
    "task.dit.remat",
    "run.num_threads",
    # Locations of files.
    "data.path",
    "data.captions",
    "data.clips.path",
    "data.clips.captions",
    "run.init_from",
    "task.vae",
    "task.perceptual_weights",
    "task.text_encoder.path",
    "task.text_encoder.cache",
    # Length of the run, and intervals.
    "run.num_steps",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep",
    "run.keep_every",
    "run.power_law.every",
    # Defaults of sampling, in previews and later.
    "task.sampling.*",
    # Recovery from an instability.
    "run.schedule_steps",
    "run.grad_clip",
    "run.skip_steps",
    "run.stop_after_nonfinite",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
    "task.adversary.optimizer.learning_rate",
    "task.adversary.optimizer.adam_learning_rate",
)
"""Option keys that may differ when a run resumes; `*` matches all keys of a section."""


def check_changes(old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path | str) -> None:
    """Logs the options of a run that differ from those that it was started with.

    Args:
      old, new: nested options, from `vidgen.core.config.to_dict`.
      workdir: workdir of the run, for messages.

    Raises:
      ConfigError: options differ that may not; the message names them.
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
            f"{workdir} belongs to a run with another config; these keys differ (old -> new): "
            f"{', '.join(shown[key] for key in refused)}. Use another --workdir, or the config of that run."
        )
    for text in shown.values():
        _log.info("the run resumes with a changed option: %s", text)


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
