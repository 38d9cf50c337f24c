"""Classes of users in configs: named when saved, imported only when trusted."""

import dataclasses
import json
import sys
from typing import Protocol, runtime_checkable

import pytest

from vidgen.core.config import ConfigError, resolve, to_dict
from vidgen.core.errors import UserError
from vidgen.core.user_classes import class_name, import_file, load_class, trusting

SOURCE = """
import dataclasses, pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()

@dataclasses.dataclass(frozen=True)
class Half:
    size: float = 0.5
    def scale(self): return self.size

@dataclasses.dataclass(frozen=True)
class Empty:
    pass

class Plain:
    def scale(self): return 1
"""


@runtime_checkable
class Scale(Protocol):
    def scale(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Options:
    scale: Scale | None = None


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    yield path
    for name in [name for name in sys.modules if name.startswith("_vidgen_config_")]:
        del sys.modules[name]


def test_an_instance_is_saved_by_name_and_loaded_by_it(file):
    half = import_file(file).Half(size=0.25)
    saved = json.loads(json.dumps(to_dict(Options(scale=half))))
    assert saved == {"class": f"{__name__}:Options", "scale": {"class": f"{file}:Half", "size": 0.25}}
    assert resolve(Options, {"scale": saved["scale"]}) == Options(scale=half)
    with pytest.raises(ConfigError, match="Empty does not fill the role Scale: it lacks scale"):
        resolve(Options, {"scale": import_file(file).Empty()})
    with pytest.raises(ConfigError, match=r'scale\.sise: unknown key "sise" for Half; did you mean "size"'):
        resolve(Options, {"scale": {"class": f"{file}:Half", "sise": 1}})


def test_a_class_is_imported_only_if_it_is_trusted(file):
    values = {"scale": {"class": f"{file}:Half"}}
    with pytest.raises(UserError, match=r"importing it executes code: .* with --trust"):
        resolve(Options, values)
    assert not file.with_suffix(".ran").exists()
    with trusting():
        assert resolve(Options, values).scale.scale() == 0.5
    assert file.with_suffix(".ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (5, r'where\.class: found 5, expected "module:Name" or "file.py:Name"'),
        ("os", 'expected "module:Name"'),
        ("os:system", "os:system is no frozen dataclass"),
        ("{}:Plain", "mine.py:Plain is no frozen dataclass"),
        ("{}:Missing", "mine.py:Missing is no frozen dataclass"),
        ("no_such_module:Half", r"no_such_module:Half .*cannot be imported"),
        ("/no/such.py:Half", "there is no file /no/such.py"),
    ],
)
def test_names_of_no_option(file, name, message):
    with trusting(), pytest.raises(UserError, match=message):
        load_class(name.format(file) if isinstance(name, str) else name, "where")


def test_a_class_that_cannot_be_found_again_is_not_saved():
    @dataclasses.dataclass(frozen=True)
    class Local:
        pass

    with pytest.raises(UserError, match=r"Local .* cannot be named in a saved config: define it at the top"):
        class_name(Local)
