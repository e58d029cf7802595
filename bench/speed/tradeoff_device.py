"""The trade-off on a device that is not here: memory and time by bench.plan, boxes of the small model in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fit.roofline import Device, Shape
from bench.plan import ANSWER_TOKENS, plan
from bench.speed.tradeoff_bundles import GPTQ, RECIPE_FLAGS
from bench.speed.tradeoff_front import Point, Setting
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import EDGE_MAX_PIXELS

PICTURES = 2
# The planner's answer is five boxes in digits; in location tokens one takes six (`bench.stages`).
TOKENS = {"digits": ANSWER_TOKENS, "locations": 30}
STORED_LIKE = {name: (("float",) if flags is None else (GPTQ, "int4")) for name, flags in RECIPE_FLAGS.items()}


def room_mb(device: Device) -> float:
    """What a device has for a process."""
    return float(round((device.usable - device.system) / 1e6))


def device_points(small: Sequence[Point], shape: Shape, device: Device) -> list[Point]:
    """A point for each recipe of the planner and each budget that the small model was asked with.

    A budget is the same share of what export advises as it was of the small model's own.
    """
    whole = [point for point in small if point.setting.keep == 1 and point.setting.constrained]
    models = dict.fromkeys((point.setting.model, point.setting.answer) for point in whole)
    found = []
    for model, answer in models:
        own = [point for point in whole if point.setting.model == model]
        most = max(point.setting.pixels for point in own)
        budgets = {p.setting.pixels: _tokens(p.setting.pixels / most, shape) for p in own}
        planned = plan(shape, device, PICTURES, list(budgets.values()))
        for recipe in planned["recipes"]:
            rows = {row["visual_tokens"]: row for row in recipe["budgets"]}
            for pixels, tokens in budgets.items():
                if like := _like(own, recipe["name"], pixels):
                    found.append(_point(like, recipe["name"], rows[tokens], answer, shape))
    if not found:
        raise GemvgError("no recipe of the planner has boxes to stand for it; measure float and gptq or int4 too")
    return found


def _tokens(share: float, shape: Shape) -> int:
    return min(max(1, int(share * EDGE_MAX_PIXELS / shape.vision.pixels_a_token)), shape.max_visual_tokens)


def _like(small: Sequence[Point], recipe: str, pixels: int) -> Point | None:
    """The small model's point that is stored most like a recipe; the first engine's."""
    for bits in STORED_LIKE[recipe]:
        for point in small:
            if (point.setting.bits, point.setting.pixels) == (bits, pixels):
                return point
    return None


def _point(like: Point, recipe: str, row: dict[str, Any], answer: str, shape: Shape) -> Point:
    ms = row["vision_ms"] + row["prefill_ms"] + TOKENS[answer] * row["decode_ms"]
    pixels = row["visual_tokens"] * shape.vision.pixels_a_token
    setting = Setting(shape.name, answer, recipe, "tensorrt", pixels, 1.0, True)
    f1_of = f"{Path(like.setting.model).name} {like.setting.bits}, {like.setting.pixels} pixels"
    return Point(setting, float(round(ms)), float(round(1e3 * row["needed_gb"])), like.f1, like.f1_interval, f1_of)
