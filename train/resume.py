"""What a stage needs to go on after a kill: its work folder, its last whole checkpoint, and weights that really load.

Shared by the stages that run on transformers' Trainer; knows nothing about their data or losses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

from gemvg_edge.errors import GemvgError


def settings_as_json(run: Any) -> dict[str, Any]:
    """The fields of a stage's settings as plain JSON values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(run).items()}


def work_folder(out: Path) -> Path:
    """Where checkpoints are kept until `out` is written."""
    return out.with_name(out.name + ".work")


def claim_work_folder(out: Path, settings: Mapping[str, Any]) -> Path:
    """Make the work folder; refused if a run with other settings left it. Several processes may claim it at once."""
    work = work_folder(out)
    record, mine = work / "settings.json", json.dumps(settings, indent=1)
    if record.is_file() and record.read_text() != mine:
        raise GemvgError(f"{work} belongs to a run with other settings; delete it, or give the settings in {record}")
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f"settings.{os.getpid()}.partial"
    partial.write_text(mine)
    os.replace(partial, record)
    return work


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes trainer_state.json last."""
    by_step = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    return next((str(folder) for folder in by_step if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def load_weights(model: torch.nn.Module, checkpoint: Path, own: Sequence[str] = ()) -> None:
    """Put a Trainer's checkpoint into the model it came from.

    transformers 5.23 saves the hub's tensor names, and Trainer's own loader, which does not rename them back, would
    leave every weight random with no more than a warning. `own` are prefixes of tensors that Qwen2-VL does not have.
    """
    state = Qwen2VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).state_dict()
    for file in checkpoint.glob("model*.safetensors") if own else ():
        state |= {name: tensor for name, tensor in load_file(file).items() if name.startswith(tuple(own))}
    model.load_state_dict(state)
