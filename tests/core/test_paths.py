import argparse
import pathlib

import pytest

from vidgen.core import paths
from vidgen.core.config import ConfigError, resolve
from vidgen.core.errors import UserError
from vidgen.data.folder import FolderData

REMOTE = ["gs://bucket/runs", "s3://b/x", "hdfs://host:9000/x", "https://a.b/c.mp4", "file:///tmp/x"]


@pytest.mark.parametrize("path", [*REMOTE, pathlib.Path("gs://bucket/runs")])
def test_remote_paths_are_refused_as_they_were_given(path):
    with pytest.raises(UserError, match=r"--out: found '\w+:/.*:// is neither read nor written yet"):
        paths.local_path(path, "--out")
    with pytest.raises(argparse.ArgumentTypeError, match=r"^found '"):
        paths.path_option(str(path))


@pytest.mark.parametrize("path", ["runs/a", "/tmp/x:y", "a:b/c", "C:/clips", "x//y", ".", "gs", "a b://c"])
def test_other_paths_pass(path):
    assert paths.local_path(path) == paths.path_option(path) == pathlib.Path(path)


@pytest.mark.parametrize("path", REMOTE)
def test_remote_paths_of_a_config_are_refused(path):
    with pytest.raises(UserError, match=r"config\.data\.path: found .*neither read nor written"):
        resolve(FolderData, {"path": path}, "config.data")
    assert resolve(FolderData, {"path": "a:b"}).path == "a:b"


def test_what_is_missing_says_how_it_is_given():
    with pytest.raises(
        ConfigError, match=r"found None of type NoneType, expected str: give --config\.data\.path=DIR"
    ):
        resolve(FolderData, {"path": None}, "config.data")
    with pytest.raises(ConfigError, match=r"missing; FolderData needs it .*: give --config\.data\.path=DIR"):
        resolve(FolderData, {}, "config.data")
    with pytest.raises(ConfigError, match=r"needs it \(type str\)$"):
        resolve(FolderData, {}, "runs/a/config.json")


def test_files_that_come_with_vidgen_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = paths.packaged_experiments()
    vae = "experiments/weights/sprites_vae"
    assert (paths.packaged(vae) / "vae" / "config.json").is_file()
    assert (
        paths.packaged("dit/sprites.py")
        == paths.packaged("experiments/dit/sprites.py")
        == own / "dit/sprites.py"
    )
    for other in ("runs/vae", "", "experiments/../vae", str(tmp_path / "experiments" / "dit")):
        assert paths.packaged(other) == pathlib.Path(other)
    (tmp_path / vae).mkdir(parents=True)
    assert paths.packaged(vae) == pathlib.Path(vae)


def test_the_name_of_a_model_on_a_hub_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remedy = paths.hub_remedy("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert "hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir Wan2.1-T2V-1.3B-Diffusers" in remedy
    (tmp_path / "runs" / "dit").mkdir(parents=True)
    for path in ("runs/dit", "runs", "/runs/dit", "a/b/c", "../dit"):
        assert paths.hub_remedy(path) == ""
