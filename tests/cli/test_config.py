import pytest

from vidgen.cli.main import main


def test_show_lists_every_value_and_its_type(capsys):
    assert main(["config", "show", "dit/sprites.py:tiny", "--config.run.batch_size=16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.run.batch_size = 16  (int" in "\n".join(lines)
    assert "config.task.kind = 'text_to_video'  ('text_to_video')" in lines
    assert any(line.startswith("config.task.dit.num_layers = ") for line in lines)
    assert all(line.startswith("config.") and line.endswith(")") for line in lines)


def test_show_with_docs_says_what_each_means(capsys):
    command = ["config", "show", "vae/folder.py:mixed,tiny", "--docs", "--config.data.path=clips"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "config.data.path = 'clips'  (str)\n    the folder.\n" in out
    assert "config.data.buckets[1].batch_size = 8  (" in out
    assert (
        "    seconds between the starts of consecutive clips of a video; None places clips end to end.\n"
        in out
    )


def test_show_names_what_has_to_be_given_and_unknown_keys(capsys):
    assert main(["config", "show", "vae/folder.py"]) == 2
    assert "config.data.path: found None" in (error := capsys.readouterr().err)
    assert "give --config.data.path=DIR" in error
    assert main(["config", "show", "vae/sprites.py", "--config.run.batchsize=3"]) == 2
    assert 'unknown key "batchsize" for RunOptions; did you mean "batch_size"' in capsys.readouterr().err


def test_fields_lists_what_may_be_given_with_defaults(capsys):
    assert main(["config", "fields"]) == 0
    out = capsys.readouterr().out
    roles = "VAETask | TextToVideoTask | your own ExperimentTask"
    assert out.startswith(f"Experiment:\n  task = (to be given)  ({roles})\n")
    assert main(["config", "fields", "config.task.dit"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("DiTConfig:\n") and "\n  num_layers = " in out
    assert main(["config", "fields", "data"]) == 0
    out = capsys.readouterr().out
    for name in ("SpritesData", "FolderData", "ArrayRecordData", "LatentsData"):
        assert f"{name}:\n  kind = " in out


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("task.ditt", 'config.task.ditt: unknown key "ditt"; did you mean "dit"?'),
        ("run.seed", "config.run.seed is a value of type int"),
        ("run.seed.x", "config.run.seed is a value of type int"),
    ],
)
def test_a_place_that_is_not_there_is_named(capsys, place, message):
    assert main(["config", "fields", place]) == 2
    assert message in capsys.readouterr().err
