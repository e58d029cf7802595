"""LoRA adapters of random numbers on the tiny checkpoints, saved and merged by peft itself."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from quantize.adapter import WEIGHTS
from quantize.torch_model import family
from tests.checkpoints import GROUPED, edit_json, write_checkpoint
from train.checkpoint import ADAPTER

Change = Callable[[Path], object]


def write_adapter(folder: Path, base: Path, model_type: str = "qwen2_vl", **options: Any) -> None:
    """An adapter of random numbers on a base, saved by peft."""
    model = get_peft_model(load_base(base, model_type), LoraConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (w for w in model.parameters() if w.requires_grad):
            weight.normal_(0, 0.05, generator=generator)
    model.save_pretrained(str(folder))


def load_base(base: Path, model_type: str = "qwen2_vl") -> Any:
    return family(model_type).model.from_pretrained(base, dtype=torch.float32)


def merge(folder: Path, base: Path, model_type: str = "qwen2_vl") -> Any:
    """The plain twin: peft's own merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PeftModel.from_pretrained(load_base(base, model_type), folder).merge_and_unload().eval()


def write_merged(folder: Path, adapter: Path, base: Path) -> None:
    """What people do without us: the checkpoint that peft's merge saves, with the base's texts."""
    merge(adapter, base).save_pretrained(folder)
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.json"):
        shutil.copyfile(base / name, folder / name)


def edit_adapter(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def say(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / ADAPTER, **changes)


def write_base_and_adapter(folder: Path) -> None:
    """A checkpoint `whole` and an `adapter` of it, on all its linear layers."""
    write_checkpoint(folder / "whole", GROUPED)
    write_adapter(folder / "adapter", folder / "whole", r=8, lora_alpha=20, target_modules="all-linear")
