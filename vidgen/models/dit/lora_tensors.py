"""Maps the tensors of a LoRA file to the transformer's arrays, and checks them."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from vidgen.ckpt.tensor_files import TensorFiles, WeightsError
from vidgen.ckpt.tensor_mapping import TensorMapping
from vidgen.core import limits
from vidgen.core.tree import named_leaves
from vidgen.models.dit.lora_scale import ScaleOf
from vidgen.models.dit.model import DiT
from vidgen.models.dit.params import diffusers_names, wan_names

__all__ = ["LoRATensors", "Pair", "Place", "read_tensors"]

_PREFIXES = (
    "",
    "transformer.",
    "diffusion_model.",
    "base_model.model.",
    "model.diffusion_model.",
    # Names with underscores for dots, as kohya's trainers and OneTrainer write them.
    "lora_unet_",
    "lora_unet__",
    "lora_transformer_",
)
_SIDES = {
    r"(.+)\.(?:lora_A|lora_down)(?:\.default)?\.weight": "down",
    r"(.+)\.(?:lora_B|lora_up)(?:\.default)?\.weight": "up",
    r"(.+)\.lora_B(?:\.default)?\.bias": "up_bias",
    r"(.+)\.alpha": "alpha",
    r"(.+)\.diff": "diff",
    r"(.+)\.diff_b": "diff_b",
}
_UNSUPPORTED = {
    r".*\.(dora_scale|lora_magnitude_vector)\b.*": "DoRA",
    r".*\.hada_.*": "LoHa",
    r".*\.lokr_.*": "LoKr",
    r".*\.oft_.*": "OFT",
    r".*\.lora_mid\..*": "LoCon of convolutions",
}
_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Place:
    """An array of the transformer, by dotted name, or one layer of a stacked array."""

    name: str
    layer: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """The two LoRA matrices of one linear map.

    Attributes:
      read: returns down [in, rank] and up [rank, out], float32; up includes the scale.
    """

    rank: int
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRATensors:
    """Contents of a LoRA file.

    Attributes:
      pairs: LoRA matrices by kernel.
      changes: by array, a function that returns the sum of its full-rank changes, float32, in the shape of
        the array or of one layer of it.
    """

    pairs: Mapping[Place, Pair]
    changes: Mapping[Place, Callable[[], np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Target:
    """An array of one layer that files may change, with its native and its external shape."""

    place: Place
    mapping: TensorMapping
    shape: tuple[int, ...]

    @property
    def external_shape(self) -> tuple[int, ...]:
        return self.mapping.external_shape(self.shape)


def read_tensors(files: TensorFiles, dit: DiT, path: pathlib.Path) -> LoRATensors:
    """LoRA matrices and full-rank changes of a file; checks every tensor first.

    Raises:
      WeightsError: tensors are unknown to this transformer, do not fit or are not finite; names each.
      UserError: an alpha is invalid or unsupported.
    """
    reader = _Reader(files, _targets(dit), path)
    grouped = reader.grouped()
    pairs: dict[Place, Pair] = {}
    changes: dict[Place, list[Callable[[], np.ndarray]]] = {}
    for base, sides in grouped:
        reader.read_base(base, sides, pairs, changes)
    if reader.problems or not (pairs or changes):
        listed = "\n".join(f"  {problem}" for problem in sorted(reader.problems)[:_SHOWN])
        raise WeightsError(f"{path} is not a valid LoRA of this transformer; unusable tensors:\n{listed}")
    return LoRATensors(pairs=pairs, changes={place: _sum_of(reads) for place, reads in changes.items()})


class _Reader:
    def __init__(self, files: TensorFiles, targets: Mapping[tuple[str, str], _Target], path: pathlib.Path):
        self._files = files
        self._targets = targets
        # Different names of one map have the same owner, which finds duplicates.
        self._owners = {base: _owner(target.place) for (base, _), target in targets.items()}
        peft = any(".lora_A" in name for name in files.shapes)
        self._scale_of = ScaleOf(path, files.metadata, peft=peft)
        self.problems: list[str] = []

    def grouped(self) -> list[tuple[str, dict[str, str]]]:
        """External name without prefix of each map or other array, and its tensor names by kind."""
        found: dict[Place, tuple[str, dict[str, str]]] = {}
        for name in self._files.shapes:
            kind = next((kind for pattern, kind in _UNSUPPORTED.items() if re.fullmatch(pattern, name)), None)
            if kind is not None:
                self.problems.append(
                    f"{name}: {kind} is not supported; merge it into the weights where it was trained"
                )
                continue
            side, base = self._parse_name(name)
            if base is None:
                self.problems.append(f"{name}: unknown")
                continue
            _, sides = found.setdefault(self._owners[base], (base, {}))
            if side in sides:
                self.problems.append(f"{name}: means the same as {sides[side]}")
            elif self._is_number(name):
                sides[side] = name
        return list(found.values())

    def read_base(
        self,
        base: str,
        sides: Mapping[str, str],
        pairs: dict[Place, Pair],
        changes: dict[Place, list[Callable[[], np.ndarray]]],
    ) -> None:
        """Adds the tensors of one map or other array to `pairs` and `changes`."""
        factor = 1.0
        kernel = self._targets.get((base, "weight"))
        if {"down", "up"} <= sides.keys() and kernel is not None:
            pair, factor = self._pair(base, sides, kernel)
            if pair is None:
                return
            pairs[kernel.place] = pair
        elif unpaired := sides.keys() & {"down", "up", "alpha", "up_bias"}:
            what = "no linear map" if kernel is None else "one factor of two"
            self.problems.append(f"{base} ({what if unpaired & {'down', 'up'} else 'no factors'}): unknown")
        for side, kind, scale in (
            ("diff", "weight", 1.0),
            ("diff_b", "bias", 1.0),
            ("up_bias", "bias", factor),
        ):
            if side not in sides:
                continue
            name, target = sides[side], self._targets.get((base, kind))
            shape = self._files.shapes[name]
            if target is None:
                self.problems.append(f"{name}: there is no such {kind}")
            elif shape != target.external_shape and shape != target.shape:
                self.problems.append(f"{name}: {shape} does not fit {target.external_shape}")
            else:
                changes.setdefault(target.place, []).append(_change(self._files, name, target, scale))

    def _parse_name(self, name: str) -> tuple[str, str | None]:
        """Kind of a tensor (a value of `_SIDES`) and its base name; None if no array has that name."""
        for pattern, side in _SIDES.items():
            if match := re.fullmatch(pattern, name):
                prefixed = match[1]
                found = (prefixed.removeprefix(p) for p in _PREFIXES if prefixed.startswith(p))
                return side, next((base for base in found if base in self._owners), None)
        return "", None

    def _is_number(self, name: str) -> bool:
        """Whether a tensor holds finite floating-point numbers; alpha may be an integer."""
        dtype = self._files.dtypes[name]
        if dtype.kind not in ("fVui" if name.endswith(".alpha") else "fV"):
            self.problems.append(f"{name}: of type {dtype}, expected floating point")
            return False
        # The comparison is false for NaN. Within the limit, products of down, up, alpha and scale are finite.
        if not (np.abs(self._files.read(name).astype(np.float32)) <= limits.LORA_WEIGHT.high).all():
            self.problems.append(f"{name}: holds numbers that are not finite, or not {limits.LORA_WEIGHT}")
            return False
        return True

    def _pair(self, base: str, sides: Mapping[str, str], kernel: _Target) -> tuple[Pair | None, float]:
        down, up = (self._files.shapes[sides[side]] for side in ("down", "up"))
        out, *inputs = kernel.external_shape
        rank = down[0] if down else 0
        fits = down in ((rank, *inputs), (rank, math.prod(inputs))) and up[:2] == (out, rank)
        if not fits or math.prod(up[2:]) != 1 or not limits.LORA_RANK.holds(rank):
            self.problems.append(f"{base}: {down} and {up} do not fit a map of {kernel.shape}")
            return None, 1.0
        factor = self._factor(base, sides.get("alpha"), rank)
        mapping = kernel.mapping
        if mapping.reshape is not None:
            mapping = dataclasses.replace(mapping, reshape=(*mapping.reshape[:-1], rank))

        def read() -> tuple[np.ndarray, np.ndarray]:
            first = self._files.read(sides["down"]).astype(np.float32).reshape(rank, *inputs)
            second = self._files.read(sides["up"]).astype(np.float32).reshape(out, rank)
            return mapping.to_native(first, (kernel.shape[0], rank)), second.T * np.float32(factor)

        return Pair(rank=rank, read=read), factor

    def _factor(self, base: str, alpha: str | None, rank: int) -> float:
        if alpha is None:
            return self._scale_of(base, rank)
        if math.prod(self._files.shapes[alpha]) != 1:
            self.problems.append(f"{alpha}: {self._files.shapes[alpha]}, expected one number")
            return 1.0
        value = float(self._files.read(alpha).astype(np.float32).reshape(()))
        return limits.LORA_ALPHA.check(value, f"{self._files.path}: {alpha}") / rank


def _owner(place: Place) -> Place:
    """The map or norm that owns an array, or the array itself."""
    name, _, last = place.name.rpartition(".")
    return Place(name, place.layer) if last in ("kernel", "scale", "bias") else place


def _change(files: TensorFiles, name: str, target: _Target, scale: float) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        tensor = files.read(name).astype(np.float32) * np.float32(scale)
        return target.mapping.to_native(tensor, target.shape)

    return read


def _sum_of(reads: Iterable[Callable[[], np.ndarray]]) -> Callable[[], np.ndarray]:
    return lambda: np.sum([read() for read in reads], axis=0)


def _targets(dit: DiT) -> dict[tuple[str, str], _Target]:
    """Arrays that files may change, by (external name of the owner, `weight` or `bias`)."""
    leaves = {name: leaf for name, leaf in named_leaves(dit).items() if ".low_rank." not in name}
    targets: dict[tuple[str, str], _Target] = {}
    for table in (diffusers_names, wan_names):
        for name, mapping in table(dit.config, leaves).items():
            shape = tuple(leaves[name].shape)
            for layer in range(shape[0]) if mapping.stacked else (None,):
                external = mapping.external_name.format(layer)
                base, _, kind = external.rpartition(".")
                if kind not in ("weight", "bias"):
                    base, kind = external, "weight"
                target = _Target(
                    place=Place(name, layer),
                    mapping=mapping,
                    shape=shape if layer is None else shape[1:],
                )
                targets[base, kind] = targets[base.replace(".", "_"), kind] = target
    return targets
