"""What compression does to boxes: one float checkpoint quantised in every way, all asked the same held-out questions.

    python -m bench.compression checkpoints/tabletop [QUANTISED ...] [--save bench/results/compression.json]

Each row is a checkpoint that quantize/ writes (kept in `--work` with its scores, so that a killed run goes on); GPTQ
checkpoints given after the float one are rows too. Weights are compared with the float ones, next-token distributions
by KL on the true answers, boxes with the truth, texts with the float model's. Checkpoints answer through transformers
in float32, with the weights that the codes stand for. The last rows are bundles: one in the runtime, and one for
TensorRT in bfloat16, computed on the CPU as its kernels round (export/rounded.py). `W8A8` also rounds, token by token,
what each linear layer of vision tower and decoder is given, in prefill and decoding. `--save` also writes a plot beside
the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.boxes.asking import Model, open_model
from bench.boxes.held_out import held_out, held_out_arguments
from bench.boxes.rounded_grounder import open_rounded
from bench.boxes.scoring import count, f1_gain, gain_text, score_counts
from bench.boxes.tabletop import evaluate
from bench.boxes.torch_grounder import TorchGrounder
from bench.readme import compression as table
from bench.results import machine, result_file, save_figure, save_result
from bench.sampled import sample_texts
from bench.stages import checkpoint_digest
from export.to_onnx import main as export
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import write_text
from gemvg_edge.prompt import END_OF_TURN
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.rotate import Settings as Rotation
from quantize.rotate import rotate
from quantize.smooth import Settings as Smoothing
from quantize.smooth import smooth
from quantize.tensors import expected_tensors
from train.collate import IGNORED, LOSS_INPUTS, collate
from train.data.record import Record
from train.data.samples import record_sample

KL_QUESTIONS, AT_ONCE = 500, 8


@dataclass(frozen=True)
class Row:
    """One way to compress."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of quantize.gptq
    first: str = ""  # what is done to the float model before: smooth or rotate
    activations: bool = False  # what linear layers are given is rounded to 8 bits a token
    bundle: str = ""  # what a row more is called, of it as a bundle
    dialect: str = "fused"  # of that bundle; another than this is computed as TensorRT's kernels do


W8 = {"bits": 8, "group_size": -1, "vision_bits": 8, "method": "rtn"}
FLOAT = "float32"
SMALLEST = {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8}
ROWS = (
    Row("RTN int4", {"method": "rtn"}),
    Row("GPTQ int4, text", {"calibration": "text"}),
    Row("GPTQ int4", {}),
    Row("RTN int3", {"method": "rtn", "bits": 3}),
    Row("GPTQ int3, text", {"calibration": "text", "bits": 3}),
    Row("GPTQ int3", {"bits": 3}),
    Row("W8A8", W8, activations=True),
    Row("W8A8, smoothed", W8, "smooth", activations=True),
    Row("W8A8, rotated", W8, "rotate", activations=True),
    Row("GPTQ int4, positive scales", {"positive_scales": True}),
    Row("GPTQ int4, the rest int8", SMALLEST, bundle="as a bundle"),
    Row(
        "GPTQ int4, the rest int8, positive scales",
        SMALLEST | {"positive_scales": True},
        bundle="as TensorRT computes it",
        dialect="standard",
    ),
)


def make_source(row: Row, reference: Path, work: Path) -> Path:
    """The float checkpoint that the row quantises; one that is there is kept."""
    source = work / row.first if row.first else reference
    match row.first:
        case "smooth" if not source.is_dir():
            smooth(Smoothing(reference, source))
        case "rotate" if not source.is_dir():
            rotate(Rotation(reference, source))
    return source


def make_checkpoint(row: Row, source: Path, work: Path, group_size: int) -> Path:
    """The row's checkpoint; one that is there is kept."""
    out = work / _file_name(row.name)
    if not out.is_dir():
        quantize(Settings(source, out, **{"group_size": group_size, **row.options}))
    return out


def measure(grounder: TorchGrounder, records: Sequence[Record], name: str) -> dict[str, Any]:
    """Texts, counts of boxes, and the next-token distributions on the true answers."""
    said = [answers[0] for _, answers, _ in sample_texts(grounder, records, False, 1, 0.0, name)]
    texts = [text.removesuffix(END_OF_TURN) for text in said]  # as the runtime gives them
    boxes = [grounder.read(text, record.sizes).boxes for text, record in zip(texts, records, strict=True)]
    return {
        "texts": texts,
        "counts": count(boxes, [record.boxes for record in records]),
        "log_probabilities": answer_distributions(grounder, records[:KL_QUESTIONS]),
    }


def measure_bundle(model: Model, records: Sequence[Record], name: str) -> dict[str, Any]:
    """Texts and counts of a bundle through the runtime, which does not tell distributions."""
    row, texts = evaluate(model, records, name)
    return {"texts": texts, "counts": row["counts"], "log_probabilities": None}


@torch.inference_mode()
def answer_distributions(grounder: TorchGrounder, records: Sequence[Record]) -> torch.Tensor:
    """Log-probabilities (answer tokens, vocabulary) before each token of the true answers."""
    found = []
    for start in range(0, len(records), AT_ONCE):
        samples = [
            record_sample(record, grounder.settings.answer_format, grounder.settings.resized(record.sizes))
            for record in records[start : start + AT_ONCE]
        ]
        batch = collate(samples, grounder.settings, pad_id=grounder.stop_ids[0])
        labels, _ = (batch.pop(name) for name in LOSS_INPUTS)
        logits = grounder.model(**batch, use_cache=False).logits
        found.append(logits[:, :-1][labels[:, 1:] != IGNORED].log_softmax(dim=-1))
    return torch.cat(found)


def weight_error(quantized: Path, reference: Path) -> float:
    """|difference| / |weights| over all tensors, Frobenius."""
    ours, theirs = open_checkpoint(quantized), open_checkpoint(reference)
    difference = total = 0.0
    for name, _ in expected_tensors(theirs.config):
        weight = theirs.read(name)
        difference += float(np.square(ours.read(name) - weight, dtype=np.float64).sum())
        total += float(np.square(weight, dtype=np.float64).sum())
    return float(np.sqrt(difference / total))


def round_activations(model: nn.Module) -> None:
    """Make every linear layer but the head round its input to 8 bits, symmetric, one scale a token.

    Sums of 8-bit products are whole numbers that float32 holds, or nearly, so this is int8 arithmetic's result.
    """

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        scale = (inputs[0].abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-12)
        return (inputs[0] / scale).round_() * scale

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
            layer.register_forward_pre_hook(hook)


def compare(name: str, folder: Path, base: Path, found: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: `found` against `start`, the float model's."""
    scores = score_counts(found["counts"])
    gain, interval = f1_gain(start["counts"], found["counts"])
    ours, theirs = found["log_probabilities"], start["log_probabilities"]
    return {
        "name": name,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "weight_error": weight_error(folder, base),
        "kl": None if ours is None else float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean()),
        "f1": scores.f1,
        "f1_gain": gain,
        "f1_gain_interval": list(interval),
        "mean_iou": scores.mean_iou,
        "image_accuracy": scores.image_accuracy,
        "same_text": sum(a == b for a, b in zip(found["texts"], start["texts"], strict=True)),
        "n": scores.n,
    }


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """F1 with the interval of its loss over megabytes, and KL over megabytes."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    for k, row in enumerate(rows):
        size, look = row["bytes"] / 1e6, {"color": plt.get_cmap("tab20")(k % 20), "marker": "os^D"[k % 4]}
        low, high = row["f1_gain_interval"]
        bar = [[row["f1_gain"] - low], [high - row["f1_gain"]]]
        left.errorbar(size, row["f1"], yerr=bar, linestyle="none", capsize=3, label=row["name"], **look)
        if row["kl"]:
            right.scatter(size, row["kl"], s=50, **look)
    figure.legend(loc="outside right upper")
    left.set(xlabel="checkpoint, MB", ylabel="F1@0.5", title="boxes (bars: 95 % of the difference to float32)")
    right.set(xlabel="checkpoint, MB", ylabel="KL from float32, nats a token", yscale="log", title="next tokens")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, file)


@command("bench.compression")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.compression", description="What compression does to boxes.")
    parser.add_argument("checkpoint", type=Path, help="a float checkpoint folder")
    parser.add_argument(
        "quantised", type=Path, nargs="*", help="GPTQ checkpoints of it, each a row more (default: none)"
    )
    held_out_arguments(parser, 2000)
    group = "how many inputs share a scale, -1 for all (default: %(default)s)"
    parser.add_argument("--group-size", type=whole_number, metavar="N", default=32, help=group)
    work = "the folder for checkpoints and scores on the way (default: %(default)s)"
    parser.add_argument("--work", type=Path, metavar="FOLDER", default=Path("runs/compression"), help=work)
    some = "the ways to compress, by their names (default: all)"
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=names, default=names, help=some)
    saved = "keep the JSON here too, and a plot of the same name in PNG (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1:
        parser.error("--limit must be at least 1")
    ways = [row for row in ROWS if row.name in args.rows]
    rows = compression(args.checkpoint, args.quantised, ways, args.limit, args.group_size, args.data, args.work)
    result = {"model": args.checkpoint.name, "group_size": args.group_size, "rows": rows}
    if args.save:
        plot(rows, args.save.with_suffix(".png"))
    print(table({**result, "machine": machine()}))
    save_result(result, args.save)


def compression(
    checkpoint: Path,
    quantised: Sequence[Path],
    ways: Sequence[Row],
    limit: int,
    group_size: int,
    data: Path,
    work: Path,
) -> list[dict[str, Any]]:
    """Every row's figures, the float model's first."""
    if open_checkpoint(checkpoint).codes_format:
        raise GemvgError(f"{checkpoint} is quantised; give the float checkpoint first")
    work = work / f"{checkpoint.name}-g{group_size}-{checkpoint_digest(checkpoint)[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    records = held_out(data, limit)
    start = measure(TorchGrounder.open(checkpoint), records, FLOAT)
    rows = [compare(FLOAT, checkpoint, checkpoint, start, start)]
    for row in ways:
        source = make_source(row, checkpoint, work)
        folder = make_checkpoint(row, source, work, group_size)
        rows.append(_scored(row, folder, source, records, start, work))
    for folder in quantised:
        rows.append(_scored(Row(folder.name), folder, checkpoint, records, start, work))
    for row in (row for row in ways if row.bundle):
        quantized, bundle = work / _file_name(row.name), work / "bundle"
        if export([str(quantized), str(bundle), "--dialect", row.dialect, "--overwrite"]):
            raise GemvgError(f"{quantized} cannot be exported; see above")
        with nullcontext(open_model(bundle)) if row.dialect == "fused" else open_rounded(bundle) as model:
            found = measure_bundle(model, records, row.bundle)
        rows.append(compare(f"{row.name}, {row.bundle}", quantized, checkpoint, found, start))
        rows[-1]["bytes"] = sum(file.stat().st_size for file in bundle.iterdir())
    return rows


def _scored(
    row: Row, folder: Path, base: Path, records: Sequence[Record], start: dict[str, Any], work: Path
) -> dict[str, Any]:
    """A row's figures; what was scored before is read."""
    kept = work / f"{_file_name(row.name)}.{len(records)}.{checkpoint_digest(folder)[:12]}.json"
    if kept.is_file():
        scored: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return scored
    grounder = TorchGrounder.open(folder)
    if row.activations:
        round_activations(grounder.model)
    scored = compare(row.name, folder, base, measure(grounder, records, row.name), start)
    write_text(kept, json.dumps(scored))
    print(f"{row.name}: F1 {gain_text(scored['f1_gain'], scored['f1_gain_interval'])}  KL {scored['kl']:.4f}")
    return scored


def _file_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


if __name__ == "__main__":
    main()
