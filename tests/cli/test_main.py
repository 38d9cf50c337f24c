import signal
import subprocess
import sys
import types

import pytest

from vidgen.cli import main as cli
from vidgen.core.config import ConfigError
from vidgen.core.errors import UserError


def fake(monkeypatch, name, main):
    monkeypatch.setitem(sys.modules, f"vidgen.cli.{name}", types.SimpleNamespace(main=main))


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_the_commands(flag, capsys):
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    for command in ("train", "sample", "evaluate", "data", "demo"):
        assert f"\n  {command} " in out


def test_no_command_is_an_error_with_the_usage(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "usage: vidgen" in captured.err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vidgen 0.")


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert 'unknown command "trian"; did you mean "train"?' in capsys.readouterr().err


def test_the_rest_of_the_arguments_reaches_the_command(monkeypatch):
    seen = []
    fake(monkeypatch, "train", lambda argv: seen.append(list(argv)) or 5)
    assert cli.main(["train", "--config", "x"]) == 5
    assert seen == [["--config", "x"]]


@pytest.mark.parametrize(
    "error", [ConfigError("config.x: no"), UserError("config.x: no"), FileNotFoundError("config.x: no")]
)
def test_user_errors_are_one_line(monkeypatch, capsys, error):
    def fails(argv):
        raise error

    monkeypatch.delenv("VIDGEN_TRACEBACK", raising=False)
    fake(monkeypatch, "sample", fails)
    assert cli.main(["sample"]) == 2
    assert capsys.readouterr().err == "vidgen: config.x: no\n"
    assert cli.run(fails, []) == 2
    monkeypatch.setenv("VIDGEN_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["sample"])


@pytest.mark.parametrize("error", [ValueError("shapes (2, 3) and (4,)"), RuntimeError("x"), TypeError("y")])
def test_errors_of_libraries_keep_their_traceback(error):
    def fails(argv):
        raise error

    with pytest.raises(type(error)):
        cli.run(fails, [])


def test_defects_keep_their_traceback(monkeypatch):
    fake(monkeypatch, "sample", lambda argv: {}["absent"])
    with pytest.raises(KeyError):
        cli.main(["sample"])


def test_none_is_success_and_interrupt_is_130(capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    assert cli.run(lambda argv: None, []) == 0
    assert cli.run(interrupted, []) == 130


def test_as_a_module_and_light():
    code = "import sys; from vidgen.cli import main; main.main(['--help']); assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    result = subprocess.run(
        [sys.executable, "-m", "vidgen.cli.main", "evalute"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and 'did you mean "evaluate"' in result.stderr


def test_sigterm_ends_a_command_as_an_exception(capsys):
    """So that what is half written is removed."""
    cleaned = []

    def stopped(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert cli.run(stopped, []) == 143
    assert cleaned == [True] and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "vidgen: terminated\n"
