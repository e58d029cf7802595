"""Score answers that are there already: ours, or a benchmark's published ones. Needs no model and no picture.

    python -m bench.score --answers runs/accuracy/mine.mig-bench.jsonl
    python -m bench.score --task mig-bench --answers migician/ --stretch-y      # as eval/MIG_bench_eval.py writes them
    python -m bench.score --task mc-bench --answers results.json --data MC-Bench

Figures are shares from 0 to 1, with 95 % bootstrap intervals. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.boxes import mc_bench
from bench.boxes.mc_bench_data import read_published
from bench.boxes.report import lines
from bench.boxes.scores import read_task, score_file, score_published_mig_bench
from bench.results import result_file, save_result
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder, printable


@command("bench.score")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.score", description="Score answers that are there already.")
    task = "what the answers are of, such as mig-bench or refcoco:testA (default: what their file says)"
    parser.add_argument("--task", help=task)
    which = "a .jsonl of bench.accuracy; or published results: files, or a folder of them (required)"
    parser.add_argument("--answers", type=Path, nargs="+", metavar="FILE", required=True, help=which)
    data = "the folder of the data set, for published results that have no true boxes (default: none)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=data)
    stretch = "Migician's scaling of y (x 1.05 and x 1.10), without which its published figures do not come out"
    parser.add_argument("--stretch-y", action="store_true", help=stretch)
    saved = "keep the JSON here too (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    result = score_any(args.task, args.answers, args.data, args.stretch_y)
    print("\n".join(lines(result)))
    save_result(result, args.save, exact=True)


def score_any(task: str | None, answers: list[Path], data: Path | None, stretched: bool) -> dict[str, Any]:
    """The figures of our answers or of published ones, told apart by content."""
    if task:
        read_task(task)
    if stretched and task not in (None, "mig-bench"):
        raise GemvgError(f"--stretch-y is of MIG-Bench alone, and --task is {task}")
    if missing := [path for path in answers if not is_file(path) and not is_folder(path)]:
        raise GemvgError(f"{printable(missing[0])}: no such file")
    if empty := [path for path in answers if is_file(path) and not path.stat().st_size]:
        raise GemvgError(f"{printable(empty[0])} is empty: a run that had no answer yet leaves it so")
    ours = [path for path in answers if not is_folder(path) and _begins_as_ours(path)]
    if ours and len(answers) > 1:
        raise GemvgError(
            f"{printable(ours[0])} is scored by itself; bench.compare holds two such files against each other"
        )
    if ours:
        result = score_file(answers[0], stretched)
        if task and task != result["task"]:
            raise GemvgError(f"{printable(answers[0])} has answers of {result['task']}, and --task is {task}")
        if stretched and result["task"] != "mig-bench":
            raise GemvgError(f"--stretch-y is of MIG-Bench alone, and these are answers of {result['task']}")
        return result
    match task:
        case "mig-bench":
            return score_published_mig_bench(answers, stretched)
        case "mc-bench" if len(answers) == 1:
            if data is None:
                raise GemvgError("--data is needed: a results file of MC-Bench has no true boxes")
            return {"task": task, **mc_bench.score(read_published(answers[0], data))}
    raise GemvgError(
        f"{printable(answers[0])} is no file of bench.accuracy; of published results those of mig-bench and mc-bench "
        "are read: say --task mig-bench or --task mc-bench"
    )


def _begins_as_ours(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return isinstance(json.loads(stream.readline(65536)).get("format"), str)
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


if __name__ == "__main__":
    main()
