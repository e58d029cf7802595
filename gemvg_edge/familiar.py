"""Whether pictures are like those a model was trained on, by a few cheap numbers; a small model sees nothing else.

The ranges are measured on training pictures (`python -m train.familiar`) and kept in the manifest. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short
from gemvg_edge.pictures import NAME

SIDE = 64  # pixels of the copy that is looked at
Range = tuple[float, float]


@dataclass(frozen=True)
class Familiar:
    """The most pictures of a question, and the ranges of what `statistics` tells; without pictures nothing is known."""

    pictures: int = 0
    brightness: Range = (0.0, 1.0)
    contrast: Range = (0.0, 1.0)
    colour: Range = (0.0, 1.0)
    detail: Range = (0.0, 1.0)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Familiar:
        """Read the fields; a range is two numbers from 0 to 1, the lower first."""
        values = dict(config)
        for name in STATISTICS:
            pair = values.get(name, (0.0, 1.0))
            numbers = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(v) in (int, float) for v in pair)
            if not numbers or not 0 <= pair[0] <= pair[1] <= 1:
                raise GemvgError(f"{name} is {short(pair)}, not two numbers from 0 to 1, the lower first")
            values[name] = (float(pair[0]), float(pair[1]))
        familiar = Familiar(**values)
        if familiar.pictures < 0:
            raise GemvgError(f"pictures is {familiar.pictures}, not at least 0")
        return familiar

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)


STATISTICS = tuple(field.name for field in fields(Familiar) if field.name != "pictures")


def statistics(picture: Image.Image) -> dict[str, float]:
    """Of an RGB picture, each 0..1: mean and spread of its brightness, mean strength of colours and of fine detail."""
    small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255
    grey = small.mean(axis=2)
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "colour": float((small.max(axis=2) - small.min(axis=2)).mean()),
        "detail": float((np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2),
    }


def unfamiliar(pictures: Sequence[Image.Image], known: Familiar) -> str | None:
    """What about these pictures a model was not trained on, as the start of a sentence; None where nothing is."""
    if not known.pictures:
        return None
    if len(pictures) > known.pictures:
        return f"{len(pictures)} pictures were given, and the model was trained on at most {known.pictures} at once"
    for k, picture in enumerate(pictures):
        for name, value in statistics(picture).items():
            low, high = getattr(known, name)
            if not low <= value <= high:
                which = picture.info.get(NAME, f"images[{k}]")
                there = f"{name} {value:.3g}, there {low:.3g} to {high:.3g}"
                return f"{which} is unlike the pictures of the training ({there})"
    return None
