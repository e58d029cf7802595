"""Box accuracy of checkpoints (through PyTorch) and bundles (through the runtime) on held-out scenes.

    python -m bench.accuracy --task tabletop [--limit N] [--model CHECKPOINT|BUNDLE ...] [--save FILE]

Held-out scenes are rendered the first time, by seed, so every machine scores the same 300. Several models answer the
same questions in one run; each row then says how many answers equal the first model's letter by letter. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from bench.results import save_result
from bench.scoring import score
from gemvg_edge.boxes import Box
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import DEFAULT_BUNDLE, Grounder
from train.queries import Query, held_out_question
from train.tabletop import HELD_OUT_SEED, read_scenes, render

SCENES = 300
CAMERAS = 2
HELD_OUT = Path("data/tabletop/heldout")

Ask = Callable[[Sequence[Image.Image], str], tuple[str, Sequence[Box]]]


def held_out(folder: Path, limit: int) -> list[tuple[list[Image.Image], Query]]:
    """The first `limit` held-out scenes' pictures and questions; renders what is missing."""
    render(folder, HELD_OUT_SEED, -(-limit // 250) * 250, cameras=3, size=192, processes=2)
    questions = []
    for scene in read_scenes(folder)[:limit]:
        views, query = held_out_question(scene, CAMERAS)
        questions.append(([Image.open(folder / view.file).convert("RGB") for view in views], query))
    return questions


def open_model(folder: Path) -> Ask:
    """A function that answers with a checkpoint or a bundle, whichever the folder is."""
    if (folder / MANIFEST).is_file():
        grounder = Grounder.open(folder)

        def ask(images: Sequence[Image.Image], query: str) -> tuple[str, Sequence[Box]]:
            grounding = grounder.ground(images, query)
            return grounding.text, grounding.boxes

        return ask
    if not (folder / "config.json").is_file():
        raise GemvgError(f"{folder} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json)")
    # Imported only for checkpoints: scoring a bundle needs no torch.
    from bench.torch_grounder import TorchGrounder

    reference = TorchGrounder.open(folder)

    def ask_reference(images: Sequence[Image.Image], query: str) -> tuple[str, Sequence[Box]]:
        text, answer = reference.ground(images, query)
        return text, answer.boxes

    return ask_reference


def evaluate(
    ask: Ask, questions: Sequence[tuple[list[Image.Image], Query]], name: str
) -> tuple[dict[str, Any], list[str]]:
    """Scores over all and by kind of question, milliseconds a question, and the texts."""
    texts, predicted = [], []
    started = time.perf_counter()
    for images, query in tqdm(questions, desc=name, leave=False):
        text, boxes = ask(images, query.text)
        texts.append(text)
        predicted.append(boxes)
    seconds = time.perf_counter() - started
    truth = [query.boxes for _, query in questions]
    kinds = [query.kind if query.boxes else "no target" for _, query in questions]
    by_kind = {}
    for kind in sorted(set(kinds)):
        chosen = [k for k in range(len(kinds)) if kinds[k] == kind]
        by_kind[kind] = asdict(score([predicted[k] for k in chosen], [truth[k] for k in chosen]))
    return {**asdict(score(predicted, truth)), "ms": 1e3 * seconds / len(truth), "kinds": by_kind}, texts


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Box accuracy on held-out scenes.")
    parser.add_argument("--task", choices=["tabletop"], default="tabletop")
    parser.add_argument("--model", type=Path, nargs="+", default=[DEFAULT_BUNDLE], help="checkpoints and bundles")
    parser.add_argument("--limit", type=int, default=SCENES, help="how many scenes")
    parser.add_argument("--data", type=Path, default=HELD_OUT, help="where the held-out scenes are, or are rendered to")
    parser.add_argument("--save", type=Path, help="also keep the JSON here, such as bench/results/accuracy.json")
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    try:
        models = [(folder, open_model(folder)) for folder in args.model]
    except GemvgError as error:
        parser.error(str(error))
    questions = held_out(args.data, args.limit)
    rows: list[dict[str, Any]] = []
    first: list[str] = []
    for folder, ask in models:
        row, texts = evaluate(ask, questions, folder.name)
        first = first or texts
        same = sum(a == b for a, b in zip(first, texts, strict=True))
        rows.append({"model": folder.name, **row, "same_text": same})
        print(
            f"{folder.name:<28} F1@0.5 {row['f1']:.3f}  mean IoU {row['mean_iou']:.3f}  image accuracy "
            f"{row['image_accuracy']:.3f}  same text as the first {same}/{len(texts)}  {row['ms']:.0f} ms a question"
        )
    save_result({"task": args.task, **rows[0], "models": rows}, args.save)


if __name__ == "__main__":
    main()
