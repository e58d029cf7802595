"""MGrounding-630k and MIG-Bench: conversations and items in their published form, exact pixels, faults by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.test_data_coco import good
from train.data.mgrounding import read_mgrounding
from train.data.mig_bench import KIND_OF_TASK, Item, asked_image, parse_item, read_mig_bench
from train.data.record import Fault, Record, Tally

FIXTURE = Path(__file__).parents[2] / "shared" / "fixtures" / "mig_bench" / "revised_MIG_bench.json"
PREFIX = "./MGrounding-630k/"
SIZE = (200, 100)


def paint(path: Path, size: tuple[int, int] = SIZE) -> None:
    """A plain picture of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def talk(images: list[str], *turns: str) -> dict[str, Any]:
    """A conversation over pictures named below MGrounding-630k."""
    speakers = ("human", "gpt") * len(turns)
    return {
        "id": "1",
        "images": [PREFIX + name for name in images],
        "conversations": [{"from": who, "value": text} for who, text in zip(speakers, turns, strict=False)],
        "type": "gg_train",
    }


def read(folder: Path, *items: Any, paint_all: bool = True) -> tuple[list[Record], Tally]:
    """What a merged file with these items gives; their pictures are painted."""
    for item in items if paint_all else []:
        for name in item["images"] if isinstance(item, dict) and "images" in item else []:
            paint(folder / str(name).removeprefix(PREFIX))
    (folder / "MGrounding-630k.json").write_text(json.dumps(list(items)))
    return good(read_mgrounding(folder))


GROUP = ["Group_Grounding/SA-1B/sa_1.jpg", "Group_Grounding/SA-1B/sa_2.jpg"]
TRACK = [f"Object_Tracking/GOT-10k/0000000{k}.jpg" for k in (1, 2, 3)]


def test_each_question_is_a_record(tmp_path: Path) -> None:
    item = talk(
        GROUP,
        "<image>\n<image>\nFind: <|object_ref_start|>a statue<|object_ref_end|>.",
        "It's in the second image. <|box_start|>(100,200),(500,1000)<|box_end|>",
        "Find every dog.",
        "Image-1: <|box_start|>(0,0),(10,10)<|box_end|>\nImage-2: <|box_start|>(5,5),(500,500)<|box_end|>",
        "What do the pictures show?",
        "A statue and some dogs.",
        "And a cat?",
        "None",
    )
    records, tally = read(tmp_path, item)
    assert not tally.refused
    first, second, third, fourth = records
    assert first.query == "Find: <|object_ref_start|>a statue<|object_ref_end|>."
    assert first.images == tuple(tmp_path / name for name in GROUP)
    assert first.boxes == (Box(1, 20, 20, 100, 100),)
    assert (first.kind, first.source) == ("referential", "MGrounding-630k")
    assert second.boxes == (Box(0, 0, 0, 2, 1), Box(1, 1, 0.5, 100, 50))
    assert (third.kind, third.words, third.boxes) == ("understanding", "A statue and some dogs.", ())
    assert (fourth.kind, fourth.boxes) == ("referential", ())


@pytest.mark.parametrize(
    ("subset", "kind"),
    [
        ("Referring_Grounding", "referential"),
        ("Region_Locating", "referential"),
        ("Common_Object", "semantic"),
        ("Difference", "semantic"),
        ("Object_Tracking", "temporal"),
        ("Free-Form", "reasoning"),
    ],
)
def test_the_subset_gives_the_kind(tmp_path: Path, subset: str, kind: str) -> None:
    names = [f"{subset}/1.jpg", f"{subset}/2.jpg"]
    question = "<image>\n<image>\nLocate it in the 2th image."
    records, _ = read(tmp_path, talk(names, question, "<|box_start|>(0,0),(500,500)<|box_end|>"))
    assert [(r.kind, r.boxes) for r in records] == [(kind, (Box(1, 0, 0, 100, 50),))]


def test_pictures_in_a_sentence_are_named(tmp_path: Path) -> None:
    answer = "Image-2: <|box_start|>(0,0),(500,500)<|box_end|>"
    records, _ = read(tmp_path, talk(GROUP, "Find what <image> shows in <image>.", answer))
    assert records[0].query == "Find what Image-1 shows in Image-2."
    records, _ = read(tmp_path, talk(GROUP, "<image>\nFind it in <image>.", answer))
    assert records[0].query == "Find it in Image-2."


def test_files_of_the_subsets_and_unpacked_archives(tmp_path: Path) -> None:
    deep = tmp_path / "home/liyou/opensource_datasets/MGrounding-630k"
    for name in GROUP:
        paint(deep / name)
    item = talk(GROUP, "<image><image>a dog", "It's in the first image. <|box_start|>(0,0),(500,500)<|box_end|>")
    (tmp_path / "Group_Grounding").mkdir()
    (tmp_path / "Group_Grounding" / "gg_train_120k.json").write_text(json.dumps([item]))
    records, _ = good(read_mgrounding(tmp_path))
    assert records[0].images == tuple(deep / name for name in GROUP)


TRACK_QUESTION = (
    "<image>\n<image>\n<image>\nThe object in the first image, (<|box_start|>(1,2),(3,4)<|box_end|>): track it."
)
TRACK_ANSWER = "Image-2: <|box_start|>(0,0),(500,500)<|box_end|>"


def test_frames_in_order_stay_as_they_are(tmp_path: Path) -> None:
    records, _ = read(tmp_path, talk(TRACK, TRACK_QUESTION, TRACK_ANSWER))
    assert records[0].query.startswith("The object in the first image")


def test_in_shuffled_frames_the_first_image_is_the_first_in_time(tmp_path: Path) -> None:
    shuffled = [TRACK[2], TRACK[0], TRACK[1]]
    records, _ = read(tmp_path, talk(shuffled, TRACK_QUESTION, TRACK_ANSWER))
    assert records[0].query == "The object in Image-2, (<|box_start|>(1,2),(3,4)<|box_end|>): track it."
    assert records[0].boxes == (Box(1, 0, 0, 100, 50),)
    by_time = "It's in the third image. <|box_start|>(0,0),(500,500)<|box_end|>"
    for question, answer in ((TRACK_QUESTION, by_time), (TRACK_QUESTION + " Not the second image.", TRACK_ANSWER)):
        records, tally = read(tmp_path, talk(shuffled, question, answer))
        assert tally.refused == {"a shuffled sequence that names pictures by their place in time": 1}


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ("text", "not laid out as MGrounding-630k (TypeError)"),
        ({"images": [PREFIX + GROUP[0]]}, "not laid out as MGrounding-630k (KeyError)"),
        ({"images": [], "conversations": []}, "not laid out as MGrounding-630k (IndexError)"),
        (talk(["Cats/1.jpg"], "<image>a", "None"), "an unknown subset"),
        (talk(GROUP, "<image><image>a"), "turns that are not question, answer, question, answer"),
        (talk(GROUP, "<image>a", "None"), "not one <image> a picture"),
        (talk(GROUP, "<image><image>", "None"), "an empty query, or one with control tokens"),
        (talk(GROUP, "<image><image>a", "Image-3: <|box_start|>(0,0),(5,5)<|box_end|>"), "image .. was named, of .."),
        (talk(GROUP, "<image><image>a", "<|box_start|>(0,0),(5,5)<|box_end|>"), "a box names none of the pictures"),
        (talk(GROUP, "<image><image>a", "Image-1: (0,0),(5,1005)"), "a coordinate of .. is past .. and was clipped"),
        (talk(GROUP, "<image><image>a", "Image-1: (7,0),(5,5)"), "a box has no width or no height"),
        (talk(GROUP, "<image><image>a", ""), "an understanding record without words"),
    ],
)
def test_malformed_conversations_are_counted(tmp_path: Path, item: Any, reason: str) -> None:
    sound = talk(GROUP, "<image><image>a dog", "None")
    records, tally = read(tmp_path, item, sound)
    assert tally.refused == {reason: 1}
    assert len(records) == 1


@pytest.mark.parametrize(
    "images", ["Group_Grounding", ["Group_Grounding/../../b.jpg"], ["/etc/a.jpg"], ["a\0.jpg"], [5], [""], {"a": 1}]
)
def test_pictures_that_are_no_names_within_the_folder(tmp_path: Path, images: Any) -> None:
    item = {**talk(GROUP, "<image>a", "None"), "images": images}
    records, tally = read(tmp_path, item, paint_all=False)
    assert records == []
    assert tally.refused.total() == 1


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"MGrounding-630k\.json: no such file; download"):
        list(read_mgrounding(tmp_path))
    _, tally = read(tmp_path, talk(GROUP, "<image><image>a dog", "None"), paint_all=False)
    assert tally.refused == {"a missing picture": 1}
    (tmp_path / "MGrounding-630k.json").write_text('[{"images": [')
    with pytest.raises(GemvgError, match=r"MGrounding-630k\.json is not JSON"):
        list(read_mgrounding(tmp_path))


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("Find it in the 2th image. ", 1),
        (
            "For the object in the first image (<|box_start|>(451,265),(519,388)<|box_end|>), find it in the 6th image",
            5,
        ),
        ("Where is the object in image-1 in the image-2.", 1),
        ("Find it in Image-2. Find it and locate it in the second image. ", 1),
        ("the third region picture", None),
    ],
)
def test_the_picture_a_question_names_last(text: str, image: int | None) -> None:
    assert asked_image(text) == image


@pytest.mark.skipif(not FIXTURE.is_file(), reason="../shared with MIG-Bench's published annotations is not here")
def test_all_of_mig_bench_is_understood(tmp_path: Path) -> None:
    items = [parse_item(content, str(k)) for k, content in enumerate(json.loads(FIXTURE.read_text()))]
    whole = [item for item in items if isinstance(item, Item)]
    assert len(whole) == len(items) == 4276
    tasks = {
        "diff": 528, "view_diff": 94, "common_object": 815, "object_tracking": 550, "multi_view": 288,
        "region": 1203, "refer_grounding": 99, "group_grounding": 485, "reasoning": 97, "correspondence": 117,
    }  # fmt: skip
    assert Counter(item.task for item in whole) == tasks
    assert Counter(KIND_OF_TASK[item.task] for item in whole) == {
        "referential": 1787, "semantic": 1554, "temporal": 550, "spatial": 288, "reasoning": 97
    }  # fmt: skip
    assert Counter(item.target for item in whole if item.task == "group_grounding") == {
        0: 126,
        1: 125,
        2: 122,
        3: 75,
        4: 37,
    }
    assert {item.target for item in whole if item.task in ("view_diff", "reasoning", "refer_grounding")} == {1}
    content = [entry for entry in json.loads(FIXTURE.read_text()) if entry["task"] in ("multi_view", "region")][:2]
    for entry in content:
        for name in entry["images"]:
            paint(tmp_path / name)
    (tmp_path / "revised_MIG_bench.json").write_text(json.dumps(content))
    records, tally = good(read_mig_bench(tmp_path))
    assert not tally.refused
    for record, entry in zip(records, content, strict=True):
        box = record.boxes[0]
        assert [box.x1 * 5, box.y1 * 10, box.x2 * 5, box.y2 * 10] == pytest.approx(entry["answer"])


def test_both_editions_of_mig_bench_give_the_same_record(tmp_path: Path) -> None:
    item = {"task": "region", "question": "Locate the 1th region picture in the source image. ", "additional_info": ""}
    for name in ("a.jpg", "b.jpg"):
        paint(tmp_path / "MIG-Bench" / "images" / name)
    old = {**item, "images": ["./MIG-Bench/images/a.jpg", "./MIG-Bench/images/b.jpg"], "answer": [0.25, 0, 0.5, 1.0]}
    new = {**item, "images": ["MIG-Bench/images/a.jpg", "MIG-Bench/images/b.jpg"], "answer": [250, 0, 500, 1000]}
    (tmp_path / "MIG_data.json").write_text(json.dumps([old]))
    before = list(read_mig_bench(tmp_path))
    (tmp_path / "revised_MIG_bench.json").write_text(json.dumps([new]))
    after = list(read_mig_bench(tmp_path))
    inside = list(read_mig_bench_inside(tmp_path))
    assert before == after == inside
    assert isinstance(after[0], Record)
    assert after[0].boxes == (Box(0, 50, 0, 100, 100),)


def read_mig_bench_inside(folder: Path) -> Iterable[Record | Fault]:
    """The same folder when its json lies in MIG-Bench itself."""
    file = folder / "MIG-Bench" / "MIG_data.json"
    file.write_text((folder / "MIG_data.json").read_text())
    return read_mig_bench(folder / "MIG-Bench")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"task": "cooking"}, "an unknown task"),
        ({"answer": [1, 2, 3]}, "not laid out as MIG-Bench (ValueError)"),
        ({"answer": ["1", 2, 3, 4]}, "not laid out as MIG-Bench (ValueError)"),
        ({"answer": [0, 0, 5, 1001]}, "a box outside its picture"),
        ({"question": "their difference"}, "the question names no picture"),
        ({"question": "in the 9th image"}, "a box in a picture that is not there"),
        ({"question": None}, "not laid out as MIG-Bench (AttributeError)"),
        ({"task": ["diff"]}, "an unknown task"),
        ({"images": "ab"}, "not laid out as MIG-Bench (TypeError)"),
        ({"images": ["a", 5]}, "not laid out as MIG-Bench (ValueError)"),
        ({"images": ["a", "../b"]}, "not laid out as MIG-Bench (ValueError)"),
        ({"images": ["/a", "b"]}, "not laid out as MIG-Bench (ValueError)"),
        ({"answer": [True, 0, 5, 5]}, "not laid out as MIG-Bench (ValueError)"),
        ({"answer": [10**400, 0, 5, 5]}, "not laid out as MIG-Bench (OverflowError)"),
    ],
)
def test_malformed_items_have_a_reason(change: dict[str, Any], reason: str) -> None:
    item = {"task": "diff", "images": ["a", "b"], "question": "in the 1th image", "answer": [0, 0, 5, 5]}
    assert isinstance(parse_item(item, "here"), Item)
    assert parse_item({**item, **change}, "here") == Fault("here", reason)


def test_mig_bench_without_pictures_or_file(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"revised_MIG_bench\.json: no such file; unpack"):
        list(read_mig_bench(tmp_path))
    item = {"task": "diff", "images": ["a", "b"], "question": "in the 1th image", "answer": [0, 0, 5, 5]}
    (tmp_path / "MIG_data.json").write_text(json.dumps([item]))
    assert list(read_mig_bench(tmp_path)) == [Fault(str(tmp_path / "a"), "a missing picture")]
