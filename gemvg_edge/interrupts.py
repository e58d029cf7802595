"""An interrupt before a command's own handling is in place: imports take seconds, and this module none."""

from __future__ import annotations

import sys


def quiet_interrupts() -> None:
    """Let Ctrl-C end the process with one word and no traceback, until `gemvg_edge.command` takes over."""
    usual = sys.excepthook

    def hook(*raised: object) -> None:
        if raised[0] is KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        else:
            usual(*raised)  # type: ignore[arg-type]

    sys.excepthook = hook
