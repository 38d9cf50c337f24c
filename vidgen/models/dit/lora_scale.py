"""Scale of LoRA, from every place where trainers and libraries store alpha."""

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
"""Key of the header's metadata where diffusers (0.34 and later) stores PEFT's config, as JSON."""

_DEFAULT_ALPHA = 8.0
"""PEFT's default for a config without `lora_alpha`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Rank and alpha of the linear maps in PEFT's adapter config.

    Attributes:
      where: the file, and the part of it, for messages.
      rank: rank of all maps except those in `rank_pattern`; None if the config gives none.
      alpha: alpha of all maps except those in `alpha_pattern`; the scale is alpha / rank.
      use_rslora: the scale is alpha / sqrt(rank) instead (arXiv 2312.03732).
      rank_pattern, alpha_pattern: exceptions by name of the linear map, or by the end of a name after a dot.
    """

    where: str
    rank: int | None
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def scale(self, name: str, rank: int) -> float:
        """Scale of the linear map `name`, whose tensors have rank `rank`.

        Raises:
          WeightsError: the config has another rank for `name`.
        """
        config_rank = _lookup(self.rank_pattern, name, self.rank)
        if config_rank is not None and config_rank != rank:
            raise WeightsError(
                f"{self.where} says rank {config_rank} of {name}, whose tensors have rank {rank}: take the "
                "config and the tensors from the same LoRA"
            )
        alpha = _lookup(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


class ScaleOf:
    """Scale of the linear maps of one file that have no alpha tensor; logs the source of alpha once."""

    def __init__(self, path: pathlib.Path, metadata: Mapping[str, str], *, peft: bool):
        """Reads the adapter config, or else kohya's metadata.

        Args:
          path: the LoRA file; PEFT writes the adapter config into the same folder.
          metadata: metadata of the file's header.
          peft: tensors have PEFT's names `lora_A` and `lora_B`, not `lora_down` and `lora_up`. Converters to
            PEFT's names multiply alpha into the tensors and leave kohya's metadata unchanged, so kohya's
            metadata is ignored.

        Raises:
          UserError: the adapter config is invalid, or has unsupported options.
        """
        self._path = path
        self._config = read_adapter_config(path, metadata) if peft else _header_config(path, metadata)
        self._alpha = None if peft or self._config else _kohya_alpha(path, metadata)
        self._logged = False

    def __call__(self, name: str, rank: int) -> float:
        """Scale of the linear map `name`, which is the external name without prefix."""
        if self._config is not None:
            self._log(f"the scale is from {self._config.where}", warn=False)
            return self._config.scale(name, rank)
        if self._alpha is not None:
            self._log(f"alpha is {self._alpha:g}, from the header's ss_network_alpha", warn=False)
            return self._alpha / rank
        self._log(
            "alpha is neither in the tensors, nor in the header's metadata, nor in a config beside the file: "
            "assuming alpha = rank (scale 1), which is too weak or too strong if the LoRA was trained with "
            "another alpha",
            warn=True,
        )
        return 1.0

    def _log(self, message: str, *, warn: bool) -> None:
        if not self._logged:
            (_log.warning if warn else _log.info)("%s: %s", self._path, message)
        self._logged = True


def read_adapter_config(path: pathlib.Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    """PEFT's adapter config of a LoRA file, from its header or else from adapter_config.json; None if absent.

    adapter_config.json is used only if it must belong to the file: the file has PEFT's name, or is the only
    safetensors file in its folder.

    Raises:
      UserError: the config is invalid, or has unsupported options.
    """
    config = _header_config(path, metadata)
    config_path = path.with_name(ADAPTER_CONFIG)
    if config is not None or not config_path.exists():
        return config
    if path.name != "adapter_model.safetensors" and len(list(path.parent.glob("*.safetensors"))) > 1:
        _log.warning("%s is not used for %s: the folder has other safetensors files", config_path, path.name)
        return None
    remedy = "take it from where the LoRA is from"
    return _config(read_json(config_path, remedy=remedy), str(config_path))


def _header_config(path: pathlib.Path, metadata: Mapping[str, str]) -> AdapterConfig | None:
    if _METADATA not in metadata:
        return None
    where = f"{path}: {_METADATA}"
    values = parse_json(metadata[_METADATA], where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: found JSON of type {type(values).__name__}, expected a mapping")
    # Keys start with the pipeline component; those of text encoders are ignored.
    transformer_values = {
        key.removeprefix("transformer."): value for key, value in values.items() if _is_transformer_key(key)
    }
    return _config(transformer_values, where) if transformer_values else None


def _is_transformer_key(key: str) -> bool:
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
    """Values by name from a PEFT pattern; accepts only regular expressions that match a single name."""
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


def _lookup(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """Value of the first key that equals `name` or its end after a dot, as PEFT looks it up."""
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
