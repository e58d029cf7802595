"""RefCOCO, Pascal VOC and labelme folders in their true layout: one picture a record."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.test_data_coco import good, paint
from train.data.convert import convert
from train.data.record import Record, write_records
from train.data.refcoco import read_refcoco
from train.data.voc_labelme import read_labelme, read_voc

PICTURE = "COCO_train2014_000000000007.jpg"


def write_refcoco(folder: Path, *refs: Any, protocol: int = 0) -> Path:
    """A refcoco folder as Python 2 pickled it, with its picture; returns the folder of refs(unc).p."""
    refcoco = folder / "refcoco"
    refcoco.mkdir(parents=True, exist_ok=True)
    instances = {
        "images": [{"id": 7, "file_name": PICTURE, "width": 64, "height": 48}],
        "annotations": [
            {"id": 70, "image_id": 7, "category_id": 1, "bbox": [1.5, 2, 10, 20]},
            {"id": 71, "image_id": 8, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"id": 72, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3]},
        ],
    }
    (refcoco / "instances.json").write_text(json.dumps(instances))
    (refcoco / "refs(unc).p").write_bytes(pickle.dumps(list(refs), protocol))
    paint(folder / "images" / "mscoco" / "images" / "train2014" / PICTURE)
    return refcoco


def ref(*sentences: Any, split: str = "train", annotation: int = 70, image: int = 7) -> dict[str, Any]:
    """A reference to one object."""
    spoken = [{"sent": text, "raw": text, "sent_id": k, "tokens": []} for k, text in enumerate(sentences)]
    ids = {"ref_id": 1, "ann_id": annotation, "image_id": image, "category_id": 1}
    return {**ids, "split": split, "sentences": spoken, "file_name": "COCO_train2014_000000000007_1.jpg"}


def test_each_expression_is_a_record(tmp_path: Path) -> None:
    folder = write_refcoco(tmp_path, ref("left mug", "mug near plate"), ref("right mug", split="testA"))
    records, tally = good(read_refcoco(folder))
    assert not tally.refused
    assert [record.query for record in records] == ["left mug", "mug near plate"]
    assert all(record.boxes == (Box(0, 1.5, 2, 11.5, 22),) for record in records)
    assert (records[0].kind, records[0].source, records[0].images[0].name) == ("referential", "RefCOCO", PICTURE)
    assert [record.query for record in good(read_refcoco(folder, "testA"))[0]] == ["right mug"]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (ref("a", annotation=99), "an unknown picture or annotation"),
        (ref("a", image=99), "an unknown picture or annotation"),
        (ref("a", annotation=71), "an annotation of another picture"),
        (ref("a", annotation=72), "a malformed picture or annotation"),
        (ref(" "), "an empty query, or one with control tokens"),
        ({"split": "train"}, "not laid out as a reference (KeyError)"),
        ("text", "not laid out as a reference (TypeError)"),
    ],
)
def test_refcoco_faults_are_named(tmp_path: Path, reference: Any, reason: str) -> None:
    records, tally = good(read_refcoco(write_refcoco(tmp_path, reference, ref("left mug"))))
    assert tally.refused == {reason: 1}
    assert len(records) == 1


def test_refcoco_without_its_files(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"refs\(unc\)\.p: no such file; unpack refcoco\.zip"):
        list(read_refcoco(tmp_path))
    folder = write_refcoco(tmp_path, ref("left mug"))
    assert good(read_refcoco(folder, pictures=tmp_path))[1].refused == {"a missing picture": 1}
    (folder / "instances.json").write_text("{")
    with pytest.raises(GemvgError, match=r"instances\.json is not JSON"):
        list(read_refcoco(folder))


VOC = """<annotation><folder>VOC2012</folder><filename>a.jpg</filename>
<size><width>64</width><height>48</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = (
    "<object><name>{}</name><difficult>0</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_voc(folder: Path, *objects: tuple[Any, ...], text: str = VOC) -> Path:
    """One picture and its XML file."""
    paint(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations").mkdir(exist_ok=True)
    content = text.format(objects="".join(OBJECT.format(*found) for found in objects))
    (folder / "Annotations" / "a.xml").write_text(content)
    return folder


def test_voc_asks_for_every_object_of_a_class(tmp_path: Path) -> None:
    objects = [("dog", 11, 5, 20, 30), ("diningtable", 1, 1, 64, 48), ("dog", 2, 3, 4, 5)]
    records, tally = good(read_voc(write_voc(tmp_path, *objects)))
    assert not tally.refused
    assert [(record.query, record.boxes) for record in records] == [
        ("every dining table", (Box(0, 0, 0, 64, 48),)),  # VOC counts pixels from 1
        ("every dog", (Box(0, 1, 2, 4, 5), Box(0, 10, 4, 20, 30))),
    ]
    assert {(record.kind, record.source) for record in records} == {("referential", "Pascal VOC")}


@pytest.mark.parametrize(
    ("objects", "text", "reason"),
    [
        ([("dog", 1, 1, 80, 9)], VOC, "a box outside its picture"),
        ([("dog", 9, 1, 3, 9)], VOC, "a box without an area"),
        ([("dog", "left", 1, 3, 9)], VOC, "not laid out as Pascal VOC (ValueError)"),
        ([("", 1, 1, 3, 9)], VOC, "an empty query, or one with control tokens"),
        ([], VOC[:60], "not laid out as Pascal VOC (ParseError)"),
        ([], VOC.replace("a.jpg", "b.jpg"), "a missing picture"),
        ([], VOC.replace("<filename>a.jpg</filename>", ""), "not laid out as Pascal VOC (ValueError)"),
        ([("dog", 1, 1, 3, 9)], VOC.replace("64", "65"), "a picture of another size than its annotation says"),
    ],
)
def test_voc_faults_are_named(tmp_path: Path, objects: list[Any], text: str, reason: str) -> None:
    records, tally = good(read_voc(write_voc(tmp_path, *objects, text=text)))
    assert records == []
    assert tally.refused == {reason: 1}


def shape(label: str, points: list[Any], kind: str | None = "rectangle") -> dict[str, Any]:
    """A shape as labelme saves it."""
    found: dict[str, Any] = {"label": label, "points": points, "group_id": None, "flags": {}}
    return found if kind is None else {**found, "shape_type": kind}


def write_labelme(folder: Path, *shapes: dict[str, Any], **change: Any) -> Path:
    """One picture and its JSON file in another folder."""
    paint(folder / "pictures" / "a.png")
    content = {"version": "5.1", "shapes": list(shapes), "imagePath": "..\\pictures\\a.png", "imageData": None}
    (folder / "labels").mkdir(exist_ok=True)
    (folder / "labels" / "a.json").write_text(json.dumps({**content, "imageWidth": 64, "imageHeight": 48, **change}))
    return folder


def test_labelme_asks_for_every_object_of_a_label(tmp_path: Path) -> None:
    shapes = [
        shape("red mug", [[30, 20], [10.5, 4]]),
        shape("red mug", [[40, 4], [60, 8], [50, 20]], None),
        shape("plate", [[20, 20], [23, 24]], "circle"),
    ]
    records, tally = good(read_labelme(write_labelme(tmp_path, *shapes)))
    assert not tally.refused
    assert [(record.query, record.boxes) for record in records] == [
        ("every plate", (Box(0, 15, 15, 25, 25),)),
        ("every red mug", (Box(0, 10.5, 4, 30, 20), Box(0, 40, 4, 60, 20))),
    ]
    assert {(record.kind, record.source) for record in records} == {("referential", "labelme")}


@pytest.mark.parametrize(
    ("shapes", "change", "reason"),
    [
        ([shape("mug", [[0, 0], [90, 9]])], {}, "a box outside its picture"),
        ([shape("mug", [[0, 0], [0, 9]])], {}, "a box without an area"),
        ([shape("mug", [[0, 0], [5, 5]], "line")], {}, "not laid out as labelme (ValueError)"),
        ([shape("mug", [])], {}, "not laid out as labelme (TypeError)"),
        ([shape(" ", [[0, 0], [5, 5]])], {}, "an empty query, or one with control tokens"),
        ([], {"imagePath": "gone.png"}, "a missing picture"),
        ([], {"imagePath": None}, "not laid out as labelme (AttributeError)"),
        ([], {"shapes": None}, "not laid out as labelme (TypeError)"),
    ],
)
def test_labelme_faults_are_named(tmp_path: Path, shapes: list[Any], change: dict[str, Any], reason: str) -> None:
    records, tally = good(read_labelme(write_labelme(tmp_path, *shapes, **change)))
    assert records == []
    assert tally.refused == {reason: 1}


def test_folders_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"Annotations: no \.xml files there; lay the folder out"):
        list(read_voc(tmp_path))
    with pytest.raises(GemvgError, match=r"no \.json files there; give the folder that labelme"):
        list(read_labelme(tmp_path))
    (tmp_path / "a.json").write_text('{"shapes": [')
    assert good(read_labelme(tmp_path))[1].refused == {"not laid out as labelme (JSONDecodeError)": 1}


def test_one_bad_file_is_not_the_end(tmp_path: Path) -> None:
    folder = write_labelme(tmp_path, shape("mug", [[0, 0], [5, 5]]))
    labels = folder / "labels"
    whole = json.loads((labels / "a.json").read_text())
    bad: dict[str, bytes] = {
        "latin1": '{"imagePath": "caf\u00e9.png"}'.encode("latin-1"),
        "deep": b"[" * 100_000,
        "doubled": b'{"shapes": [], "shapes": []}',
        "infinite": json.dumps({**whole, "imageWidth": float("inf")}).encode(),
        "text": json.dumps({**whole, "imageWidth": "64"}).encode(),
        "number": json.dumps({**whole, "shapes": [{**shape("mug", [[0, 0], [5, 5]]), "label": 5}]}).encode(),
        "null": json.dumps({**whole, "imagePath": "a\0.png"}).encode(),
        "long": json.dumps({**whole, "imagePath": "x" * 300 + ".png"}).encode(),
        "half": json.dumps({**whole, "imagePath": "\ud800.png"}).encode(),
    }
    for name, content in bad.items():
        (labels / f"{name}.json").write_bytes(content)
    (labels / "folder.json").mkdir()
    (labels / "gone.json").symlink_to(labels / "nowhere")
    records, tally = good(read_labelme(folder))
    assert [record.query for record in records] == ["every mug"]
    assert tally.refused.total() == len(bad) + 2
    assert all("labelme (" in reason or "picture" in reason for reason in tally.refused)


def test_a_byte_order_mark_and_an_equal_box_are_no_fault(tmp_path: Path) -> None:
    folder = write_labelme(tmp_path, shape("mug", [[0, 0], [5, 5]]), shape(" mug", [[5, 5], [0, 0]]))
    file = folder / "labels" / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    records, tally = good(read_labelme(folder))
    assert [(record.query, record.boxes) for record in records] == [("every mug", (Box(0, 0, 0, 5, 5),))]
    assert not tally.refused


def test_a_picture_that_two_files_label_is_left_out(tmp_path: Path) -> None:
    """Each of them may have only some of the mugs."""
    folder = write_labelme(tmp_path, shape("mug", [[0, 0], [5, 5]]))
    content = json.loads((folder / "labels" / "a.json").read_text())
    (folder / "labels" / "b.json").write_text(json.dumps({**content, "imagePath": "./../pictures/a.png"}))
    records, tally = good(read_labelme(folder))
    assert records == []
    assert tally.refused == {"a picture that several files label": 2}
    write_voc(tmp_path, ("dog", 1, 1, 9, 9))
    (tmp_path / "Annotations" / "b.xml").write_text((tmp_path / "Annotations" / "a.xml").read_text())
    assert good(read_voc(tmp_path))[1].refused == {"a picture that several files label": 2}


BOMB = "<!DOCTYPE a [<!ENTITY a0 'ha'>{}]>".format(
    "".join(f"<!ENTITY a{k} '{f'&a{k - 1};' * 10}'>" for k in range(1, 12))
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + VOC.replace("VOC2012", "&a11;"),
        "<!DOCTYPE annotation SYSTEM 'file:///etc/passwd'>" + VOC,
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>" + VOC.replace("VOC2012", "&x;"),
        "<a>" * 50_000,
        VOC.replace("a.jpg", "../JPEGImages/a.jpg"),
        VOC.replace("a.jpg", "/etc/passwd"),
        VOC.replace("64", "64.5"),
        VOC.replace("64", "9" * 5000),
    ],
)
def test_voc_files_of_strangers(tmp_path: Path, text: str) -> None:
    folder = write_voc(tmp_path, ("dog", 1, 1, 9, 9))
    paint(folder / "JPEGImages" / "b.jpg")
    (folder / "Annotations" / "b.xml").write_text(
        (folder / "Annotations" / "a.xml").read_text().replace("a.jpg", "b.jpg")
    )
    (folder / "Annotations" / "a.xml").write_text(text)
    records, tally = good(read_voc(folder))
    assert [record.images[0].name for record in records] == ["b.jpg"]
    assert list(tally.refused.values()) == [1]
    assert next(iter(tally.refused)).startswith("not laid out as Pascal VOC (")


def test_a_folder_that_gives_nothing_leaves_the_older_records(tmp_path: Path) -> None:
    paint(tmp_path / "shop" / "a.jpg")
    (tmp_path / "shop" / "a.json").write_text(json.dumps({"imagePath": "a.jpg", "shapes": "none"}))
    older = Record((tmp_path / "shop" / "a.jpg",), ((64, 48),), "the mug", (), "referential", "us")
    write_records([older], tmp_path / "shop.jsonl")
    before = (tmp_path / "shop.jsonl").read_bytes()
    with pytest.raises(GemvgError, match=r"shop gave no record \(1 were refused\)"):
        convert("labelme", tmp_path / "shop", 0, tmp_path / "shop.jsonl", overwrite=True)
    assert (tmp_path / "shop.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shop", "shop.jsonl"]
