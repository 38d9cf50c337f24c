import sys

import pytest

from vidgen.cli.overrides import load_config
from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError
from vidgen.core.paths import packaged_experiments
from vidgen.models.video_vae.config import VARIANTS

OWN = """
from ml_collections import ConfigDict
from . import base

def get_config(arg="none"):
    if arg == "bad":
        raise ValueError("unknown argument 'bad'")
    return ConfigDict({"a": {"b": base.VALUE, "text": "x"}, "arg": arg})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with packages called as vidgen's own folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("experiments/vae", "pallas_kernels/attention"):
        (tmp_path / name).mkdir(parents=True)
        for place in (tmp_path / name, (tmp_path / name).parent):
            (place / "__init__.py").write_text("raise RuntimeError('of the user')")
    for name in ("own:1.py", "base.py"):
        (tmp_path / name).write_text(OWN if name.startswith("own") else "VALUE = 3")
    return tmp_path


def test_vidgens_own_experiments_are_found_by_name(folder):
    for spec in ("experiments/vae/finetune.py:tiny", "vae/finetune.py:tiny"):
        values = load_config(spec, ["--config.run.batch_size=4", "--config.data.path=x"])
        assert values["task"]["kind"] == "vae" and values["run"]["batch_size"] == 4
    assert "experiments" not in sys.modules and "pallas_kernels" not in sys.modules


def test_a_file_in_the_current_folder_goes_first_and_imports_what_is_beside_it(folder):
    (folder / "experiments" / "vae" / "sprites.py").write_text(OWN)
    with pytest.raises(ConfigError, match=r"sprites\.py imports another file of its folder, .* not there: "):
        load_config("experiments/vae/sprites.py", [])
    for value in (1, 2):
        (folder / "experiments" / "vae" / "base.py").write_text(f"VALUE = {'1' * value}")
        assert load_config("experiments/vae/sprites.py:tiny", []) == {
            "a": {"b": int("1" * value), "text": "x"},
            "arg": "tiny",
        }


def test_arguments_colons_and_overrides(folder):
    assert load_config("own:1.py", [])["arg"] == "none"
    values = load_config(
        f"{folder}/own:1.py:some", ["--config.a.text=1", "--config.a.b=[1, 2]", "--config.c.d=true"]
    )
    assert values == {"a": {"b": [1, 2], "text": "1"}, "arg": "some", "c": {"d": True}}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("own:1.py", ["--config.a.b", "4"], '"--config.a.b" has no value; write it with "=": --config.a.b=4'),
        ("own:1.py", ["--config.a.b", "--x"], 'write it with "=": --config.a.b=VALUE'),
        ("own:1.py", ["--batch"], '"--batch" is no option; values are changed by --config.section.key=value'),
        ("own:1.py", ["--config.a.b.c=1"], "config.a.b.c: a.b is the value 3"),
        ("own:1.py:bad", [], "--config=own:1.py:bad: unknown argument 'bad'"),
        ("base.py", [], "base.py has no function get_config"),
        ("none.py:tiny", [], "there is no file none.py; expected FILE.py or FILE.py:ARGUMENT"),
        ("none.py", [], "dit/folder.py, dit/sprites.py"),
        ("wrong.py", [], "wrong.py, line 2: "),
        ("notes.txt", [], "notes.txt is no Python file"),
    ],
)
def test_errors_name_the_file_and_the_remedy(folder, spec, overrides, message):
    (folder / "wrong.py").write_text("a = 1\nb = = 2\n")
    (folder / "notes.txt").write_text("a = 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(spec, overrides)
    assert message in str(caught.value)


def test_a_config_on_another_machine_is_refused():
    with pytest.raises(UserError, match="gs:// is neither read nor written yet"):
        load_config("gs://bucket/own.py:tiny", [])


EXPERIMENTS = sorted(
    "/".join(path.parts[-2:]) for path in packaged_experiments().glob("*/*.py") if path.name != "__init__.py"
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_wrong_argument_names_those_of_the_file_itself(name):
    with pytest.raises(ConfigError) as caught:
        load_config(f"{name}:no-such", [])
    message = str(caught.value)
    assert f"--config={name}:no-such: unknown argument 'no-such': use " in message
    offered = set(message.partition(": use ")[2].replace("'", "").replace(" or ", ", ").split(", ")) - {
        "none"
    }
    documented = load_text(name).partition("Arguments:")[2].partition("Hardware:")[0]
    assert {"tiny"} <= offered
    for argument in offered:
        assert load_config(f"{name}:{argument}", [])["run"]["num_steps"] >= 1
        assert f"`{argument}`" in documented or argument in VARIANTS


def load_text(name):
    return (packaged_experiments() / name).read_text()
