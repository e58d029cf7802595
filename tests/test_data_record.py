"""The record file: what is written is what is read, broken lines and bad boxes are counted and named."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from train.data import record as record_module
from train.data.record import KINDS, Fault, Record, Tally, check, keep_good, read_records, write_records

GOOD = Record((Path("a.png"), Path("b.png")), ((64, 48), (30, 20)), "the mug", (Box(1, 2, 3, 9, 8),), "semantic", "us")

numbers = st.floats(0, 1e4, allow_nan=False)
boxes = st.builds(Box, st.integers(0, 2), numbers, numbers, numbers, numbers)
names = st.lists(st.text("abcä z.", min_size=1).filter(lambda s: s.strip(" .")), min_size=1, max_size=3)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any record that JSON can hold, good or bad."""
    images = draw(names)
    return Record(
        images=tuple(Path("pictures") / f"{name}.png" for name in images),
        sizes=tuple((draw(st.integers(1, 9999)), draw(st.integers(1, 9999))) for _ in images),
        query=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        boxes=tuple(sorted(draw(st.lists(boxes, max_size=4)))),
        kind=draw(st.sampled_from(KINDS)),
        source="test",
        mode=draw(st.sampled_from(["direct", "cot"])),
        thinking=draw(st.text("ab\n")),
        words=draw(st.text("ab\n")),
    )


@given(st.lists(records(), max_size=4))
def test_what_is_written_is_read(given_records: list[Record]) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        absolute = [replace(r, images=tuple(root / image for image in r.images)) for r in given_records]
        assert write_records(absolute, root / "sub" / "records.jsonl") == len(absolute)
        found = list(read_records(root / "sub" / "records.jsonl"))
    resolved = [replace(r, images=tuple(image.resolve() for image in r.images)) for r in found if isinstance(r, Record)]
    assert resolved == [replace(r, images=tuple(image.resolve() for image in r.images)) for r in absolute]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"boxes": ()}, None),
        ({"boxes": (Box(0, -0.5, 0, 64.9, 48),)}, None),
        ({"boxes": (Box(0, -2, 0, 10, 10),)}, "a box outside its picture"),
        ({"boxes": (Box(1, 0, 0, 32, 10),)}, "a box outside its picture"),
        ({"boxes": (Box(2, 0, 0, 1, 1),)}, "a box in a picture that is not there"),
        ({"boxes": (Box(-1, 0, 0, 1, 1),)}, "a box in a picture that is not there"),
        ({"boxes": (Box(0, 5, 5, 5, 9),)}, "a box without an area"),
        ({"boxes": (Box(0, float("nan"), 5, 6, 9),)}, "a box without an area"),
        ({"query": "  "}, "an empty query, or one with control tokens"),
        ({"query": "a <|im_end|>"}, "an empty query, or one with control tokens"),
        ({"kind": "poetry"}, "an unknown kind or mode"),
        ({"mode": "cot"}, "mode cot without reasoning"),
        ({"kind": "understanding"}, "an understanding record without words"),
        ({"images": ()}, "no pictures, or not one size a picture"),
        ({"sizes": ((64, 48), (0, 20))}, "a picture without an area"),
    ],
)
def test_each_fault_has_its_reason(change: dict[str, object], reason: str | None) -> None:
    assert check(replace(GOOD, **change)) == reason  # type: ignore[arg-type]


def test_refused_records_are_counted_and_named() -> None:
    outside = replace(GOOD, boxes=(Box(0, 0, 0, 999, 9),), query="the far mug")
    tally = Tally()
    kept = list(keep_good([GOOD, outside, Fault("x.json, item 7", "a missing picture"), outside, GOOD], tally))
    assert kept == [GOOD, GOOD]
    assert tally.kept == 2
    assert tally.refused == {"a box outside its picture": 2, "a missing picture": 1}
    assert tally.examples["a missing picture"] == "x.json, item 7"
    assert "2 x a box outside its picture (first: us: 'the far mug')" in tally.lines()[1]


def test_broken_lines_are_named(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    write_records([GOOD], file)
    whole = file.read_text()
    no_sizes = {key: value for key, value in json.loads(whole).items() if key != "sizes"}
    file.write_text(whole + whole[:40] + "\n" + json.dumps(no_sizes) + "\n" + whole)
    items = list(read_records(file))
    assert [isinstance(item, Fault) for item in items] == [False, True, True, False]
    assert items[1] == Fault(f"{file}, line 2", "not a record (JSONDecodeError)")
    assert items[2] == Fault(f"{file}, line 3", "not a record (KeyError)")


LINE = {
    "images": ["a.png"], "sizes": [[64, 48]], "query": "the mug", "boxes": [[0, 1, 2, 30, 40]], "kind": "semantic",
    "source": "us",
}  # fmt: skip
SIZE, BOX = "a size is not two whole numbers", "a box is not a picture's number and four numbers"
NAME, CONTROL = "an image is not the name of a file", "an answer with control tokens, or that is no Unicode text"


def changed(**change: object) -> bytes:
    return json.dumps({**LINE, **change}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"images":["caf\xe9.png"]}', "not text in UTF-8"),
        ('{"images": ["a"]}'.encode("utf-16"), "not text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (changed(sizes=[[float("inf"), 5]]), "Infinity is no number"),
        (changed(boxes=[[0, float("nan"), 0, 5, 5]]), "NaN is no number"),
        (changed(sizes=[["SIZE", 5]]).replace(b'"SIZE"', b"1e999"), "past every range"),
        (changed(sizes=[["SIZE", 5]]).replace(b'"SIZE"', b"9" * 5000), "past every range"),
        (changed()[:-1] + b', "kind": "temporal"}', "'kind' stands twice"),
        (changed()[:-5], "JSONDecodeError"),
        (b"null", "not an object"),
        (b"[1]", "not an object"),
        (b'"text"', "not an object"),
        (changed(images="a.png"), "images is not a list"),
        (changed(images=[7]), NAME),
        (changed(images=[""]), NAME),
        (changed(images=["a\0.png"]), NAME),
        (changed(images=["\ud800.png"]), NAME),
        (changed(sizes=[[64.5, 48]]), SIZE),
        (changed(sizes=[["64", 48]]), SIZE),
        (changed(sizes=[[True, 48]]), SIZE),
        (changed(sizes=[[64]]), SIZE),
        (changed(sizes=[64, 48]), SIZE),
        (changed(boxes={"0": 1}), "boxes is not a list"),
        (changed(boxes=[[1.7, 1, 2, 3, 4]]), BOX),
        (changed(boxes=[[True, 1, 2, 3, 4]]), BOX),
        (changed(boxes=[[0, 1, 2, 3]]), BOX),
        (changed(boxes=[[0, "1", 2, 3, 4]]), BOX),
        (changed(boxes=[[0, None, 2, 3, 4]]), BOX),
        (changed(query=None), "KeyError"),
        (changed(query=5), "query is not text"),
        (changed(source=["us"]), "source is not text"),
        (changed(mode=True), "mode is not text"),
        (changed(words=7), "words is not text"),
    ],
)
def test_one_bad_line_is_a_fault_and_its_neighbours_are_kept(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + changed() + b"\r\n\r\n" + line + b"\n \n" + changed())
    first, fault, last = read_records(file)
    assert isinstance(first, Record)
    assert first == last
    assert isinstance(fault, Fault)
    assert fault.where == f"{file}, line 3"
    assert fault.reason.startswith("not a record (")
    assert reason in fault.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sizes": [[64.0, 48.0]], "mode": None, "words": None, "extra": {"a": 1}}, None),
        ({"images": ["/elsewhere/a.png"]}, None),
        ({"images": ["../a.png"]}, None),
        ({"sizes": [[-64, 48]]}, "a picture without an area"),
        ({"sizes": [[10**9, 48]]}, "a picture larger than any"),
        ({"boxes": [[10**299, 0, 0, 5, 5]]}, "a box in a picture that is not there"),
        ({"boxes": [[0, 0, 0, 1e300, 5]]}, "a box outside its picture"),
        ({"query": "a \ud800"}, "an empty query, or one with control tokens"),
        ({"kind": "understanding", "words": "yes<|im_end|>"}, CONTROL),
        ({"thinking": "\udfff"}, CONTROL),
    ],
)  # fmt: skip
def test_what_a_line_says_is_checked(tmp_path: Path, change: dict[str, object], reason: str | None) -> None:
    (tmp_path / "records.jsonl").write_bytes(changed(**change))
    (record,) = read_records(tmp_path / "records.jsonl")
    assert isinstance(record, Record)
    assert check(record) == reason


def test_a_line_without_an_end_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "LONGEST_LINE", 1000)
    file = tmp_path / "records.jsonl"
    file.write_bytes(changed() + b"\n" + b"x" * 5000 + b"\n" + changed(query="y" * 990) + b"\n" + changed())
    kinds = [type(item) for item in read_records(file)]
    assert kinds == [Record, Fault, Fault, Record]
    assert [item.where[-1] for item in read_records(file) if isinstance(item, Fault)] == ["2", "3"]


def test_the_file_is_utf_8_in_every_locale(tmp_path: Path) -> None:
    record = {**LINE, "images": ["gr\u00fcn/caf\u00e9.png"], "query": "\u676f"}
    (tmp_path / "in.jsonl").write_bytes(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    command = [sys.executable, "-m", "train.data.mix", str(tmp_path / "out.jsonl"), str(tmp_path / "in.jsonl")]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (found,) = read_records(tmp_path / "out.jsonl")
    assert isinstance(found, Record)
    assert (found.images[0].name, found.query) == ("caf\u00e9.png", "\u676f")


def test_paths_lead_to_the_pictures_through_links(tmp_path: Path) -> None:
    for folder in ("data/pictures", "disk/store"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "disk" / "store")
    (tmp_path / "data" / "pictures" / "a.png").touch()
    (tmp_path / "disk" / "b.png").touch()
    (tmp_path / "data" / "link" / "c.png").touch()
    images = tmp_path / "data" / "pictures" / "a.png", tmp_path / "data/link/../b.png", tmp_path / "data/link/c.png"
    records = [replace(GOOD, images=(image,), sizes=((64, 48),), boxes=()) for image in images]
    for out in (tmp_path / "data" / "link" / "out.jsonl", tmp_path / "data" / "out.jsonl"):
        write_records(records, out)
        for image, found in zip(images, read_records(out), strict=True):
            assert isinstance(found, Record)
            assert found.images[0].samefile(image)
    assert '"link/c.png"' in (tmp_path / "data" / "out.jsonl").read_text(), "the short way where it is right"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"{}\n", b'{"seed": 1}\n' * 3, b"# notes\n"])
def test_files_that_hold_no_records_are_never_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "out.jsonl"
    file.write_bytes(content)
    asked: list[Record] = []
    with pytest.raises(GemvgError, match=r"out\.jsonl exists and holds no records; give another place"):
        write_records((asked.append(GOOD) or GOOD for _ in range(3)), file)  # type: ignore[func-returns-value]
    assert file.read_bytes() == content
    assert asked == []
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_an_input_is_never_the_output(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    file = tmp_path / "a.jsonl"
    write_records([GOOD], file)
    before = file.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    for out in (file, tmp_path / "sub" / ".." / "a.jsonl", tmp_path / "link.jsonl", tmp_path / "hard.jsonl"):
        with pytest.raises(GemvgError, match=r"is .*a\.jsonl, which is read; give another place"):
            write_records([], out, [file])
    with pytest.raises(GemvgError, match=r"holds .*a\.jsonl, which is read"):
        write_records([], tmp_path, [file])
    assert file.read_bytes() == before


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    write_records([GOOD], file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as if there were no more room
    try:
        with pytest.raises(GemvgError, match=r"out\.jsonl cannot be written \(File too large\)"):
            write_records([GOOD] * 9999, file, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_users_partial_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.partial").write_text("mine")
    write_records([GOOD], tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl.partial").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_the_system_refuses(tmp_path: Path, name: str) -> None:
    for work in (lambda: list(read_records(tmp_path / name)), lambda: write_records([GOOD], tmp_path / name)):
        with pytest.raises(GemvgError, match=r"cannot be read \("):
            work()
    with pytest.raises(GemvgError, match=r"cannot be read \("):
        write_records([GOOD], tmp_path / name / "out.jsonl")


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"none\.jsonl: no such file; write it with a reader"):
        list(read_records(tmp_path / "none.jsonl"))
