"""Accuracy of checkpoints (through PyTorch) and bundles (through the runtime) on a benchmark, asked as its authors do.

    python -m bench.accuracy                                                 # the shipped model on the simulated world
    python -m bench.accuracy --task mig-bench --data MIG --model Migician-7B my.int4
    python -m bench.accuracy --task refcoco:testA --data refer/data --model my.int4 --ray local --workers 2

Every answer is saved as it comes, in OUT/MODEL.TASK.jsonl; a killed run goes on. Several models answer the same
questions; each row then says how many answers equal the first model's letter by letter. docs/howto/benchmarks.md says
where each data set is to be had and how its folder must look. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from bench.boxes import tabletop
from bench.boxes.answers import read_answers
from bench.boxes.asking import DTYPES, Asking, describe
from bench.boxes.report import lines, plot, summary
from bench.boxes.run import load, run
from bench.boxes.scores import score_file
from bench.results import check_result, result_file, save_result
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder, printable, refuse_inputs
from gemvg_edge.models import DEFAULT_BUNDLE

OUT = Path("runs/accuracy")
LONGEST = 100  # characters of models' names in the name of a file


@command("bench.accuracy")
def main() -> None:
    """Command line; see the module's first lines."""
    args = _arguments()
    facts = [describe(folder) for folder in args.model]
    names = [fact.name for fact in facts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise GemvgError(f"--model gives two folders of the name {twice}, whose answers would share a file")
    if args.records:
        benchmarks = [tabletop.load_records(args.records)] * len(facts)
    else:
        task = args.task or "tabletop"
        # Read once a way of asking: a data set may have hundreds of megabytes.
        ways = {own: load(task, args.data, own, args.think, args.limit) for own in {fact.own_words for fact in facts}}
        benchmarks = [ways[fact.own_words] for fact in facts]
    ending = f"{benchmarks[0].task.replace(':', '-')}{'.think' if args.think else ''}"
    files = [args.out / f"{name}.{ending}.jsonl" for name in names]
    together = "+".join(names) if sum(map(len, names)) < LONGEST else f"{names[0]}+{len(names) - 1}"
    kept = args.save or args.out / f"{together}.{ending}.json"
    _check_places(kept, files)
    asking = Asking(args.think, max_pixels=args.max_pixels, engine=args.engine, dtype=args.dtype)
    many = {"limit": args.limit, "ray": args.ray, "workers": args.workers, "overwrite": args.overwrite}
    results: list[dict[str, Any]] = []
    first: dict[str, str] = {}
    for fact, benchmark, file in zip(facts, benchmarks, files, strict=True):
        asked = run(benchmark, fact, asking, file, **many)
        result, texts = score_file(file, only=asked), _texts(file, asked)
        first = first or texts
        result["same_text"] = sum(texts.get(name) == text for name, text in first.items())
        results.append(result)
        print(f"{printable(fact.name)}: {printable(file)}")
        print("\n".join(lines(result)), end="\n\n")
    print("\n".join(summary(result["model"], result) for result in results))
    save_result({"task": results[0]["task"], "think": args.think, "models": results}, kept)
    plot(results, results[0]["task"], kept.with_suffix(".png"))


def _check_places(kept: Path, answers: list[Path]) -> None:
    """GemvgError where figures or plot would replace something else than what an earlier run wrote there."""
    if kept.suffix != ".json":
        raise GemvgError(f"--save {printable(kept)} does not end in .json; the plot lies beside it")
    if kept.parent != answers[0].parent and not is_folder(kept.parent):
        raise GemvgError(f"--save {printable(kept)}: there is no folder {printable(kept.parent)}; make it first")
    refuse_inputs(kept, answers, "--save")
    check_result(kept)
    picture = kept.with_suffix(".png")
    if os.path.lexists(picture) and not is_file(kept):
        why = "is there without the figures of its run; move it away"
        raise GemvgError(f"{printable(picture)} {why}, or give another --out or --save")


def _texts(file: Path, asked: set[str]) -> dict[str, str]:
    """Each question's answer as it was written; what has a problem is told on stderr."""
    _, answers = read_answers(file)
    found = {answer.id: (answer.answer, answer.problem) for answer in answers if answer.id in asked}
    if problems := [problem for _, problem in found.values() if problem]:
        said = printable(problems[0])
        print(f"{printable(file)}: {len(problems)} answers have a problem, such as: {said}", file=sys.stderr)
    return {name: text for name, (text, _) in found.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.accuracy", description="Accuracy of models on a benchmark.")
    task = (
        "mig-bench, mc-bench, odinw13 (or odinw13:all-classes, odinw13:present-classes), refcoco, refcoco+ or "
        "refcocog (or one split, such as refcoco:testA), tabletop (or tabletop:new-names, tabletop:new-style) "
        "(default: tabletop)"
    )
    parser.add_argument("--task", help=task)
    place = "the folder of the data set (default: data/world, of tabletop; the others need it)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=place)
    which = "checkpoint and bundle folders, one or more (default: the shipped bundle)"
    parser.add_argument("--model", type=Path, nargs="+", metavar="FOLDER", default=[DEFAULT_BUNDLE], help=which)
    parser.add_argument("--think", action="store_true", help="ask for reasoning before the answer")
    many = f"how many questions, its parts in turn (default: all; of tabletop {tabletop.QUESTIONS})"
    parser.add_argument("--limit", type=whole_number, metavar="N", help=many)
    budget = "pixels of a picture after resizing, at most (default: the bundle's, or as export has it)"
    parser.add_argument("--max-pixels", type=whole_number, metavar="N", help=budget)
    parser.add_argument("--engine", help="what runs bundles, such as onnx (default: the fastest that does)")
    dtype = "what checkpoints compute in, on a GPU where there is one (default: %(default)s)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=dtype)
    own = "a .jsonl of records to ask instead (default: the task)"
    parser.add_argument("--records", type=Path, metavar="FILE", help=own)
    out = "the folder for MODEL.TASK.jsonl, which the next run goes on with, figures and plot (default: %(default)s)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=OUT, help=out)
    parser.add_argument("--overwrite", action="store_true", help="ask anew what was answered before")
    ray = "spread the questions over a Ray cluster: local, auto or HOST:PORT (default: this process)"
    parser.add_argument("--ray", metavar="ADDRESS", nargs="?", const="local", help=ray)
    workers = "models that are open at once with --ray (default: one a GPU, else one a machine)"
    parser.add_argument("--workers", type=whole_number, metavar="N", default=0, help=workers)
    saved = "keep the JSON here, such as bench/results/accuracy.json, and the plot beside it (default: in --out)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if args.workers < 0 or (args.workers and not args.ray):
        parser.error("--workers is at least 0, and says nothing without --ray")
    if args.records and (args.task or args.data):
        parser.error("--records takes the place of --task and --data; give one or the other")
    return args


if __name__ == "__main__":
    main()
