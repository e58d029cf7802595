"""The bar of a quantisation: its whole is the work that is really done, and it is full only when all is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantize import gptq
from quantize.checkpoint import open_checkpoint
from quantize.gptq import quantize
from quantize.progress import QUANTISED
from quantize.stream import HEAD, MERGER, block_names
from tests.test_gptq import prompts_of, quantize_until, settings, tiny

__all__ = ["tiny"]


class Bar:
    """Stands in for tqdm's: keeps what it is told, with the block that it was told after."""

    def __init__(self, total: int, initial: int = 0, **_: Any) -> None:
        self.total, self.initial, self.steps = total, initial, list[int]()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, work: int) -> None:
        self.steps.append(work)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Bar]:
    """Every bar that quantising makes."""
    made: list[Bar] = []

    def make(**told: Any) -> Bar:
        made.append(Bar(**told))
        return made[-1]

    monkeypatch.setattr(gptq, "tqdm", make)
    return made


def weights(folder: Path, block: str) -> int:
    """Of a block's linear layers."""
    layers = gptq.linear_layers(open_checkpoint(folder / "checkpoint"))
    return sum(out * into for name, (out, into) in layers.items() if name == block or name.startswith(f"{block}."))


def rows(folder: Path) -> tuple[int, int]:
    """Patches and tokens of the calibration prompts."""
    prompts = prompts_of(folder)
    return sum(len(prompt.patches) for prompt in prompts), sum(len(prompt.ids) for prompt in prompts)


def test_a_vision_tower_that_is_passed_through_counts_for_less(tiny: tuple[Any, Path], bars: list[Bar]) -> None:
    _, folder = tiny
    quantize(settings(folder, "bar"))
    (bar,), (patches, tokens) = bars, rows(folder)
    done = dict(zip(block_names(open_checkpoint(folder / "checkpoint")), bar.steps, strict=True))
    assert bar.initial == 0
    assert sum(bar.steps) == bar.total
    for block, work in done.items():
        if block == HEAD:  # as it was, and its outputs are not asked for
            assert work == 0
        elif block == MERGER:
            assert work == weights(folder, block) * (patches // 4)
        elif block.startswith("visual."):
            assert work == weights(folder, block) * patches
        else:
            assert work == QUANTISED * weights(folder, block) * tokens


def test_a_quantised_head_is_work(tiny: tuple[Any, Path], bars: list[Bar]) -> None:
    _, folder = tiny
    quantize(settings(folder, "bar-head", head_bits=8, vision_bits=8))
    (bar,), (patches, tokens) = bars, rows(folder)
    assert sum(bar.steps) == bar.total
    assert bar.steps[-1] == QUANTISED * weights(folder, HEAD) * tokens > 0
    assert bar.steps[0] == QUANTISED * weights(folder, "visual.blocks.0") * patches


def test_work_of_an_earlier_run_is_no_part_of_the_rate(
    tiny: tuple[Any, Path], bars: list[Bar], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = tiny
    run = settings(folder, "bar-again", head_bits=8)
    quantize_until("model.layers.1", run, monkeypatch)
    quantize(run)
    first, again = bars
    assert first.total == again.total
    assert again.initial == sum(first.steps) > 0
    assert again.initial + sum(again.steps) == again.total


def test_rounding_to_nearest_counts_what_is_rounded(tiny: tuple[Any, Path], bars: list[Bar]) -> None:
    _, folder = tiny
    quantize(settings(folder, "bar-rtn", method="rtn"))
    names = block_names(open_checkpoint(folder / "checkpoint"))
    wanted = [QUANTISED * weights(folder, name) if name.startswith("model.") else 0 for name in names]
    assert (bars[0].steps, bars[0].total) == (wanted, sum(wanted))
