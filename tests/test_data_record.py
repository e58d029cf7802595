"""The record file: what is written is what is read, broken lines and bad boxes are counted and named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
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


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"none\.jsonl: no such file; write it with a reader"):
        list(read_records(tmp_path / "none.jsonl"))
