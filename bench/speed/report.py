"""A result of bench.latency: what its numbers say of each other, its table, its plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import save_figure
from bench.tables.markdown import table

OURS = "ours"
PHASES = {
    "vision_ms": "vision", "prefill_ms": "prefill", "first_token_ms": "first token", "first_box_ms": "first box",
    "box_ms": "a further box", "location_box_ms": "... in location tokens", "token_ms": "a token",
    "again_ms": "another question", "changed_ms": "last of four changed",
}  # fmt: skip
GROWING = ("vision_ms", "prefill_ms", "first_token_ms", "again_ms", "token_ms")  # with the pictures
# Ours over the best rival's, at most; of a peak, at least.
AT_MOST = {"first_token_ms": 0.48, "box_ms": 2 / 3, "location_box_ms": 1 / 3, "peak_gib": 1.1}
AT_LEAST = {"token_of_read": 0.85, "vision_of_int8": 0.62, "prefill_of_int8": 0.62}
PANELS = (
    ("vision_ms", "vision, s"), ("prefill_ms", "prefill, s"), ("first_token_ms", "first token, s"),
    ("box_ms", "a further box, s"), ("again_ms", "another question, s"), ("peak_gib", "peak memory, GiB"),
)  # fmt: skip

Row = dict[str, Any]


def ratios(rows: Sequence[Row]) -> None:
    """Put beside each system's numbers how many times ours they are, at the same number of pictures."""
    for row in rows:
        ours = next((r for r in rows if r["system"] == OURS and r["pictures"] == row["pictures"]), None)
        if ours:
            keys = [key for key in (*PHASES, "peak_gib") if key in row and ours.get(key)]
            row["times_ours"] = {key: row[key] / ours[key] for key in keys}


def bars(rows: Sequence[Row]) -> list[Row]:
    """Each goal with what was reached, at the fewest pictures that were measured."""
    fewest = [row for row in rows if row["pictures"] == min(r["pictures"] for r in rows)]
    ours = next((row for row in fewest if row["system"] == OURS), None)
    rivals = [row for row in fewest if not row["system"].startswith(OURS)]
    if ours is None:
        return []
    told = []
    for key, limit in AT_MOST.items():
        # Others have no location tokens: their boxes are in digits.
        others = [row["box_ms" if key == "location_box_ms" else key] for row in rivals]
        if others and key in ours:
            reached = ours[key] / min(others)
            told.append({"goal": key, "at_most": limit, "reached": reached, "met": reached <= limit})
    for key, limit in AT_LEAST.items():
        if key in ours["shares"]:
            reached = ours["shares"][key]
            told.append({"goal": key, "at_least": limit, "reached": reached, "met": reached >= limit})
    return told


def slopes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds that a further picture costs in each phase, by least squares; nothing for one number of pictures."""
    found: dict[str, dict[str, float]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        counts = [row["pictures"] for row in own]
        if len(counts) > 1:
            found[system] = {key: float(np.polyfit(counts, [row[key] for row in own], 1)[0]) for key in GROWING}
    return found


def markdown(result: Row) -> str:
    """The tables that people read."""
    parts = []
    for pictures in dict.fromkeys(row["pictures"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["pictures"] == pictures]
        head = [f"{pictures} pictures", *(f"`{row['system']}`" for row in rows)]
        lines = [["load, s", *(f"{row['load_s']:.1f}" for row in rows)]]
        for key, name in PHASES.items():
            if any(key in row for row in rows):
                lines.append([f"{name}, ms", *(_cell(row, key) for row in rows)])
        lines.append(["peak memory, GiB", *(f"{row['peak_gib']:.2f}" for row in rows)])
        lines.append(["prompt, tokens", *(str(row["prompt_tokens"]) for row in rows)])
        names = dict.fromkeys(key for row in rows for key in row["shares"])
        for key in names:
            phase, _, peak = key.partition("_of_")
            lines.append([f"{phase}, % of {peak} peak", *(f"{100 * row['shares'][key]:.0f}" for row in rows)])
        parts.append(table(head, lines))
    parts += [f"`{name}` could not be measured: {why}" for name, why in result["failed"].items()]
    peaks = result["peaks"]
    if peaks["int8_gops"]:
        rates = f"{peaks['int8_gops']:.0f} GOP/s in int8, {peaks['float32_gflops']:.0f} GFLOP/s in float32"
        parts.append(
            f"Peaks of {result['threads']} threads, medians of before and after each run: {rates}, "
            f"{peaks['read_gbs']:.1f} GB/s read."
        )
    else:
        parts.append(f"The machine's peaks are not known: {peaks.get('reason')}.")
    if result["noise"]["loud"]:
        parts.append(f"Not a quiet machine: {result['noise']['told']}.")
    parts.append(f"{result['model']}; medians of {result['runs']} interleaved runs; in brackets: times ours.")
    return "\n\n".join(parts)


def growth(result: Row) -> str:
    """What a further picture costs in each phase, in seconds, by system."""
    slopes = result["slopes"]
    names = {key: name for key, name in PHASES.items() if any(key in own for own in slopes.values())}
    lines = [[f"`{system}`", *(f"{own[key] / 1e3:.3f}" for key in names)] for system, own in slopes.items()]
    counts = ", ".join(str(count) for count in sorted({row["pictures"] for row in result["rows"]}))
    measured = f"Slopes over {counts} pictures; medians of {result['runs']} interleaved runs."
    failed = [f"`{name}` could not be measured: {why}" for name, why in result["failed"].items()]
    return "\n\n".join([table(["seconds a picture", *names.values()], lines), measured, *failed])


def _cell(row: Row, key: str) -> str:
    if key not in row:
        return ""
    digits = 1 if row[key] < 100 else 0
    times = row.get("times_ours", {}).get(key)
    return f"{row[key]:.{digits}f}" + (f" ({times:.2f})" if times and row["system"] != OURS else "")


def plot(result: Row, file: Path) -> None:
    """Six panels: bars for one number of pictures, lines and slopes for several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    counts = sorted({row["pictures"] for row in rows})
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 6.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS, strict=True):
        for k, system in enumerate(systems):
            own = sorted((row for row in rows if row["system"] == system), key=lambda row: int(row["pictures"]))
            values = [row[key] / (1 if key == "peak_gib" else 1e3) for row in own]
            if len(counts) == 1:
                axis.bar(k, values[0], color=f"C{k}", label=system)
                axis.text(k, values[0], f"{values[0]:.3g}", ha="center", va="bottom", fontsize=8)
            else:
                slope = result["slopes"].get(system, {}).get(key)
                label = system if slope is None else f"{system}: {slope / 1e3:+.3g} s a picture"
                axis.plot([row["pictures"] for row in own], values, "o-", color=f"C{k}", label=label)
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        if len(counts) == 1:
            axis.set_xticks(range(len(systems)), systems, fontsize=7, rotation=15)
        else:
            axis.set_xticks(counts)
            axis.set_xlabel("pictures")
            axis.legend(fontsize=7, frameon=False)
    machine = f"{result['machine']['processor']}, {result['threads']} threads"
    figure.suptitle(f"{result['model']}, {', '.join(map(str, counts))} pictures of {result['pixels']}; {machine}")
    save_figure(figure, file, dpi=120)
