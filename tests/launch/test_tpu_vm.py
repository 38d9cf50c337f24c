"""The TPU VM script, by the commands that it would run."""

import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "tpu_vm.sh"
WHERE = ["--name", "slice", "--zone", "z1"]


def run(action, *arguments, code=0):
    result = subprocess.run([SCRIPT, action, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    return result.stdout if code == 0 else result.stderr


def dry(action, *arguments):
    return run(action, "--dry-run", *WHERE, *arguments).splitlines()


def test_create_makes_copies_and_installs():
    create, copy, install = dry("create", "--type", "v5litepod-16", "--spot", "--project", "p")
    assert create.startswith("gcloud compute tpus tpu-vm create slice --accelerator-type=v5litepod-16 ")
    assert "--version=v2-alpha-tpuv5-lite --spot --zone=z1 --project=p" in create
    assert copy.startswith("gcloud compute tpus tpu-vm scp ")
    assert "slice:vidgen.tar.gz --worker=all --zone=z1" in copy
    assert ".[tpu]" in install and "--worker=all" in install


def test_create_queued_names_the_node_and_waits():
    create = dry("create", "--type", "v6e-16", "--queued")[0]
    assert create.startswith("gcloud compute tpus queued-resources create slice --node-id=slice ")
    assert "--runtime-version=v2-alpha-tpuv6e" in create


def test_run_goes_to_all_workers_quoted_and_logged():
    (line,) = dry("run", "--", "vidgen", "sample", "--prompt", "a red circle")
    assert "tpu-vm ssh slice --worker=all" in line
    assert "a\\\\\\ red\\\\\\ circle" in line, line
    assert "vidgen.log" in line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ssh", "--worker", "3"], "gcloud compute tpus tpu-vm ssh slice --worker=3 --zone=z1"),
        (["status"], "gcloud compute tpus tpu-vm describe slice --zone=z1"),
        (["status", "--queued"], "gcloud compute tpus queued-resources describe slice --zone=z1"),
        (["delete"], "gcloud compute tpus tpu-vm delete slice --quiet --zone=z1"),
        (
            ["delete", "--queued"],
            "gcloud compute tpus queued-resources delete slice --force --quiet --zone=z1",
        ),
    ],
)
def test_one_command_actions(arguments, expected):
    assert [line.strip() for line in dry(*arguments)] == [expected]


def test_errors_say_what_to_do():
    assert 'unknown action "creat": create, install' in run("creat", code=2)
    assert "create needs --name and --zone" in run("create", code=2)
    assert "create needs --type" in run("create", *WHERE, "--dry-run", code=2)
    assert 'type "v9": give --version' in run("create", *WHERE, "--type", "v9", "--dry-run", code=2)
    assert 'unknown option "--foo"' in run("run", "--foo", code=2)
    assert 'run needs a command after "--"' in run("run", *WHERE, code=2)
    assert "--zone needs a value" in run("run", "--zone", code=2)


def test_help_is_the_head_of_the_script():
    out = run("--help")
    assert out.startswith("Runs one command on every worker")
    assert "set -euo" not in out
