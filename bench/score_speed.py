"""How long scoring takes and how much memory: made-up answers to every benchmark, scored by bench.score.

    python -m bench.score_speed [--answers 100000] [--save bench/results/score_speed.json]

Whole processes, from their start to their last line. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.boxes.answers import FORMAT, VERSION
from bench.boxes.mc_bench import STYLES
from bench.boxes.mig_bench import TASKS
from bench.boxes.odinw_data import ALL, SETS
from bench.memory import peak_of
from bench.results import result_file, save_result
from gemvg_edge.command import command, whole_number
from train.journal import Line
from train.output_folder import WORK, marked

BENCHMARKS = ("tabletop", "mig-bench", "mc-bench", "odinw13", "refcoco:testA")
SIZE = [640, 480]


def made_up(task: str, count: int) -> Iterator[Line]:
    """A header and so many answers, of which about two in three boxes are right; the draw is fixed."""
    rng = random.Random(0)
    yield {"format": FORMAT, "version": VERSION, "task": task, "benchmark": "revised", "model": "made up",
           "verbatim": True, "locations": 0}  # fmt: skip
    for number in range(count):
        part, labels, images, extra = _about(task, number, rng)
        truth = [_box(rng, rng.randrange(images), label) for label in labels]
        boxes = [{**box, "score": rng.random()} for box in truth if rng.random() < 0.7]
        boxes.append({**_box(rng, 0, labels[0]), "score": rng.random()})
        steps = [[round(1000 * v / side) for v, side in zip(b["box"], SIZE * 2, strict=True)] for b in boxes]
        said = [{"bbox_2d": step, "label": b.get("label")} for step, b in zip(steps, boxes, strict=True)]
        if task == "mig-bench":
            extra = {"corners": steps[0]}
        yield {
            "id": str(number), "number": number, "part": part, "images": ["a.jpg"] * images, "sizes": [SIZE] * images,
            "query": "the mug", "truth": truth, "boxes": boxes, "thinking": "", "problem": None, "tokens": 9, "ms": 1.0,
            "answer": json.dumps(said) if task == "odinw13" else "({},{}),({},{})".format(*steps[-1]), "extra": extra,
        }  # fmt: skip


def _about(task: str, number: int, rng: random.Random) -> tuple[str, list[str | None], int, dict[str, Any]]:
    """(part, the class of each true box, how many pictures, what its scorer reads) of an answer."""
    match task:
        case "mig-bench":
            return TASKS[number % len(TASKS)], [None], 3, {}
        case "mc-bench":
            pair = [2 * number, 2 * number + 1]
            groups: list[str | None] = [f"group {rng.choice((1, 1, 1, 2))}" for _ in range(rng.randrange(1, 4))]
            return STYLES[number % len(STYLES)], groups, 2, {"image_ids": pair, "places": pair}
        case "odinw13":
            name = list(SETS)[number % len(SETS)]
            labels: list[str | None] = [rng.choice(SETS[name][1]) for _ in range(3)]
            return f"{ALL}/{name}", labels, 1, {"picture": number, "asked_for": "", "frame": [1000, 1000]}
        case "tabletop":
            return f"task {number % 14}", [None, None], 2, {"kind": "semantic", "new_name": []}
    return "testA", [None], 1, {}


def _box(rng: random.Random, image: int, label: str | None) -> dict[str, Any]:
    x, y = rng.randrange(500), rng.randrange(380)
    box: dict[str, Any] = {"image": image, "box": [x, y, x + rng.randrange(20, 130), y + rng.randrange(20, 90)]}
    return box | ({"label": label} if label else {})


@command("bench.score_speed")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.score_speed", description="Time and memory of scoring.")
    many = "how many answers to each benchmark (default: %(default)s)"
    parser.add_argument("--answers", type=whole_number, metavar="N", default=100_000, help=many)
    place = "the folder to work in, taken away at the end (default: %(default)s)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", default=Path("data/score_speed"), help=place)
    saved = "keep the JSON here too, such as bench/results/score_speed.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.answers < 1:
        parser.error("--answers must be at least 1")
    rows = []
    with marked(args.folder, {"format": WORK}) as folder:
        for task in tqdm(BENCHMARKS, desc="benchmarks", leave=False):
            file = folder / f"{task.replace(':', '-')}.jsonl"
            with file.open("w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in made_up(task, args.answers))
            gib, seconds = peak_of([sys.executable, "-m", "bench.score", "--answers", str(file)])
            rows.append({"task": task, "answers": args.answers, "seconds": seconds, "peak_gib": gib})
            file.unlink()
    for row in rows:
        print(f"{row['task']:<14} {row['answers']} answers  {row['seconds']:.1f} s  {row['peak_gib']:.2f} GiB")
    save_result({"rows": rows}, args.save)


if __name__ == "__main__":
    main()
