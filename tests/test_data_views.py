"""Ego-Exo4D, STAR and MVTrack folders in their true layout; exact boxes, faults by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests import test_data_masks
from tests.test_data_coco import good, paint
from train.data.ego_exo import read_ego_exo
from train.data.mvtrack import STRIDE, read_mvtrack
from train.data.record import Record
from train.data.sightings import OTHER_TIME, Sighting, follow, spread
from train.data.star import read_star


@given(st.integers(0, 40), st.integers(0, 99))
def test_spread_groups_hold_each_frame_once_in_order(count: int, seed: int) -> None:
    groups = [list(group) for group in spread(range(count), np.random.default_rng(seed))]
    assert sorted(frame for group in groups for frame in group) == list(range(count))
    assert all(group == sorted(group) and len(group) <= 4 for group in groups)
    assert count < 2 or sum(len(group) == 1 for group in groups) <= len(groups) / 2


def shown_box(record: Record) -> tuple[int, list[int]]:
    """The 0-based picture and the whole steps of the box in the query."""
    image = re.search(r"image (\d)", record.query)
    corners = re.search(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>", record.query)
    assert image is not None
    assert corners is not None
    return int(image[1]) - 1, [int(value) for value in corners.groups()]


def test_the_shown_box_is_not_asked_for(tmp_path: Path) -> None:
    for name in "abc":
        paint(tmp_path / f"{name}.jpg", (100, 50))
    seen = [
        Sighting(tmp_path / "a.jpg", (10, 10, 20, 20)),
        Sighting(tmp_path / "b.jpg", None),
        Sighting(tmp_path / "c.jpg", (50, 25, 100, 50)),
    ]
    steps = {0: [100, 200, 200, 400], 2: [500, 500, 1000, 1000]}
    shown = set()
    for seed in range(12):
        record = follow(seen, "mug", OTHER_TIME, "temporal", "us", np.random.default_rng(seed))
        assert isinstance(record, Record)
        image, corners = shown_box(record)
        shown.add(image)
        assert corners == steps[image]
        assert record.boxes == ((Box(2, 50, 25, 100, 50),) if image == 0 else (Box(0, 10, 10, 20, 20),))
    assert shown == {0, 2}
    outside = [seen[0], Sighting(tmp_path / "c.jpg", (50, 25, 140, 50))]
    thin = [Sighting(tmp_path / "a.jpg", (10, 10, 10.01, 20)), seen[1]]
    for sightings, reason in ((outside, "a box outside its picture"), (thin, "a box to show that is thinner")):
        fault = follow(sightings, "mug", OTHER_TIME, "temporal", "us", np.random.default_rng(0))
        assert getattr(fault, "reason", "").startswith(reason)
    assert follow([seen[1], seen[1]], "mug", OTHER_TIME, "temporal", "us", np.random.default_rng(0)) is None
    assert follow([seen[0]], "mug", OTHER_TIME, "temporal", "us", np.random.default_rng(0)) is None


def write_ego_exo(folder: Path, packed: bool) -> dict[str, Any]:
    """One take: a bowl in the wearer's camera at two moments, in cam01 at one of them; pictures of half the size."""
    (height, width), counts, _, encoded = test_data_masks.KNOWN[0]  # its box is 7, 5, 31, 20
    mask: dict[str, Any] = {"size": [height, width], "counts": counts}
    if packed:
        mask = {"height": height, "width": width, "encodedMask": encoded}
    masks: dict[str, Any] = {
        "metal bowl_0": {"aria01_214-1": {"0": mask, "30": mask}, "cam01": {"30": mask}},
        "knife_1": {"cam01": {"30": mask}},
    }
    save_ego_exo(folder, masks, packed)
    for camera in ("aria01_214-1", "cam01"):
        for frame in ("0", "30"):
            paint(folder / "take-1" / camera / f"{frame}.jpg", (30, 20))
    return masks


def save_ego_exo(folder: Path, masks: dict[str, Any], packed: bool) -> None:
    """Either layout of the masks."""
    (folder / "take-1").mkdir(parents=True, exist_ok=True)
    if packed:
        objects = {name: {c: {"annotation": v} for c, v in views.items()} for name, views in masks.items()}
        take = {"take_name": "cooking_1", "object_masks": objects}
        (folder / "relations_train.json").write_text(json.dumps({"annotations": {"take-1": take}}))
    else:
        (folder / "split.json").write_text(json.dumps({"train": ["take-1"], "val": ["take-2"]}))
        (folder / "take-1" / "annotation.json").write_text(json.dumps({"masks": masks}))


@pytest.mark.parametrize("packed", [False, True])
def test_ego_exo_asks_the_other_camera(tmp_path: Path, packed: bool) -> None:
    write_ego_exo(tmp_path, packed)
    shown = set()
    for seed in range(8):
        records, tally = good(read_ego_exo(tmp_path, seed=seed))
        assert not tally.refused
        (record,) = records
        image, corners = shown_box(record)
        shown.add(record.images[image].parent.name)
        assert {path.name for path in record.images} == {"30.jpg"}
        assert corners == [117, 125, 517, 500]
        assert record.boxes == (Box(1 - image, 3.5, 2.5, 15.5, 10),)  # half of (7, 5, 31, 20)
        assert (record.kind, record.source) == ("spatial", "Ego-Exo4D")
        assert "the metal bowl" in record.query
    assert shown == {"aria01_214-1", "cam01"}


def test_ego_exo_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"split\.json: no such file; make the folder with process_data\.py"):
        list(read_ego_exo(tmp_path))
    masks = write_ego_exo(tmp_path, packed=False)
    assert good(read_ego_exo(tmp_path, "val"))[1].refused == {"a missing take": 1}
    with pytest.raises(GemvgError, match="has no list 'test'"):
        list(read_ego_exo(tmp_path, "test"))
    paint(tmp_path / "take-1" / "cam01" / "30.jpg", (30, 30))
    assert good(read_ego_exo(tmp_path))[1].refused == {"a mask of another shape than its picture": 1}
    (tmp_path / "take-1" / "cam01" / "30.jpg").unlink()
    assert good(read_ego_exo(tmp_path))[1].refused == {"a missing picture": 1}
    masks["metal bowl_0"]["aria01_214-1"]["30"] = {"size": [4, 4], "counts": "m8"}
    save_ego_exo(tmp_path, masks, packed=False)
    paint(tmp_path / "take-1" / "cam01" / "30.jpg", (30, 20))
    assert good(read_ego_exo(tmp_path))[1].refused == {"a malformed mask": 1}
    save_ego_exo(tmp_path, {"bowl": 5}, packed=False)
    assert good(read_ego_exo(tmp_path))[1].refused == {"not laid out as Ego-Exo4D relations (AttributeError)": 1}
    (tmp_path / "take-1" / "annotation.json").write_text("{")
    with pytest.raises(GemvgError, match=r"annotation\.json is not JSON"):
        list(read_ego_exo(tmp_path))


def write_star(folder: Path, **frames: Any) -> None:
    """Two questions about one video; `frames` adds frames to the second."""

    def frame(*objects: tuple[str, list[float] | None]) -> dict[str, Any]:
        return {"bbox_labels": [label for label, _ in objects], "bbox": [box for _, box in objects], "actions": ["c1"]}

    first = {"000100": frame(("o000", [1, 2, 10, 20]), ("o010", [3, 4, 8, 9]))}
    second: dict[str, Any] = {
        "000100": first["000100"],
        "000030": frame(("o000", [5, 5, 15, 25]), ("o010", None), ("o007", [0, 0, 1, 1]), ("o007", [1, 1, 2, 2])),
    }
    questions = [{"video_id": "ABC", "situations": first}, {"video_id": "ABC", "situations": {**second, **frames}}]
    folder.mkdir(exist_ok=True)
    (folder / "STAR_train.json").write_text(json.dumps(questions))
    (folder / "object_classes.txt").write_text("o000 person\no007 paper/notebook\no010 cup/glass/bottle\n")
    for name in ("000030", "000100", "000200", "000300"):
        paint(folder / "frames" / "ABC.mp4" / f"{name}.png")


def test_star_follows_things_through_the_video(tmp_path: Path) -> None:
    write_star(tmp_path)
    records, tally = good(read_star(tmp_path))
    assert not tally.refused
    (record,) = records  # the cup and the notebook have one sure box each
    assert [path.name for path in record.images] == ["000030.png", "000100.png"]  # in the order of time
    image, _ = shown_box(record)
    assert record.boxes == ((Box(1, 1, 2, 10, 20),) if image == 0 else (Box(0, 5, 5, 15, 25),))
    assert (record.kind, record.source) == ("temporal", "STAR")
    write_star(tmp_path, **{"000200": {"bbox_labels": ["o010"], "bbox": [[3, 4, 9, 9]]}})
    queries = [record.query for record in good(read_star(tmp_path))[0]]
    assert sum("cup or glass or bottle" in query for query in queries) == 1
    write_star(tmp_path, **{"000200": {"bbox_labels": ["o007"], "bbox": [[3, 4, 9, 9]]}})
    assert not any("notebook" in record.query for record in good(read_star(tmp_path))[0])  # which of two, elsewhere?


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ({"000200": {"bbox_labels": ["o999"], "bbox": [[0, 0, 1, 1]]}}, "an unknown category"),
        ({"000200": {"bbox_labels": ["o000"], "bbox": [[0, 0, 1]]}}, "a malformed box"),
        ({"000200": {"bbox_labels": ["o000"], "bbox": [[0, 0, 1, 9999]]}}, "a box outside its picture"),
        ({"000200": {"bbox_labels": ["o000"], "bbox": []}}, "not laid out as STAR (ValueError)"),
        ({"000400": {"bbox_labels": ["o000"], "bbox": [[0, 0, 9, 9]]}}, "a missing picture"),
        ({"last": {"bbox_labels": ["o000"], "bbox": [[0, 0, 9, 9]]}}, "not laid out as STAR (ValueError)"),
    ],
)
def test_star_faults_are_named(tmp_path: Path, frames: dict[str, Any], reason: str) -> None:
    write_star(tmp_path, **frames)
    reasons = set()
    for seed in range(6):
        reasons |= set(good(read_star(tmp_path, seed=seed))[1].refused)
    assert reasons == {reason}


def test_star_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"object_classes\.txt: no such file; put STAR_train\.json"):
        list(read_star(tmp_path))
    write_star(tmp_path)
    (tmp_path / "STAR_train.json").write_text('[{"video_id"')
    with pytest.raises(GemvgError, match=r"STAR_train\.json is not JSON"):
        list(read_star(tmp_path))


def write_mvtrack(folder: Path, cameras: int = 2, moments: int = 3) -> None:
    """The scene bag1: camera c sees the bag at (c, moment) but for camera 2 at moment 1, where it is hidden."""
    names = [f"bag1-{c}" for c in range(1, cameras + 1)]
    folder.mkdir(exist_ok=True)
    (folder / "mvtrack_train_split.txt").write_text("\n".join(names) + "\n")
    for c, name in enumerate(names, 1):
        rows = [f"{c},{k // STRIDE},10,20" for k in range((moments - 1) * STRIDE + 1)]
        hidden = [int(c == 2 and k == STRIDE) for k in range(len(rows))]
        for k in range(0, len(rows), STRIDE):
            paint(folder / "bag1" / name / "img" / f"{k + 1:05}.jpg")
        (folder / "bag1" / name / "groundtruth.txt").write_text("\n".join(rows) + "\n")
        (folder / "bag1" / name / "invisible.txt").write_text(",".join(map(str, hidden)) + "\n")


def test_mvtrack_goes_over_cameras_and_over_time(tmp_path: Path) -> None:
    write_mvtrack(tmp_path)
    records, tally = good(read_mvtrack(tmp_path))
    assert not tally.refused
    moments = {f"{k * STRIDE + 1:05}": k for k in range(3)}
    for record in records:
        shown, _ = shown_box(record)
        assert "the bag" in record.query
        for image, path in enumerate(record.images):
            camera, moment = int(path.parts[-3][-1]), moments[path.stem]
            seen = image != shown and not (camera == 2 and moment == 1)
            expected = [Box(image, camera, moment, camera + 10, moment + 20)] if seen else []
            assert [box for box in record.boxes if box.image == image] == expected
    assert sum(record.kind == "spatial" for record in records) == 3
    for record in records:
        cameras, times = {path.parts[-3] for path in record.images}, {path.stem for path in record.images}
        assert (len(cameras) == 1) == (record.kind == "temporal")
        assert (len(times) == 1) == (record.kind == "spatial")


def test_mvtrack_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"train_split\.txt: no such file; lay the folder out"):
        list(read_mvtrack(tmp_path))
    write_mvtrack(tmp_path)
    first, second = tmp_path / "bag1" / "bag1-1", tmp_path / "bag1" / "bag1-2"
    (first / "groundtruth.txt").write_text(
        (first / "groundtruth.txt").read_text().replace("1,0,10,20", "1,0,nan,20", 1)
    )
    (second / "invisible.txt").write_text("0,0")
    _, tally = good(read_mvtrack(tmp_path))
    assert tally.refused == {"a malformed box": 1, "not as many boxes as flags": 1}
    assert tally.examples["a malformed box"].endswith("bag1-1/groundtruth.txt, row 1")
    (second / "invisible.txt").unlink()
    assert good(read_mvtrack(tmp_path))[1].refused["a missing annotation file"] == 1


def test_a_camera_that_is_listed_twice_is_one(tmp_path: Path) -> None:
    write_mvtrack(tmp_path)
    before = list(read_mvtrack(tmp_path))
    file = tmp_path / "mvtrack_train_split.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() * 2)
    assert list(read_mvtrack(tmp_path)) == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("mvtrack_train_split.txt", b"bag1-1 bag1-2 ../x-1 /etc/x-1 -1", "a sequence that names no folder"),
        ("bag1/bag1-1/invisible.txt", b"0,2,0", "an annotation file that cannot be read"),
        ("bag1/bag1-1/invisible.txt", b"0,x,0", "an annotation file that cannot be read"),
        ("bag1/bag1-1/groundtruth.txt", "1,2,3,4 \u00e9".encode("latin-1"), "an annotation file that cannot be read"),
        ("bag1/bag1-1/groundtruth.txt", b"1,2,3", "not as many boxes as flags"),
    ],
)
def test_mvtrack_files_of_strangers(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    write_mvtrack(tmp_path)
    (tmp_path / name).write_bytes(content)
    _, tally = good(read_mvtrack(tmp_path))
    assert set(tally.refused) == {reason}


def test_star_questions_that_disagree(tmp_path: Path) -> None:
    """Of two boxes of one thing in one frame neither is taken; one that stands twice is one."""
    other = {"bbox_labels": ["o000"], "bbox": [[2, 2, 10, 20]]}
    write_star(tmp_path, **{"000100": other, "000200": {"bbox_labels": ["o000"] * 2, "bbox": [[5, 6, 7, 8]] * 2}})
    records, tally = good(read_star(tmp_path))
    assert tally.refused == {"another box than an earlier question has; the thing is left out of this frame": 1}
    assert [[path.name for path in record.images] for record in records] == [["000030.png", "000200.png"]]


@pytest.mark.parametrize("video", [7, None, "../ABC", "", "\ud800", ["ABC"]])
def test_star_videos_that_are_no_names(tmp_path: Path, video: Any) -> None:
    write_star(tmp_path)
    content = json.loads((tmp_path / "STAR_train.json").read_text())
    (tmp_path / "STAR_train.json").write_text(json.dumps([*content, {**content[0], "video_id": video}]))
    records, tally = good(read_star(tmp_path))
    assert len(records) == 1
    assert list(tally.refused.values()) == [1]


def test_a_class_that_stands_twice_has_no_meaning(tmp_path: Path) -> None:
    write_star(tmp_path)
    with (tmp_path / "object_classes.txt").open("a") as file:
        file.write("o000 dog\n")
    records, tally = good(read_star(tmp_path))
    assert records == []
    assert set(tally.refused) == {"an unknown category"}


def test_ego_exo_takes_and_cameras_that_lead_elsewhere(tmp_path: Path) -> None:
    masks = write_ego_exo(tmp_path, packed=False)
    (tmp_path / "split.json").write_text(json.dumps({"train": ["take-1", "take-1", "../x", 5, "x" * 300]}))
    records, tally = good(read_ego_exo(tmp_path))
    assert len(records) == 1
    assert tally.refused == {"a take that names no folder": 2, "a missing take": 1}
    masks["metal bowl_0"]["../cam02"] = masks["metal bowl_0"].pop("cam01")
    save_ego_exo(tmp_path, masks, packed=False)
    assert good(read_ego_exo(tmp_path))[1].refused == {"a camera or a frame that names no file": 1}


@pytest.mark.parametrize("size", [[20.5, 30], ["20", 30], [True, 30], [-20, -30], [0, 30], [10**9, 10**9], None])
def test_ego_exo_masks_of_no_size(tmp_path: Path, size: Any) -> None:
    masks = write_ego_exo(tmp_path, packed=False)
    masks["metal bowl_0"]["aria01_214-1"]["30"]["size"] = size
    save_ego_exo(tmp_path, masks, packed=False)
    assert good(read_ego_exo(tmp_path))[1].refused == {"a malformed mask": 1}
