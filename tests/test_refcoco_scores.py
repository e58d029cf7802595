"""RefCOCO, RefCOCO+ and RefCOCOg in the authors' layout, every split, asked of the shipped model and scored."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from bench.boxes import refcoco
from bench.boxes.asking import Asking, describe
from bench.boxes.run import load, run
from bench.boxes.scores import read_task, score_file
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from tests.answer_files import line, paint, write_answers
from train.data.refcoco import PICTURES

EVERY = [(name, split) for name, splits in refcoco.SPLITS.items() for split in splits]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The refer tool's `data` folder: three data sets, a reference of two expressions in each split."""
    root = tmp_path_factory.mktemp("refer")
    for name, splits in refcoco.SPLITS.items():
        (root / name).mkdir()
        refs, annotations = [], []
        for k, split in enumerate(("train", *splits)):
            annotations.append({"id": k, "image_id": 7, "category_id": 1, "bbox": [10 * k, 5, 20, 30]})
            spoken = [{"sent": f"{split} {word}", "raw": "", "sent_id": 0, "tokens": []} for word in ("left", "right")]
            refs.append({"ref_id": k, "ann_id": k, "image_id": 7, "split": split, "sentences": spoken})
        by = "umd" if name == "refcocog" else "unc"
        (root / name / f"refs({by}).p").write_bytes(pickle.dumps(refs, 0))
        images = [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 120, "height": 60}]
        (root / name / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    paint(root / PICTURES / "COCO_train2014_000000000007.jpg", (120, 60))
    return root


@pytest.mark.parametrize(("name", "split"), EVERY)
def test_every_split(folder: Path, name: str, split: str) -> None:
    for place in (folder, folder / name):
        benchmark = load(f"{name}:{split}", place, own_words=True, think=False, limit=None)
        assert [question.query for question in benchmark.questions] == [f"{split} left", f"{split} right"]
        assert benchmark.questions[0].published is None
        x = 10 * (1 + refcoco.SPLITS[name].index(split))
        assert [list(box) for box in benchmark.questions[0].truth] == [[x, 5, x + 20, 35]]
        assert (benchmark.folder / benchmark.questions[0].images[0]).is_file()


def test_all_splits_of_one(folder: Path, tmp_path: Path) -> None:
    benchmark = load("refcocog", folder, own_words=True, think=False, limit=None)
    assert [question.part for question in benchmark.questions] == ["val", "val", "test", "test"]
    facts = describe(DEFAULT_BUNDLE)
    file = tmp_path / "a.jsonl"
    assert len(run(benchmark, facts, Asking(), file, limit=3)) == 3
    result = score_file(file)
    assert (result["macro"]["n"], result["macro"]["parts"], result["macro"]["of"]) == (3, 2, 2)
    assert set(result["tasks"]) == {"val", "test"}


def test_the_first_box_counts(tmp_path: Path) -> None:
    true, good, bad = (0, 10, 10, 30, 30), (0, 10, 10, 30, 29), (0, 50, 50, 60, 60)
    half = (0, 10, 10, 30, 20)  # an IoU of exactly 0.5 is right
    lines = [line(k, "testA", [true], boxes) for k, boxes in enumerate(([good, bad], [bad, good], [], [half]))]
    told = score_file(write_answers(tmp_path / "a.jsonl", "refcoco:testA", lines))["tasks"]["testA"]
    assert told["acc@0.5"] == 0.5
    assert told["mean_iou"] == pytest.approx((0.95 + 0.5) / 4)


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    for wrong in ("refcoco:test", "refcocog:testA", "refcoc", "refcoco:"):
        with pytest.raises(GemvgError, match="is not known; give tabletop"):
            read_task(wrong)
    with pytest.raises(GemvgError, match=r"refs\(unc\).p: no such file; unpack refcoco.zip"):
        load("refcoco", tmp_path, own_words=True, think=False, limit=None)
    with pytest.raises(GemvgError, match="--data is needed: the folder of refcoco"):
        load("refcoco", None, own_words=True, think=False, limit=None)
    picture = folder / PICTURES / "COCO_train2014_000000000007.jpg"
    moved = picture.rename(tmp_path / picture.name)
    from train.data.pictures import measure

    measure.cache_clear()
    with pytest.raises(GemvgError, match=r"000007.jpg: a missing picture; a benchmark is scored whole"):
        load("refcoco:val", folder, own_words=True, think=False, limit=None)
    moved.rename(picture)
    measure.cache_clear()
