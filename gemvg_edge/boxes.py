"""Box, IoU, matching and coordinate frames. The only place with box arithmetic; knows neither text nor models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Size = tuple[int, int]  # width and height of a picture
Steps = tuple[int, int]  # the largest x and y that a model writes: both are whole numbers from 0 on

# Qwen2-VL writes integers 0..1000 of each image's own width and height (Qwen3-VL issues 721 and 1486).
RELATIVE_FRAME = 1000
RELATIVE_STEPS: Steps = (RELATIVE_FRAME, RELATIVE_FRAME)
# Qwen2.5-VL writes pixels of the resized image (issues 676 and 866), so its steps are each picture's resized size.
RELATIVE, ABSOLUTE = {"kind": "relative", "size": RELATIVE_FRAME}, {"kind": "absolute"}
FRAMES: tuple[dict[str, Any], ...] = (RELATIVE, ABSOLUTE)  # as a manifest names them


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A box in one picture, x1 y1 x2 y2 in pixels of the original; `image` is the 0-based index into the list given.

    Two are equal where they lie in one place, whatever they are called. Iterates over its four numbers.
    """

    image: int  # from 0
    x1: float  # left
    y1: float  # top
    x2: float  # right
    y2: float  # bottom
    # What was asked for, or the name that the model wrote.
    label: str | None = field(default=None, compare=False, kw_only=True)
    score: float | None = field(default=None, compare=False, kw_only=True)  # 0..1; None where nothing gave one

    def __iter__(self) -> Iterator[float]:
        return iter(self.corners)

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2."""
        return self.x1, self.y1, self.x2, self.y2

    @property
    def area(self) -> float:
        """Square pixels; 0 for an inverted box."""
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0..1 (continuous, no +1 pixel); boxes in different images have 0."""
    if a.image != b.image:
        return 0.0
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    union = a.area + b.area - intersection
    return intersection / union if union > 0 else 0.0  # areas below every float are none


def match_boxes(predicted: Sequence[Box], truth: Sequence[Box], threshold: float = 0.5) -> list[tuple[int, int, float]]:
    """One-to-one matches (predicted index, truth index, IoU), best IoU first, each at least `threshold`."""
    pairs = sorted(
        (
            (overlap, i, j)
            for i, p in enumerate(predicted)
            for j, t in enumerate(truth)
            if (overlap := iou(p, t)) > 0 and overlap >= threshold
        ),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    used_predictions: set[int] = set()
    used_truths: set[int] = set()
    matches = []
    for overlap, i, j in pairs:
        if i not in used_predictions and j not in used_truths:
            used_predictions.add(i)
            used_truths.add(j)
            matches.append((i, j, overlap))
    return matches


def to_steps(box: Box, size: Size, steps: Steps) -> tuple[int, int, int, int]:
    """Pixels of an image of (width, height) -> whole steps 0..steps along each side, rounded and clamped."""
    (width, height), (across, down) = size, steps
    return (
        _step(box.x1, width, across),
        _step(box.y1, height, down),
        _step(box.x2, width, across),
        _step(box.y2, height, down),
    )


def from_steps(image: int, values: Sequence[float], size: Size, steps: Steps) -> Box:
    """Steps 0..steps (x1, y1, x2, y2) of an image of (width, height) pixels -> a box in its pixels."""
    (width, height), (across, down) = size, steps
    x1, y1, x2, y2 = values
    return Box(image, x1 * width / across, y1 * height / down, x2 * width / across, y2 * height / down)


def change_steps(values: Sequence[int], old: Steps, new: Steps) -> list[int]:
    """The same box (x1, y1, x2, y2) in other steps of the same picture, rounded and clamped."""
    sides = list(zip(old, new, strict=True)) * 2
    return [min(there, round(v * there / here)) for v, (here, there) in zip(values, sides, strict=True)]


def _step(value: float, extent: int, steps: int) -> int:
    return min(steps, max(0, round(value / extent * steps)))
