"""What the files of several families share: a tiny checkpoint with records to calibrate it on, and its logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from gemvg_edge.boxes import Box, Size
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize, read_prompts
from quantize.torch_model import load_model
from tests.checkpoints import torch_logits, write_checkpoint
from train.data.record import Record, write_records

SAMPLES = 6
GROUP = 8
# Runs whose checkpoints every family's are read back from.
READ_BACK: list[dict[str, Any]] = [
    {"method": "rtn", "bits": 8, "group_size": -1, "vision_bits": 8, "head_bits": 8},
    {"method": "rtn", "vision_bits": 4, "head_bits": 4, "embedding_bits": 4},
    {},
    {"bits": 8, "group_size": -1, "vision_bits": 8, "head_bits": 8},
    {"calibration": "text", "desc_act": True},
]


def write_family(folder: Path, config: dict[str, Any], sizes: list[Size]) -> Any:
    """A tiny random `checkpoint` and `records.jsonl` beside it, pictures of these sizes; transformers' model."""
    model = write_checkpoint(folder / "checkpoint", config)
    rng = np.random.default_rng(0)
    records = []
    for number in range(SAMPLES):
        images = tuple(folder / f"{number}-{k}.png" for k in range(1 + number % 3))
        shown = [sizes[(number + k) % len(sizes)] for k in range(len(images))]
        for image, (width, height) in zip(images, shown, strict=True):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(image)
        box = Box(0, 2.0, 3.0, 14.0, 20.0)
        records.append(Record(images, tuple(shown), f"thing {number}", (box,), "referential", "test"))
    write_records(records, folder / "records.jsonl")
    return model


def settings(folder: Path, out: str, **options: Any) -> Settings:
    """A run of quantize.gptq on them."""
    given = {"group_size": GROUP, "records": folder / "records.jsonl", "samples": SAMPLES, "device": "cpu"}
    return Settings(folder / "checkpoint", folder / out, **{**given, **options})


def logits(model: Any, prompt: Any) -> np.ndarray:
    """Transformers' logits of a calibration prompt."""
    patches = [part.numpy() for part in torch.split(prompt.patches, [h * w for _, h, w in prompt.grids])]
    return torch_logits(model, prompt.ids.numpy(), patches, list(prompt.grids))


def quantized_names(run: Settings) -> set[str]:
    """The names of the tensors that a run writes, in place of what another left there."""
    shutil.rmtree(run.out, ignore_errors=True)
    quantize(run)
    return set(load_file(run.out / "model.safetensors"))


def differences(model: Any, folder: Path, written: Path) -> list[np.ndarray]:
    """The model's logits less those of a checkpoint, for each calibration prompt of the folder."""
    other = load_model(written)
    prompts = read_prompts(settings(folder, "unused"), open_checkpoint(folder / "checkpoint"))
    return [logits(model, prompt) - logits(other, prompt) for prompt in prompts]
