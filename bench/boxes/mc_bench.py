"""MC-Bench: accuracy of presence and AP50 of boxes in image pairs, as released and corrected.

The scripts are those of github.com/XuYunqiu/MC-Bench. A sample is two pictures and a text; its categories are groups of
instances ("group 1", ..), since some texts ask for several. Acc: for both pictures, boxes were claimed exactly if there
are any; no IoU takes part. AP50: COCO's AP at IoU 0.5, each group weighted by its true boxes, after the groups of a
sample with several were renamed as fits best. What is called as released keeps three faults of the released script: it
reads the answers anew for every such sample, so that only the last one's are renamed; it renames one group after the
other, so that the second may take the first along; it takes neighbours in the list of images for a pair. Corrected
renames in every sample, at once, and pairs as the descriptions do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from bench.boxes.answers import Answered, is_number_id
from bench.boxes.coco_ap import Boxes, Floats, resampled_ap, weighted_ap
from bench.boxes.rated import Rated, means
from bench.boxes.scoring import interval, resample
from gemvg_edge.boxes import Box, iou
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short

STYLES = ("referring", "comparison", "reasoning")
VALUES = ("acc",)
AP50 = np.asarray([0.5])
MOST_GROUPS = 6  # whose orders are tried: 720
_GROUP = re.compile(r"group[ _-]?(\d{1,3})", re.I)


class Sample(NamedTuple):
    """One sample as it is scored; boxes in pixels, `image` 0 or 1, their groups beside them."""

    number: int
    id: str
    style: str
    image_ids: tuple[int, int]
    places: tuple[int, int]  # of its pictures in the benchmark's list of images
    truth: list[tuple[int, Box]]  # (group, box)
    found: list[tuple[int, Box]]


def group_of(label: str | None) -> int:
    """The group that a box's label names, from 1; 1 where it names none."""
    found = _GROUP.search(label or "")
    return max(1, int(found[1])) if found else 1


def read_samples(answers: Iterable[Answered]) -> list[Sample]:
    """What scoring keeps of each answer, in the order of the questions."""
    samples = []
    for said in answers:
        pair, places = _two(said, "image_ids"), _two(said, "places")
        truth, found = ([(group_of(box.label), box) for box in boxes] for boxes in (said.truth, said.boxes))
        samples.append(Sample(said.number, said.id, said.part, pair, places, truth, found))
    return sorted(samples, key=lambda sample: sample.number)


def _two(said: Answered, key: str) -> tuple[int, int]:
    pair = said.extra.get(key)
    if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_number_id, pair)) or len(said.sizes) != 2:
        raise GemvgError(f"answer {short(said.id)}: {key} is {short(pair)}, not a pair of MC-Bench's")
    return pair[0], pair[1]


def is_right(sample: Sample) -> bool:
    """Whether boxes were claimed in exactly the pictures that have any."""
    return {box.image for _, box in sample.found} == {box.image for _, box in sample.truth}


def acc_as_released(samples: Sequence[Sample]) -> float | None:
    """The share of neighbouring pictures with boxes claimed in exactly those that have any."""
    pairs = _neighbours(samples)
    right = sum(
        {box.image for _, box in _boxes_of(samples, pair, "found")}
        == {box.image for _, box in _boxes_of(samples, pair, "truth")}
        for pair in pairs
    )
    return right / len(pairs) if pairs else None


def best_renaming(truth: Sequence[tuple[int, Box]], found: Sequence[tuple[int, Box]]) -> dict[int, int]:
    """Which true group each claimed one is best taken for: by the mean IoU of the boxes that pair best (Hungarian).

    Of equal ones the first in the order of itertools.permutations; claimed groups past the true ones keep their name.
    """
    wanted, named = sorted({group for group, _ in truth}), sorted({group for group, _ in found})
    if not wanted or not named or max(len(wanted), len(named)) > MOST_GROUPS:
        return {}
    worth = {(claimed, group): _pair(truth, found, claimed, group) for claimed in named for group in wanted}
    if len(named) <= len(wanted):
        ways = (dict(zip(named, groups, strict=True)) for groups in permutations(wanted, len(named)))
    else:
        ways = (dict(zip(groups, wanted, strict=True)) for groups in permutations(named, len(wanted)))
    best: tuple[float, dict[int, int]] = (-1.0, {})
    for way in ways:
        overlaps = [overlap for pair in way.items() for overlap in worth[pair]]
        mean = sum(overlaps) / len(overlaps) if overlaps else 0.0
        if mean > best[0]:
            best = mean, way
    return best[1]


def _pair(truth: Sequence[tuple[int, Box]], found: Sequence[tuple[int, Box]], claimed: int, group: int) -> list[float]:
    """The IoUs of a claimed group's boxes with a true group's, paired best in each picture."""
    overlaps: list[float] = []
    for image in (0, 1):
        said = [box for g, box in found if g == claimed and box.image == image]
        true = [box for g, box in truth if g == group and box.image == image]
        if said and true:
            table = np.asarray([[iou(a, b) for b in true] for a in said])
            overlaps += table[linear_sum_assignment(table, maximize=True)].tolist()
    return overlaps


def corrected(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the groups of each that has several renamed at once."""
    return [
        sample._replace(found=[(way.get(group, group), box) for group, box in sample.found])
        if len({group for group, _ in sample.truth}) > 1 and (way := best_renaming(sample.truth, sample.found))
        else sample
        for sample in samples
    ]


def as_released(samples: Sequence[Sample]) -> list[Sample]:
    """The samples as the released script leaves them: one pair's groups renamed, one after the other."""
    changed = list(samples)
    for pair in reversed(_neighbours(samples)):
        truth, found = _boxes_of(samples, pair, "truth"), _boxes_of(samples, pair, "found")
        if 2 not in {group for group, _ in truth}:
            continue
        for claimed, group in best_renaming(truth, found).items():
            for number, image in pair:
                renamed = [
                    (group if g == claimed and box.image == image else g, box) for g, box in changed[number].found
                ]
                changed[number] = changed[number]._replace(found=renamed)
        break  # what was renamed before is read anew
    return changed


Place = tuple[int, int]  # a sample's number in the list, and which of its pictures


def _neighbours(samples: Sequence[Sample]) -> list[tuple[Place, Place]]:
    """Two and two pictures as they follow each other in the benchmark's list of images."""
    listed = sorted((sample.places[image], n, image) for n, sample in enumerate(samples) for image in (0, 1))
    pictures = [(n, image) for _, n, image in listed]
    return list(zip(pictures[::2], pictures[1::2], strict=True))


def _boxes_of(samples: Sequence[Sample], pair: tuple[Place, Place], which: str) -> list[tuple[int, Box]]:
    """The true or claimed boxes of two pictures as if they were a sample's first and second."""
    moved = []
    for k, (number, image) in enumerate(pair):
        boxes: list[tuple[int, Box]] = getattr(samples[number], which)
        moved += [(group, _at(box, k)) for group, box in boxes if box.image == image]
    return moved


def _at(box: Box, image: int) -> Box:
    return Box(image, *box, label=box.label, score=box.score)


def ap50(samples: Sequence[Sample], constant: bool = False) -> float | None:
    """AP at IoU 0.5, groups weighted by their true boxes; None without true boxes.

    By our own matching, which is pycocotools' to the last digits (tests): no summary of COCO's weighs classes.
    """
    truth, found = as_boxes(samples)
    if not len(truth.images):
        return None
    images, found = _images(samples), found.constant() if constant else found
    return float(weighted_ap(truth, found, images, np.ones((1, len(images))), weigh=True, ious=AP50)[0])


def resampled_ap50(samples: Sequence[Sample]) -> Floats:
    """The same (resamples,) of images drawn with replacement."""
    truth, found = as_boxes(samples)
    return resampled_ap(truth, found, _images(samples), weigh=True, ious=AP50)


def _images(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    return np.unique(np.asarray([image for sample in samples for image in sample.image_ids], np.int64))


def as_boxes(samples: Sequence[Sample]) -> tuple[Boxes, Boxes]:
    """(true boxes, claimed boxes) by the benchmark's own image ids, which decide the order of equal scores."""
    truth = [(s.image_ids[box.image], group, box.corners, 0.0) for s in samples for group, box in s.truth]
    found = [
        (s.image_ids[box.image], group, box.corners, 1.0 if box.score is None else box.score)
        for s in samples
        for group, box in s.found
    ]
    return Boxes.of(truth), Boxes.of(found)


def rate(samples: Sequence[Sample]) -> Rated:
    """Whether each sample is right, named as in VALUES."""
    return Rated.of(((s.number, s.id, s.style, [float(is_right(s))]) for s in samples), VALUES)


def score(samples: Sequence[Sample]) -> dict[str, Any]:
    """Acc by style, and over all as it is published; AP50 as released and corrected, with our scores and without."""
    rated = rate(samples)
    scores = means(rated, STYLES)
    hits = rated.values["acc"]
    macro = {**scores["macro"], "macro_acc": scores["macro"].get("acc")}
    macro["acc"], macro["acc_as_released"] = float(hits.mean()) if len(hits) else None, acc_as_released(samples)
    macro["acc_interval"] = interval(resample(hits[:, None])[:, 0] / len(hits)) if len(hits) else None
    mended = corrected(samples)
    for name, variant in (("as_released", as_released(samples)), ("corrected", mended)):
        macro[f"ap50_{name}"], macro[f"ap50_{name}_interval"] = ap50(variant), interval(resampled_ap50(variant))
        macro[f"ap50_{name}_constant_score"] = ap50(variant, constant=True)
    for style, told in scores["tasks"].items():
        told["ap50_corrected"] = ap50([sample for sample in mended if sample.style == style])
    return {**scores, "macro": macro}
