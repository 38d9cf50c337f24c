import argparse
import dataclasses
from typing import Annotated

import numpy as np
import pytest

from vidgen.core import limits
from vidgen.core.config import ConfigError, resolve
from vidgen.core.errors import UserError
from vidgen.core.limits import Limit, check_fields

WHOLE = Limit(low=1, high=10, whole=True, unit="frames")
ABOVE = Limit(low=0, high=2, above=True)


@pytest.mark.parametrize("value", [1, 10, np.int32(3)])
def test_within(value):
    assert WHOLE.check(value, "x") is value


@pytest.mark.parametrize("value", [0, 11, 10**400, 2.0, True, None, "3", float("nan")])
def test_not_within(value):
    with pytest.raises(UserError, match=r"^a\.json: frames: found .*, expected a whole number from 1 to 10"):
        WHOLE.check(value, "a.json: frames")


@pytest.mark.parametrize("value", [0, 0.0, -1, float("inf"), float("-inf"), float("nan"), 2.1, False])
def test_open_and_finite(value):
    assert ABOVE.holds(1e-9) and ABOVE.holds(2) and not ABOVE.holds(value)


def test_options_of_commands(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--fps", type=limits.FPS)
    parser.add_argument("--num-frames", type=limits.NUM_FRAMES)
    found = parser.parse_args(["--fps", "8", "--num-frames", "17"])
    assert found.fps == 8.0 and found.num_frames == 17 and isinstance(found.num_frames, int)
    for text in ("nan", "inf", "1e-9", "-8", "x", ""):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--fps={text}"])
        assert "--fps: found" in capsys.readouterr().err
    for text in ("1000001", "0", "1.5", "9" * 5000):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--num-frames={text}"])
        assert "expected a whole number from 1 to 1,000,000 (frames)" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    frames: Annotated[int, WHOLE] = 1
    sides: tuple[Annotated[int, WHOLE], ...] = ()
    scale: Annotated[float, ABOVE] | None = None
    by_name: dict[str, Annotated[float, ABOVE]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "options")


def test_configs():
    values = {"frames": 3, "sides": [1, 2], "scale": 1, "by_name": {"a": 1}}
    assert resolve(Options, values) == Options(frames=3, sides=(1, 2), scale=1.0, by_name={"a": 1.0})
    with pytest.raises(ConfigError, match=r"config\.frames: found 0 of type int, expected a whole number"):
        resolve(Options, {"frames": 0})
    with pytest.raises(ConfigError, match=r"config.sides\[1\]: found 11"):
        resolve(Options, {"sides": [1, 11]})
    with pytest.raises(ConfigError, match=r"config.scale: found nan"):
        resolve(Options, {"scale": float("nan")})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"frames": 0}, "options.frames: found 0"),
        ({"sides": (1, 0)}, r"options.sides\[1\]: found 0"),
        ({"scale": float("inf")}, "options.scale: found inf"),
        ({"by_name": {"a": -1.0}}, "options.by_name.a: found -1.0"),
    ],
)
def test_fields(values, said):
    assert Options().scale is None
    with pytest.raises(UserError, match=said):
        Options(**values)
