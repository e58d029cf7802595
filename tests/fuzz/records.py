"""Damaged record files, scenes and annotation files of every data set: sound records, counted faults, or one sentence.

An input is the name of its reader, a line break and the file; what else that data set needs lies beside it, sound.
"""

from __future__ import annotations

import atexit
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemvg_edge.errors import GemvgError
from tests import test_data_coco, test_data_ids, test_data_mgrounding, test_data_single, test_data_views
from train.data.coco import read_coco
from train.data.d3 import read_d3
from train.data.ego_exo import read_ego_exo
from train.data.mgrounding import read_mgrounding
from train.data.mig_bench import read_mig_bench
from train.data.mvtrack import read_mvtrack
from train.data.pictures import measure
from train.data.record import Fault, Record, Tally, keep_good, read_records, write_records
from train.data.record import check as fault_of
from train.data.refcoco import read_refcoco
from train.data.star import read_star
from train.data.voc_labelme import read_labelme, read_voc
from train.world.scenes import read_scenes

Read = Callable[[Path], Iterator[Record | Fault]]


class Place(NamedTuple):
    """A reader with its folder, and the file in it that an input becomes."""

    read: Read
    folder: Path
    file: Path


def seeds() -> list[bytes]:
    """Every reader's sound file, some broken lines, and what has made readers of such files fail elsewhere."""
    sound = [b"%s\n%s" % (name.encode(), place.file.read_bytes()) for name, place in _originals().items()]
    record = _originals()["records"].file.read_bytes()
    bomb = b'<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa"><!ENTITY c "&a;&a;&a;&a;&a;&a;">]><annotation>&c;</annotation>'
    broken: list[bytes] = [
        b"records\n\xef\xbb\xbf" + record.replace(b"\n", b"\r\n\r\n"),
        b'records\n{"images": ["a\\u0000", "\\ud800"]}\n' + record,
        b"records\ncaf\xe9\n" + record,
        b"voc\n" + bomb,
        b"refs\n\x80\x02]r\xff\xff\xff\x7f.",
        b"refs\n\x80\x02}" + b")" + b"\x85" * 2000 + b"K\x01s.",
        b"refs\n" + _laughs(),
        b"d3\n" + pickle.dumps({1: {"bbox": np.zeros((1, 4)), "image_id": np.int64(1), "sent_id": [1]}}, 5),
    ]
    return [*sound, *broken]


def check(data: bytes) -> None:
    """Feed one input to its reader; AssertionError or any error but GemvgError is a find."""
    name, _, content = data.partition(b"\n")
    places = _places()
    place = places.get(name.decode("latin-1"), places["records"])
    place.file.write_bytes(content)
    sentence, tally, out = "", Tally(), place.folder.parent / "out" / "written.jsonl"
    try:
        items = list(place.read(place.folder))
    except GemvgError as error:
        items, sentence = [], str(error)
    assert sentence.isprintable()
    assert len(sentence) < 1000
    kept = list(keep_good(items, tally))
    assert tally.kept + tally.refused.total() == len(items)
    "\n".join(tally.lines()).encode()
    for record in kept:
        assert fault_of(record) is None
        if place.read is not _read_record_file:
            assert [measure(path) for path in record.images] == list(record.sizes)
            assert all(path.resolve().is_relative_to(place.folder.parent.resolve()) for path in record.images)
            assert len(set(record.boxes)) == len(record.boxes)
    assert write_records(kept, out, overwrite=True) == len(kept)
    again = [item for item in read_records(out) if isinstance(item, Record)]
    what = [(r.sizes, r.query, tuple(sorted(r.boxes)), r.words, r.thinking) for r in kept]
    assert [(r.sizes, r.query, r.boxes, r.words, r.thinking) for r in again] == what


def _read_record_file(folder: Path) -> Iterator[Record | Fault]:
    return read_records(folder / "records.jsonl")


def _read_scenes(folder: Path) -> Iterator[Record | Fault]:
    read_scenes(folder)
    return iter(())


@cache
def _originals() -> dict[str, Place]:
    """What seeds are taken from; inputs are written elsewhere."""
    return _make_places(_scratch())


@cache
def _places() -> dict[str, Place]:
    return _make_places(_scratch())


def _scratch() -> Path:
    """A folder that goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="gemvg-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _make_places(root: Path) -> dict[str, Place]:
    """A small data set for every reader."""

    def at(read: Read, name: str, *file: str) -> Place:
        return Place(read, root / name / "data", (root / name / "data").joinpath(*file))

    places = {
        "records": at(_read_record_file, "records", "records.jsonl"),
        "scenes": at(_read_scenes, "scenes", "scenes-00000000.jsonl"),
        "coco": at(read_coco, "coco", "annotations", "instances_train2017.json"),
        "ids": at(read_coco, "ids", "annotations", "instances_train2017.json"),
        "voc": at(read_voc, "voc", "Annotations", "a.xml"),
        "labelme": at(read_labelme, "labelme", "labels", "a.json"),
        "refs": at(read_refcoco, "refs", "refs(unc).p"),
        "instances": at(read_refcoco, "instances", "instances.json"),
        "mig": at(read_mig_bench, "mig", "MIG_data.json"),
        "mgrounding": at(read_mgrounding, "mgrounding", "MGrounding-630k.json"),
        "masks": at(read_ego_exo, "masks", "take-1", "annotation.json"),
        "relations": at(read_ego_exo, "relations", "relations_train.json"),
        "star": at(read_star, "star", "STAR_train.json"),
        "classes": at(read_star, "classes", "object_classes.txt"),
        "rows": at(read_mvtrack, "rows", "bag1", "bag1-1", "groundtruth.txt"),
        "split": at(read_mvtrack, "split", "mvtrack_train_split.txt"),
    }
    places |= {f"d3 {table}": at(read_d3, f"d3 {table}", "d3_pkl", f"{table}.pkl") for table in _TABLES}
    places["d3"] = places["d3 annotations"]
    for name, place in places.items():
        place.folder.mkdir(parents=True, exist_ok=True)
        _fill(name, place.folder)
        assert place.file.is_file(), name
    return places


_TABLES = ("sentences", "annotations", "images", "groups")


def _fill(name: str, folder: Path) -> None:
    match name.split()[0]:
        case "records":
            test_data_coco.paint(folder / "a.jpg")
            lines = [{**_RECORD, "query": "a mug"}, {**_RECORD, "mode": "cot", "thinking": "here"}, _WORDS]
            (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        case "scenes":
            view = {"file": "images/0-0.png", "width": 64, "height": 48, "boxes": [[1, 2, 30, 40], None]}
            scene = {"seed": 3, "things": [["mug", "red"], ["cup", "blue"]], "moved": [0], "removed": [], "added": [1]}
            (folder / "scenes-00000000.jsonl").write_text(json.dumps({**scene, "views": [view] * 4}) + "\n")
        case "coco":
            if not (folder / "annotations").exists():
                test_data_coco.write_coco(folder)
        case "ids":
            test_data_ids.write(folder)
        case "voc":
            test_data_single.write_voc(folder, ("dog", 11, 5, 20, 30), ("diningtable", 1, 1, 64, 48))
        case "labelme":
            shape = test_data_single.shape
            round_one = shape("plate", [[20, 20], [23, 24]], "circle")
            test_data_single.write_labelme(folder, shape("mug", [[30, 20], [10.5, 4]]), round_one)
        case "refs" | "instances":
            test_data_single.write_refcoco(folder.parent, test_data_single.ref("left mug", "the mug"))
            for file in (folder.parent / "refcoco").iterdir():
                file.rename(folder / file.name)
        case "d3":
            test_data_coco.write_d3(folder)
        case "mig":
            item = {"task": "diff", "images": ["./a.png"], "question": "in the 1th image", "answer": [0, 0, 5, 5]}
            (folder / "MIG_data.json").write_text(json.dumps([item, {**item, "task": "region"}]))
            test_data_coco.paint(folder / "a.png")
        case "mgrounding":
            group = test_data_mgrounding.GROUP
            answer = "It's in the second image. <|box_start|>(0,0),(500,500)<|box_end|>"
            talks = [test_data_mgrounding.talk(group, "<image><image>a dog", text) for text in ("None", answer)]
            test_data_mgrounding.read(folder, *talks)
        case "masks" | "relations":
            test_data_views.write_ego_exo(folder, packed=name == "relations")
        case "star" | "classes":
            test_data_views.write_star(folder)
        case "rows" | "split":
            test_data_views.write_mvtrack(folder)


_RECORD: dict[str, Any] = {
    "images": ["a.jpg"], "sizes": [[64, 48]], "query": "mug", "boxes": [[0, 1.5, 2, 30, 40]], "kind": "referential",
    "source": "us",
}  # fmt: skip
_WORDS = {**_RECORD, "boxes": [], "kind": "understanding", "words": "two"}


def _laughs() -> bytes:
    """A pickle whose lists hold each other: a few bytes that would print as 2 to the power of 60 words."""
    nested: Any = ["x"]
    for _ in range(60):
        nested = [nested, nested]
    entry = {"split": "train", "sentences": [{"sent": nested}], "image_id": nested, "ann_id": nested}
    stream = io.BytesIO()
    pickle.Pickler(stream, 2).dump([entry, {**entry, "image_id": 7, "ann_id": 70}])
    return stream.getvalue()
