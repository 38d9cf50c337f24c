import os
import subprocess
import sys

import pytest

from vidgen.core.accelerators import skip_absent_tpu


def platforms(environment, *, packages=("libtpu",), devices=()):
    environment = dict(environment)
    skip_absent_tpu(environment, devices=devices, installed=lambda name: name in packages)
    return environment.get("JAX_PLATFORMS")


def test_cpus_are_chosen_where_libtpu_is_installed_and_no_tpu_is_there(tmp_path):
    assert platforms({}) == "cpu"
    assert platforms({"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "libtpu.so"}) == "cpu"
    assert platforms({}, devices=[f"{tmp_path}/accel*"]) == "cpu"


@pytest.mark.parametrize(
    "environment",
    [
        {"TPU_NAME": "v5e"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"CLOUD_TPU_TASK_ID": "0"},
        {"JAX_FORCE_TPU_INIT": "1"},
    ],
)
def test_jax_chooses_where_a_variable_names_a_tpu(environment):
    assert platforms(environment) is None


def test_jax_chooses_where_there_is_anything_to_choose(tmp_path):
    (tmp_path / "accel0").touch()
    assert platforms({}, devices=["/absent*", f"{tmp_path}/accel*"]) is None
    assert platforms({}, packages=("libtpu", "jax_plugins")) is None
    assert platforms({}, packages=()) is None
    assert platforms({"JAX_PLATFORMS": "tpu"}) == "tpu"
    assert platforms({"JAX_PLATFORMS": ""}) == ""


def test_a_command_says_nothing_about_tpus():
    code = (
        "import jax; from vidgen.cli.main import run; run(lambda _: print(__import__('jax').devices()), [])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "CpuDevice(id=0)" in result.stdout
    assert result.stderr == ""
