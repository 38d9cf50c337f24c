"""The rules of the house that no linter knows: sizes, and commands in the documents that exist."""

import ast
import importlib
import keyword
import pathlib
import re
import statistics
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_FILE, MEDIAN_FILE, MAX_FUNCTION = 500, 200, 80
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def tracked(*patterns):
    """Files that git tracks or would, as paths below the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [pathlib.Path(line) for line in out.splitlines() if (ROOT / line).exists()]


def test_files_are_short():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in tracked("*.py")}
    lengths = [length for length in lines.values() if length]
    assert len(lengths) > 10, "no sources were found"
    assert {str(path): length for path, length in lines.items() if length > MAX_FILE} == {}
    assert statistics.median(lengths) < MEDIAN_FILE


def test_functions_fit_a_screen():
    long = {}
    for path in tracked("*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    long[f"{path}:{node.lineno} {node.name}"] = length
    assert long == {}


def test_packages_import_nothing_at_their_root():
    """`__init__.py` files are empty but for the public face and leaf packages, whose children are modules."""
    for path in tracked("vidgen/**/__init__.py"):
        children = [child for child in (ROOT / path).parent.iterdir() if (child / "__init__.py").exists()]
        if children:
            assert (ROOT / path).read_text().strip() == "", f"{path} has subpackages and is not empty"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_files_named_in_the_documents_exist(page):
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", text)
    assert [link for link in linked if not (page.parent / link).exists()] == []
    named = re.findall(
        r"\b(?<!/)((?:experiments|launch|notebooks|benchmarks|docs|requirements|tests)/[\w/]+\.\w+)", text
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_in_the_documents_exist(page):
    text = page.read_text()
    commands = set(re.findall(r"(?:^ {4}|`|\$ )vidgen ([a-z]\w*)", text, flags=re.MULTILINE))
    modules = set(re.findall(r"python3? -m (vidgen[\w.]*|launch[\w.]*|benchmarks[\w.]*)", text))
    targets = set(re.findall(r"(?:^ {4}|`|\$ )make ([a-z][\w-]*)", text, flags=re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    files = {command: f"{command}_" if keyword.iskeyword(command) else command for command in commands}
    assert {c for c, file in files.items() if not (ROOT / f"vidgen/cli/{file}.py").exists()} == set()
    programs = {
        m: [ROOT / m.replace(".", "/") / "__main__.py", ROOT / f"{m.replace('.', '/')}.py"] for m in modules
    }
    assert {m for m, paths in programs.items() if not any(path.exists() for path in paths)} == set()
    assert {t for t in targets if not re.search(rf"^{t}:", makefile, flags=re.MULTILINE)} == set()


def test_shapes_are_checked_in_every_package():
    packages = {path.parts[1] for path in tracked("vidgen/*/__init__.py")}
    option = re.search(r"--jaxtyping-packages=([\w.,]+)", (ROOT / "pyproject.toml").read_text())
    assert {f"vidgen.{package}" for package in packages} | {"beartype.beartype"} == set(option[1].split(","))


def test_pins_are_plain():
    for path in tracked("requirements/*.txt"):
        lines = [line for line in (ROOT / path).read_text().splitlines() if not line.startswith("#")]
        assert lines, f"{path} pins nothing"
        assert [
            line for line in lines if not re.match(r"^[\w.-]+(\[[\w,-]+\])?==[\w.!+]+( ; .+)?$", line)
        ] == []


MODULES = [".".join(p.with_suffix("").parts) for p in tracked("vidgen/**/*.py") if p.name != "__init__.py"]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_with_its_signatures_checked(module):
    assert importlib.import_module(module).__doc__, f"{module} has no docstring"


def test_commands_and_training_ask_no_role_for_its_type():
    """Tasks, data and models answer by methods of their roles: the command of a new kind is no new branch."""
    roles = set()
    for path in tracked("vidgen/models/*.py", "vidgen/data/*.py", "vidgen/train/*_task.py"):
        tree = ast.parse((ROOT / path).read_text())
        roles |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    roles -= {"BrokenClip"}  # an exception
    assert {"VAETask", "LatentsData", "SpritesData", "TextToVideo", "VideoVAE", "LPIPS"} <= roles
    asked = []
    for path in tracked("vidgen/cli/*.py", "vidgen/train/*.py", "vidgen/preflight/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "isinstance"
            ):
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                asked += [f"{path}:{node.lineno} {name}" for name in names & roles]
    assert asked == []
