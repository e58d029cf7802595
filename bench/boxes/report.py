"""Figures for people: lines in a terminal and bars in a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.boxes.tabletop import NAMES
from bench.results import save_figure
from gemvg_edge.files import printable

# What a plot and a table in short show of each benchmark.
HEADLINES = {"mig-bench": "acc@0.5", "mc-bench": "acc", "odinw13": "ap", "tabletop": "f1", "records": "f1"}


def headline(task: str) -> str:
    """The figure that a task is known by."""
    return HEADLINES.get(task.partition(":")[0], "acc@0.5")


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A result's figures by part and over parts, a line each; intervals in brackets."""
    rows = [*result["tasks"].items(), *_macro(result)]
    if "f1" in result:  # of all boxes together
        rows.append(("all", {key: value for key, value in result.items() if key not in ("ms", "tokens")}))
        rows += [(name, result[name]) for name in NAMES if name in result]
    width = max((len(name) for name, _ in rows), default=0)
    for name, told in ((printable(name), told) for name, told in rows):
        yield f"{name:<{width}}  {told['n']:>6}  {'  '.join(_figures(told))}"
    if incomplete := result.get("incomplete"):
        yield f"note: {incomplete}"
    if found := result.get("agreement"):
        yield (
            f"as published: {found['boxes']} of {found['answers']} boxes, {found['ious']} IoUs, "
            f"{found['summaries']} of {found['tasks']} summaries are the same to the last digit"
        )


def summary(name: str, result: Mapping[str, Any]) -> str:
    """A model in one line, to stand below others."""
    name = printable(name)
    if "f1" in result:
        low, high = result["f1_interval"]
        return (
            f"{name:<24} F1@0.5 {result['f1']:.3f} [{low:.3f}, {high:.3f}]  exact {result['exact']:.3f}  mean IoU "
            f"{result['mean_iou']:.3f}  image accuracy {result['image_accuracy']:.3f}  {result['ms']:.0f} ms, "
            f"{result['tokens']:.1f} tokens a question"
        )
    return f"{name:<24} " + "; ".join(f"{part} {'  '.join(_figures(told))}" for part, told in _macro(result))


def _macro(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mean over parts; of two protocols that are not comparable, one each."""
    macro = result["macro"]
    if all(isinstance(told, dict) for told in macro.values()):
        yield from ((f"mean, {name}", told) for name, told in macro.items())
    else:
        yield "mean", macro


def _figures(told: Mapping[str, Any]) -> Iterator[str]:
    for name, value in told.items():
        if isinstance(value, float):
            low_high = told.get(f"{name}_interval")
            yield f"{name} {value:.3f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")
    if told.get("of", 0) != told.get("parts", 0) and "of" in told:
        yield f"over {told['parts']} of {told['of']}"


def plot(results: Sequence[Mapping[str, Any]], task: str, file: Path) -> None:
    """The headline of every part, a bar a model with its interval, as a PNG."""
    from matplotlib import pyplot  # slow to import

    pyplot.rcParams["text.parse_math"] = False  # names of folders and of data sets are no formulas
    name = headline(task)
    parts = list(dict.fromkeys(part for result in results for part in result["tasks"]))
    figure, axes = pyplot.subplots(figsize=(min(14.0, max(6.0, 0.9 * len(parts) + 2)), 4.4))
    share = 0.8 / len(results)
    for k, result in enumerate(results):
        told = [result["tasks"].get(part, {}) for part in parts]
        heights = [one.get(name) or 0.0 for one in told]
        bounds = [one.get(f"{name}_interval") or (height, height) for one, height in zip(told, heights, strict=True)]
        spreads = [[max(0.0, h - low) for h, (low, _) in zip(heights, bounds, strict=True)],
                   [max(0.0, high - h) for h, (_, high) in zip(heights, bounds, strict=True)]]  # fmt: skip
        places = [at + (k - (len(results) - 1) / 2) * share for at in range(len(parts))]
        axes.bar(
            places,
            heights,
            share,
            yerr=spreads,
            capsize=2,
            label=printable(" " + result["model"]),
            error_kw={"linewidth": 0.8},
        )
    axes.set_xticks(range(len(parts)), [printable(part) for part in parts], rotation=40, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel(name)
    axes.set_title(task)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(x=0.01)
    axes.legend(fontsize=8, loc="lower left", framealpha=0.9)
    figure.tight_layout()
    save_figure(figure, file)
