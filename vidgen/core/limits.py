"""Ranges of the numbers in command lines, configs and files, in one table.

A `Limit` is the type of a command's option (`add_argument("--fps", type=limits.FPS)`), the annotation of a
config field (`fps: Annotated[float, limits.FPS]`, checked by `core.config.resolve` and `check_fields`) and a
check of any other number (`limits.FPS.check(value, "clip.json: fps")`).
"""

import argparse
import dataclasses
import math
import numbers
import typing
from typing import Any

from vidgen.core.errors import UserError

__all__ = ["Limit", "check_fields"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """A range of finite numbers.

    Attributes:
      low: smallest value.
      high: largest value.
      whole: integers only.
      above: excludes `low` itself.
      unit: unit of the numbers, for messages.
    """

    low: int | float
    high: int | float
    whole: bool = False
    above: bool = False
    unit: str = ""

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        start = "above" if self.above else "from"
        joint = "and at most" if self.above else "to"
        unit = f" ({self.unit})" if self.unit else ""
        return f"{kind} {start} {_shown(self.low)} {joint} {_shown(self.high)}{unit}"

    def holds(self, value: Any) -> bool:
        """Whether `value` is a number of the right type within the range."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        # Ints are finite and compare exactly; `isfinite` overflows on huge ones.
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        number: Any = value
        return bool((self.low < number if self.above else self.low <= number) and number <= self.high)

    def check(self, value: Any, where: str) -> Any:
        """Returns `value` if it is in the range.

        Args:
          where: option, or file and key, with which the message begins.

        Raises:
          UserError: `value` is not a number, not finite, not an integer or out of range.
        """
        if not self.holds(value):
            shown = repr(value)
            raise UserError(
                f"{where}: found {shown if len(shown) <= 60 else shown[:57] + '...'}, expected {self}"
            )
        return value

    def __call__(self, text: str) -> Any:
        """Number parsed from a command-line argument.

        Raises:
          ArgumentTypeError: as in `check`; argparse names the option.
        """
        try:
            value = int(text) if self.whole else float(text)
        except ValueError:
            value = None
        if value is None or not self.holds(value):
            raise argparse.ArgumentTypeError(f"found {text[:60]!r}, expected {self}")
        return value


def check_fields(obj: Any, where: str = "") -> None:
    """Checks every field of a dataclass that is annotated with a `Limit`, for use in `__post_init__`.

    None passes if the annotation allows it; each item of a tuple or mapping is checked.

    Args:
      where: path of the object, the prefix of its field names in messages.

    Raises:
      UserError: a field is out of range; the message names it.
    """
    for name, hint in typing.get_type_hints(type(obj), include_extras=True).items():
        _check(hint, getattr(obj, name), f"{where}.{name}" if where else name)


def _check(hint: Any, value: Any, where: str) -> None:
    for limit in getattr(hint, "__metadata__", ()):
        if isinstance(limit, Limit):
            limit.check(value, where)
    arguments = typing.get_args(hint)
    if value is None or not arguments:
        return
    if isinstance(value, tuple | list):
        items = arguments[:1] * len(value) if len(arguments) < 2 or arguments[1] is ... else arguments
        for index, (item, inner) in enumerate(zip(items, value, strict=False)):
            _check(item, inner, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check(arguments[-1], inner, f"{where}.{key}")
    elif typing.get_origin(hint) is not typing.Annotated:
        # A union: at most one member has a range for numbers, and a dataclass belongs to another member.
        if dataclasses.is_dataclass(value):
            return
        for member in arguments:
            if getattr(member, "__metadata__", None):
                _check(member, value, where)


def _shown(number: int | float) -> str:
    return f"{number:,.0f}" if float(number).is_integer() and abs(number) < 1e15 else f"{number:g}"


# Videos
NUM_FRAMES = Limit(low=1, high=1_000_000, whole=True, unit="frames")
SIDE = Limit(low=1, high=16_384, whole=True, unit="pixels")
PIXELS = Limit(low=1, high=2**32, whole=True, unit="pixels of all frames of a video")
FPS = Limit(low=0.001, high=1000, unit="frames per second")
HELDOUT_EVERY = Limit(low=2, high=1_000_000, whole=True, unit="seconds")
SECONDS = Limit(low=0.001, high=1e6, unit="seconds")
FACTOR = Limit(low=1, high=1024, whole=True, unit="pixels or frames of a latent")

# Runs
STEPS = Limit(low=1, high=1e9, whole=True, unit="steps")
STEP = Limit(low=0, high=1e9, whole=True, unit="steps")
BATCH_SIZE = Limit(low=1, high=1e6, whole=True, unit="clips")
COUNT = Limit(low=1, high=1e9, whole=True)
NUM_CLIPS = Limit(low=0, high=1e9, whole=True, unit="clips")
NUM_THREADS = Limit(low=1, high=1024, whole=True, unit="threads")
NUM_PROCESSES = Limit(low=1, high=100_000, whole=True, unit="processes")
SEED = Limit(low=0, high=2**32 - 1, whole=True)
PROBABILITY = Limit(low=0, high=1)
DECAY = Limit(low=0, high=1, unit="decay per step")
LEARNING_RATE = Limit(low=0, high=1000)
POSITIVE = Limit(low=0, high=1e30, above=True)
NON_NEGATIVE = Limit(low=0, high=1e30)
FINITE = Limit(low=-1e30, high=1e30)

# Sampling
SAMPLER_STEPS = Limit(low=1, high=1000, whole=True, unit="steps")
SHIFT = Limit(low=0.001, high=1000)
GUIDANCE_SCALE = Limit(low=0, high=1000)
TIMESTEP = Limit(low=0, high=1, unit="0 data, 1 noise")
MOMENTUM = Limit(low=-1, high=1)
LORA_SCALE = Limit(low=-1000, high=1000)

# Models
LAYERS = Limit(low=1, high=1000, whole=True, unit="layers")
WIDTH = Limit(low=1, high=1_000_000, whole=True, unit="channels")
HEADS = Limit(low=1, high=4096, whole=True, unit="heads")
PATCH = Limit(low=1, high=64, whole=True)
VOCABULARY = Limit(low=1, high=10_000_000, whole=True, unit="tokens")
TOKENS = Limit(low=1, high=1_000_000, whole=True, unit="tokens")
EPSILON = Limit(low=0, high=1)
LORA_RANK = Limit(low=1, high=8192, whole=True)
LORA_WEIGHT = Limit(low=-1e12, high=1e12)
LORA_ALPHA = Limit(low=0, high=1e6)
RES_BLOCKS = Limit(low=1, high=32, whole=True, unit="blocks of a level")
MAX_LEVELS = 8
POSITIONS = Limit(low=0, high=1_000_000, whole=True, unit="tokens")
BUCKETS = Limit(low=4, high=65_536, whole=True)
STATISTIC = Limit(low=-1e30, high=1e30)
