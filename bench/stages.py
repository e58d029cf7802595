"""Score every stage of a training pipeline on held-out questions, asked directly and with reasoning.

    python -m bench.stages runs/tiny stage1 stage2 grpo student [--limit 1000] [--save bench/results/stages.json]

`runs/tiny/NAME` is a checkpoint; each is exported to a float32 bundle (whose answers are those of the checkpoint, see
export.verify) and asked the same questions. What was scored is kept beside the checkpoints and not asked again, so a
killed run goes on. Gains between stages come with the paired bootstrap's interval. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.boxes.asking import Asking, open_model
from bench.boxes.held_out import SPLITS, held_out, held_out_arguments
from bench.boxes.report import summary
from bench.boxes.scoring import f1_gain, gain_text
from bench.boxes.tabletop import evaluate
from bench.results import result_file, save_result
from export.to_onnx import main as export
from gemvg_edge.answer import write_box
from gemvg_edge.boxes import to_steps
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import write_text
from gemvg_edge.prompt import encode
from quantize.checkpoint import open_checkpoint
from quantize.tensors import expected_tensors
from train.checkpoint import read_settings
from train.data.record import MODES, Record

LIMIT = 1000
# (stage, what it is compared with): the gains that the table tells.
GAINS = (
    ("tabletop", "several-runs"),  # what ships, and what shipped before
    ("tabletop", "before"),  # or before the world varied
    ("tabletop.int4", "tabletop"),
    ("tabletop-bare", "tabletop"),  # without marks around its boxes
    ("stage2", "stage1"),
    ("bare", "stage2"),  # without marks around its boxes, too
    ("student", "stage2"),  # its teacher
    ("student-digits", "student"),  # the same start, answering in locations
)


def read_stage(text: str, splits: Sequence[str]) -> tuple[str, Sequence[str], Sequence[str]]:
    """`NAME[:MODE[:SPLIT]]` -> the checkpoint's name, the modes to ask it in and the splits."""
    parts = text.split(":")
    name, mode, split = (*parts, "", "")[:3]
    if not name or len(parts) > 3 or mode not in ("", *MODES) or split not in ("", *SPLITS):
        known = f"MODE one of {', '.join(MODES)} and SPLIT one of {', '.join(SPLITS)}"
        raise GemvgError(f"{text!r} is not a stage; give NAME, NAME:MODE or NAME:MODE:SPLIT, {known}")
    return name, [mode] if mode else MODES, [split] if split else splits


def score_stage(folder: Path, think: bool, split: str, data: Path, limit: int) -> dict[str, Any]:
    """One checkpoint's scores in one mode; read from beside it if its weights were scored before."""
    mode = "cot" if think else "direct"
    file = folder.parent / "scores" / f"{folder.name}.{mode}.{split}.json"
    weights = checkpoint_digest(folder)
    key = {"weights": weights, "limit": limit}
    if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8")))["key"] == key:
        row: dict[str, Any] = kept["row"]
        return row
    bundle = folder.parent / "bundles" / f"{folder.name}-{weights[:12]}"
    if not bundle.is_dir():
        bundle.parent.mkdir(exist_ok=True)
        if export([str(folder), str(bundle)]):
            raise GemvgError(f"{folder} cannot be exported; see above")
    records = held_out(data, limit, split)
    row, _ = evaluate(open_model(bundle, Asking(think)), records, f"{folder.name} {mode}")
    row = {"stage": folder.name, "mode": mode, "split": split, **row}
    row |= {"counts": row["counts"].tolist(), "tokens_a_box": tokens_a_box(folder, records)}
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps({"key": key, "row": row}))
    return row


def parameters(folder: Path) -> int:
    """How many numbers a checkpoint's weights stand for, quantised or not."""
    return sum(math.prod(shape) for _, shape in expected_tensors(open_checkpoint(folder).config))


def tokens_a_box(folder: Path, records: Sequence[Record]) -> float:
    """How many tokens, each a decode step, a true box takes in the checkpoint's own format, on average."""
    settings = read_settings(folder)
    places = [(box, record.sizes[box.image]) for record in records for box in record.boxes]
    form = settings.answer_format
    texts = [write_box(to_steps(box, size, form.steps(settings.resized([size])[0])), form) for box, size in places]
    return sum(len(encode(settings.tokenizer, text)) for text in texts) / max(1, len(texts))


def gains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """F1 of a stage less that of the one it is compared with, in each mode and split that both were scored in."""
    by_key = {(row["stage"], row["mode"], row["split"]): np.asarray(row["counts"]) for row in rows}
    told = []
    for better, start in GAINS:
        for mode, split in product(MODES, SPLITS):
            if (better, mode, split) in by_key and (start, mode, split) in by_key:
                gain, interval = f1_gain(by_key[start, mode, split], by_key[better, mode, split])
                asked = {"stage": better, "start": start, "mode": mode, "split": split}
                told.append({**asked, "gain": gain, "interval": interval})
    return told


def checkpoint_digest(folder: Path) -> str:
    """The sha256 of what a checkpoint answers with: weights, config and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if not file.is_file():
            raise GemvgError(f"{folder} is not a checkpoint: it has no {file.name}")
        digest.update(file.read_bytes())
    return digest.hexdigest()


@command("bench.stages")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.stages", description="Score every stage of a training pipeline.")
    parser.add_argument("folder", type=Path, help="the folder where the stages' checkpoints are")
    parser.add_argument(
        "stages",
        nargs="+",
        help="their names, in order; NAME:direct asks in one mode only, NAME::held-out in one split only",
    )
    held_out_arguments(parser, LIMIT)
    which = f"which scenes are asked about: {', '.join(SPLITS)} (default: held-out)"
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", choices=list(SPLITS), default=["held-out"], help=which)
    saved = "keep the JSON here too, such as bench/results/stages.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    rows = []
    for name, modes, splits in [read_stage(stage, args.splits) for stage in args.stages]:
        for mode in modes:
            for split in splits:
                row = score_stage(args.folder / name, mode == "cot", split, args.data, args.limit)
                rows.append({**row, "parameters": parameters(args.folder / name)})
                print(summary(f"{name} {mode} {split}", rows[-1]))
    told = gains(rows)
    for gain in told:
        asked = f"{gain['mode']}, {gain['split']}"
        print(f"{gain['stage']} over {gain['start']}, {asked}: F1 {gain_text(gain['gain'], gain['interval'])}")
    kept = [{key: value for key, value in row.items() if key not in ("counts", "ms")} for row in rows]
    save_result({"rows": kept, "gains": told}, args.save)


if __name__ == "__main__":
    main()
