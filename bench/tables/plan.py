"""The device planner's results as Markdown, for the command and for README.md; knows nothing but the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.tables.markdown import table

Result = dict[str, Any]

PARTS = {"decoder": "decoder", "embedding": "embedding", "head": "head", "vision": "vision tower"}
FLAGS = {"head": "--head-bits 4", "embedding": "--embedding-bits 4", "vision": "--vision-bits 4"}


def plan(result: Result) -> str:
    """How far the roofline is from what was published, row by row, and what it was not tried on."""
    efficiency, phases = result["efficiency"], result["median_error_of_phases"]
    rows = [
        [
            row["device"],
            row["model"],
            row["decoder"],
            f"{row['version']} {row['benchmark']}",
            row["phase"],
            f"{row['published_ms']:.1f}",
            f"{row['predicted_ms']:.1f}",
            f"{100 * row['error']:+.0f}",
            "fitted" if row["fitted"] else "held out",
        ]
        for row in result["rows"]
    ]
    head = ["device", "model", "weights", "published in", "phase", "published, ms", "predicted, ms", "error, %", "half"]
    by_phase = ", ".join(f"{phase} {100 * error:.0f} %" for phase, error in phases.items())
    lines = [
        table(head, rows),
        "",
        f"Median error of the {result['held_out']} times held out: {100 * result['median_error']:.1f} % ({by_phase}). "
        f"Kernels reach {100 * efficiency['compute']:.0f} % of peak and {100 * efficiency['bandwidth']:.0f} % of "
        "bandwidth, fitted on every other published row. With the halves swapped the median is "
        f"{100 * result['median_error_halves_swapped']:.1f} %; were the Orin NX and Nano measured in Super mode, "
        f"{100 * result['median_error_super_mode']:.1f} %.",
        "",
        _memory_check(result["memory"]),
        "",
        "Left out:",
        *[f"* {entry['reason']}: {'; '.join(entry['what'])}." for entry in result["left_out"]],
    ]
    return "\n".join(lines)


def _memory_check(rows: Sequence[Result]) -> str:
    cells = [
        [
            row["device"],
            row["model"],
            f"{row['published_gb']:.2f}",
            f"{row['weights_and_cache_gb']:.2f}",
            f"{row['planned_gb']:.2f}",
            f"{100 * row['error']:+.0f}",
        ]
        for row in rows
    ]
    head = ["device", "model", "published peak, GB", "weights and cache, GB", "planned, GB", "error, %"]
    return table(head, cells)


def plan_7b(result: Result) -> str:
    """Of one model on one device: memory part by part, what fits, the time of each phase, and what to change."""
    lines = [
        f"`{result['model']}` on {result['title']}, {_pictures(result['pictures'])} a question. Of "
        f"{result['usable_gb']:.2f} GB the system takes {result['system_gb']:.2f} and the runtime "
        f"{result['runtime_gb']:.1f} (what TensorRT Edge-LLM asks for beside the model). A thousand tokens of cache "
        f"take {result['cache_gb_a_thousand_tokens']:.3f} GB.",
        "",
        table(["weights, GB", *PARTS.values(), "together"], [_weights_row(recipe) for recipe in result["recipes"]]),
        "",
        _budgets_table(result),
        "",
        *[f"* {line}" for line in _advice(result)],
    ]
    return "\n".join(lines)


def _weights_row(recipe: Result) -> list[str]:
    sizes = recipe["weights_gb"]
    return [recipe["name"], *[_gigabytes(sizes[part]) for part in PARTS], _gigabytes(sum(sizes.values()))]


def _budgets_table(result: Result) -> str:
    rows = [
        [
            recipe["name"],
            str(budget["visual_tokens"]),
            _gigabytes(budget["cache_gb"]),
            _gigabytes(budget["activations_gb"]),
            _gigabytes(budget["needed_gb"]),
            _gigabytes(budget["spare_gb"]),
            budget["verdict"],
            f"{budget['vision_ms']:.0f}",
            f"{budget['prefill_ms']:.0f}",
            f"{budget['decode_ms']:.1f}",
            f"{budget['answer_s']:.1f}",
        ]
        for recipe in result["recipes"]
        for budget in recipe["budgets"]
    ]
    head = ["weights", "tokens a picture", "cache, GB", "activations, GB", "needed, GB", "to spare, GB", ""]
    head += ["vision, ms", "prefill, ms", "ms a token", f"{result['answer_tokens']} tokens, s"]
    return table(head, rows)


def _advice(result: Result) -> list[str]:
    lines = [_recipe_advice(recipe, result["pixels_a_token"]) for recipe in result["recipes"]]
    building = "; ".join(f"{_gigabytes(recipe['building_gb'])} GB for {recipe['name']}" for recipe in result["recipes"])
    lines.append(
        f"Building the engines takes memory of its own, on the device: about {building} (as measured with TensorRT-RTX "
        "on a CPU), and the weights once more where a GPU tries them. Where that is more than there is, add swap."
    )
    lines += [result["note"]] * bool(result["note"])
    if "changes" not in result:
        return lines
    changes = result["changes"]
    first = changes["further"][0]
    spares = [f"{FLAGS[step['part']]} leaves {_gigabytes(step['spare_gb'])} GB" for step in changes["further"]]
    last = result["recipes"][-1]["name"]
    lines.append(
        f"Quantise further, on top of {last} and of each other, at {first['visual_tokens']} tokens a picture: "
        + "; ".join(spares)
        + ". Measure the boxes afterwards (bench.compression)."
    )
    lines.append(f"Another device: {last} fits with every size of picture on {_names(changes['devices'])}.")
    lines.append(f"A smaller model that does so here: {_names(changes['models'])}.")
    return lines


def _recipe_advice(recipe: Result, pixels_a_token: int) -> str:
    for verdict in ("fits", "tight"):
        sizes = [b for b in recipe["budgets"] if b["verdict"] == verdict]
        if sizes:
            most = max(sizes, key=lambda budget: int(budget["visual_tokens"]))
            pixels = most["visual_tokens"] * pixels_a_token / 1e6
            up_to = f"up to {most['visual_tokens']} tokens a picture ({pixels:.2f} megapixels)"
            fewer = "" if most is recipe["budgets"][-1] else "; larger pictures leave less room: lower max_pixels"
            room = f"{_gigabytes(most['spare_gb'])} GB to spare"
            tight = ", too little to be sure of" if verdict == "tight" else ""
            return f"{recipe['name']}: {verdict} with {up_to}, {room}{tight}{fewer}."
    short = -max(budget["spare_gb"] for budget in recipe["budgets"])
    left = {part: size for part, size in recipe["weights_gb"].items() if recipe["stored"][part] != "int4"}
    part = max(left, key=lambda part: float(left[part]))
    return (
        f"{recipe['name']}: does not fit, {_gigabytes(short)} GB short with the smallest pictures; the {PARTS[part]} "
        f"is the largest part that has more than 4 bits ({_gigabytes(left[part])} GB in {recipe['stored'][part]})."
    )


def _pictures(count: int) -> str:
    return "one picture" if count == 1 else f"{count} pictures"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none of those that are known"


def _gigabytes(size: float) -> str:
    return f"{size:.2f}"
