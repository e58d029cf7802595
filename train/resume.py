"""The checkpoint that a killed stage goes on from."""

from __future__ import annotations

import json
from pathlib import Path


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes trainer_state.json last.

    transformers' get_last_checkpoint takes the newest folder, and a run killed while saving could never go on.
    """
    by_step = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    return next((str(folder) for folder in by_step if _is_whole(folder)), None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True
