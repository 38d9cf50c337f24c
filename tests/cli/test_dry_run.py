import collections
import shutil

import pytest

from vidgen.cli.dry_run import check_disk
from vidgen.cli.main import main
from vidgen.core.errors import UserError


def dry(tmp_path, *options, config="vae/sprites.py:tiny"):
    return main(["train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--dry-run", *options])


def test_a_run_that_can_begin_is_described_and_nothing_is_written(tmp_path, capsys):
    assert dry(tmp_path) == 0
    out = capsys.readouterr().out
    assert "parameters; mesh {'data': 8" in out
    assert "first batch: 8 clips" in out and "2 are kept" in out
    assert "nothing stands against 2 steps" in out
    assert list(tmp_path.iterdir()) == []


def test_what_would_stop_it_is_named(tmp_path, capsys):
    absent = ["--config.run.init_from=none/of_that"]
    assert dry(tmp_path, *absent) == 2
    error = capsys.readouterr().err
    assert "config.run.init_from: none/of_that is not the workdir" in error and "hf download" in error
    (tmp_path / "file").touch()
    assert main(["train", "--config=vae/sprites.py:tiny", f"--workdir={tmp_path / 'file'}", "--dry-run"]) == 2
    assert "file is no folder" in capsys.readouterr().err
    assert dry(tmp_path, "--config.task.vae=runs/none", config="dit/sprites.py:tiny") == 2
    assert "holds no VAE" in capsys.readouterr().err
    assert dry(tmp_path, f"--config.data.path={tmp_path}", config="vae/folder.py:tiny") == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(10 << 30, 7 << 30, 3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: {tmp_path: usage}[path])
    assert check_disk(tmp_path / "runs" / "a", 3 << 30) == 3 << 30
    with pytest.raises(UserError, match=r"runs/a: 3\.0 GiB are free, .* take 4\.5 GiB: free some"):
        check_disk(tmp_path / "runs" / "a", 9 << 29)
