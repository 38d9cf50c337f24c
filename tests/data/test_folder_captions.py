import json
import pathlib

import pytest

from vidgen.data.captions import FolderCaptions


@pytest.fixture
def root(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "b.mp4", "sub/c.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def captions_of(root, list_file=None):
    captions = FolderCaptions.load(root, list_file)
    return [captions.of(root / name) for name in ("a.mp4", "b.mp4", "sub/c.mp4")]


def test_text_beside_the_clip(root):
    (root / "a.txt").write_text("  a red\n circle \n")
    (root / "sub" / "c.txt").write_text("été", encoding="utf-8-sig")
    assert captions_of(root) == ["a red circle", "", "été"]


@pytest.mark.parametrize("file_key", ["file", "file_name", "path"])
@pytest.mark.parametrize("text_key", ["caption", "text"])
def test_jsonl(root, file_key, text_key):
    rows = [{file_key: "a.mp4", text_key: "one", "n": 1}, {file_key: "sub/c.mp4", text_key: "two"}]
    (root / "captions.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    assert captions_of(root) == ["one", "", "two"]


@pytest.mark.parametrize("header", ["file,caption", "path,text", "file_name,caption"])
def test_csv(root, header):
    (root / "captions.csv").write_text(f'{header}\nsub/c.mp4,"a red circle, ""moving""\nleft"\na.mp4,x\n')
    assert captions_of(root) == ["x", "", 'a red circle, "moving" left']


def test_the_list_goes_before_the_text_beside(root):
    (root / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "listed"}\n')
    for name in ("a.txt", "b.txt"):
        (root / name).write_text("beside")
    assert captions_of(root) == ["listed", "beside", ""]


def test_list_elsewhere_and_absolute_paths(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists") / "mine.jsonl"
    elsewhere.write_text(f'{{"file": "{(root / "a.mp4").as_posix()}", "caption": "one"}}\n')
    assert captions_of(root, str(elsewhere)) == ["one", "", ""]


def test_captions_without_a_clip_are_told(root):
    (root / "captions.jsonl").write_text('{"file": "gone.mp4", "caption": "one"}\n')
    texts = [root / "a.txt", root / "alone.txt"]
    captions = FolderCaptions.load(root, None)
    clips = [root / "a.mp4", root / "b.mp4"]
    told = {pathlib.Path(path).name: reason for path, reason in captions.without_clip(clips, texts)}
    assert set(told) == {"gone.mp4", "alone.txt"}
    assert "captions.jsonl" in told["gone.mp4"] and "no video or image" in told["alone.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.jsonl",
            b'{"file": "a.mp4", "caption": "x"}\n{"file"',
            r"captions\.jsonl, line 2: not JSON",
        ),
        ("captions.jsonl", b"[1]\n", "line 1: found list, expected a JSON object"),
        (
            "captions.jsonl",
            b'{"file": "a.mp4", "description": "x"}\n',
            "under caption or text; found file, description",
        ),
        (
            "captions.csv",
            b"name,caption\na.mp4,x\n",
            "line 2: expected a text under file or file_name or path",
        ),
        ("captions.csv", "file,caption\na.mp4,été\n".encode("latin-1"), r"captions\.csv: not UTF-8"),
    ],
)
def test_lists_with_mistakes(root, name, content, message):
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FolderCaptions.load(root, None)


def test_which_list(root):
    for name in ("captions.csv", "captions.jsonl"):
        (root / name).write_text("file,caption\n" if name.endswith("csv") else "")
    with pytest.raises(ValueError, match="both"):
        FolderCaptions.load(root, None)
    assert FolderCaptions.load(root, str(root / "captions.csv")).listed == {}
    with pytest.raises(FileNotFoundError, match=r"nope\.csv"):
        FolderCaptions.load(root, str(root / "nope.csv"))
    (root / "list.xml").touch()
    with pytest.raises(ValueError, match=r"ends in \.jsonl or \.csv"):
        FolderCaptions.load(root, str(root / "list.xml"))
