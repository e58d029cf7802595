"""Box scores of one model over many questions, with bootstrap intervals. Knows neither models nor files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemvg_edge.boxes import Box, match_boxes

RESAMPLES = 2000
# (questions, 6): hits, boxes claimed, boxes wanted, IoU of hits added up, right images, all right and nothing else
Counts = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """`f1` counts boxes over all questions (IoU at least the threshold, right image, one to one).

    `mean_iou` is over matched boxes; `image_accuracy` is the share of questions whose predicted boxes lie in exactly
    the images that the true boxes lie in (both empty counts as right); `exact` the share where every true box was
    found and nothing else was claimed, so that questions without a target count too. The intervals are 95 % bootstrap
    intervals over questions.
    """

    n: int
    f1: float
    f1_interval: Interval
    precision: float
    recall: float
    mean_iou: float
    mean_iou_interval: Interval
    image_accuracy: float
    image_accuracy_interval: Interval
    exact: float
    exact_interval: Interval


def count(predicted: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], threshold: float = 0.5) -> Counts:
    """What each question's predicted boxes add to the scores."""
    rows = []
    for p, t in zip(predicted, truth, strict=True):
        overlaps = [overlap for _, _, overlap in match_boxes(p, t, threshold)]
        right_images = {box.image for box in p} == {box.image for box in t}
        exact = len(overlaps) == len(p) == len(t)
        rows.append((len(overlaps), len(p), len(t), sum(overlaps), right_images, exact))
    return np.asarray(rows, np.float64).reshape(-1, 6)


def score(predicted: Sequence[Sequence[Box]], truth: Sequence[Sequence[Box]], threshold: float = 0.5) -> Scores:
    """Score each question's predicted boxes against its true ones."""
    return score_counts(count(predicted, truth, threshold))


def score_counts(counts: Counts) -> Scores:
    """The same from what `count` gave."""
    n, total = len(counts), counts.sum(axis=0)
    again = resample(counts)
    return Scores(
        n=n,
        f1=float(f1_of(total)),
        f1_interval=interval(f1_of(again)),
        precision=float(_share(total[0], total[1])),
        recall=float(_share(total[0], total[2])),
        mean_iou=float(_share(total[3], total[0])),
        mean_iou_interval=interval(_share(again[:, 3], again[:, 0])),
        image_accuracy=float(total[4] / max(1, n)),
        image_accuracy_interval=interval(again[:, 4] / max(1, n)),
        exact=float(total[5] / max(1, n)),
        exact_interval=interval(again[:, 5] / max(1, n)),
    )


def f1_gain(before: Counts, after: Counts) -> tuple[float, Interval]:
    """How much F1 two models differ on the same questions, and the paired bootstrap's 95 % interval of that."""
    both = resample(np.concatenate([before, after], axis=1))
    gain = f1_of(after.sum(axis=0)) - f1_of(before.sum(axis=0))
    columns = before.shape[1]
    return float(gain), interval(f1_of(both[:, columns:]) - f1_of(both[:, :columns]))


def mean_gain(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> tuple[float, Interval]:
    """The mean difference of two models' values (questions,) and the paired bootstrap's 95 % interval of it."""
    again = resample((after - before)[:, None])[:, 0] / max(1, len(before))
    return float((after - before).mean()), interval(again)


def gain_text(gain: float, interval: Sequence[float]) -> str:
    """A gain and its interval for people."""
    return f"{gain:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def resample(values: Counts, seed: int = 0) -> Counts:
    """Sums (RESAMPLES, columns) of values (n, columns) over rows drawn with replacement; a seed's draw is fixed."""
    n = len(values)
    if not n:
        return np.zeros((RESAMPLES, values.shape[1]))
    rng = np.random.default_rng(seed)
    return np.stack([draw(rng, n) @ values for _ in range(RESAMPLES)])


def draw(rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
    """How often each of n is drawn in n draws with replacement."""
    return np.bincount(rng.integers(0, n, n), minlength=n)


def interval(values: Counts) -> Interval:
    """The middle 95 % of what resampling gave."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def f1_of(counts: Counts) -> Counts:
    """F1 of counts that were added up, in their last axis."""
    return _share(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def _share(part: Counts, whole: Counts) -> Counts:
    return np.divide(part, whole, out=np.zeros_like(part, np.float64), where=whole != 0)
