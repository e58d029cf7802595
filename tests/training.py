"""What the tests of every training stage need: a kill, and the weights that came out."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration, TrainerCallback, TrainerState


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict()
    return state


class StopAt(TrainerCallback):  # type: ignore[misc]  # transformers is not followed by mypy
    """Stands for a kill: raises after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """The Trainer calls it after each step."""
        if state.global_step == self.step:
            raise KeyboardInterrupt
