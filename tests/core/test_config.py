import dataclasses
import json
import pathlib
from typing import Any, Literal

import ml_collections
import pytest

from vidgen.core import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    kind: Literal["adam"] = "adam"
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    kind: Literal["muon"] = "muon"
    momentum: float = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    steps: int
    optimizer: Adam | Muon = Adam()
    optional: Adam | None = None
    widths: tuple[int, ...] = (1, 2)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int | None = None
    save: bool = True
    path: pathlib.Path | str = "."
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    extra: Any = None

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, expected 0 or more")


def test_nested_mapping_becomes_dataclasses():
    run = config.resolve(
        Run,
        {"steps": 3, "optimizer": {"kind": "muon", "momentum": 1}, "widths": [4, 5, 6], "weights": {"a": 1}},
    )
    assert run == Run(steps=3, optimizer=Muon(momentum=1.0), widths=(4, 5, 6), weights={"a": 1.0})
    assert isinstance(run.optimizer, Muon) and isinstance(run.optimizer.momentum, float)
    assert isinstance(run.widths, tuple)


def test_config_dict_is_a_mapping_too():
    values = ml_collections.ConfigDict(
        {"steps": 3, "optimizer": {"kind": "adam", "rate": 0.5}, "optional": {"rate": 2}}
    )
    run = config.resolve(Run, values)
    assert run == Run(steps=3, optimizer=Adam(rate=0.5), optional=Adam(rate=2.0))


def test_instances_pass_through():
    run = Run(steps=1)
    assert config.resolve(Run, run) is run
    assert config.resolve(Run, {"steps": 1, "optimizer": Muon()}).optimizer == Muon()


def test_a_union_can_be_the_root():
    assert config.resolve(Adam | Muon, {"kind": "muon"}) == Muon()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"steps": 1, "optimiser": {}}, ['config.optimiser: unknown key "optimiser" for Run', '"optimizer"']),
        (
            {"steps": 1, "optimizer": {"kind": "adam", "rat": 1}},
            ["config.optimizer.rat", 'did you mean "rate"'],
        ),
        ({}, ["config.steps: missing", "Run needs it (type int)"]),
        ({"steps": 1.5}, ["config.steps: found 1.5 of type float, expected int"]),
        ({"steps": True}, ["config.steps: found True of type bool, expected int"]),
        ({"steps": 1, "save": 1}, ["config.save: found 1 of type int, expected bool"]),
        ({"steps": 1, "precision": "bfloat"}, ["config.precision", 'did you mean "bfloat16"']),
        ({"steps": 1, "optimizer": {"rate": 1.0}}, ["config.optimizer", '"kind"', "adam, muon"]),
        ({"steps": 1, "optimizer": {"kind": "mun"}}, ["config.optimizer.kind", 'did you mean "muon"']),
        ({"steps": 1, "optimizer": 3}, ["config.optimizer: found 3 of type int", "Adam or Muon"]),
        ({"steps": 1, "optional": [1]}, ["config.optional: found [1] of type list"]),
        ({"steps": 1, "widths": [1, "x"]}, ["config.widths[1]: found 'x' of type str, expected int"]),
        ({"steps": 1, "widths": 3}, ["config.widths: found 3", "expected a list"]),
        (
            {"steps": 1, "optimizer": {"kind": "adam", "betas": [1.0]}},
            ["config.optimizer.betas", "expected 2"],
        ),
        ({"steps": 1, "seed": "a"}, ["config.seed: found 'a' of type str, expected int"]),
        ({"steps": 1, "weights": {"a": "b"}}, ["config.weights.a: found 'b'"]),
        ({"steps": -1}, ["config: steps is -1, expected 0 or more"]),
        (3, ["config: found 3 of type int", "fields of Run"]),
    ],
)
def test_errors_name_key_found_and_expected(values, parts):
    with pytest.raises(config.ConfigError) as caught:
        config.resolve(Run, values)
    for part in parts:
        assert part in str(caught.value)


def test_to_dict_is_the_json_inverse():
    run = Run(
        steps=2,
        optimizer=Muon(),
        optional=Adam(),
        path=pathlib.Path("a/b"),
        weights={"x": 0.1},
        extra=[1, (2,)],
    )
    plain = json.loads(json.dumps(config.to_dict(run)))
    assert plain["path"] == "a/b" and plain["optional"]["betas"] == [0.9, 0.999]
    back = config.resolve(Run, plain)
    assert config.to_dict(back) == config.to_dict(run)
    assert back.optimizer == Muon() and back.optional == Adam()


def test_to_dict_names_what_json_cannot_hold():
    with pytest.raises(config.ConfigError, match=r"config\.extra\[1\]: found <object"):
        config.to_dict(Run(steps=1, extra=[1, object()]))


@pytest.mark.parametrize("kind", [["adam"], {"adam": 1}, None, 3])
def test_a_kind_that_is_no_text_is_named(kind):
    with pytest.raises(config.ConfigError, match=r"config\.optimizer\.kind: unknown value"):
        config.resolve(Run, {"steps": 1, "optimizer": {"kind": kind}})
