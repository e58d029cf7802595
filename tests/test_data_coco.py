"""COCO and D3 folders in their true layout, written by hand: exact boxes, counted faults, the same order always."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.errors import GemvgError
from train.data.annotations import read_pickle
from train.data.coco import read_coco
from train.data.d3 import read_d3
from train.data.pictures import measure
from train.data.record import Fault, Record, Tally, keep_good

# Beside a person in picture 3 there is a crowd, so not every person there has a box.
OBJECTS: dict[int, list[tuple[str, list[float]]]] = {
    1: [("dog", [1, 2, 10, 20])],
    2: [("cat", [5, 5, 8, 9])],
    3: [("dog", [0, 0, 30.5, 20]), ("dog", [2, 2, 4, 4]), ("person", [40, 5, 6, 7])],
    4: [],
    5: [("cat", [5, 6, 8, 9]), ("person", [20, 5, 6, 7])],
    6: [("cat", [5, 7, 8, 9]), ("person", [30, 5, 6, 7])],
    7: [("dog", [5, 8, 8, 9]), ("person", [31, 5, 6, 7])],
}
NAMES = {18: "dog", 0: "cat", 1: "person"}


def paint(path: Path, size: tuple[int, int] = (64, 48), **save: Any) -> None:
    """A plain picture of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(path, **save)


def write_coco(folder: Path, **extra: Any) -> Path:
    """A tiny COCO folder; `extra` adds annotations."""
    ids = {name: key for key, name in NAMES.items()}
    annotations = [
        {"id": 10 * image + k, "image_id": image, "category_id": ids[name], "bbox": box, "iscrowd": 0}
        for image, objects in OBJECTS.items()
        for k, (name, box) in enumerate(objects)
    ]
    annotations.append({"id": 99, "image_id": 3, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    content = {
        "images": [{"id": k, "file_name": f"{k:012}.jpg", "width": 64, "height": 48} for k in OBJECTS],
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
        "annotations": annotations + extra.get("annotations", []),
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    for image in OBJECTS:
        paint(folder / "train2017" / f"{image:012}.jpg")
    return folder


def good(items: Iterable[Record | Fault]) -> tuple[list[Record], Tally]:
    """The good records and the tally."""
    measure.cache_clear()  # tests change pictures in place
    tally = Tally()
    return list(keep_good(items, tally)), tally


def truth(path: Path, name: str) -> list[tuple[float, float, float, float]]:
    """The corners that OBJECTS gives a picture."""
    found = [box for label, box in OBJECTS[int(path.stem)] if label == name]
    return sorted((x, y, x + w, y + h) for x, y, w, h in found)


def test_coco_asks_for_every_object(tmp_path: Path) -> None:
    folder, seen = write_coco(tmp_path), set()
    for seed in range(40):
        records, tally = good(read_coco(folder, seed=seed))
        assert not tally.refused
        for record in (record for record in records if record.kind == "referential"):
            name = next(name for name in NAMES.values() if name in record.query)
            seen.add((name, len(record.images), len(record.boxes)))
            for image, path in enumerate(record.images):
                boxes = sorted((b.x1, b.y1, b.x2, b.y2) for b in record.boxes if b.image == image)
                assert boxes == truth(path, name)
            assert not (name == "person" and any(int(path.stem) == 3 for path in record.images))  # a crowd stands there
            assert len(set(record.images)) == len(record.images)
    assert {("dog", 1, 1), ("dog", 2, 3), ("person", 2, 1)} <= seen
    assert {count for _, count, _ in seen} == {1, 2, 3, 4}
    assert any(boxes == 0 for _, _, boxes in seen)


def test_coco_finds_the_common_kind(tmp_path: Path) -> None:
    folder, seen = write_coco(tmp_path), set()
    for seed in range(30):
        records, _ = good(read_coco(folder, seed=seed))
        for record in (record for record in records if record.kind == "semantic"):
            kinds = [{label for label, _ in OBJECTS[int(path.stem)]} for path in record.images]
            (name,) = set.intersection(*kinds)
            count = len(record.images)
            asked = [k for k in range(count) if f"image {k + 1}" in record.query] or list(range(count))
            expected = [(k, *corners) for k in asked for corners in truth(record.images[k], name)]
            assert [(b.image, b.x1, b.y1, b.x2, b.y2) for b in record.boxes] == expected
            seen.add((name, count, len(asked)))
    assert seen == {(name, count, asked) for name in NAMES.values() for count in (2, 3) for asked in (1, count)}


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"image_id": 1, "category_id": 5, "bbox": [1, 1, 2, 2]}, "an unknown category; its picture is left out"),
        ({"image_id": 1, "category_id": 18, "bbox": [1, 1, "2"]}, "a malformed annotation; its picture is left out"),
        ({"image_id": 1, "category_id": 18}, "no field 'bbox'; its picture is left out"),
        ({"image_id": 77, "category_id": 18, "bbox": [1, 1, 2, 2]}, "an unknown picture; its picture is left out"),
        ("nonsense", "a malformed annotation; its picture is left out"),
        ({"image_id": 1, "category_id": [18], "bbox": [1, 1, 2, 2]}, "a malformed annotation; its picture is left out"),
        ({"image_id": 1, "category_id": 18, "bbox": [60, 1, 20, 2]}, "a box outside its picture"),
        ({"image_id": 1, "category_id": 18, "bbox": [6, 1, 0, 2]}, "a box without an area"),
    ],
)
def test_a_wrong_coco_annotation_leaves_its_picture_out(tmp_path: Path, annotation: Any, reason: str) -> None:
    records, tally = good(read_coco(write_coco(tmp_path, annotations=[annotation])))
    assert tally.refused == {reason: 1}
    shown = {int(path.stem) for record in records for path in record.images}
    assert (1 in shown) == (reason.startswith("an unknown picture") or annotation == "nonsense")
    assert records


def test_coco_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    (folder / "train2017" / "000000000001.jpg").unlink()
    (folder / "train2017" / "000000000002.jpg").write_bytes(b"no picture")
    paint(folder / "train2017" / "000000000004.jpg", (48, 64))
    turned = Image.Exif()
    turned[0x0112] = 3
    paint(folder / "train2017" / "000000000003.jpg", exif=turned)
    records, tally = good(read_coco(folder))
    assert {int(path.stem) for record in records for path in record.images} == {5, 6, 7}
    assert tally.refused == {
        "a missing picture": 1,
        "an unreadable picture": 1,
        "a picture turned by its EXIF data": 1,
        "a picture of another size than its annotation says": 1,
    }
    assert tally.examples["a missing picture"].endswith("000000000001.jpg")


def test_the_seed_fixes_coco_and_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    first = list(read_coco(folder, seed=3))
    file = folder / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: list(reversed(value)) for key, value in content.items()}))
    assert list(read_coco(folder, seed=3)) == first
    assert list(read_coco(folder, seed=4)) != first


def test_coco_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"instances_train2017\.json: no such file; lay the folder out as"):
        list(read_coco(tmp_path))
    file = write_coco(tmp_path) / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(GemvgError, match=r"instances_train2017\.json is not JSON"):
        list(read_coco(tmp_path))
    file.write_text('{"images": []}')
    with pytest.raises(GemvgError, match="has no list 'annotations'"):
        list(read_coco(tmp_path))


def write_d3(folder: Path) -> dict[str, dict[int, Any]]:
    """A tiny D3 folder: one group of three pictures, two descriptions."""
    tables: dict[str, dict[int, Any]] = {
        "sentences": {
            1: {"id": 1, "raw_sent": "a dog with a leash", "is_negative": False},
            2: {"id": 2, "raw_sent": "a dog without a leash", "is_negative": True},
        },
        "annotations": {
            5: {"id": 5, "image_id": 0, "sent_id": [1], "bbox": np.array([[1, 2, 10, 20]]), "area": np.array([200])},
            6: {"id": 6, "image_id": 0, "sent_id": [2], "bbox": [np.array([30, 2, 10, 20])], "area": [np.int64(1)]},
            7: {"id": 7, "image_id": 2, "sent_id": [2], "bbox": np.array([[3, 4, 5, 6]], np.float32)},
        },
        "images": {k: {"id": k, "file_name": f"dog/{k}.jpg", "width": 64, "height": 48} for k in range(3)},
        "groups": {9: {"id": 9, "img_id": [2, 0, 1], "inner_sent_id": [1, 2], "outer_sent_id": []}},
    }
    save_d3(folder, tables)
    for image in range(3):
        paint(folder / "d3_images" / "dog" / f"{image}.jpg")
    return tables


def save_d3(folder: Path, tables: dict[str, dict[int, Any]]) -> None:
    """Write the four pickles."""
    (folder / "d3_pkl").mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (folder / "d3_pkl" / f"{name}.pkl").write_bytes(pickle.dumps(table))


def test_d3_asks_each_description_of_each_picture_once(tmp_path: Path) -> None:
    write_d3(tmp_path)
    expected = {
        "a dog with a leash": {"0": [(1, 2, 11, 22)], "1": [], "2": []},
        "a dog without a leash": {"0": [(30, 2, 40, 22)], "1": [], "2": [(3, 4, 8, 10)]},
    }
    orders = set()
    for seed in range(8):
        records, tally = good(read_d3(tmp_path, seed))
        assert not tally.refused
        found: dict[str, dict[str, list[Any]]] = {text: {} for text in expected}
        for record in records:
            assert (record.kind, record.source) == ("referential", "D3")
            for image, path in enumerate(record.images):
                boxes = [(b.x1, b.y1, b.x2, b.y2) for b in record.boxes if b.image == image]
                found[record.query][path.stem] = boxes
        assert found == expected
        orders.add(str(records))
    assert len(orders) > 1


def test_d3_faults_are_named(tmp_path: Path) -> None:
    tables = write_d3(tmp_path)
    tables["annotations"][8] = {"id": 8, "image_id": 0, "sent_id": [44], "bbox": np.array([[1, 1, 2, 2]])}
    tables["images"][3] = {"id": 3, "file_name": "dog/3.jpg", "width": 64, "height": 48}
    tables["images"][4] = {"id": 4, "file_name": "dog/4.jpg"}
    tables["groups"][10] = {"id": 10, "img_id": None}
    save_d3(tmp_path, tables)
    records, tally = good(read_d3(tmp_path))
    assert tally.refused == {
        "a malformed annotation; its picture is left out": 1,
        "a missing picture": 1,
        "a malformed image entry": 1,
        "a malformed group": 1,
    }
    assert {path.stem for record in records for path in record.images} == {"1", "2"}


class _Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_d3(tmp_path)
    (tmp_path / "d3_pkl" / "groups.pkl").write_bytes(pickle.dumps({1: _Harm()}))
    with pytest.raises(GemvgError, match=r"groups\.pkl: the pickle asks for \w+\.mkdir, which data does not need"):
        list(read_d3(tmp_path))
    assert not Path("harm").exists()
    (tmp_path / "d3_pkl" / "groups.pkl").write_bytes(b"\x80\x04no")
    with pytest.raises(GemvgError, match=r"groups\.pkl is not a pickle that can be read"):
        list(read_d3(tmp_path))
    (tmp_path / "d3_pkl" / "groups.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(GemvgError, match="holds a list, not a dict"):
        list(read_d3(tmp_path))


HARMLESS = {
    "array": np.array([[1, 2.5]]), "number": np.float32(3.5), "big end first": np.array([1.5], ">f4"),
    "words": np.array(["ab", "c"]), "lists": np.array([[1], [2, 3]], object), "set": {1, 2},
    "columns": np.asfortranarray([[1, 2], [3, 4]]), "whole": np.int64(7), "flag": np.bool_(True),
}  # fmt: skip
PLAIN = {
    "array": [[1, 2.5]], "number": 3.5, "big end first": [1.5], "words": ["ab", "c"], "lists": [[1], [2, 3]],
    "set": {1, 2}, "columns": [[1, 2], [3, 4]], "whole": 7, "flag": True,
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_pickles_become_lists(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(HARMLESS, protocol))
    assert read_pickle(tmp_path / "a.pkl", dict, "") == PLAIN


@pytest.mark.parametrize(
    "stored",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2 billion places, as Python's own reader makes it
        b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"K\x01s.",  # a key whose hash needs a deeper stack than there is
        b"\x80\x02}(" + b")" * 100 + b"tK\x01s.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f.",  # more bytes than there is memory
        pickle.dumps(np.zeros(3)).replace(b"f8", b"O8"),
        pickle.dumps(np.zeros(3)).replace(b"f8", b"V8"),
        pickle.dumps(np.zeros(3))[:-20] + b".",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb.",
        b"\x80\x02cbuiltins\nset\n}b.",
        b"I" + b"9" * 10**5 + b"\n.",
        b"",
    ],
)
def test_pickles_of_strangers(tmp_path: Path, stored: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(stored)
    with pytest.raises(GemvgError, match=r"a\.pkl (is not a pickle that can be read|holds a \w+, not a dict)"):
        read_pickle(tmp_path / "a.pkl", dict, "")
