import argparse
import json
import logging

import av
import numpy as np
import pytest

from vidgen.cli.main import main
from vidgen.cli.sample import _prompts
from vidgen.data.video_io import read_metadata
from vidgen.pipeline import load
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.guidance import AdaptiveProjected
from vidgen.sampling.steppers import Euler

FEW = ["--steps", "2"]


def sample(*arguments):
    return main(["sample", *map(str, arguments)])


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_an_mp4_with_what_made_it(tiny_runs, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, logger="vidgen")
    out = tmp_path / "new" / "a.mp4"
    arguments = ["--checkpoint", tiny_runs.dit, "--prompt", "a red circle", "--out", out, "--seed", 5, *FEW]
    assert sample(*arguments, "--guidance-scale", 2.5, "--negative-prompt", "blue", "--fps", 12) == 0
    assert capsys.readouterr().out.splitlines() == [str(out)]
    for line in (
        "loading",
        "loaded in",
        "step 0 of 2; compiling",
        "step 2 of 2; decoding",
        f"wrote {out} (5 ",
    ):
        assert line in caplog.text
    assert frames(out).shape == (5, 16, 16, 3)
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 12.0)
    assert json.loads(read_metadata(out)["vidgen"]) == {
        "prompt": "a red circle",
        "negative_prompt": "blue",
        "seed": 5,
        "num_frames": 5,
        "height": 16,
        "width": 16,
        "fps": 12.0,
        "steps": 2,
        "guidance_scale": 2.5,
        "shift": 1.0,
        "stepper": "dpm_solver",
        "checkpoint": str(tiny_runs.dit),
    }


def test_the_metadata_say_how_to_make_it_again(tiny_runs, tmp_path):
    out = tmp_path / "a.png"  # without loss
    arguments = ["--checkpoint", tiny_runs.dit, "--prompt", "a dog", "--out", out, "--num-frames", 1]
    assert sample(*arguments, "--stepper", "euler", "--steps", 1) == 0
    made_by = json.loads(read_metadata(out)["vidgen"])
    assert (made_by.pop("checkpoint"), made_by.pop("stepper")) == (str(tiny_runs.dit), "euler")
    assert made_by.pop("fps") == 8.0
    again = load(tiny_runs.dit)(made_by.pop("prompt"), stepper=Euler(), **made_by)
    np.testing.assert_array_equal(frames(out), again)


def test_other_guidance_and_a_cache(tiny_runs, tmp_path):
    out = tmp_path / "a.png"
    arguments = ["--checkpoint", tiny_runs.dit, "--prompt", "a dog", "--out", out, "--num-frames", 1]
    how = ["--guidance", "apg", "--guidance-interval", 0.1, 0.7, "--cache-threshold", 0.2]
    assert sample(*arguments, "--steps", 4, *how) == 0
    made_by = json.loads(read_metadata(out)["vidgen"])
    assert [made_by[name] for name in ("guidance", "guidance_interval", "cache_threshold")] == [
        "apg",
        [0.1, 0.7],
        0.2,
    ]
    expected = load(tiny_runs.dit)(
        "a dog",
        num_frames=1,
        steps=4,
        guidance=AdaptiveProjected(),
        guidance_interval=(0.1, 0.7),
        cache=TeaCache(threshold=0.2),
    )
    np.testing.assert_array_equal(frames(out), expected)


def test_a_file_of_prompts_gives_numbered_files(tiny_runs, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \na dog\n", encoding="utf-8")
    arguments = [
        "--checkpoint",
        tiny_runs.dit,
        "--prompt-file",
        prompts,
        "--seed",
        7,
        "--batch-size",
        2,
        *FEW,
    ]
    assert sample(*arguments, "--out", tmp_path / "s.mp4") == 0
    names = [f"s-{index:03}.mp4" for index in range(3)]
    assert sorted(path.name for path in tmp_path.glob("s*")) == names
    assert capsys.readouterr().out.splitlines()[-3:] == [str(tmp_path / name) for name in names]
    made_by = [json.loads(read_metadata(tmp_path / name)["vidgen"]) for name in names]
    assert [(m["prompt"], m["seed"]) for m in made_by] == [
        ("a red circle", 7),
        ("a blue square", 8),
        ("a dog", 9),
    ]
    # The second batch's clip is that of its seed alone.
    assert sample(*arguments[:2], "--prompt", "a dog", "--seed", 9, *FEW, "--out", tmp_path / "one.mp4") == 0
    difference = np.abs(frames(tmp_path / "one.mp4").astype(int) - frames(tmp_path / "s-002.mp4"))
    assert difference.max() <= 4, "beyond what rounding before the codec gives"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such/run"], "no/such/run is not the workdir of a training run"),
        (["--num-frames", "6"], "num_frames=6 is not 1 + 4 n; use 5 or 9"),
        (["--num-frames", "5", "--height", "16384", "--width", "16384"], "tokens of the video: found"),
    ],
)
def test_errors_that_need_the_model(tiny_runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = ["--checkpoint", tiny_runs.dit, "--prompt", "a dog", "--out", "a.mp4"]
    assert sample(*defaults, *arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("vidgen: ")]) == 1
    assert message in errors[-1] and "Traceback" not in "".join(errors)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, where nothing may be loaded."""
    (tmp_path / "taken.mp4").mkdir()
    (tmp_path / "file").write_bytes(b"\0no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vidgen.pipeline.load", lambda *a, **k: pytest.fail("the model is loaded"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.avi"], '--out a.avi: cannot write ".avi"; use one of .mp4, .gif, .png'),
        (["--out", "a"], '--out a: cannot write ""'),
        (["--out", "taken.mp4"], "taken.mp4 is a folder: give the name of a file"),
        (["--out", "file/a.mp4"], "file is no folder"),
        (["--out", "x" * 300 + ".mp4"], "this name cannot be written to"),
        (["--out", "a\0.mp4"], "this name cannot be written to"),
        (["--prompt", "a\0b"], "--prompt: character 1 is a NUL character, which is not text"),
        (["--prompt", "a\udc80"], "--prompt: character 1 is half of a surrogate pair, which is not text"),
        (["--negative-prompt", "\0"], "--negative-prompt: character 0 is a NUL character"),
        (
            ["--guidance-interval", "0.5", "0.2"],
            "guidance_interval=(0.5, 0.2): expected 0 <= low < high <= 1",
        ),
        (
            ["--num-frames", "1000000", "--height", "16384"],
            "--num-frames 1000000 --height 16384: found 16384000000, expected a whole number from 1 to",
        ),
        (["--image", "none.png"], "--image none.png: there is no such image"),
        (["--image", "file"], "file: cannot be decoded as an image"),
        (["--lora", "none.safetensors"], "--lora none.safetensors: there is no such file"),
        (["--lora-scale", "2"], "--lora-scale is for --lora"),
        (["--text-cache", "file"], "--text-cache file is a file: give a folder"),
    ],
)
def test_errors_before_anything_is_loaded(folder, capsys, arguments, message):
    assert sample("--checkpoint", "run", "--prompt", "a dog", "--out", "a.mp4", *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1 and errors.startswith("vidgen: ")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "taken.mp4"]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--guidance-scale", "nan inf -1 1e9 x"),
        ("--guidance-scale-2", "nan inf"),
        ("--shift", "nan inf 0 -3"),
        ("--fps", "nan inf 0 1e-9 -8"),
        ("--steps", "0 -1 1001 2.5 1e9"),
        ("--height", "0 1000000"),
        ("--width", "-16 1000000"),
        ("--num-frames", "0 1000001 x"),
        ("--seed", "-1 4294967296"),
        ("--lora-scale", "nan inf"),
        ("--cache-threshold", "-1 nan"),
        ("--batch-size", "0 -1"),
    ],
)
def test_numbers_out_of_range(folder, capsys, option, values):
    for value in values.split():
        with pytest.raises(SystemExit) as stopped:
            sample("--checkpoint", "run", "--prompt", "a dog", "--out", "a.mp4", f"{option}={value}")
        assert stopped.value.code == 2
        assert f"argument {option}: found '{value}', expected a" in capsys.readouterr().err


def test_the_seed_of_every_prompt_is_in_range(folder, capsys):
    (folder / "prompts.txt").write_text("a\nb\n")
    arguments = ["--checkpoint", "run", "--prompt-file", "prompts.txt", "--out", "a.mp4"]
    assert sample(*arguments, "--seed", 2**32 - 1) == 2
    assert "--seed of the last of 2 prompts: found 4294967296" in capsys.readouterr().err


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_lines_of_a_file_of_prompts_end_as_those_of_text_files(tmp_path, separator):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeffa red{separator}circle\r\nblue\n".encode())
    arguments = argparse.Namespace(prompt=None, prompt_file=file)
    assert _prompts(arguments) == [f"a red{separator}circle", "blue"]


def test_files_of_prompts_that_are_none(tmp_path, capsys):
    arguments = ["--checkpoint", "x", "--out", "a.mp4", "--prompt-file"]
    assert sample(*arguments, tmp_path / "missing.txt") == 2
    assert "missing.txt" in capsys.readouterr().err
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\0\xff")
    assert sample(*arguments, tmp_path / "binary.txt") == 2
    assert "binary.txt: not UTF-8 text" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n \n")
    assert sample(*arguments, tmp_path / "empty.txt") == 2
    assert "empty.txt holds no prompt: write one per line" in capsys.readouterr().err


def test_help_and_missing_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample("--help")
    assert stopped.value.code == 0 and "--guidance-scale" in capsys.readouterr().out
    for wrong in (["--prompt", "x", "--out", "a.mp4"], ["--checkpoint", "x", "--out", "a.mp4"]):
        with pytest.raises(SystemExit) as stopped:
            sample(*wrong)
        assert stopped.value.code == 2
        assert "required" in capsys.readouterr().err
