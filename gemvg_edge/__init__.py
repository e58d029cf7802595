"""Ask several pictures a question and get boxes.

    from gemvg_edge import Grounder

    scene = Grounder.open().look(["left.png", "right.png"])
    for box in scene.ground("the mug that is in both views").boxes:
        print(box.image, box.x1, box.y1, box.x2, box.y2)

Needs numpy, pillow, tokenizers and one engine; see the extras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemvg_edge.boxes import Box
    from gemvg_edge.draw import draw_boxes
    from gemvg_edge.errors import Cancelled, GemvgError, TimedOut
    from gemvg_edge.grounder import Grounder
    from gemvg_edge.grounding import Grounding
    from gemvg_edge.marks import mark
    from gemvg_edge.queueing import Request
    from gemvg_edge.scene import Scene

__version__ = "0.1.0"
__all__ = [
    "Box",
    "Cancelled",
    "GemvgError",
    "Grounder",
    "Grounding",
    "Request",
    "Scene",
    "TimedOut",
    "__version__",
    "draw_boxes",
    "mark",
]

# Loaded at first use: training and export need only single modules, and `import gemvg_edge` stays light.
_HOMES = {
    "Box": "boxes",
    "Cancelled": "errors",
    "GemvgError": "errors",
    "Grounder": "grounder",
    "Grounding": "grounding",
    "Request": "queueing",
    "Scene": "scene",
    "TimedOut": "errors",
    "draw_boxes": "draw",
    "mark": "marks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
