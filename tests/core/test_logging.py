import logging
import subprocess
import sys
import types

import pytest

from vidgen.core import logging as vidgen_logging


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_level_from_the_environment_and_no_jax_at_import():
    code = (
        "import sys; from vidgen.core.logging import get_logger;"
        "get_logger('x'); log = get_logger('vidgen.train'); log.debug('fine'); log.info('plain');"
        "assert 'jax' not in sys.modules"
    )
    debug, info = run(code, VIDGEN_LOG="debug"), run(code)
    assert debug.returncode == info.returncode == 0, debug.stderr + info.stderr
    assert debug.stderr.count("\n") == 2 and "D vidgen.train: fine" in debug.stderr
    assert info.stderr.count("\n") == 1 and "I vidgen.train: plain" in info.stderr


def test_unknown_level_is_named():
    result = run("from vidgen.core.logging import get_logger; get_logger()", VIDGEN_LOG="loud")
    assert 'VIDGEN_LOG is "LOUD", expected one of' in result.stderr


def test_names_are_below_the_package():
    assert vidgen_logging.get_logger("x").name == "vidgen.x"
    assert vidgen_logging.get_logger("vidgen.x") is vidgen_logging.get_logger("x")
    assert vidgen_logging.get_logger() is logging.getLogger("vidgen")


def test_one_line_each_whatever_libraries_do():
    code = (
        "import logging; from vidgen.core.logging import get_logger; log = get_logger('x');"
        "logging.info('configures the root logger where nobody did'); log.info('once')"
    )
    assert run(code).stderr.count("once") == 1


def test_an_application_that_logs_keeps_its_format():
    code = (
        "import logging; logging.basicConfig(format='mine %(message)s');"
        "from vidgen.core.logging import get_logger; get_logger('x').info('hello')"
    )
    assert run(code).stderr == "mine hello\n"


@pytest.mark.parametrize(("count", "prefix"), [(1, ""), (4, "[2/4] ")])
def test_process_prefix_with_several_processes(monkeypatch, capsys, count, prefix):
    state = types.SimpleNamespace(num_processes=count, process_id=2)
    monkeypatch.setitem(sys.modules, "jax._src.distributed", types.SimpleNamespace(global_state=state))
    monkeypatch.setattr(logging.root, "handlers", [])
    vidgen_logging.get_logger("prefix").warning("hello")
    line = capsys.readouterr().err
    assert line.endswith("vidgen.prefix: hello\n")
    assert line.startswith(prefix)
    assert line.startswith("[") == bool(prefix)
