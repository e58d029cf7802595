"""Ids that join the parts of a data set: a missing, doubled or odd one never puts a box on another picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemvg_edge.boxes import Box
from tests.test_data_coco import good, paint, save_d3, write_d3
from tests.test_data_single import ref, write_refcoco
from train.data.annotations import as_id, index_by_id, index_pictures, inside
from train.data.coco import label_pictures
from train.data.d3 import read_d3
from train.data.labelled import LabelledPicture
from train.data.record import Fault
from train.data.refcoco import read_refcoco

CASES = Path(__file__).parents[2] / "shared" / "cases" / "coco"
CUP, DOG = Box(0, 1, 2, 31, 42), Box(0, 50, 20, 80, 60)
Truth = dict[str, dict[str, tuple[Box, ...]]]  # file -> label -> boxes
BOTH: Truth = {"a.jpg": {"cup": (CUP,)}, "b.jpg": {"dog": (DOG,)}}


def image(key: Any, name: Any = "a.jpg", **change: Any) -> dict[str, Any]:
    return {"id": key, "file_name": name, "width": 100, "height": 80, **change}


def note(key: Any, picture: Any, category: Any, **change: Any) -> dict[str, Any]:
    bbox = [1, 2, 30, 40] if category == 1 else [50, 20, 30, 40]
    return {"id": key, "image_id": picture, "category_id": category, "bbox": bbox, "iscrowd": 0, **change}


def write(folder: Path, **change: Any) -> Path:
    """A cup in a.jpg and a dog in b.jpg; `change` replaces one of the three lists."""
    content = {
        "images": [image(1), image(2, "b.jpg")],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
        "annotations": [note(1, 1, 1), note(2, 2, 2)],
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content | change))
    for name in ("a.jpg", "b.jpg", "sub/a.jpg"):
        paint(folder / "train2017" / name, (100, 80))
    return folder


def read(folder: Path) -> tuple[Truth, list[str]]:
    """What each picture shows, and the reasons of the faults."""
    items = list(label_pictures(folder, "train2017"))
    root = folder / "train2017"
    shown = {str(p.path.relative_to(root)): dict(p.objects) for p in items if isinstance(p, LabelledPicture)}
    return shown, sorted({item.reason for item in items if isinstance(item, Fault)})


TWICE, NONE, UNKNOWN = "whose id stands twice", "an image without an id", "an unknown picture; its picture is left out"
B_ONLY, A_ONLY, NOTHING = {"b.jpg": BOTH["b.jpg"]}, {"a.jpg": BOTH["a.jpg"]}, Truth()
CHANGES: dict[str, tuple[dict[str, Any], Truth, list[str]]] = {
    "as it should be": ({}, BOTH, []),
    "float ids": (
        {"images": [image(1.0), image(2.0, "b.jpg")], "annotations": [note(1, 1.0, 1.0), note(2, 2, 2)]}, BOTH, [],
    ),
    "ids that are text all over": (
        {"images": [image("1"), image("x", "b.jpg")], "annotations": [note("1", "1", 1), note("2", "x", 2)]}, BOTH, [],
    ),
    "text that names a number": ({"annotations": [note(1, "1", 1), note(2, 2, 2)]}, B_ONLY, [UNKNOWN]),
    "text with zeros": ({"annotations": [note(1, "0001", 1), note(2, 2, 2)]}, B_ONLY, [UNKNOWN]),
    "a number that names text": ({"images": [image("1"), image(2, "b.jpg")]}, B_ONLY, [UNKNOWN]),
    "true": ({"annotations": [note(1, True, 1), note(2, 2, 2)]}, B_ONLY, [UNKNOWN]),
    "null": ({"images": [image(None), image(2, "b.jpg")]}, B_ONLY, [NONE, UNKNOWN]),
    "a list": ({"images": [image([1]), image(2, "b.jpg")], "annotations": [note(2, 2, 2)]}, B_ONLY, [NONE]),
    "a half": ({"images": [image(1.5), image(2, "b.jpg")], "annotations": [note(2, 2, 2)]}, B_ONLY, [NONE]),
    "no id": ({"images": [{"file_name": "a.jpg"}, image(2, "b.jpg")], "annotations": []}, {"b.jpg": {}}, [NONE]),
    "no object": ({"images": ["a.jpg", image(2, "b.jpg")], "annotations": [note(2, 2, 2)]}, B_ONLY, [NONE]),
    "two pictures of one id": ({"images": [image(1), image(1, "b.jpg")]}, NOTHING, [f"an image {TWICE}", UNKNOWN]),
    "two and a third": (
        {"images": [image(1), image(2, "b.jpg"), image(1, "sub/a.jpg")]}, B_ONLY, [f"an image {TWICE}"],
    ),
    "1 and 1.0": ({"images": [image(1), image(1.0, "sub/a.jpg"), image(2, "b.jpg")]}, B_ONLY, [f"an image {TWICE}"]),
    "1 and '1'": ({"images": [image(1), image("1", "sub/a.jpg"), image(2, "b.jpg")]}, B_ONLY, [f"an image {TWICE}"]),
    "one file of two ids": (
        {"images": [image(1), image(3, "./a.jpg"), image(2, "b.jpg")]}, B_ONLY,
        ["a picture that stands under several ids"],
    ),
    "one name in two folders": (
        {"images": [image(1), image(3, "sub/a.jpg"), image(2, "b.jpg")]}, {**BOTH, "sub/a.jpg": {}}, [],
    ),
    "one box twice": ({"annotations": [note(1, 1, 1), note(2, 2, 2), note(3, 1, 1)]}, BOTH, []),
    "one annotation twice": ({"annotations": [note(1, 1, 1), note(2, 2, 2), note(1, 1, 1)]}, BOTH, []),
    "two annotations of one id": (
        {"annotations": [note(1, 1, 1), note(2, 2, 2), note(1, 1, 2)]}, B_ONLY, [f"an annotation {TWICE}"],
    ),
    "annotations without ids": ({"annotations": [note(None, 1, 1), note(None, 2, 2)]}, BOTH, []),
    "a category twice": (
        {"categories": [{"id": 1, "name": "cup"}, {"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]}, B_ONLY,
        [f"a category {TWICE}", "an unknown category; its picture is left out"],
    ),
    "two categories of one name": (
        {"categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": " dog"}]},
        {"a.jpg": {"dog": (CUP,)}, "b.jpg": {"dog": (DOG,)}}, [],
    ),
    "a category that is text": (
        {"annotations": [note(1, 1, "1"), note(2, 2, 2)]}, B_ONLY, ["an unknown category; its picture is left out"],
    ),
    "a size in text": ({"images": [image(1, width="100"), image(2, "b.jpg")]}, B_ONLY, ["a malformed image entry"]),
    "a size of halves": ({"images": [image(1, width=100.5), image(2, "b.jpg")]}, B_ONLY, ["a malformed image entry"]),
    "a crowd that is text": (
        {"annotations": [note(1, 1, 1, iscrowd="0"), note(2, 2, 2)]}, B_ONLY,
        ["a malformed annotation; its picture is left out"],
    ),
    "a negative width": (
        {"annotations": [note(1, 1, 1, bbox=[40, 2, -10, 40]), note(2, 2, 2)]}, B_ONLY, ["a box without an area"],
    ),
    "a path out of the folder": (
        {"images": [image(1, "../train2017/a.jpg"), image(2, "b.jpg")]}, B_ONLY, ["a malformed image entry"],
    ),
    "an absolute path": ({"images": [image(1, "/etc/passwd"), image(2, "b.jpg")]}, B_ONLY, ["a malformed image entry"]),
    "a null character": ({"images": [image(1, "a\0.jpg"), image(2, "b.jpg")]}, B_ONLY, ["a malformed image entry"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_boxes_stay_on_their_pictures(tmp_path: Path, name: str) -> None:
    change, wanted, reasons = CHANGES[name]
    assert read(write(tmp_path, **change)) == (wanted, sorted(reasons))


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared with the cases is not here")
@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("duplicate_image_ids", NOTHING),
        ("float_ids", BOTH),
        ("same_annotation_twice", BOTH),
        ("string_image_id_in_annotations", NOTHING),
    ],
)
def test_cases_of_the_field(case: str, wanted: Truth) -> None:
    shown, reasons = read(CASES / case)
    assert shown == wanted
    assert bool(reasons) == (wanted == NOTHING)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (7, 7), (7.0, 7), ("7", "7"), (0, 0), (-3, -3), (" ", None), (None, None), (True, None), (7.5, None),
        (float("nan"), None), (float("inf"), None), (10**400, None), ([7], None), ({}, None),
    ],
)  # fmt: skip
def test_what_an_id_is(value: Any, key: Any) -> None:
    assert as_id(value) == key
    assert type(as_id(value)) is type(key)


def test_faults_name_what_is_left_out() -> None:
    index = index_pictures([(1, {"file_name": "a.jpg"}), (1, {"file_name": "b.jpg"}), (2, "?")], "x.json")
    assert [fault.where for fault in index.faults] == ["x.json: image 1, a.jpg", "x.json: image 1, b.jpg"]
    assert index.entries == {2: "?"}
    assert index_by_id([(3, "a"), (3, "a")], "word", "x", equal_is_one=True).entries == {3: "a"}
    assert index_by_id([("7", "a"), ("07", "b")], "word", "x").entries == {"7": "a", "07": "b"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/../..", "/a", "../a", "a\0b", "\ud800", None, 5, ["a"]])
def test_names_that_lead_elsewhere(name: Any) -> None:
    with pytest.raises(ValueError, match=r"name|surrogates"):
        inside(Path("folder"), name)
    assert inside(Path("folder"), "sub/./b/../a.jpg", "c") == Path("folder/sub/./b/../a.jpg/c")


@pytest.mark.parametrize(
    ("part", "entry", "reasons"),
    [
        ("images", image(7, "other.jpg"), {"an image whose id stands twice", "an unknown picture or annotation"}),
        ("images", image("7", "other.jpg"), {"an image whose id stands twice", "an unknown picture or annotation"}),
        ("images", image(None, "other.jpg"), {"an image without an id"}),
        ("annotations", {"id": 70, "image_id": 7, "bbox": [1, 1, 2, 2]},
         {"an annotation whose id stands twice", "an unknown picture or annotation"}),
        ("annotations", {"id": 70, "image_id": 7, "category_id": 1, "bbox": [1.5, 2, 10, 20]}, set()),
    ],
)  # fmt: skip
def test_refcoco_joins_by_sure_ids(tmp_path: Path, part: str, entry: Any, reasons: set[str]) -> None:
    folder = write_refcoco(tmp_path, ref("left mug"))
    content = json.loads((folder / "instances.json").read_text())
    content[part].append(entry)
    (folder / "instances.json").write_text(json.dumps(content))
    records, tally = good(read_refcoco(folder))
    assert set(tally.refused) == reasons
    assert len(records) == ("an unknown picture or annotation" not in reasons)
    assert all(record.boxes == (Box(0, 1.5, 2, 11.5, 22),) for record in records)


@pytest.mark.parametrize("wrong", ["7", True, None, 7.5])
def test_a_reference_of_another_kind_of_id_is_refused(tmp_path: Path, wrong: Any) -> None:
    records, tally = good(read_refcoco(write_refcoco(tmp_path, ref("left mug", image=wrong))))
    assert records == []
    assert tally.refused == {"an unknown picture or annotation": 1}


@pytest.mark.parametrize(
    ("change", "shown", "refused"),
    [
        ({}, {"0", "1", "2"}, False),
        ({("images", "0"): image("0", "dog/1.jpg", width=64, height=48)}, {"1", "2"}, True),
        ({("images", 5): image(5, "dog/1.jpg", width=64, height=48)}, {"0", "2"}, True),
        ({("annotations", 5): {"id": 6, "image_id": 0, "sent_id": [1], "bbox": [[1, 2, 3, 4]]}}, {"1", "2"}, True),
        ({("annotations", 5): {"id": 5, "image_id": "0", "sent_id": [1], "bbox": [[1, 2, 3, 4]]}}, {"1", "2"}, True),
        ({("annotations", 8): {"id": 8, "image_id": np.int64(0), "sent_id": [1], "bbox": [1, 2, 10, 20]}},
         {"0", "1", "2"}, False),
        ({("sentences", "1"): {"id": "1", "raw_sent": "a cat"}}, set(), True),
        ({("groups", 9): {"id": 9, "img_id": ["0", 1], "inner_sent_id": [1]}}, set(), True),
        ({("groups", 9): {"id": 9, "img_id": [1, 1.0, 2], "inner_sent_id": [1, 1]}}, {"1", "2"}, False),
    ],
)  # fmt: skip
def test_d3_joins_by_sure_ids(
    tmp_path: Path, change: dict[tuple[str, Any], Any], shown: set[str], refused: bool
) -> None:
    tables = write_d3(tmp_path)
    for (table, key), entry in change.items():
        tables[table][key] = entry
    save_d3(tmp_path, tables)
    records, tally = good(read_d3(tmp_path))
    assert {path.stem for record in records for path in record.images} == shown
    assert bool(tally.refused) == refused
