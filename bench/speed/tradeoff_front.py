"""Points of the trade-off between time, memory and boxes: which of them no other beats, and which fits a limit.

Pure; knows neither models nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One way to answer: what was exported, and how it is run."""

    model: str  # the checkpoint's folder, or the shape that was planned
    answer: str  # how its answers write boxes: digits or locations
    bits: str  # of the weights
    engine: str
    pixels: int  # of a picture, at most
    keep: float  # the share of visual tokens that is left
    constrained: bool  # by the grammar of an answer

    def __str__(self) -> str:
        grammar = "by the grammar" if self.constrained else "free"
        tokens = "all tokens" if self.keep == 1 else f"{self.keep:g} of the tokens"
        name = Path(self.model).name
        return f"{name} {self.bits} on {self.engine}, {self.pixels} pixels, {tokens}, {self.answer} {grammar}"


@dataclass(frozen=True)
class Point:
    """A setting and what it costs; rounded as tables show it, so that the noise behind that wins no place."""

    setting: Setting
    ms: float  # a look and one question
    mb: float  # peak of a process, 10^6 bytes
    f1: float
    f1_interval: tuple[float, float]
    f1_of: str = ""  # whose F1 it is, where it is another model's

    def row(self) -> dict[str, Any]:
        """As a result has it."""
        return {**asdict(self.setting), **{key: value for key, value in asdict(self).items() if key != "setting"}}


@dataclass(frozen=True)
class Limits:
    """What a point must keep to; None is no limit."""

    max_ms: float | None = None
    max_mb: float | None = None
    min_f1: float | None = None

    def __str__(self) -> str:
        told = [
            f"at most {self.max_ms:g} ms" if self.max_ms is not None else "",
            f"at most {self.max_mb:g} MB" if self.max_mb is not None else "",
            f"an F1 of at least {self.min_f1:g}" if self.min_f1 is not None else "",
        ]
        return " and ".join(part for part in told if part)


def point_of(row: dict[str, Any]) -> Point:
    """A point from its row."""
    setting = Setting(**{key: row[key] for key in Setting.__dataclass_fields__})
    low, high = row["f1_interval"]
    return Point(setting, row["ms"], row["mb"], row["f1"], (low, high), row["f1_of"])


def dominates(one: Point, other: Point) -> bool:
    """Whether one is at least as good as the other in all three, and better in one of them."""
    pairs = ((one.ms, other.ms), (one.mb, other.mb), (-one.f1, -other.f1))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates, in their order."""
    return [point for point in points if not any(dominates(other, point) for other in points)]


def choose(points: Sequence[Point], limits: Limits) -> Point | None:
    """Of those within the limits the one with the best F1, then the fastest, then the smallest."""
    fitting = [point for point in points if not misses(point, limits)]
    return min(fitting, key=lambda point: (-point.f1, point.ms, point.mb), default=None)


def misses(point: Point, limits: Limits) -> dict[str, float]:
    """By how much of each limit a point misses it; nothing for what it keeps to."""
    found = {}
    for name, value, most in (("ms", point.ms, limits.max_ms), ("mb", point.mb, limits.max_mb)):
        if most is not None and value > most:
            found[name] = value / most - 1
    if limits.min_f1 is not None and point.f1 < limits.min_f1:
        found["f1"] = 1 - point.f1 / limits.min_f1
    return found


def refusal(points: Sequence[Point], limits: Limits) -> str:
    """The sentence where nothing fits: the point whose largest miss, in shares of the limit, is least."""

    def largest(point: Point) -> tuple[float, float]:
        missed = misses(point, limits).values()
        return max(missed, default=0.0), sum(missed)

    nearest = min(points, key=largest)
    missed = misses(nearest, limits)
    shown = {"ms": f"{nearest.ms:g} ms", "mb": f"{nearest.mb:g} MB", "f1": f"F1 {nearest.f1:.3f}"}
    told = [
        f"{text} ({100 * missed[key]:.1f} % too {'low' if key == 'f1' else 'much'})" if key in missed else text
        for key, text in shown.items()
    ]
    return f"nothing has {limits}; the nearest miss is {nearest.setting}: {', '.join(told)}"
