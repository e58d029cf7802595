"""Published answers to MIG-Bench, as its scripts write them, and whether scoring them again gives what they say.

    one file a task: [{"task", "question", "answer", "filter_answer", "iou", "groundtruth"}, .., {task: {..}}]

Format: eval/results of github.com/Tajamul21/MIG-Agent. There are no pictures in it, so the right picture is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.boxes.answers import Answered
from bench.boxes.mig_bench import ITEMS, THRESHOLDS, parse, published_iou, rate, stretch, version_of
from bench.boxes.rated import Rated
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable
from gemvg_edge.json_object import short
from train.data.annotations import find_files, read_json

LAYOUT = "give files as eval/MIG_bench_eval.py writes them, one a task, or a folder of them"


def read_published(paths: Sequence[Path]) -> tuple[str, list[Answered], dict[str, dict[str, Any]]]:
    """(version, answers, the summary of each task) of files or folders."""
    answers: list[Answered] = []
    summaries: dict[str, dict[str, Any]] = {}
    sources: dict[str, Path] = {}  # of each task
    versions: dict[str, Path] = {}
    for file in [file for path in paths for file in (find_files(path, "*.json") if is_folder(path) else [path])]:
        content = read_json(file, list, LAYOUT)
        rows = list(_rows(content, file))
        for task in {row.part for row in rows}:
            if task in sources:
                raise GemvgError(f"{printable(file)} has the task {task}, as {printable(sources[task])} has; give one")
            sources[task] = file
        versions.setdefault(version_of([row.extra["corners"] for row in rows], file), file)
        answers += rows
        summaries |= {task: told for task, told in _summary_of(content).items() if task in sources}
    if not answers:
        raise GemvgError(f"{printable(paths[0])} holds no answers; {LAYOUT}")
    if len(versions) > 1:
        named = " and ".join(f"{printable(file)} ({version})" for version, file in versions.items())
        raise GemvgError(f"{named} are answers to two versions of MIG-Bench; score them apart")
    return next(iter(versions)), answers, summaries


def _summary_of(content: list[Any]) -> dict[str, dict[str, Any]]:
    last = content[-1]
    known = isinstance(last, dict) and "answer" not in last
    return {task: told for task, told in last.items() if isinstance(told, dict)} if known else {}


def _rows(content: list[Any], file: Path) -> Iterator[Answered]:
    entries = [entry for entry in content if isinstance(entry, dict) and "answer" in entry]
    if not entries or len(entries) < len(content) - 1:
        raise GemvgError(f"{printable(file)} holds no answers, or something between them; {LAYOUT}")
    for number, entry in enumerate(entries):
        task, text, query = entry.get("task"), entry["answer"], entry.get("question", "")
        text = "" if text is None else text
        if not isinstance(task, str) or task not in ITEMS or not isinstance(text, str) or not isinstance(query, str):
            raise GemvgError(f"{printable(file)}, entry {number}: task {short(task)}, answer {short(text)}; {LAYOUT}")
        extra = {"corners": entry.get("groundtruth"), "box": entry.get("filter_answer"), "iou": entry.get("iou")}
        yield Answered(f"{task}/{number}", number, task, [], [], query, [], text, [], "", None, 0, 0.0, extra)


def agreement(
    answers: Sequence[Answered], summaries: dict[str, dict[str, Any]], version: str, stretched: bool
) -> dict[str, int]:
    """How many parsed boxes, IoUs and task summaries are exactly the published ones."""
    boxes, ious = 0, 0
    for answer in answers:
        box = parse(answer.answer, version)
        box = stretch(box, version) if stretched else box
        boxes += box == answer.extra["box"]
        ious += published_iou(answer.extra["corners"], box) == answer.extra["iou"]
    rated = rate(answers, version, stretched=stretched)
    same = sum(_summary(rated, task) == summary for task, summary in summaries.items())
    return {"answers": len(answers), "boxes": boxes, "ious": ious, "tasks": len(summaries), "summaries": same}


def _summary(rated: Rated, task: str) -> dict[str, Any]:
    rows = rated.rows_of(task)
    hits = {f"IOU@{t}": int(rated.values[f"acc@{t}"][rows].sum()) for t in sorted(THRESHOLDS, reverse=True)}
    return {**hits, "AVE_IOU": sum(rated.values["mean_iou"][rows].tolist()), "TOTAL": len(rows)}
