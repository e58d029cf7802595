"""The tables of the field's benchmarks, of paired comparisons, and of what scoring takes."""

from __future__ import annotations

from typing import Any

from bench.boxes.scoring import gain_text
from bench.tables.markdown import table

Result = dict[str, Any]


def with_interval(row: Result, name: str) -> str:
    """A figure with its 95 % interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def models(result: Result) -> str:
    """Every model that was compared on the simulated world."""
    rows = [
        [
            f"`{row['model']}`",
            with_interval(row, "f1"),
            with_interval(row, "exact"),
            with_interval(row, "mean_iou"),
            with_interval(row, "image_accuracy"),
            f"{row['same_text']} / {row['n']}",
            f"{row['ms']:.0f}",
        ]
        for row in result["models"]
    ]
    head = ["model", "F1@0.5", "whole questions right", "mean IoU of matches", "image accuracy"]
    return table([*head, "same text as the first", "ms a question"], rows)


def kinds(result: Result) -> str:
    """The last model's scores by kind of question."""
    shipped = result["models"][-1]
    parts = {**shipped["kinds"], **{f"- {task}": row for task, row in shipped["tasks"].items()}}
    rows = [
        [kind, str(row["n"]), with_interval(row, "f1"), f"{row['exact']:.3f}", f"{row['image_accuracy']:.3f}"]
        for kind, row in parts.items()
    ]
    none = shipped["no_target"]
    shares = [f"{none['exact']:.3f}", f"{none['image_accuracy']:.3f}"]
    rows.append(["all that have no target", str(none["n"]), "-", *shares])
    return table(["kind of question, and task", "questions", "F1@0.5", "whole questions right", "image accuracy"], rows)


def new_names(result: Result) -> str:
    """Questions with a name that training never shows, apart from the others."""
    said = {
        "new_name_in_text": "a new name in the text",
        "new_name_in_target": "a new name among what is asked for",
        "no_new_name": "neither",
    }
    rows = []
    for row in result["models"]:
        told = {"all of the split": row} | {words: row[key] for key, words in said.items()}
        rows += [
            [f"`{row['model']}`, {words}", str(one["n"]), with_interval(one, "f1"), with_interval(one, "exact")]
            for words, one in told.items()
        ]
    return table(["model, questions", "questions", "F1@0.5", "whole questions right"], rows)


def mig_bench(result: Result) -> str:
    """MIG-Bench by task, and how much of it is what was published."""
    rows = [
        [f"`{task}`", str(row["n"]), with_interval(row, "acc@0.5"), f"{row['acc@0.3']:.3f}", f"{row['acc@0.7']:.3f}",
         f"{row['mean_iou']:.3f}"]
        for task, row in {**result["tasks"], "mean of tasks": result["macro"]}.items()
    ]  # fmt: skip
    head = ["task", "questions", "Acc@0.5", "Acc@0.3", "Acc@0.7", "mean IoU"]
    found = result["agreement"]
    same = (
        f"Of what was published, {found['boxes']} of {found['answers']} boxes, {found['ious']} IoUs and "
        f"{found['summaries']} of {found['tasks']} summaries come out the same to the last digit."
    )
    return table(head, rows) + "\n\n" + same


def compared(result: Result) -> str:
    """What one model gains over another on the same questions."""
    rows = [
        [name, f"{row['a']:.3f}", f"{row['b']:.3f}", gain_text(row["gain"], row["interval"]),
         *([str(row["lost"]), str(row["gained"]), f"{row['p']:.2f}"] if "p" in row else [""] * 3)]
        for name, row in result["values"].items()
    ]  # fmt: skip
    head = ["", f"`{result['a']}`", f"`{result['b']}`", "gain [95 %]", "lost", "gained", "McNemar's p"]
    note = f"{result['n']} questions; {result['same_text']} answers are the same letter by letter."
    return table(head, rows) + "\n\n" + note


def score_speed(result: Result) -> str:
    """Seconds and memory of scoring."""
    rows = [
        [f"`{row['task']}`", f"{row['answers']:,}", f"{row['seconds']:.1f}", f"{row['peak_gib']:.2f}"]
        for row in result["rows"]
    ]
    return table(["benchmark", "answers", "seconds", "peak memory, GiB"], rows) + "\n\n"
