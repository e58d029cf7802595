"""Learning curves as a picture: one panel a figure of the Trainer's log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemvg_edge.files import replacing

WANTED = (
    "answer_loss", "tower_loss", "place_loss", "pointer_loss", "mark_loss", "fate_loss", "kl_loss", "reward", "entropy",
    "grad_norm", "learning_rate",
)  # fmt: skip


def draw_curves(log: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw each wanted figure that the log has over the steps; nothing if it has none."""
    from matplotlib.figure import Figure  # slow to import, and only needed when a stage ends

    names = [name for name in WANTED if any(name in entry for entry in log)]
    if not names:
        return
    figure = Figure(figsize=(9, 2.2 * ((len(names) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(names) + 1) // 2, 2, squeeze=False).flat
    for name, panel in zip(names, panels, strict=False):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    if len(names) % 2:
        figure.axes[-1].set_axis_off()
    with replacing(file) as partial:
        figure.savefig(partial, dpi=110)
