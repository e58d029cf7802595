"""Rotate the decoder's residual stream, so that no channel is an outlier: QuaRot's offline part (arXiv 2404.00456).

    python -m quantize.rotate --model CHECKPOINT --out FOLDER

Norm weights go into the linear layers that read them, which leaves norms that a rotation passes through; then what
writes to the stream is multiplied by a random orthogonal matrix and what reads it by the transpose. The result is a
float checkpoint that computes the same, with a head of its own even where it was tied. The vision tower's layer norms
subtract a mean, which a rotation would move, so the tower stays. Ends with one JSON line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from quantize.adapter import with_base
from quantize.checkpoint import Checkpoint, open_float_checkpoint
from quantize.parts import START, as_stored, write_checkpoint, write_part, writing_parts
from quantize.stream import DEEPSTACK, HEAD, MERGER, block_names
from quantize.tensors import EMBEDDING
from train.stage import Seed, Switch, check_out, run_stage, settings_json, working

NORM = "model.norm.weight"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Settings:
    """What a run is told."""

    model: Path  # the float checkpoint folder to read, or a LoRA adapter's
    out: Path  # the checkpoint folder to write
    seed: Seed = 0  # what the random rotation starts from
    base: Path | None = None  # of an adapter: the checkpoint that it belongs to; none: the one that it names
    overwrite: Switch = False  # replace a finished result that is at --out


def rotate(run: Settings) -> None:
    """Write the rotated checkpoint."""
    run = with_base(run)
    check_out(run)
    checkpoint = open_float_checkpoint(run.model, run.base)
    rotation = random_rotation(checkpoint.config.shape.hidden_size, run.seed)
    with writing_parts(run.out), working(run) as work:
        for name in tqdm([START, *block_names(checkpoint)], unit="block"):
            write_part(checkpoint, work, name, rotated_part(checkpoint, name, rotation))
        write_checkpoint(checkpoint, work, run, {}, settings_json(run), own_head=True)
    print(json.dumps({"out": str(run.out), "seed": run.seed}))


def random_rotation(width: int, seed: int) -> Array:
    """An orthogonal matrix (width, width), uniform over all of them; widths need not be powers of two."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return np.asarray(q * np.sign(np.diag(r)), np.float32)


def rotated_part(checkpoint: Checkpoint, name: str, rotation: Array) -> Mapping[str, npt.NDArray[Any]]:
    """The tensors of a block that change, in the types that they are stored in."""
    read, found = checkpoint.read, dict[str, Array]()
    if name == START:
        found = {EMBEDDING: read(EMBEDDING) @ rotation, NORM: np.ones_like(read(NORM))}
    elif name == MERGER or name.startswith(DEEPSTACK):
        last = f"{name}.linear_fc2" if checkpoint.config.shape.model_type == "qwen3_vl" else f"{name}.mlp.2"
        weight, bias = f"{last}.weight", f"{last}.bias"
        found = {weight: rotation.T @ read(weight), bias: read(bias) @ rotation}
    elif name == HEAD:
        head = EMBEDDING if checkpoint.config.tied_head else f"{HEAD}.weight"
        return {f"{HEAD}.weight": as_stored(checkpoint, head, np.matmul(read(head) * read(NORM), rotation))}
    elif name.startswith("model.layers."):
        for norm, readers in READERS.items():
            scale = read(f"{name}.{norm}.weight")
            found[f"{name}.{norm}.weight"] = np.ones_like(scale)
            for weight in (f"{name}.{reader}.weight" for reader in readers):
                found[weight] = np.matmul(read(weight) * scale, rotation)
        for weight in (f"{name}.{writer}.weight" for writer in WRITERS):
            found[weight] = rotation.T @ read(weight)
    return {tensor: as_stored(checkpoint, tensor, values) for tensor, values in found.items()}


def main() -> None:
    """Command line; see the module's first lines."""
    run_stage("quantize.rotate", Settings, "Rotate the decoder's residual stream.", rotate)


if __name__ == "__main__":
    main()
