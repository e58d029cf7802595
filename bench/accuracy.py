"""Box accuracy of checkpoints (through PyTorch) and bundles (through the runtime) on held-out questions.

    python -m bench.accuracy [--limit N] [--model CHECKPOINT|BUNDLE ...] [--think] [--split new-names] [--save FILE]
    python -m bench.accuracy --records mine.jsonl --model BUNDLE

Held-out scenes are rendered the first time, by seed, so every machine scores the same questions; the five kinds come
in turn. Several models answer the same questions in one run; each row then says how many answers equal the first
model's letter by letter. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from bench.boxes.scoring import Counts, count, score_counts
from bench.results import result_file, save_result
from gemvg_edge.answer import Answer
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import Grounder
from gemvg_edge.images import load_image
from gemvg_edge.models import DEFAULT_BUNDLE
from train.data.record import Record
from train.data.samples import read_all
from train.hub import checkpoint_folder
from train.world.render import render
from train.world.samples import held_out_records
from train.world.scenes import HELD_OUT_SEED, NEW_NAMES_SEED, NEW_STYLE_SEED, read_scenes

QUESTIONS = 500
SPLITS = {"held-out": HELD_OUT_SEED, "new-names": NEW_NAMES_SEED, "new-style": NEW_STYLE_SEED}
HELD_OUT = Path("data/world")
SIZE = 144

# Pictures and query -> text, what it says, and how many tokens were decoded.
Ask = Callable[[Sequence[Image.Image], str], tuple[str, Answer, int]]


def held_out(folder: Path, limit: int, split: str = "held-out") -> list[Record]:
    """The first `limit` held-out questions of a split; renders the scenes that are missing."""
    # A few scenes do not allow the question that would be asked of them, and relatives come in twos.
    scenes = -(-(limit + limit // 20 + 2) // 10) * 10
    render(folder / split, SPLITS[split], scenes, SIZE, os.cpu_count() or 1)
    records = held_out_records(read_scenes(folder / split)[:scenes], folder / split, "tabletop")
    return records[:limit]


def held_out_arguments(parser: argparse.ArgumentParser, limit: int, *, split: bool = False) -> None:
    """The arguments that `held_out` takes: --limit and its default, --data and, where one is chosen, --split."""
    many = "how many held-out questions are asked (default: %(default)s)"
    parser.add_argument("--limit", type=whole_number, metavar="N", default=limit, help=many)
    if split:
        which = "which scenes are asked about (default: %(default)s)"
        parser.add_argument("--split", choices=list(SPLITS), default="held-out", help=which)
    place = "the folder where the scenes are, or are rendered to (default: %(default)s)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=HELD_OUT, help=place)


def open_model(folder: Path, think: bool = False, max_pixels: int | None = None, engine: str | None = None) -> Ask:
    """A function that answers with a checkpoint or a bundle, whichever the folder (or the hub id) is.

    `max_pixels` is the budget of each picture; left out, a bundle's own, or what an export of the checkpoint has.
    `engine` runs a bundle; left out, the fastest that does.
    """
    folder = checkpoint_folder(folder)
    if (folder / MANIFEST).is_file():
        return asking(Grounder.open(folder, engine=engine, max_pixels=max_pixels), think)
    if not (folder / "config.json").is_file():
        raise GemvgError(f"{folder} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json)")
    # Imported only for checkpoints: scoring a bundle needs no torch.
    from bench.boxes.torch_grounder import TorchGrounder

    reference = TorchGrounder.open(folder, max_pixels)

    def ask_reference(images: Sequence[Image.Image], query: str) -> tuple[str, Answer, int]:
        text, answer = reference.ground(images, query, think=think)
        return text, answer, len(reference.settings.tokenizer.encode(text, add_special_tokens=False).ids) + 1

    return ask_reference


def asking(grounder: Grounder, think: bool = False) -> Ask:
    """A function that answers with an opened bundle."""

    def ask(images: Sequence[Image.Image], query: str) -> tuple[str, Answer, int]:
        grounding = grounder.ground(images, query, think=think)
        answer = Answer(grounding.boxes, grounding.thinking, grounding.problem)
        return grounding.text, answer, grounding.timings.answer_tokens

    return ask


def evaluate(ask: Ask, records: Sequence[Record], name: str) -> tuple[dict[str, Any], list[str]]:
    """Scores over all and by kind and task, milliseconds and decoded tokens a question, and the texts."""
    texts, predicted, tokens = [], [], 0
    seconds = 0.0
    for record in tqdm(records, desc=name, leave=False):
        images = [load_image(path) for path in record.images]
        started = time.perf_counter()
        text, answer, decoded = ask(images, record.query)
        seconds += time.perf_counter() - started
        texts.append(text)
        predicted.append(answer.boxes)
        tokens += decoded
    counts = count(predicted, [record.boxes for record in records])
    parts: dict[str, list[str]] = {
        "kinds": [record.kind for record in records],
        "tasks": [record.source.partition(":")[2] for record in records],
    }
    by_part = {
        part: {
            label: _brief(counts[[k for k, other in enumerate(labels) if other == label]])
            for label in sorted(set(labels))
        }
        for part, labels in parts.items()
    }
    empty = [k for k, record in enumerate(records) if not record.boxes]
    row = {
        **asdict(score_counts(counts)),
        "ms": 1e3 * seconds / len(records),
        "tokens": tokens / len(records),
        "no_target": _brief(counts[empty]),
        **by_part,
    }
    return {**row, "counts": counts}, texts


def _brief(counts: Counts) -> dict[str, Any]:
    """The scores of a part that a table tells."""
    scores = asdict(score_counts(counts))
    return {key: scores[key] for key in ("n", "f1", "f1_interval", "image_accuracy")}


@command("bench.accuracy")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.accuracy", description="Box accuracy on held-out questions.")
    which = "checkpoint and bundle folders, one or more (default: the shipped bundle)"
    parser.add_argument("--model", type=Path, nargs="+", metavar="FOLDER", default=[DEFAULT_BUNDLE], help=which)
    held_out_arguments(parser, QUESTIONS, split=True)
    parser.add_argument("--think", action="store_true", help="ask for reasoning before the answer")
    budget = "pixels of a picture after resizing, at most (default: the bundle's, or as export has it)"
    parser.add_argument("--max-pixels", type=whole_number, metavar="N", help=budget)
    own = "a .jsonl of records to ask instead (default: held-out scenes)"
    parser.add_argument("--records", type=Path, metavar="FILE", help=own)
    saved = "keep the JSON here too, such as bench/results/accuracy.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    models = [(folder, open_model(folder, args.think, args.max_pixels)) for folder in args.model]
    records = read_all(args.records)[: args.limit] if args.records else held_out(args.data, args.limit, args.split)
    rows: list[dict[str, Any]] = []
    first: list[str] = []
    for folder, ask in models:
        row, texts = evaluate(ask, records, folder.name)
        del row["counts"]
        first = first or texts
        same = sum(a == b for a, b in zip(first, texts, strict=True))
        rows.append({"model": folder.name, **row, "same_text": same})
        print_row(folder.name, rows[-1])
    save_result({"split": args.split, "think": args.think, "models": rows}, args.save)


def print_row(name: str, row: dict[str, Any]) -> None:
    """One model's scores for people."""
    print(
        f"{name:<24} F1@0.5 {row['f1']:.3f} [{row['f1_interval'][0]:.3f}, {row['f1_interval'][1]:.3f}]  mean IoU "
        f"{row['mean_iou']:.3f}  image accuracy {row['image_accuracy']:.3f}  {row['ms']:.0f} ms, "
        f"{row['tokens']:.1f} tokens a question"
    )
    for part in ("kinds", "tasks"):
        print("    " + "  ".join(f"{label} {scores['f1']:.2f}" for label, scores in row[part].items()))


if __name__ == "__main__":
    main()
