"""Strength of LoRA updates: every place in which trainers and libraries keep alpha."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from vidgen.ckpt.tensor_files import WeightsError
from vidgen.core import limits
from vidgen.core.errors import UserError
from vidgen.core.files import parse_json, read_json
from vidgen.core.logging import get_logger

__all__ = ["ADAPTER_CONFIG", "AdapterConfig", "ScaleOf", "read_adapter_config"]

_log = get_logger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
"""Key of the header's metadata under which diffusers (0.34 and later) keeps PEFT's config, as JSON."""

_DEFAULT_ALPHA = 8.0
"""PEFT's, where a config leaves `lora_alpha` out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What PEFT's config of an adapter says of the strength of its updates.

    Attributes:
      where: the file and the part of it, for messages.
      rank: of all updates but those in `rank_pattern`; None where it is not said.
      alpha: as `rank`; an update is scaled by alpha / rank.
      use_rslora: it is scaled by alpha / sqrt(rank) instead (arXiv 2312.03732).
      rank_pattern, alpha_pattern: by names of linear maps, or by the ends of names after a dot.
    """

    where: str
    rank: int | None
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def scale(self, name: str, rank: int) -> float:
        """The factor of the update of the map `name`, whose factors have that rank.

        Raises:
          WeightsError: the config says another rank.
        """
        said = _of_pattern(self.rank_pattern, name, self.rank)
        if said is not None and said != rank:
            raise WeightsError(
                f"{self.where} says rank {said} of {name}, whose tensors have rank {rank}: they do not "
                "belong together"
            )
        alpha = _of_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class ScaleOf:
    """The factor of each update of one file that has no alpha tensor of its own; logs where it is from."""

    def __init__(self, path: pathlib.Path, metadata: Mapping[str, str], *, peft: bool):
        """Reads what there is.

        Args:
          path: of the LoRA file; PEFT keeps its config beside it.
          metadata: of the file's header.
          peft: names are PEFT's, `lora_A` and `lora_B`, not `lora_down` and `lora_up`. Converters to these
            names multiply alpha in, and leave kohya's metadata as it was.

        Raises:
          UserError: a config is no JSON of its kind, or asks for what is not supported.
        """
        self._path = path
        self._config = read_adapter_config(path, metadata) if peft else _of_header(path, metadata)
        self._alpha = None if peft or self._config else _kohya_alpha(path, metadata)
        self._said = False

    def __call__(self, name: str, rank: int) -> float:
        """The factor of the update of the map `name`, as the file calls it without its prefix."""
        if self._config is not None:
            self._log(f"the scale is {self._config.where}'s", warn=False)
            return self._config.scale(name, rank)
        if self._alpha is not None:
            self._log(f"alpha is {self._alpha:g}, the header's ss_network_alpha", warn=False)
            return self._alpha / rank
        self._log(
            "alpha is neither in the tensors, nor in the header's metadata, nor in a config beside the file: "
            "it is taken to be equal to the rank (scale 1), which is too weak or too strong if the LoRA was "
            "trained with another",
            warn=True,
        )
        return 1.0

    def _log(self, message: str, *, warn: bool) -> None:
        if not self._said:
            (_log.warning if warn else _log.info)("%s: %s", self._path, message)
        self._said = True


def read_adapter_config(path: pathlib.Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    """PEFT's config of the adapter in a file, from the file's header, or else from adapter_config.json.

    The latter counts where it must belong to the file: the file has PEFT's name, or is alone in its folder.

    Raises:
      UserError: it is no JSON of its kind, or asks for what is not supported.
    """
    config = _of_header(path, metadata)
    beside = path.with_name(ADAPTER_CONFIG)
    if config is not None or not beside.exists():
        return config
    if path.name != "adapter_model.safetensors" and len(list(path.parent.glob("*.safetensors"))) > 1:
        _log.warning("%s is not used for %s: there are other weights in the folder", beside, path.name)
        return None
    return _config(read_json(beside, remedy="take it from where the LoRA is from"), str(beside))


def _of_header(path: pathlib.Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    if _METADATA not in metadata:
        return None
    where = f"{path}: {_METADATA}"
    values = parse_json(metadata[_METADATA], where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: found JSON of type {type(values).__name__}, expected a mapping")
    # Keys begin with the part of the pipeline; those of text encoders are of no use here.
    of_part = {key.removeprefix("transformer."): value for key, value in values.items() if _is_ours(key)}
    return _config(of_part, where) if of_part else None


def _is_ours(key: str) -> bool:
    return key.startswith("transformer.") or "." not in key


def _config(values: Mapping[str, Any], where: str) -> AdapterConfig:
    kind = values.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(f"{where}: peft_type={str(kind)[:60]!r} is not supported; expected 'LORA'")
    if values.get("use_dora"):
        raise UserError(f"{where}: use_dora: DoRA is not supported; merge it into the weights with PEFT")
    rank, alpha = values.get("r"), values.get("lora_alpha", _DEFAULT_ALPHA)
    rslora = values.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise UserError(f"{where}: use_rslora is {str(rslora)[:60]!r}; expected true or false")
    return AdapterConfig(
        where=where,
        rank=None if rank is None else limits.LORA_RANK.check(rank, f"{where}: r"),
        alpha=float(limits.LORA_ALPHA.check(alpha, f"{where}: lora_alpha")),
        use_rslora=rslora,
        rank_pattern=_pattern(values, "rank_pattern", limits.LORA_RANK, where),
        alpha_pattern=_pattern(values, "alpha_pattern", limits.LORA_ALPHA, where),
    )


def _pattern(values: Mapping[str, Any], key: str, limit: limits.Limit, where: str) -> dict[str, Any]:
    """A mapping of names; of regular expressions only those that stand for names are taken."""
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: {key} is {json.dumps(found)[:60]}; expected a mapping")
    named = {}
    for pattern, value in found.items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if set(name) & set("\\^$*+?{}[]|()"):
            raise UserError(f"{where}: {key}: {pattern[:80]!r} is a regular expression; expected a name")
        named[name] = limit.check(value, f"{where}: {key}: {pattern[:80]}")
    return named


def _of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that is `name` or its end after a dot, as PEFT looks it up."""
    return next((value for key, value in pattern.items() if f".{name}".endswith(f".{key}")), default)


def _kohya_alpha(path: pathlib.Path, metadata: Mapping[str, str]) -> float | None:
    text = metadata.get("ss_network_alpha", "None")
    if text == "None":
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    return limits.LORA_ALPHA.check(alpha, f"{path}: ss_network_alpha")
