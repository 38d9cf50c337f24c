import importlib.util

import jax
import pytest

from vidgen.preflight import topology
from vidgen.preflight.topology import CHIPS, PreflightError, chip_of, prepare_environment, topology_devices


@pytest.mark.parametrize("name", ["v5q:2x2", "v5e", "v5e:4", "4x4", "v5e:4x4 "])
def test_wrong_names_are_errors(name):
    with pytest.raises(PreflightError, match=r"--topology=.* expected a generation \(v5e, v5p, v6e, tpu7x\)"):
        topology_devices(name)


def test_missing_libtpu_is_one_line_that_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        topology.importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(PreflightError, match=r'libtpu.* is not installed: pip install "vidgen\[tpu\]"'):
        topology_devices("v5e:4x4")


def test_what_libtpu_refuses_is_an_error_with_its_words(monkeypatch):
    from jax.experimental import topologies

    def refuse(**_):
        raise RuntimeError("3x2 is not divisible")

    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    with pytest.raises(PreflightError, match="v5e:3x2 is no slice that libtpu knows: 3x2 is not divisible"):
        topology_devices("v5e:3x2")


def test_environment_is_for_a_host_without_a_tpu():
    environment = {"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "mine"}
    prepare_environment(environment)
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["TPU_SKIP_MDS_QUERY"] == environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert environment["TPU_WORKER_HOSTNAMES"] == "mine"


def test_chips_are_told_apart_and_a_cpu_is_none():
    assert len({chip.kind for chip in CHIPS.values()}) == len(CHIPS)
    assert chip_of(jax.devices()[0]) is None
