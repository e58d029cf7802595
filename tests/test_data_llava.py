"""LLaVA's conversations over one picture or several, and lists in JSON that are read an item at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.test_data_coco import good, paint
from train.data import json_list
from train.data.json_list import stream_json
from train.data.llava import read_llava
from train.data.record import Record, Tally

BOX = "<|box_start|>(0,0),(500,500)<|box_end|>"


def talk(images: Any, *turns: str, key: str = "image") -> dict[str, Any]:
    """A conversation over pictures."""
    speakers = ("human", "gpt") * len(turns)
    said = [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)]
    return {"id": "1", key: images, "conversations": said}


def read(folder: Path, *items: Any, paint_all: bool = True) -> tuple[list[Record], Tally]:
    """What a file with these items gives; their pictures, 64 x 48, are painted."""
    for item in items if paint_all else []:
        names = item.get("image", item.get("images")) if isinstance(item, dict) else None
        for name in [names] if isinstance(names, str) else names or []:
            paint(folder / name)
    (folder / "talks.json").write_text(json.dumps(list(items)))
    return good(read_llava(folder))


def test_a_picture_alone_and_each_turn_alone(tmp_path: Path) -> None:
    item = talk("coco/1.jpg", "<image>\nWhat is it?", "A mug.", "Which colour?\nAnswer in one word.", "Red")
    records, tally = read(tmp_path, item)
    assert not tally.refused
    assert [(r.query, r.words) for r in records] == [
        ("What is it?", "A mug."),
        ("Which colour?\nAnswer in one word.", "Red"),
    ]
    for record in records:
        assert (record.kind, record.boxes, record.source) == ("understanding", (), "LLaVA")
        assert (record.images, record.sizes) == ((tmp_path / "coco/1.jpg",), ((64, 48),))


@pytest.mark.parametrize("key", ["image", "images"])
def test_several_pictures(tmp_path: Path, key: str) -> None:
    names = ["a.png", "b.png", "c.png"]
    item = talk(
        names, "What differs?\n<image>\n<image>", "The mug.", "<image>\nIs it here, beside what <image> shows?", "No."
    )
    assert read(tmp_path, item)[1].refused == {"not one <image> a picture, in a question": 1}
    item = talk(names, "What differs?\n<image>\n<image>", "The mug.", "Is it in <image> too?", "No.", key=key)
    (first, second), tally = read(tmp_path, item)
    assert not tally.refused
    assert (first.query, len(first.images)) == ("What differs?", 2)  # a picture that comes later is not seen yet
    assert (second.query, second.images) == ("Is it in Image-3 too?", tuple(tmp_path / name for name in names))


def test_boxes_as_qwen_writes_them_are_boxes(tmp_path: Path) -> None:
    records, tally = read(
        tmp_path,
        talk(["a.png"], "<image>\nWhere is the mug?", BOX),
        talk(["a.png", "b.png"], "<image><image>\nWhere is the mug?", f"It's in the second image. {BOX}"),
        talk(["a.png", "b.png"], "<image><image>\nFind the mug in image-2.", BOX),
    )
    assert not tally.refused
    assert [(r.kind, r.boxes) for r in records] == [
        ("referential", (Box(image, 0, 0, 32, 24),)) for image in (0, 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not laid out as LLaVA (AttributeError)"),
        ({"image": "a.png"}, "not laid out as LLaVA (KeyError)"),
        ({"id": "1", "conversations": []}, "a conversation without pictures"),
        (talk([], "hello", "hello"), "a conversation without pictures"),
        (talk(["a.png"], "<image>a"), "turns that are not question, answer, question, answer"),
        (talk(["a.png"], "a", "b"), "not one <image> a picture, in a question"),
        (talk(["a.png"], "a", "<image>"), "not one <image> a picture, in a question"),
        (talk(["a.png"], "<image>", "b"), "an empty query, or one with control tokens"),
        (talk(["a.png"], "<image>a", "<|im_start|>"), "an answer with control tokens, or that is no Unicode text"),
        (talk(["a.png"], "<image>a", ""), "an understanding record without words"),
        (talk(["a.png"], "<image>Where?", "[0.1, 0.25, .5, 1.0]"), "a box in numbers that do not say of what"),
        (talk(["a.png"], "<image>[0.1,0.2,0.3,0.4]?", "a"), "a box in numbers that do not say of what"),
        (talk(["a.png", "b.png"], "<image><image>a", BOX), "a box names none of the pictures"),
        (talk(["a.png"], "<image>a", BOX.replace("500", "1700")), "a coordinate of .. is past .."),
        (talk(["../a.png"], "<image>a", "b"), "not laid out as LLaVA (ValueError)"),
        (talk([5], "<image>a", "b"), "not laid out as LLaVA (ValueError)"),
    ],
)
def test_malformed_conversations_are_counted(tmp_path: Path, item: Any, reason: str) -> None:
    sound = talk("a.png", "<image>\nWhat is it?", "A mug.")
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    records, tally = read(tmp_path, item, sound, paint_all=False)
    assert tally.refused == {reason: 1}
    assert len(records) == 1


def test_a_question_before_its_picture(tmp_path: Path) -> None:
    records, tally = read(tmp_path, talk("a.png", "Hello?", "Hello.", "<image>\nWhat is it?", "A mug."))
    assert tally.refused == {"a question before the first picture": 1}
    assert [record.query for record in records] == ["What is it?"]


def test_folders_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"no \.json files there; lay the folder out as"):
        list(read_llava(tmp_path))
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(GemvgError, match=r"a\.json is not JSON that holds a list \(it does not begin with \[\)"):
        list(read_llava(tmp_path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=5), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans())
def test_items_are_those_of_the_whole_list(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any], step: int, indent: int | None, ascii_only: bool
) -> None:
    """Read a few characters at a time: numbers, escapes and spaces are cut anywhere."""
    file = tmp_path_factory.getbasetemp() / "items.json"
    file.write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "STEP", step)
        assert list(stream_json(file, "")) == items


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        "[1 2]",
        "[1,]",
        "[,1]",
        "[1",
        "[1,",
        "[1]x",
        '["a',
        "[NaN]",
        '[{"a":1,"a":2}]',
        "[" * 9000,
        "[01]",
    ],
)
def test_what_is_no_list(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(GemvgError, match=r"a\.json is not JSON that holds a list"):
        list(stream_json(tmp_path / "a.json", ""))


def test_files_that_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GemvgError, match=r"a\.json: no such file; get it"):
        list(stream_json(tmp_path / "a.json", "get it"))
    (tmp_path / "a.json").write_bytes(b'[1, "\xff"]')
    with pytest.raises(GemvgError, match="is not JSON that holds a list"):
        list(stream_json(tmp_path / "a.json", ""))
    monkeypatch.setattr(json_list, "STEP", 64)
    monkeypatch.setattr(json_list, "LONGEST_LINE", 128)
    (tmp_path / "a.json").write_text('[1, "' + "a" * 1000 + '"]')
    items = stream_json(tmp_path / "a.json", "")
    assert next(items) == 1
    with pytest.raises(GemvgError, match=r"an item of more than .* MB"):
        next(items)
