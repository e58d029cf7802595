"""What each answer is worth, as numbers, and their means: by part, and over parts, with bootstrap intervals.

Knows no benchmark. A part is what a benchmark tells apart: a task of MIG-Bench, a split of RefCOCO.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.boxes.scoring import interval, resample

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rated:
    """Every answer's values, in the order of the questions; NaN where a value cannot be known."""

    ids: list[str]
    parts: list[str]
    values: dict[str, Values]  # name -> (answers,)

    @staticmethod
    def of(rows: Iterable[tuple[int, str, str, Sequence[float]]], names: Sequence[str]) -> Rated:
        """From (number, id, part, values) in any order."""
        ordered = sorted(rows, key=lambda row: row[0])
        table = np.asarray([row[3] for row in ordered], np.float64).reshape(len(ordered), len(names))
        return Rated(
            [row[1] for row in ordered],
            [row[2] for row in ordered],
            {name: table[:, k] for k, name in enumerate(names)},
        )

    def rows_of(self, part: str) -> list[int]:
        """The places of a part's answers."""
        return [k for k, other in enumerate(self.parts) if other == part]


def means(rated: Rated, expected: Sequence[str]) -> dict[str, Any]:
    """`tasks`: each part's means and how many answers they are over; `macro`: the unweighted mean over the parts.

    A part that nothing was answered of is missing in both; `macro` says how many of the expected ones it is over.
    """
    names = list(rated.values)
    known = [part for part in (*expected, *sorted(set(rated.parts) - set(expected))) if part in set(rated.parts)]
    tasks: dict[str, dict[str, Any]] = {}
    sums, resampled = [], []
    for seed, part in enumerate(known):  # or parts of one length would be drawn alike
        rows = rated.rows_of(part)
        values = np.asarray([rated.values[name][rows] for name in names]).reshape(len(names), len(rows)).T
        # Added up in the order of the questions, as the published scripts do: the last digit depends on it.
        mean = np.asarray([sum(column.tolist()) / len(rows) for column in values.T])
        again = resample(values, seed) / len(rows)
        tasks[part] = {**_told(names, mean, again), "n": len(rows)}
        sums.append(mean)
        resampled.append(again)
    macro: dict[str, Any] = {"n": len(rated.ids), "parts": len(known), "of": len(expected)}
    if known:
        macro = {**_told(names, np.mean(sums, axis=0), np.mean(resampled, axis=0)), **macro}
    return {"tasks": tasks, "macro": macro}


def _told(names: Sequence[str], mean: Values, again: Values) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for k, name in enumerate(names):
        known = bool(np.isfinite(mean[k]))
        told[name] = float(mean[k]) if known else None
        told[f"{name}_interval"] = interval(again[:, k]) if known else None
    return told
