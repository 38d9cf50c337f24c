import json

import av
import jax
import numpy as np
import pytest

from vidgen.cli.main import main
from vidgen.data.video_io import read_metadata
from vidgen.pipeline import load
from vidgen.sampling.caching import TeaCache
from vidgen.sampling.generate import generate
from vidgen.sampling.guidance import AdaptiveProjected
from vidgen.sampling.options import SamplingOptions
from vidgen.sampling.steppers import Euler
from vidgen.sampling.time_grid import TimeGrid

FEW = ["--steps", "2"]


def sample(*arguments):
    return main(["sample", *map(str, arguments)])


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_an_mp4_with_what_made_it(tiny_runs, tmp_path, capsys):
    out = tmp_path / "new" / "a.mp4"
    arguments = ["--checkpoint", tiny_runs.dit, "--prompt", "a red circle", "--out", out, "--seed", 5, *FEW]
    assert sample(*arguments, "--guidance-scale", 2.5, "--negative-prompt", "blue", "--fps", 12) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
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
    pipeline = load(tiny_runs.dit)
    options = SamplingOptions(
        grid=TimeGrid(num_steps=4),
        guidance=AdaptiveProjected(),
        guidance_interval=(0.1, 0.7),
        cache=TeaCache(threshold=0.2),
    )
    with jax.set_mesh(pipeline.mesh):
        expected = generate(
            pipeline.model, pipeline.vae, ["a dog"], size=(1, 16, 16), seeds=[0], options=options
        )
    np.testing.assert_array_equal(frames(out), expected[0])


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
        (["--out", "a.avi"], '--out a.avi: cannot write ".avi"; use one of .mp4, .gif, .png'),
        (["--out", "a"], '--out a: cannot write ""'),
        (["--checkpoint", "no/such/run"], "no/such/run is not the workdir of a training run"),
        (["--num-frames", "6"], "num_frames=6 is not 1 + 4 n; use 5 or 9"),
        (["--batch-size", "0"], "--batch-size is 0: give at least 1"),
        (["--fps", "0"], "--fps is 0.0: give a positive number"),
        (
            ["--guidance-interval", "0.5", "0.2"],
            "guidance_interval=(0.5, 0.2): expected 0 <= low < high <= 1",
        ),
        (["--cache-threshold", "-1"], "threshold=-1.0 must be 0, which computes every step, or more"),
    ],
)
def test_errors_are_one_line_and_status_2(tiny_runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    defaults = ["--checkpoint", tiny_runs.dit, "--prompt", "a dog", "--out", "a.mp4"]
    assert sample(*defaults, *arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("vidgen: ")]) == 1
    assert message in errors[-1] and "Traceback" not in "".join(errors)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_files_of_prompts_that_are_none(tmp_path, capsys):
    arguments = ["--checkpoint", "x", "--out", "a.mp4", "--prompt-file"]
    assert sample(*arguments, tmp_path / "missing.txt") == 2
    assert "missing.txt" in capsys.readouterr().err
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
