"""A result of bench.tradeoff as a table and as a plot; knows nothing but the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import save_figure
from bench.tables.markdown import table

Result = dict[str, Any]
HEAD = ["weights", "engine", "answer", "decoding", "pixels", "tokens kept", "ms", "MB", "F1@0.5 [95 %]"]
MARKS = {"native": "o", "onnx": "s", "tensorrt": "D"}


def front_table(result: Result) -> str:
    """The points that no other beats, by their milliseconds."""
    return _table([row for row in result["points"] if row["front"]], result, False) + "\n\n" + note(result)


def whole_table(result: Result) -> str:
    """Every point, those of the front marked."""
    return _table(result["points"], result, True) + "\n\n" + note(result)


def note(result: Result) -> str:
    """What was asked, and how it was timed."""
    asked = f"{result['questions']} held-out questions. "
    if result["device"]:
        room = f"Memory and milliseconds of {result['device']} are planned (`bench.plan`), not measured; a process has "
        return f"{asked}{room}{result['room_mb']:.0f} MB there. F1 is the small model's that is named."
    fronts = sum(row["front"] for row in result["points"])
    return (
        f"{len(result['points'])} points, {fronts} of them in the front; {asked}Milliseconds of a look and a question, "
        f"each question at its fastest of {result['rounds']} fresh processes; MB is a process's peak, to 5. "
        + _machine(result["measured_on"], result["threads"])
    )


def _machine(machine: Result, threads: int) -> str:
    using = f"{threads} thread{'s' * (threads > 1)}" if threads else "a thread a physical core"
    return f"Measured with {using} on {machine['processor']}, {machine['cores']} cores, Python {machine['python']}."


def _table(rows: Sequence[Result], result: Result, marked: bool) -> str:
    planned = bool(result["device"])
    several = len({row["model"] for row in rows}) > 1 or planned
    head = [*(["front"] if marked else []), *(["model"] if several else []), *HEAD, *(["F1 of"] if planned else [])]
    return table(head, [_cells(row, several, marked) for row in sorted(rows, key=lambda row: row["ms"])])


def _cells(row: Result, several: bool, marked: bool) -> list[str]:
    low, high = row["f1_interval"]
    return [
        *(["**\\***" if row["front"] else ""] if marked else []),
        *([f"`{Path(row['model']).name}`"] if several else []),
        row["bits"],
        row["engine"],
        row["answer"],
        "by the grammar" if row["constrained"] else "free",
        str(row["pixels"]),
        f"{row['keep']:g}",
        f"{row['ms']:.1f}" if row["ms"] < 1000 else f"{row['ms']:.0f}",
        f"{row['mb']:.0f}",
        f"{row['f1']:.3f} [{low:.3f}, {high:.3f}]",
        *([row["f1_of"]] if row["f1_of"] else []),
    ]


def plot(result: Result, file: Path) -> None:
    """F1 over milliseconds; colour is memory, the shape the engine, and those of the front have a black edge."""
    import matplotlib.pyplot as plt

    rows = result["points"]
    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    low, high = min(row["mb"] for row in rows), max(row["mb"] for row in rows)
    drawn = None
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        drawn = axes.scatter(
            [row["ms"] for row in own], [row["f1"] for row in own], c=[row["mb"] for row in own], vmin=low, vmax=high,
            marker=MARKS.get(engine, "^"), s=[110 if row["front"] else 40 for row in own], cmap="viridis",
            edgecolors=["black" if row["front"] else "none" for row in own], linewidths=1.5, label=engine, zorder=3,
        )  # fmt: skip
    best = sorted((row for row in rows if row["front"]), key=lambda row: row["ms"])
    for number, row in enumerate(best, 1):  # texts beside the points would cover each other
        axes.vlines(row["ms"], *row["f1_interval"], color="grey", alpha=0.5)
        axes.annotate(str(number), (row["ms"], row["f1"]), (0, 9), textcoords="offset points", ha="center", fontsize=8)
        axes.plot([], [], " ", label=f"{number}: {_short(row)}")
    assert drawn is not None
    figure.colorbar(drawn, label="peak memory, MB")
    where = f"planned for {result['device']}, F1 of a small model" if result["device"] else "measured"
    axes.set(
        xlabel="a look and one question, ms", ylabel="F1@0.5", title=f"no point beats those with an edge ({where})"
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, file)


def _short(row: Result) -> str:
    free = "" if row["constrained"] else ", free"
    keep = "" if row["keep"] == 1 else f", keep {row['keep']:g}"
    return f"{row['bits']} on {row['engine']}, {row['pixels']} px{keep}{free}"
