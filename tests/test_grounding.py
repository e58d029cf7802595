"""Answers as others want them: JSON, numpy, COCO and supervision, with the real libraries and back."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from pycocotools.coco import COCO

from gemvg_edge import Box, GemvgError, Grounder, Grounding
from gemvg_edge.grounding import Picture, Timings
from train.data.coco import label_pictures
from train.data.labelled import LabelledPicture

SCHEMA = Path(__file__).parents[1] / "docs" / "reference" / "grounding.schema.json"
IMAGES = Path(__file__).parents[1] / "examples" / "images"
BOXES = (
    Box(0, 10, 20, 30.5, 40, label="mug", score=0.75),
    Box(0, 1, 2, 3, 4, label="a red ball", score=0.5),
    Box(2, 0, 0, 639.25, 480, label="mug"),
)
PICTURES = (Picture("left.png", 640, 480), Picture("images[1]", 3, 5), Picture("right.png", 640, 480))
TIMINGS = Timings(1.5, 2, 3, 4, 5.25, 60, 7, 8)
ANSWER = Grounding(BOXES, "Image-1: ...", "Hm.", "a box was clipped", TIMINGS, "all mugs and balls", PICTURES)
NOTHING = Grounding((), "None", "", None, Timings(), "the mug", PICTURES[:1])


def everything(grounding: Grounding) -> Any:
    """With what equality of boxes leaves out."""
    return grounding, [(box.label, box.score) for box in grounding.boxes]


def test_an_answer_iterates_over_its_boxes() -> None:
    assert tuple(ANSWER) == BOXES
    assert (len(ANSWER), bool(ANSWER), len(NOTHING), bool(NOTHING)) == (3, True, 0, False)
    x1, y1, x2, y2 = ANSWER.boxes[0]
    assert [x1, y1, x2, y2] == list(BOXES[0]) == [10, 20, 30.5, 40]


@pytest.mark.parametrize("grounding", [ANSWER, NOTHING])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_comes_back_and_keeps_the_schema(grounding: Grounding, indent: int | None) -> None:
    text = grounding.to_json(indent)
    assert everything(Grounding.from_json(text)) == everything(grounding)
    jsonschema.validate(json.loads(text), json.loads(SCHEMA.read_text()))
    assert ("\n" in text) == bool(indent)


def test_a_real_answer_comes_back_too() -> None:
    grounding = Grounder.open(threads=1).ground([IMAGES / "scene1-a.png", IMAGES / "scene1-b.png"], "all balls")
    assert grounding.boxes
    assert {box.label for box in grounding} == {"all balls"}
    assert [picture.name for picture in grounding.pictures] == [str(IMAGES / f"scene1-{k}.png") for k in "ab"]
    assert everything(Grounding.from_json(grounding.to_json())) == everything(grounding)
    jsonschema.validate(grounding.to_dict(), json.loads(SCHEMA.read_text()))


def altered(change: Callable[[dict[str, Any]], object]) -> str:
    content = ANSWER.to_dict()
    change(content)
    return json.dumps(content)


BAD_JSON = {
    "no JSON": ("{", "the grounding is not JSON"),
    "not a number": (ANSWER.to_json().replace("640", "NaN"), "NaN is no number of JSON"),
    "a list": ("[]", "is not of format gemvg-edge-grounding; give what Grounding.to_json wrote"),
    "another format": (altered(lambda c: c.update(format="coco")), "is not of format"),
    "a later version": (altered(lambda c: c.update(version=2)), "has version 2, this gemvg-edge reads 1; update"),
    "no boxes": (altered(lambda c: c.pop("boxes")), "lacks the field boxes"),
    "a text as a box": (altered(lambda c: c.update(boxes=["x"])), "boxes holds 'x', no object"),
    "a box in no picture": (altered(lambda c: c["boxes"][1].update(image=3)), r"boxes\[1\].image is 3, not 0 to 2"),
    "a text as a corner": (altered(lambda c: c["boxes"][0].update(x1="1")), r"boxes\[0\].x1 is '1', not of type float"),
    "a score past 1": (altered(lambda c: c["boxes"][0].update(score=1.5)), r"boxes\[0\].score is 1.5"),
    "a picture without size": (altered(lambda c: c["images"][0].update(width=0)), r"images\[0\].width is 0"),
    "time that runs back": (altered(lambda c: c["timings"].update(decode_ms=-1)), "timings.decode_ms is -1"),
}


@pytest.mark.parametrize("label", BAD_JSON)
def test_bad_json_is_one_sentence(label: str) -> None:
    text, message = BAD_JSON[label]
    with pytest.raises(GemvgError, match=message):
        Grounding.from_json(text)


def test_numbers_that_json_has_not_are_told() -> None:
    box = Box(0, np.float32(1), 2, 3, 4, score=np.float64(0.5))  # type: ignore[arg-type]
    assert Grounding.from_json(replace(ANSWER, boxes=(box,)).to_json()).boxes == (Box(0, 1, 2, 3, 4),)
    with pytest.raises(GemvgError, match="has what JSON has not"):
        replace(ANSWER, boxes=(Box(0, math.nan, 2, 3, 4),)).to_json()
    with pytest.raises(GemvgError, match=r"the grounding is a NoneType; give what Grounding\.to_json wrote, a text"):
        Grounding.from_json(None)  # type: ignore[arg-type]


def test_numpy() -> None:
    xyxy, images, scores, labels = ANSWER.to_numpy()
    assert [str(part.dtype) for part in (xyxy, images, scores)] == ["float32", "int64", "float32"]
    assert xyxy.tolist() == [list(box) for box in BOXES]
    assert images.tolist() == [0, 0, 2]
    assert scores[:2].tolist() == [0.75, 0.5]
    assert math.isnan(scores[2])
    assert labels == ["mug", "a red ball", "mug"]
    assert [part.shape for part in NOTHING.to_numpy()[:3]] == [(0, 4), (0,), (0,)]


def test_coco_is_read_by_pycocotools(tmp_path: Path) -> None:
    file = tmp_path / "answer.json"
    file.write_text(json.dumps(ANSWER.to_coco()))
    with redirect_stdout(StringIO()):
        coco = COCO(str(file))
    assert [coco.imgs[k]["file_name"] for k in coco.getImgIds()] == [picture.name for picture in PICTURES]
    found = []
    for annotation in coco.loadAnns(coco.getAnnIds()):
        x, y, width, height = annotation["bbox"]
        label = coco.cats[annotation["category_id"]]["name"]
        found.append(
            Box(annotation["image_id"] - 1, x, y, x + width, y + height, label=label, score=annotation.get("score"))
        )
    assert tuple(found) == BOXES
    assert [(box.label, box.score) for box in found] == [(box.label, box.score) for box in BOXES]
    assert coco.getAnnIds(catIds=coco.getCatIds(catNms=["mug"])) == [1, 3]


def test_coco_is_read_by_our_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "annotations").mkdir()
    shutil.copytree(IMAGES, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    grounding = Grounder.open(threads=1).ground(["scene1-a.png", "scene1-b.png"], "all balls")
    (tmp_path / "annotations" / "instances_mine.json").write_text(json.dumps(grounding.to_coco()))
    read = [item for item in label_pictures(tmp_path, "mine") if isinstance(item, LabelledPicture)]
    found = [replace(box, image=k) for k, picture in enumerate(read) for box in picture.objects["all balls"]]
    assert len(found) > 2
    assert np.allclose([list(box) for box in found], [list(box) for box in grounding])
    assert [box.image for box in found] == [box.image for box in grounding]


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision() -> None:
    import supervision

    found = ANSWER.to_supervision()
    assert [len(detections) for detections in found] == [2, 0, 1]
    assert all(isinstance(detections, supervision.Detections) for detections in found)
    assert found[0].xyxy.tolist() == [list(box) for box in BOXES[:2]]
    assert found[0].confidence is not None
    assert found[0].confidence.tolist() == [0.75, 0.5]
    assert found[2].confidence is None
    assert list(found[0].data["class_name"]) == ["mug", "a red ball"]
    assert (found[0].class_id.tolist(), found[2].class_id.tolist()) == ([0, 1], [0])  # type: ignore[union-attr]
    back = supervision.Detections.merge([found[0], supervision.Detections.empty()])
    assert back.xyxy.tolist() == found[0].xyxy.tolist()
    assert [len(detections) for detections in NOTHING.to_supervision()] == [0]


def test_without_supervision_the_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(GemvgError, match="run `pip install supervision`"):
        ANSWER.to_supervision()
