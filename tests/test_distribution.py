"""What is in a wheel and a source archive, and that an installed vidgen works beside a user's own folders."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import vidgen

ROOT = pathlib.Path(__file__).parents[1]
NAME = f"vidgen_jax-{vidgen.__version__}"


def call(*command, cwd, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """A folder with the wheel and the source archive of the files that git tracks or would."""
    folder = tmp_path_factory.mktemp("distribution")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, folder / "source" / name
        if not os.path.lexists(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target, follow_symlinks=False)
    build = "from setuptools import build_meta as b; print(b.build_{}({!r}))"
    for kind in ("wheel", "sdist"):
        call(sys.executable, "-c", build.format(kind, str(folder)), cwd=folder / "source")
    return folder


def test_a_wheel_holds_one_package_with_all_that_commands_read(archives):
    names = zipfile.ZipFile(archives / f"{NAME}-py3-none-any.whl").namelist()
    assert {name.split("/")[0] for name in names} == {"vidgen", f"{NAME}.dist-info"}
    inside = {name.removeprefix("vidgen/") for name in names if name.startswith("vidgen/")}
    for folder in ("vidgen", "experiments", "pallas_kernels"):
        beside = {
            str(path.relative_to(ROOT / folder))
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".json", ".safetensors", ".typed")
            and not path.is_relative_to(ROOT / "vidgen" / "experiments")
            and not path.is_relative_to(ROOT / "vidgen" / "pallas_kernels")
        }
        prefix = "" if folder == "vidgen" else f"{folder}/"
        assert beside and {f"{prefix}{name}" for name in beside} - inside == set()
    assert not [name for name in inside if "__pycache__" in name]


def test_a_source_archive_holds_what_the_repository_has(archives):
    with tarfile.open(archives / f"{NAME}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        size = sum(member.size for member in archive.getmembers())
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "setup.py",
        "docs/design.md",
        "docs/images/vae_sprites.png",
        "launch/tpu_vm.sh",
        "launch/local.py",
        "tests/test_distribution.py",
        "tests/core/test_paths.py",
        "notebooks/quickstart.py",
        "benchmarks/startup.py",
        "requirements/dev.txt",
        "experiments/weights/sprites_vae/vae/model.safetensors",
        "pallas_kernels/attention/block_sizes.json",
    ):
        assert name in names
    assert size < 20e6, "something is in it twice"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_installed_vidgen_works_beside_folders_of_the_same_names(archives, tmp_path):
    call(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    # The packages that vidgen needs are those of this environment; its own are the wheel's.
    with zipfile.ZipFile(archives / f"{NAME}-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    (site / "shared.pth").write_text(str(pathlib.Path(pytest.__file__).parents[1]))
    here = tmp_path / "here"
    for name in ("experiments", "experiments/vae", "experiments/dit", "pallas_kernels"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise RuntimeError('of the user')")
    program = [str(python), "-m", "vidgen.cli.main"]  # With the current folder first on the path of imports.
    where = call(str(python), "-c", "import vidgen; print(vidgen.__file__)", cwd=here)
    assert where.strip().startswith(str(site))
    call(*program, "demo", "--help", cwd=here)
    call(*program, "train", "--config=experiments/vae/sprites.py:tiny", "--workdir=runs/vae", cwd=here)
    tiny = ["--config=dit/sprites.py:tiny", "--workdir=runs/dit", "--config.task.vae=runs/vae"]
    call(*program, "train", *tiny, cwd=here)
    call(
        *program, "sample", "--checkpoint=runs/dit", "--prompt=a circle", "--steps=2", "--out=a.mp4", cwd=here
    )
    assert (here / "a.mp4").stat().st_size > 0
    call(
        *program, "encode", "a.mp4", "--vae=experiments/weights/sprites_vae", "--out=a.safetensors", cwd=here
    )
