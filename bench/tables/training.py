"""Tables of what training gained."""

from __future__ import annotations

from typing import Any

from bench.boxes.scoring import gain_text
from bench.tables.boxes import with_interval
from bench.tables.markdown import table

Result = dict[str, Any]


def stages(result: Result) -> str:
    """Every training stage in both modes, by kind, with 95 % intervals."""
    rows, kinds_of = [], list(result["rows"][0]["kinds"])
    for row in result["rows"]:
        rows.append(
            [
                f"`{row['stage']}`{_split(row)}",
                row["mode"],
                f"{row['parameters'] / 1e6:.2f}",
                with_interval(row, "f1"),
                f"{row['mean_iou']:.3f}",
                f"{row['image_accuracy']:.3f}",
                *(f"{row['kinds'][kind]['f1']:.2f}" if kind in row["kinds"] else "" for kind in kinds_of),
                f"{row['tokens']:.1f}",
                f"{row['tokens_a_box']:.1f}",
            ]
        )
    head = ["stage", "asked", "parameters, M", "F1@0.5 [95 %]", "mean IoU", "image accuracy", *kinds_of]
    head += ["tokens", "tokens a box"]
    lines = [
        f"* `{gain['stage']}` over `{gain['start']}`, {gain['mode']}{_split(gain)}: "
        f"F1 {gain_text(gain['gain'], gain['interval'])}, paired over the questions."
        for gain in result["gains"]
    ]
    return "\n".join([table(head, rows), "", *lines, *[""] * bool(lines), ""])


def _split(row: Result) -> str:
    """What to say of the questions, if they are not the plain ones; gains had no other when older files were kept."""
    return f", {row['split']}" if row.get("split", "held-out") != "held-out" else ""


def sampled(result: Result) -> str:
    """What GRPO gained over its start in the rewards of sampled answers."""
    rows = []
    for row in result["rows"]:
        gains = [
            gain_text(row[f"{name}_gain"], row[f"{name}_gain_interval"]) if f"{name}_gain" in row else ""
            for name in ("reward", "f1")
        ]
        scores = f"{row['reward']:.3f}", gains[0], f"{row['f1']:.3f}", gains[1]
        rows.append([f"`{row['stage']}`", row["mode"], f"{row['temperature']:g}", *scores])
    over = f"over `{result['start']}` [95 %]"
    head = ["stage", "asked", "temperature", "reward", over, "F1@0.5", over]
    asked = f"{result['n']} questions, {result['answers']} answers to each above temperature 0. "
    return table(head, rows) + "\n\n" + asked


def train_step(result: Result) -> str:
    """Time of a training step by kind of attention and what is set around it."""
    rows = [
        [
            f"`--attention {row['attention']}`" + (f", `{row['settings']}`" if row["settings"] else ""),
            f"{row['seconds']:.2f}",
            f"{row['over_first']:.2f} [{row['lowest']:.2f}, {row['highest']:.2f}]",
        ]
        for row in result["rows"]
    ]
    head = ["run", "seconds a step", f"times the first [least, most of {result['rounds']} rounds]"]
    each = f"Runs of {result['steps']} steps of {result['batch']} sets of pictures, eight questions each. "
    return table(head, rows) + "\n\n" + each


def further(result: Result) -> str:
    """GRPO and as much further SFT over their start and over each other, and reasoned answers over direct ones."""
    rows = []
    for mode, scored in result["modes"].items():
        rows.append([f"`{result['start']}`", mode, f"{scored['start_f1']:.3f}", "", "", ""])
        for row in scored["rows"]:
            over = result["start"] if row["over"] == "start" else row["over"]
            seeds = ", ".join(f"{gain:+.3f}" for gain in row["seeds"]) if len(row["seeds"]) > 1 else ""
            gain = gain_text(row["gain"], row["interval"])
            rows.append([f"`{row['arm']}`", mode, f"{row['f1']:.3f}", f"`{over}`", gain, seeds])
    head = ["trained", "asked", "F1@0.5", "over", "gain [95 %]", "each seed"]
    need = [
        [f"`{row['arm']}`", f"{row['direct_f1']:.3f}", f"{row['f1']:.3f}", gain_text(row["gain"], row["interval"])]
        for row in result["reasoned"]
    ]
    asked = f"{result['n']} questions; {result['reasoned'][0]['n']} of them in the second table. "
    need_head = ["trained", "direct F1@0.5", "reasoned F1@0.5", "gain [95 %]"]
    return "\n\n".join([table(head, rows), table(need_head, need), asked])
