"""What happened to an answer, in the words that the gallery filters by. Knows boxes alone."""

from __future__ import annotations

from collections.abc import Sequence

from gemvg_edge.boxes import Box, iou, match_boxes

RIGHT, MALFORMED, WRONG_IMAGE, MISSED, EXTRA, LOOSE = (
    "right", "malformed", "wrong image", "missed", "extra", "loose",
)  # fmt: skip
KINDS = (RIGHT, WRONG_IMAGE, MISSED, EXTRA, LOOSE, MALFORMED)
MOST = 300  # boxes that are paired: an answer that repeats itself has thousands


def kinds_of(boxes: Sequence[Box], truth: Sequence[Box], problem: str | None) -> list[str]:
    """Which of KINDS an answer is: `right` (every true box found, nothing else), or one or more of the others.

    `wrong image`: a box in a picture that has no true one, where another has; `loose`: a true box that was missed, with
    a claimed one over part of it; `extra`: more boxes than were found.
    """
    boxes, truth = boxes[:MOST], truth[:MOST]
    pairs = match_boxes(boxes, truth)
    hit, found = {i for i, _, _ in pairs}, {j for _, j, _ in pairs}
    spare = [box for i, box in enumerate(boxes) if i not in hit]
    missed = [box for j, box in enumerate(truth) if j not in found]
    images = {box.image for box in truth}
    kinds = []
    if problem:
        kinds.append(MALFORMED)
    if images and any(box.image not in images for box in spare):
        kinds.append(WRONG_IMAGE)
    if missed:
        kinds.append(MISSED)
    if any(iou(box, true) > 0 for box in spare for true in missed):
        kinds.append(LOOSE)
    if len(spare) > len(missed):
        kinds.append(EXTRA)
    return kinds or [RIGHT]


def overlap_of(boxes: Sequence[Box], truth: Sequence[Box]) -> float:
    """The IoU of the pairs, best first, over as many as there are true or claimed boxes; 1 where there are none."""
    boxes, truth = boxes[:MOST], truth[:MOST]
    most = max(len(boxes), len(truth))
    pairs = match_boxes(boxes, truth, threshold=0.0)
    return sum(overlap for _, _, overlap in pairs) / most if most else 1.0
