"""MC-Bench: our scores against a plain transcription of its protocol, its layout, its results file."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from bench.boxes import mc_bench, mc_bench_data
from bench.boxes.answers import to_line
from bench.boxes.asking import Said
from bench.boxes.run import load
from bench.boxes.scores import score_file
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.answer_files import paint, write_answers

STYLES = ("Referring", "Comparison", "Reasoning")


def generate(seed: int, permuted: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and results: samples of one to three groups, negatives, equal scores; images in any order."""
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(3, 9))
    ids = [int(k) for k in rng.permutation(2 * samples)] if permuted else list(range(2 * samples))
    images: list[Any] = []
    annotations: list[Any] = []
    results: list[Any] = []
    descriptions: list[Any] = []
    for number in range(samples):
        pair = ids[2 * number : 2 * number + 2]
        groups = int(rng.integers(1, 4))
        positive = rng.random() < 0.8
        for image in pair:
            images.append({"id": image, "file_name": f"COCO/{image}.png", "width": 64, "height": 48, "text_id": number})
            for group in range(1, groups + 1) if positive else ():
                for _ in range(int(rng.integers(0, 3))):
                    box = [int(v) for v in (*rng.integers(0, 20, 2), *rng.integers(5, 20, 2))]
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": image, "category_id": group, "bbox": box,
                         "area": box[2] * box[3], "iscrowd": 0, "text_id": number}
                    )  # fmt: skip
                    if rng.random() < 0.8:  # claimed under some other group, a little off
                        moved = [float(v) for v in np.asarray(box) + rng.integers(-1, 2, 4)]
                        claimed = int(rng.integers(1, 4))
                        results.append(row(image, claimed, moved, float(rng.integers(1, 4)) / 4))
            if rng.random() < 0.2:
                results.append(row(image, int(rng.integers(1, 4)), [1.0, 2.0, 9.0, 8.0], 0.5))
        descriptions.append(
            {"id": number, "images_id": pair, "text": f"thing {number}", "positive_sample": positive,
             "text_style": STYLES[number % 3]}
        )  # fmt: skip
    if permuted:
        rng.shuffle(images)
    categories = [{"id": k, "name": f"group {k}"} for k in (1, 2, 3)]
    truth = {"images": images, "annotations": annotations, "descriptions": descriptions, "categories": categories}
    return truth, results


def row(image: int, group: int, box: list[float], score: float) -> dict[str, Any]:
    """A box of a results file."""
    return {"image_id": image, "category_id": group, "bbox": box, "score": score}


def overlap(a: list[float], b: list[float]) -> float:
    """IoU of two boxes x y w h."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    return across * down / (a[2] * a[3] + b[2] * b[3] - across * down)


class Protocol:
    """The protocol as paper.md tells it, written straight down: loops over COCO rows, nothing shared with ours."""

    def __init__(self, truth: dict[str, Any], results: list[dict[str, Any]], released: bool) -> None:
        self.truth, self.results, self.released = truth, copy.deepcopy(results), released
        if released:
            listed = [image["id"] for image in truth["images"]]
            self.pairs = list(zip(listed[::2], listed[1::2], strict=True))
        else:
            self.pairs = [tuple(description["images_id"]) for description in truth["descriptions"]]

    def boxes(self, rows: list[dict[str, Any]], image: int, group: int) -> list[list[float]]:
        """The boxes of an image and a group."""
        return [r["bbox"] for r in rows if r["image_id"] == image and r["category_id"] == group]

    def groups(self, rows: list[dict[str, Any]], pair: tuple[int, ...]) -> list[int]:
        """The groups that a pair has."""
        return sorted({r["category_id"] for r in rows if r["image_id"] in pair})

    def fit(self, pair: tuple[int, ...], way: dict[int, int]) -> float:
        """The mean IoU of a renaming."""
        overlaps = []
        for claimed, group in way.items():
            for image in pair:
                said = self.boxes(self.results, image, claimed)
                true = self.boxes(self.truth["annotations"], image, group)
                if said and true:
                    table = np.array([[overlap(a, b) for b in true] for a in said])
                    rows, columns = linear_sum_assignment(-table)
                    overlaps += list(table[rows, columns])
        return sum(overlaps) / len(overlaps) if overlaps else 0.0

    def ways(self, named: list[int], wanted: list[int]) -> Iterator[dict[int, int]]:
        """Every renaming."""
        if len(named) <= len(wanted):
            yield from (dict(zip(named, way, strict=True)) for way in permutations(wanted, len(named)))
        else:
            yield from (dict(zip(way, wanted, strict=True)) for way in permutations(named, len(wanted)))

    def renamed(self) -> list[dict[str, Any]]:
        """The results with their groups renamed."""
        final = copy.deepcopy(self.results)
        for pair in self.pairs:
            wanted = self.groups(self.truth["annotations"], pair)
            several = 2 in wanted if self.released else len(wanted) > 1
            named = self.groups(self.results, pair)
            if not several or not named:
                if self.released and several:
                    final = copy.deepcopy(self.results)
                continue
            best, chosen = -1.0, {}
            for way in self.ways(named, wanted):
                if (fit := self.fit(pair, way)) > best:
                    best, chosen = fit, way
            if self.released:
                final = copy.deepcopy(self.results)  # read from the disk again
                for claimed, group in chosen.items():
                    for r in final:
                        if r["image_id"] in pair and r["category_id"] == claimed:
                            r["category_id"] = group
            else:
                for r in final:
                    if r["image_id"] in pair:
                        r["category_id"] = chosen.get(r["category_id"], r["category_id"])
        return final

    def ap50(self) -> float | None:
        """AP at IoU 0.5, groups weighted."""
        counts = {k: sum(a["category_id"] == k for a in self.truth["annotations"]) for k in (1, 2, 3)}
        if not sum(counts.values()):
            return None
        found = self.renamed()
        if not found:
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            known = COCO()
            known.dataset = copy.deepcopy(self.truth)
            known.createIndex()
            evaluation = COCOeval(known, known.loadRes(found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
        table = evaluation.eval["precision"]
        total = 0.0
        for k, group in enumerate(evaluation.params.catIds):
            values = table[0, :, k, 0, 2]
            if counts[group]:
                total += counts[group] * values[values > -1].mean()
        return float(total / sum(counts.values()))

    def acc(self) -> float:
        """The share of pairs whose images are told right."""

        def shown(rows: list[dict[str, Any]], image: int) -> bool:
            return any(r["image_id"] == image for r in rows)

        right = [
            all(shown(self.truth["annotations"], image) == shown(self.results, image) for image in pair)
            for pair in self.pairs
        ]
        return sum(right) / len(right)


def write(folder: Path, truth: dict[str, Any], results: list[dict[str, Any]]) -> tuple[Path, Path]:
    """(the folder, the results file)."""
    (folder / "mc-bench_v0.2_val.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    return folder, folder / "results.json"


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_scores_are_the_protocols(tmp_path: Path, seed: int, permuted: bool) -> None:
    truth, results = generate(seed, permuted)
    folder, file = write(tmp_path, truth, results)
    told = mc_bench.score(mc_bench_data.read_published(file, folder))["macro"]
    for name, released in (("as_released", True), ("corrected", False)):
        plain = Protocol(truth, results, released)
        expected = plain.ap50()
        if expected is None:
            assert told[f"ap50_{name}"] is None
        else:
            assert told[f"ap50_{name}"] == pytest.approx(expected, abs=1e-9)
        assert told["acc_as_released" if released else "acc"] == plain.acc()


def test_the_cases_tell_the_variants_apart() -> None:
    """Or agreement would mean little: renaming matters, the released faults matter, so does the images' order."""
    differing = {False: 0, True: 0}
    for seed in range(12):
        for permuted in differing:
            truth, results = generate(seed, permuted)
            released, corrected = (Protocol(truth, results, way) for way in (True, False))
            differing[permuted] += released.ap50() != corrected.ap50()
    assert min(differing.values()) >= 6


def test_groups_are_renamed_at_once() -> None:
    place = [Box(0, 0, 0, 10, 10), Box(0, 20, 20, 30, 30)]
    sample = mc_bench.Sample(
        0, "a", "referring", (0, 1), (0, 1), [(1, place[0]), (2, place[1])], [(2, place[0]), (1, place[1])]
    )
    assert mc_bench.best_renaming(sample.truth, sample.found) == {1: 2, 2: 1}
    assert [group for group, _ in mc_bench.corrected([sample])[0].found] == [1, 2]
    # The released script renames 1 to 2 and then every 2, the new ones too, to 1.
    assert [group for group, _ in mc_bench.as_released([sample])[0].found] == [1, 1]


def test_a_data_set_without_a_second_group_is_scored() -> None:
    """The released script crashes there."""
    box = Box(0, 0, 0, 10, 10)
    sample = mc_bench.Sample(0, "a", "referring", (0, 1), (0, 1), [(1, box)], [(1, box)])
    told = mc_bench.score([sample])["macro"]
    assert told["ap50_as_released"] == told["ap50_corrected"] == pytest.approx(1.0)


def test_the_authors_layout_is_read(tmp_path: Path) -> None:
    truth, _ = generate(3, permuted=True)
    for image in truth["images"]:
        paint(tmp_path / "mc-bench_images" / image["file_name"])
    write(tmp_path, truth, [])
    benchmark = load("mc-bench", tmp_path, own_words=True, think=False, limit=None)
    assert len(benchmark.questions) == len(truth["descriptions"])
    question, description = benchmark.questions[0], truth["descriptions"][0]
    assert question.query == description["text"]
    assert question.extra["image_ids"] == description["images_id"]
    boxes = sum(len(question.truth) for question in benchmark.questions)
    assert boxes == len(truth["annotations"])
    # Perfect answers, asked, saved and scored.
    lines = []
    for number, asked in enumerate(benchmark.questions):
        boxes_of = tuple(Box(*[b.image, *b], label=b.label) for b in asked.truth)
        lines.append(to_line(number, asked, asked.query, Said("..", boxes_of, "", None, 1, 1.0)))
    told = score_file(write_answers(tmp_path / "a.jsonl", "mc-bench", lines))["macro"]
    assert (told["acc"], told["ap50_corrected"]) == (1.0, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (
            {"descriptions": [{"images_id": [0], "text": "x", "text_style": "a"}]},
            "description 0 is not laid out as MC-Bench",
        ),
        ({"descriptions": [{"images_id": [0, 99], "text": "x", "text_style": "a"}]}, "description 0 is not laid out"),
        ({"images": 1}, "has no list 'images'"),
        ({"descriptions": ["x"]}, "description 0 is not laid out"),
        ({"descriptions": [{"images_id": [0, 0], "text": "x", "text_style": "a"}]}, "one image twice"),
        ({"descriptions": [{"images_id": ["0", 1], "text": "x", "text_style": "a"}]}, "whose id is no whole number"),
        (
            {"descriptions": [{"images_id": [0, k], "text": "x", "text_style": "a"} for k in (1, 2)]},
            "description 1 .*an image of another sample",
        ),
        (
            {"annotations": [{"image_id": 99, "category_id": 1, "bbox": [1, 1, 2, 2]}]},
            "annotation 0 .*an unknown image or category",
        ),
        ({"annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 1, -2, 2]}]}, "has a negative side"),
        ({"annotations": ["x"]}, "annotation 0 is not laid out"),
        ({"categories": [{"id": k, "name": f"group {4 - k}"} for k in (1, 2, 3)]}, "is not named `group` and its id"),
        ({"categories": [{"id": 1, "name": "group 1"}] * 2}, "a category whose id stands twice"),
        ({}, "is a missing picture"),
    ],
)
def test_what_is_not_as_published_is_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    truth, _ = generate(0, permuted=False)
    write(tmp_path, truth | change, [])
    with pytest.raises(GemvgError, match=fault):
        mc_bench_data.load(tmp_path)


def test_results_of_other_images_are_refused(tmp_path: Path) -> None:
    truth, _ = generate(0, permuted=False)
    folder, file = write(tmp_path, truth, [row(999, 1, [0.0, 0.0, 1.0, 1.0], 1.0)])
    with pytest.raises(GemvgError, match="has boxes in image 999, which no sample"):
        mc_bench_data.read_published(file, folder)
    file.write_text(json.dumps([{"image_id": 0, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]))
    with pytest.raises(GemvgError, match="row 0 is no box of MC-Bench"):
        mc_bench_data.read_published(file, folder)
    file.write_text("[]")
    (tmp_path / "none").mkdir()
    with pytest.raises(GemvgError, match=r"no file named mc-bench\*_val.json"):
        mc_bench_data.read_published(file, tmp_path / "none")
