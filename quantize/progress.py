"""How much work each block of a checkpoint is, so that the bar of a long quantisation tells the truth.

Work is what grows with the time: a block's weights times the rows of calibration inputs that they see. Knows no solver.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from quantize.calibration import CalibrationPrompt
from quantize.checkpoint import Checkpoint
from quantize.stream import DEEPSTACK, HEAD, MERGER, block_names

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # work has no unit that people know
# A quantised block takes so many times what it takes when its inputs only pass through: 3 on checkpoints/tabletop, 6 at
# Qwen2-VL-2B's widths, measured.
QUANTISED = 4


def block_work(
    checkpoint: Checkpoint,
    prompts: Sequence[CalibrationPrompt],
    layers: Mapping[str, tuple[int, ...]],
    quantised: Collection[str],
) -> list[int]:
    """Of each block, in order. `layers`: shape (out, in) by name; `quantised`: names of those that get codes."""
    work = []
    for block in block_names(checkpoint):
        mine = {name: out * into for name, (out, into) in layers.items() if f"{name}.".startswith(f"{block}.")}
        rounded = sum(weights for name, weights in mine.items() if name in quantised)
        # Rounding to nearest has no inputs, and nothing is after the head that would need what comes out of it.
        passed = sum(mine.values()) - rounded if prompts and block != HEAD else 0
        work.append((QUANTISED * rounded + passed) * max(1, _rows(checkpoint, prompts, block)))
    return work


def _rows(checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], block: str) -> int:
    """How many rows of inputs a block sees: patches, visual tokens, or tokens."""
    if not block.startswith("visual."):
        return sum(len(prompt.ids) for prompt in prompts)
    patches = sum(t * h * w for prompt in prompts for t, h, w in prompt.grids)
    merges = block == MERGER or block.startswith(DEEPSTACK)
    return patches // checkpoint.config.settings.preprocessing.merge_size**2 if merges else patches
