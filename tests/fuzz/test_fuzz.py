"""Damaged input of every kind ends well or in an error that names the file, and leaves nothing behind."""

import random

import pytest

from tests.fuzz import mutate, runner
from tests.fuzz.bad_targets import FAULTS

SEED = 0
SMALL, LARGE = 3, 50
"""Inputs of each target."""
SECONDS_EACH = {"checkpoint", "import", "vae_diffusers", "vae_run", "wan_file", "workdir_model"}
"""They build whole models, and are left to the large test."""


def check(report, seed=SEED):
    told = [
        f"{result['target']}:{result['index']} ({result['file']}): {result['error']}\n"
        f"  again: {runner.reproduce(result, seed)}"
        for result in report.failures
    ]
    assert not told, "\n".join([report.summary(), *told[:20]])


def test_a_few_of_each(tmp_path):
    report = runner.run([("*", 0, SMALL)], tmp_path, seed=SEED, without=SECONDS_EACH)
    assert len(report.results) == SMALL * len(report.counts()) > 100
    check(report)
    outcomes = {result["outcome"] for result in report.results}
    assert {"success", "UserError", "WeightsError", "BrokenClip"} <= outcomes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_of_each(tmp_path):
    report = runner.run([("*", 1000, LARGE)], tmp_path, seed=SEED)
    assert report.counts().keys() >= SECONDS_EACH
    assert len(report.results) == LARGE * len(report.counts()) >= 2000
    print(report.summary())
    check(report)


@pytest.fixture(scope="module")
def of_bad_readers(tmp_path_factory):
    limits = runner.Limits(cpu_seconds=0.5, wall_seconds=2, peak_bytes=100 << 20)
    plan = [("good", 0, 2), ("writes", 0, 1), *((name, 0, 1) for name in FAULTS), ("good", 2, 1)]
    root = tmp_path_factory.mktemp("bad")
    report = runner.run(plan, root, module="tests.fuzz.bad_targets", limits=limits)
    assert [(result["target"], result["index"]) for result in report.results] == [
        (name, first + n) for name, first, count in plan for n in range(count)
    ]
    return {(result["target"], result["index"]): result for result in report.results}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_of_a_reader_is_found(of_bad_readers, name):
    result = of_bad_readers[name, 0]
    assert result["outcome"] == "failure" and FAULTS[name][1] in result["error"]


def test_a_good_reader_is_not_blamed(of_bad_readers):
    for index in range(3):  # The last of them in another worker.
        assert of_bad_readers["good", index]["outcome"] == "UserError"
    assert of_bad_readers["writes", 0]["outcome"] == "success"


MUTATORS = {
    mutate.damage_bytes: bytes(range(200)),
    mutate.damage_json: b'{"a": [1, 2.5, {"b": "text", "c": null}], "d": true}',
    mutate.damage_lines: b'{"file": "a", "caption": "b"}\nplain text\n',
    mutate.damage_safetensors: b"\x40\0\0\0\0\0\0\0"
    + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64)
    + bytes(8),
}


@pytest.mark.parametrize("damage", MUTATORS, ids=lambda damage: damage.__name__)
def test_damage_depends_on_the_generator_alone(damage):
    data = MUTATORS[damage]
    made = [damage(data, random.Random(f"x/{index}"), b"donor") for index in range(300)]
    again = [damage(data, random.Random(f"x/{index}"), b"donor") for index in range(300)]
    assert made == again
    assert len(set(made)) > 150 and sum(one != data for one in made) > 250
