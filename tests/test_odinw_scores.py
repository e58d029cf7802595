"""ODINW-13: both protocols on hand-made sets in the authors' layout, published JSON as the scripts read it, AP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.boxes import odinw_data
from bench.boxes.answers import Benchmark, to_line
from bench.boxes.asking import Said
from bench.boxes.odinw import read_json_boxes
from bench.boxes.odinw_data import ALL, PRESENT, SETS
from bench.boxes.scores import score_file
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.answer_files import paint, write_answers

SIZE = (64, 48)


def write_sets(folder: Path) -> Path:
    """All 13 sets, two pictures each: the first shows one thing of each class but the last, the second of the first."""
    for name, (place, classes) in SETS.items():
        file, pictures = odinw_data._annotations(folder, name)
        assert str(file).startswith(str(folder / place))
        annotations = [annotation(k + 1, 1, k + 1, [2 * k, 1, 10, 12]) for k in range(max(1, len(classes) - 1))]
        annotations.append(annotation(99, 2, 1, [20, 10, 16, 8]))
        content = {
            "images": [{"id": k, "file_name": f"{k}.jpg", "width": SIZE[0], "height": SIZE[1]} for k in (1, 2)],
            # Exports of Roboflow have a class above the others that nothing is of.
            "categories": [{"id": 0, "name": "top"}, *({"id": k + 1, "name": c} for k, c in enumerate(classes))],
            "annotations": annotations,
        }
        for k in (1, 2):
            paint(pictures / f"{k}.jpg", SIZE)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


def annotation(number: int, image: int, category: int, box: list[int]) -> dict[str, Any]:
    """One true box."""
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": 0,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("odinw"))


def perfect(benchmark: Benchmark, verbatim: bool) -> list[dict[str, Any]]:
    """The line of a right answer to every question."""
    lines = []
    for number, question in enumerate(benchmark.questions):
        boxes = tuple(Box(0, *b, label=b.label if verbatim else None, score=0.9) for b in question.truth)
        steps = [[1000 * v / side for v, side in zip(b, SIZE * 2, strict=True)] for b in boxes]
        text = json.dumps([{"bbox_2d": s, "label": str(b.label).upper()} for s, b in zip(steps, boxes, strict=True)])
        line = to_line(
            number, question, question.published or "", Said(f"```json\n{text}\n```", boxes, "", None, 1, 1.0)
        )
        line["extra"]["frame"] = [1000, 1000]
        lines.append(line)
    return lines


@pytest.mark.parametrize("own_words", [False, True])
def test_right_answers_have_an_ap_of_one(folder: Path, tmp_path: Path, own_words: bool) -> None:
    benchmark = odinw_data.load(folder, own_words)
    file = write_answers(tmp_path / "a.jsonl", "odinw13", perfect(benchmark, not own_words), verbatim=not own_words)
    result = score_file(file)
    assert set(result["macro"]) == {ALL, PRESENT}
    for protocol in (ALL, PRESENT):
        told = result["macro"][protocol]
        assert (told["ap"], told["ap_constant_score"]) == (pytest.approx(1.0), pytest.approx(1.0))
        assert (told["parts"], told["of"]) == (13, 13)
    assert list(result["tasks"]) == [f"{protocol}/{name}" for protocol in (ALL, PRESENT) for name in SETS]


def test_what_is_asked(folder: Path) -> None:
    stock = {q.id: q for q in odinw_data.load(folder, own_words=False).questions}
    fish = SETS["Aquarium"][1]
    assert stock[f"{ALL}/Aquarium/0"].published == (
        f"Locate every instance that belongs to the following categories: '{', '.join(fish)}'. "
        "Report bbox coordinates in JSON format."
    )
    assert f"{ALL}/Aquarium/0/fish" not in stock
    assert stock[f"{PRESENT}/Aquarium/0/fish"].published == (
        "Locate every fish in the image and output the coordinates in JSON format."
    )
    # Only what is there is asked for.
    assert [name for name in stock if name.startswith(f"{PRESENT}/Aquarium/1/")] == [f"{PRESENT}/Aquarium/1/fish"]
    assert f"{PRESENT}/Aquarium/0/{fish[-1]}" not in stock
    ours = {q.id: q for q in odinw_data.load(folder, own_words=True, protocols=[ALL]).questions}
    assert [ours[f"{ALL}/Aquarium/1/{label}"].query for label in fish] == [f"every {label}" for label in fish]
    assert ours[f"{ALL}/Aquarium/1/{fish[-1]}"].truth == ()
    assert not any(name.startswith(PRESENT) for name in ours)


def test_a_wrong_class_costs_and_scores_order(folder: Path, tmp_path: Path) -> None:
    """A box too many, of a class that is there: under a lower score it costs nothing, with one for all it does."""
    benchmark = odinw_data.load(folder, own_words=False, protocols=[ALL])
    lines = perfect(benchmark, verbatim=True)
    (first,) = (line for line in lines if line["id"] == f"{ALL}/pothole/0")
    extra = {"bbox_2d": [900, 900, 950, 950], "label": "pothole"}
    said = json.loads(first["answer"].removeprefix("```json").removesuffix("```"))
    first["answer"] = json.dumps([extra, *said])
    first["boxes"].insert(0, {"image": 0, "box": [57.6, 43.2, 60.8, 45.6], "label": "pothole", "score": 0.1})
    told = score_file(write_answers(tmp_path / "a.jsonl", "odinw13", lines, verbatim=True))["tasks"]
    assert told[f"{ALL}/pothole"]["ap"] == pytest.approx(1.0)
    assert told[f"{ALL}/pothole"]["ap_constant_score"] < 0.7
    assert told[f"{ALL}/Packages"]["ap_constant_score"] == pytest.approx(1.0)


ONE = [([1.0, 2.0, 3.0, 4.0], "a")]
# (text, as Qwen3-VL's script reads it, as Vision-R1's does).
PUBLISHED: list[tuple[str, Any, Any]] = [
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', ONE, ONE),
    ("[{'bbox_2d': [1, 2, 3, 4], 'label': 'a'}]", ONE, ONE),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]\n```', ONE, ONE),
    ('Here:\n```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]\n```\nDone.', ONE, ONE),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6', [], ONE),
    ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox', [], ONE),
    ('[{"bbox_2d": [1, 2, 3], "label": "a"}]', [], []),
    ('[{"bbox_2d": [1, 2, 3, NaN], "label": "a"}]', [], []),
    ('[{"bbox_2d": [1, 2, 3, 1e999], "label": "a"}]', [], []),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": null}]', [], []),
    ('[{"bbox_2d": "1, 2, 3, 4", "label": "a"}]', [], []),
    ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', [], []),
    ("(1,2),(3,4)", [], []),
    ("[" * 100_000, [], []),
    ('[{"bbox_2d": [' + "9" * 10**6 + ', 2, 3, 4], "label": "a"}]', [], []),
    ("None", [], []),
    ("", [], []),
]


@pytest.mark.parametrize(("text", "qwen3", "vision_r1"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_published_answers_are_read_as_the_scripts_do(text: str, qwen3: Any, vision_r1: Any) -> None:
    assert read_json_boxes(text, repair=False) == qwen3
    assert read_json_boxes(text, repair=True) == vision_r1


def test_pixels_of_the_resized_picture_are_turned_back(folder: Path, tmp_path: Path) -> None:
    benchmark = odinw_data.load(folder, own_words=False, protocols=[PRESENT])
    lines = perfect(benchmark, verbatim=True)
    for line in lines:  # as a Qwen2.5-VL that saw each picture at 128 x 96 writes them
        boxes = [{"bbox_2d": [2 * v for v in b["box"]], "label": b["label"]} for b in line["boxes"]]
        line |= {"answer": json.dumps(boxes), "extra": {**line["extra"], "frame": [128, 96]}}
    told = score_file(write_answers(tmp_path / "a.jsonl", "odinw13", lines, verbatim=True))["macro"][PRESENT]
    assert told["ap_constant_score"] == pytest.approx(1.0)


def test_what_is_not_as_published_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GemvgError, match=r"large/valid/annotations_without_background.json: no such file; unpack the 13"
    ):
        odinw_data.load(tmp_path, own_words=True)
    write_sets(tmp_path)
    file = tmp_path / "pothole" / "valid" / odinw_data.NAMES
    content = json.loads(file.read_text())
    for change, fault in (
        ({"categories": [{"id": 1, "name": "hole"}]}, "has no class 'pothole'"),
        (
            {"annotations": [annotation(1, 1, 0, [1, 1, 2, 2])]},
            "annotation 0 cannot be used .an unknown",
        ),
        ({"annotations": [{"image_id": 1}]}, "annotation 0 cannot be used"),
        ({"annotations": [annotation(1, 3, 1, [1, 1, 2, 2])]}, "annotation 0 cannot be used .an unknown image"),
        ({"annotations": [annotation(1, 1, 1, [1, 1, -2, 2])]}, "has a negative side"),
        ({"annotations": [annotation(1, 1, 1, [1, 1, 10**9, 2])]}, "is larger than any picture"),
        ({"annotations": [annotation(1, 1, 1, [1, 1, 2, 2]) | {"iscrowd": "0"}]}, "iscrowd is neither 0 nor 1"),
        ({"images": content["images"] * 2}, "an image whose id stands twice"),
        ({"images": [{"id": str(i["id"])} | i | {"id": str(i["id"])} for i in content["images"]]}, "an unknown image"),
        (
            {"images": [{"id": 1, "file_name": "../../x.jpg", "width": 1, "height": 1}], "annotations": []},
            "image 0 is malformed",
        ),
        (
            {"images": [{"id": 1, "file_name": "1.jpg", "width": 9, "height": 9}], "annotations": []},
            "of another size than its annotation",
        ),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(GemvgError, match=fault):
            odinw_data.load(tmp_path, own_words=True)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"part": "some/pothole"}, "is about 'some/pothole', which is no set of ODINW-13"),
        ({"truth": [{"image": 0, "box": [1, 2, 3, 4], "label": "cat"}]}, "has a true box of 'cat', no class of"),
        ({"extra": {"picture": 0, "asked_for": "", "frame": [0, 5]}}, r"frame is \[0, 5\]"),
    ],
)
def test_lines_that_cannot_be_are_named(folder: Path, tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    lines = perfect(odinw_data.load(folder, own_words=False, protocols=[ALL]), verbatim=True)
    lines[0] |= change
    with pytest.raises(GemvgError, match=fault):
        score_file(write_answers(tmp_path / "a.jsonl", "odinw13", lines, verbatim=True))
