import json
import os
import stat

import pytest

from vidgen.core import files
from vidgen.core.errors import UserError


def test_lines_end_where_text_files_end_them(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\x0b\x0c\x1c\x85\u2028\u2029two\r\nthree\rfour\n\nfive".encode())
    lines = files.read_lines(path)
    assert lines == ["one\x0b\x0c\x1c\x85\u2028\u2029two", "three", "four", "", "five"]
    assert files.split_lines("a\n") == ["a"] and files.split_lines("") == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("ein gr\u00fcner Kreis".encode("latin-1"), "not UTF-8"),
        ("red".encode("utf-16"), "not UTF-8"),
        (b"red\0blue", "character 3 is a NUL"),
        (b"x" * 101, "longer than 100 bytes"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, data, said):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        files.read_text(path, max_bytes=100)
    assert str(path) in str(error.value)


def test_half_of_a_surrogate_pair_is_no_text():
    assert files.require_text("\U0001f3ac", "a") == "\U0001f3ac"
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: character 1 is half"):
        files.require_text("x\ud83c", "a.jsonl, line 3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "nested deeper than 64"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested deeper than 64"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 10_000 + "}", "not JSON"),
        ('{"a": 1, "a": 2}', '"a" stands twice'),
        ("[1]", "of type list, expected a mapping"),
    ],
)
def test_json_that_cannot_be_used_is_named(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        files.read_json(path, remedy="write it again")
    assert str(error.value).startswith(str(path)) and str(error.value).endswith(": write it again")


def test_json_that_is_read(tmp_path):
    value = {"a": [1, 2.5, None, "\u732b"], "b": {"c": {}}}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert files.read_json(tmp_path / "a.json", remedy="") == value
    with pytest.raises(FileNotFoundError, match=r"b\.json is missing: give another"):
        files.read_json(tmp_path / "b.json", remedy="give another")


@pytest.mark.parametrize("folder", [False, True])
def test_a_target_appears_whole_or_not_at_all(tmp_path, folder):
    path = tmp_path / "new" / ("x" * 240 if folder else "\u732b" * 80)

    def write(temporary):
        assert temporary.parent == path.parent and not path.exists()
        (temporary / "a" if folder else temporary).write_text("whole")

    def interrupted():
        with files.replacing(path, folder=folder) as temporary:
            write(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(path.parent.iterdir())
    mask = os.umask(0o022)
    try:
        with files.replacing(path, folder=folder) as temporary:
            write(temporary)
    finally:
        os.umask(mask)
    assert (path / "a" if folder else path).read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == (0o755 if folder else 0o644)


def test_nothing_of_the_user_is_replaced_by_a_folder(tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("x")
    (tmp_path / "out").mkdir()
    with files.replacing(tmp_path / "out", folder=True) as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "out.part" / "mine").exists()
    for target in ("out", "out.part"):
        with pytest.raises(UserError, match="not an empty folder"):
            files.check_target(tmp_path / target, folder=True)
    with pytest.raises(UserError, match="is a folder"):
        files.check_target(tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/below", "file/below/further"])
def test_names_that_cannot_be_written_are_found_before(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError):
        files.check_target(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
