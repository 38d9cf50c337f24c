import json
import pathlib

import pytest

from vidgen.core.errors import UserError
from vidgen.data.captions import FolderCaptions
from vidgen.data.folder_files import FolderFiles


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
            "line 1: expected one column file or file_name or path; found name, caption",
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


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_lines(root, character):
    caption = f"a red{character}circle"
    (root / "captions.jsonl").write_text(
        json.dumps({"file": "a.mp4", "caption": caption}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert captions_of(root) == ["a red circle", "", ""]
    (root / "captions.jsonl").unlink()
    (root / "captions.csv").write_text(
        f"\ufefffile,caption\r\na.mp4,{caption}\r\nb.mp4,x\r\n", encoding="utf-8"
    )
    assert captions_of(root) == ["a red circle", "x", ""]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("file,caption\na.mp4,red, and blue\n", "line 2: found 3 fields, expected 2"),
        ("file,caption\na.mp4\n", "line 2: found 1 fields, expected 2"),
        ('file,caption\na.mp4,"red\nb.mp4,blue\n', "line 3: not CSV"),
        ('file,caption\na.mp4,"red\nb.mp4,"blue"\n', "line 3: not CSV"),
        ("file,caption\na.mp4,red\n./a.mp4,blue\n", r"line 3: \./a\.mp4 has another caption in line 2"),
        ("a.mp4,red\n", "line 1: expected one column file .* found a.mp4, red"),
        ("", "line 1: expected one column"),
        ("file,path,caption\na,b,c\n", "line 1: expected one column file"),
        (f"file,caption\na.mp4,{'x' * 200_000}\n", "line 2: not CSV .*field limit"),
    ],
)
def test_rows_that_would_be_read_wrongly(root, rows, message):
    (root / "captions.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        FolderCaptions.load(root, None)


def test_the_same_caption_twice(root):
    (root / "captions.csv").write_text("file,caption\na.mp4,red\n\na.mp4,red\n")
    assert captions_of(root)[0] == "red"


@pytest.mark.parametrize("text", ["red\0", "red\ud800"])
def test_a_caption_that_is_no_text_is_of_one_clip(root, text):
    rows = [
        {"file": "a.mp4", "caption": text},
        {"file": "b.mp4", "caption": "x"},
        {"file": text, "caption": "y"},
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = FolderCaptions.load(root, None)
    assert captions.of(root / "b.mp4") == "x"
    with pytest.raises(UserError, match="line 1: character 3 is"):
        captions.of(root / "a.mp4")
    ((place, why),) = captions.without_clip([root / "a.mp4", root / "b.mp4"], [])
    assert str(place).endswith("captions.jsonl, line 3") and "the file's name: character 3" in why
    if text.isprintable():
        return
    (root / "captions.jsonl").unlink()
    (root / "captions.csv").write_bytes(b"file,caption\na.mp4,red\0\nb.mp4,x\n")
    assert FolderCaptions.load(root, None).of(root / "b.mp4") == "x"


def test_text_files_in_capitals(root):
    texts = [root / "a.TXT", root / "b.txt", root / "b.TXT"]
    for text in texts:
        text.write_text(text.name)
    captions = FolderCaptions.load(root, None, texts)
    assert [captions.of(root / name) for name in ("a.mp4", "b.mp4")] == ["a.TXT", "b.txt"]
    told = captions.without_clip([root / "a.mp4", root / "b.mp4"], texts)
    assert told == [(root / "b.TXT", "a caption of the same clip as b.txt, which is used")]


def test_links_to_one_file_keep_their_captions(root):
    for name in ("one.mp4", "two.mp4", "three.mp4"):
        (root / name).symlink_to("a.mp4")
    rows = [("one.mp4", "first"), ("two.mp4", "second"), ("sub/c.mp4", "third")]
    (root / "captions.csv").write_text("file,caption\n" + "".join(f"{file},{text}\n" for file, text in rows))
    (root / "c.mp4").symlink_to("sub/c.mp4")
    captions = FolderCaptions.load(root, None)
    names = ("one.mp4", "two.mp4", "three.mp4", "c.mp4")
    assert [captions.of(root / name) for name in names] == ["first", "second", "", "third"]
    assert not captions.without_clip([root / "one.mp4", root / "two.mp4", root / "c.mp4"], [])


def test_folders_that_links_lead_to(tmp_path):
    store, root = tmp_path / "store", tmp_path / "root"
    (root / "real").mkdir(parents=True)
    store.mkdir()
    for file in (store / "x.mp4", root / "real" / "y.mp4"):
        file.touch()
    for name, target in {"a_first": "real", "more": store, "again": store, "loop": root}.items():
        (root / name).symlink_to(target)
    files = FolderFiles.look(root, None)
    assert [file.name for file in files.found] == ["again/x.mp4", "real/y.mp4"]
    assert dict(files.stray) == {
        "a_first": f"a link to {root}/real, which is read already",
        "more": f"a link to {root}/again, which is read already",
        "loop": f"a link to {root}, which is read already",
    }
    (tmp_path / "link").symlink_to(root)
    assert [file.name for file in FolderFiles.look(tmp_path / "link", None).found] == [
        "again/x.mp4",
        "real/y.mp4",
    ]
