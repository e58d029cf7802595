"""The tables of what answers cost by their grammar, and of what their scores mean."""

from __future__ import annotations

from typing import Any

from bench.boxes.scoring import gain_text
from bench.tables.markdown import table

Result = dict[str, Any]


def constrained(result: Result) -> str:
    """Answers by their grammar beside free ones."""
    rows = []
    for row in result["rows"]:
        for way, name in (("free", "free"), ("constrained", "by the grammar")):
            gain = gain_text(row["f1_gain"], row["f1_gain_interval"]) if way == "constrained" else ""
            same = f"{row['same_where_allowed']} / {row['allowed']}" if way == "constrained" else ""
            one = row[way]
            numbers = [
                f"{one['f1']:.3f}",
                gain,
                same,
                str(one["unreadable"]),
                f"{one['steps']:.1f}",
                f"{one['ms']:.1f}",
            ]
            rows.append(["reasoned" if row["think"] else "direct", name, *numbers])
    head = ["asked", "decoded", "F1@0.5", "over free [95 %]", "same text where well formed", "unreadable"]
    return table([*head, "decoder steps", "ms a question"], rows) + f"\n\n{result['rows'][0]['questions']} questions. "


def calibration(result: Result) -> str:
    """What a threshold on the score keeps."""
    rows = [
        [f"{row['threshold']:g}", f"{row['precision']:.3f}", f"{row['recall']:.3f}"] for row in result["thresholds"]
    ]
    said = (
        f"{result['boxes']} boxes of {result['questions']} questions, of which {result['right']:.3f} are right; fitted "
        f"on {result['fitted_on']['questions']} others. Expected calibration error {result['ece_raw']:.3f} of the "
        f"probabilities as they are and {result['ece']:.3f} of the scores; AP@0.5 {result['ap']:.3f}, and "
        f"{result['ap_without_scores']:.3f} with boxes in no order. "
    )
    return table(["score at least", "precision", "recall"], rows) + "\n\n" + said
