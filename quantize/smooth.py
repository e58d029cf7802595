"""Move outliers from activations into weights, so that 8 bits hold both: SmoothQuant (arXiv 2211.10438), offline.

    python -m quantize.smooth --model CHECKPOINT --out FOLDER [--alpha 0.5]

Every channel of a linear layer's input is divided by s = max|x|^alpha / max|w|^(1 - alpha) and the layer's column
multiplied by it; the division goes into what makes the input: a norm, or a linear layer with nothing but attention or
a product behind it. The result is a float checkpoint that computes the same. Ends with one JSON line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from gemvg_edge.errors import GemvgError
from quantize.adapter import with_base
from quantize.calibration import grounding_prompts
from quantize.checkpoint import Checkpoint, open_float_checkpoint
from quantize.parts import START, as_stored, write_checkpoint, write_part, writing_parts
from quantize.stream import DEEPSTACK, HEAD, MERGER, Block, block_names, stream
from train.checkpoint import with_budget
from train.stage import Switch, check_out, run_stage, settings_json, usable_device, working

SMALLEST = 1e-5  # of a scale and of what it is made from: a channel that is never used stays as it is


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    model: Path  # the float checkpoint folder to read, or a LoRA adapter's
    out: Path  # the checkpoint folder to write
    alpha: float = 0.5  # share of the difficulty that goes to the weights, 0 to 1
    samples: int = 128  # how many prompts the activations are measured on
    records: Path | None = None  # a .jsonl of grounding records to take prompts from; none: simulated scenes
    scenes: Path = Path("data/world/calibration")  # where the simulated scenes are, or are rendered to
    max_pixels: int | None = None  # pixels of a calibration picture after resizing, at most; none: as export has it
    device: str = "auto"  # what torch computes on, such as cpu or cuda; auto: the GPU if there is one
    base: Path | None = None  # of an adapter: the checkpoint that it belongs to; none: the one that it names
    overwrite: Switch = False  # replace a finished result that is at --out


class Fold(NamedTuple):
    """Where a scale goes: from the inputs of `readers` into rows of the `makers`' tensors."""

    makers: tuple[str, ...]  # tensors of the block whose rows are divided
    readers: tuple[str, ...]  # linear layers of the block whose columns are multiplied
    rows: npt.NDArray[np.int64]  # of each column: the row that makes it


def folds(checkpoint: Checkpoint, name: str) -> list[Fold]:
    """The folds of a block."""
    shape = checkpoint.config.shape
    gated = shape.model_type == "qwen2_5_vl"  # a vision tower with RMS norms, which have no bias

    def norm(part: str) -> tuple[str, ...]:
        return (f"{part}.weight",) if gated else (f"{part}.weight", f"{part}.bias")

    qwen3 = shape.model_type == "qwen3_vl"
    if name == HEAD:
        return []
    if name.startswith(DEEPSTACK):
        return [Fold(norm("norm"), ("linear_fc1",), np.arange(checkpoint.config.merged_dim))]
    if name == MERGER:  # a token's input is several patches side by side, each from the same norm
        width = shape.vision.embed_dim
        patches = checkpoint.config.merged_dim // width
        maker, reader = ("norm", "linear_fc1") if qwen3 else ("ln_q", "mlp.0")
        return [Fold(norm(maker), (reader,), np.tile(np.arange(width), patches))]
    if name.startswith("visual."):
        own = np.arange(shape.vision.embed_dim)
        attention = [
            Fold(norm("norm1"), ("attn.qkv",), own),
            Fold(("attn.qkv.weight", "attn.qkv.bias"), ("attn.proj",), 2 * len(own) + own),  # the values' third
        ]
        if not gated:
            return [*attention, Fold(norm("norm2"), ("mlp.linear_fc1" if qwen3 else "mlp.fc1",), own)]
        inner = np.arange(checkpoint.config.vision_intermediate_size)
        return [
            *attention,
            Fold(norm("norm2"), ("mlp.gate_proj", "mlp.up_proj"), own),
            Fold(("mlp.up_proj.weight", "mlp.up_proj.bias"), ("mlp.down_proj",), inner),
        ]
    own = np.arange(shape.hidden_size)
    heads = np.arange(shape.kv_heads * shape.head_dim).reshape(shape.kv_heads, shape.head_dim)
    values = np.repeat(heads, shape.heads // shape.kv_heads, axis=0).ravel()  # query heads share a value head
    return [
        Fold(("input_layernorm.weight",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), own),
        Fold(("post_attention_layernorm.weight",), ("mlp.gate_proj", "mlp.up_proj"), own),
        Fold(
            ("self_attn.v_proj.weight",) if qwen3 else ("self_attn.v_proj.weight", "self_attn.v_proj.bias"),
            ("self_attn.o_proj",),
            values,
        ),
        Fold(("mlp.up_proj.weight",), ("mlp.down_proj",), np.arange(checkpoint.config.intermediate_size)),
    ]


def smooth(run: Settings) -> None:
    """Write the smoothed checkpoint."""
    if not 0 <= run.alpha <= 1 or run.samples < 1:
        raise GemvgError(f"--alpha is {run.alpha} and --samples {run.samples}; give 0 to 1, and at least 1")
    run = with_base(run)
    check_out(run)
    run = replace(run, device=usable_device(run.device))
    checkpoint = open_float_checkpoint(run.model, run.base)
    settings = with_budget(checkpoint.config.settings, run.max_pixels)
    prompts = grounding_prompts(settings, run.records, run.scenes, run.samples)
    with writing_parts(run.out), working(run) as work:
        write_part(checkpoint, work, START, {})
        names = block_names(checkpoint)
        for block in tqdm(stream(checkpoint, prompts, run.device, work), total=len(names), unit="block"):
            changed = smooth_block(block, folds(checkpoint, block.name), run.alpha)
            stored = {name: as_stored(checkpoint, name, values) for name, values in changed.items()}
            write_part(checkpoint, work, block.name, stored)
        write_checkpoint(checkpoint, work, run, {}, settings_json(run), own_head=False)
    print(json.dumps({"out": str(run.out), "alpha": run.alpha}))


def smooth_block(block: Block, folds: list[Fold], alpha: float) -> dict[str, npt.NDArray[np.float32]]:
    """The block's tensors that change, by their full names; the block itself stays as it is."""
    tensors = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    largest = _largest_inputs(block, [fold.readers[0] for fold in folds])
    changed: set[str] = set()
    for fold in folds:
        rows = torch.from_numpy(fold.rows)
        weights = [f"{reader}.weight" for reader in fold.readers]
        columns = torch.stack([tensors[weight].abs().amax(dim=0) for weight in weights]).amax(dim=0)
        scale = largest[fold.readers[0]] ** alpha / columns.clamp(min=SMALLEST) ** (1 - alpha)
        scale = torch.where(largest[fold.readers[0]] < SMALLEST, 1.0, scale.clamp(min=SMALLEST))  # (columns)
        count = len(tensors[fold.makers[0]])
        # Columns that one row makes share its scale: the largest.
        by_row = torch.zeros(count, device=scale.device).scatter_reduce(0, rows.to(scale.device), scale, "amax")
        by_row[by_row == 0] = 1
        for maker in fold.makers:
            tensors[maker] /= by_row if tensors[maker].dim() == 1 else by_row[:, None]
        for weight in weights:
            tensors[weight] *= by_row[rows]
        changed |= {*fold.makers, *weights}
    return {f"{block.name}.{name}": tensors[name].cpu().numpy() for name in sorted(changed)}


def _largest_inputs(block: Block, layers: list[str]) -> dict[str, torch.Tensor]:
    """The largest magnitude in each channel of the inputs of layers (by names in the block), over all prompts."""
    full = {f"{block.name}.{layer}": layer for layer in layers}
    found = {layer: block.linears[name].weight.new_zeros(()) for name, layer in full.items()}

    def note(name: str, x: torch.Tensor) -> None:
        if x.numel():
            found[full[name]] = torch.maximum(found[full[name]], x.abs().reshape(-1, x.shape[-1]).amax(dim=0))

    with block.watching(full, note):
        block.run()
    return found


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("quantize.smooth", Settings, "Move outliers from activations into weights.", smooth)


if __name__ == "__main__":
    main()
