"""From given pictures to visual tokens: read, resized and known by their pixels; only what is new is encoded.

Knows pixels and the vision tower; neither text nor the decoder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from gemvg_edge.cache import Digest, Prefix, SceneCache, picture_key
from gemvg_edge.engines.protocol import Floats, VisionTower
from gemvg_edge.grounding import Picture
from gemvg_edge.images import Grid, Preprocessing, patchify, resize
from gemvg_edge.opened import Visual
from gemvg_edge.pictures import NAME
from gemvg_edge.pruning import Pruning, prune


@dataclass(frozen=True)
class Resized:
    """The pictures of a look, ready for its turn."""

    pictures: tuple[Picture, ...]
    pixels: tuple[npt.NDArray[np.uint8], ...]  # each (height, width, 3)
    keys: tuple[Digest, ...]
    numbers: Preprocessing
    pruning: Pruning | None
    warning: str | None  # what about them is unlike those of the model's training
    ms: float  # what that took

    @property
    def grids(self) -> list[Grid]:
        """Patches of each picture."""
        side = self.numbers.patch_size
        return [(1, pixels.shape[0] // side, pixels.shape[1] // side) for pixels in self.pixels]

    @property
    def names(self) -> list[Digest]:
        """What the decoder is given, picture by picture: other tokens of one picture are another sequence."""
        return [key if self.pruning is None else key + repr(self.pruning).encode() for key in self.keys]


@dataclass(frozen=True)
class Recalled:
    """What earlier looks left of some pictures, and the patches of those that are left to encode."""

    prefix: Prefix | None
    tokens: dict[Digest, Floats]
    patches: dict[Digest, Floats]


def resize_all(
    pictures: Sequence[Image.Image],
    numbers: Preprocessing,
    pruning: Pruning | None,
    warning: str | None,
    started: float,
) -> Resized:
    """Loaded pictures at the size that the model sees, since `started`; GemvgError names one that is too thin."""
    pixels = tuple(resize(picture, numbers) for picture in pictures)
    given = tuple(Picture(picture.info[NAME], *picture.size) for picture in pictures)
    keys = tuple(picture_key(one, numbers) for one in pixels)
    return Resized(given, pixels, keys, numbers, pruning, warning, (time.perf_counter() - started) * 1e3)


def recall(resized: Resized, cache: SceneCache, every: bool) -> Recalled:
    """What the cache has. `every`: the tokens of all pictures are wanted, though keys and values be at hand."""
    prefix = cache.prefix(resized.names)
    tokens, patches = {}, {}
    first = 0 if every or resized.pruning or not prefix else prefix.pictures
    for key, pixels in zip(resized.keys[first:], resized.pixels[first:], strict=True):
        if key in tokens or key in patches:
            continue
        if (found := cache.tokens(key)) is not None:
            tokens[key] = found
        else:
            patches[key], _ = patchify(pixels, resized.numbers)
    return Recalled(prefix, tokens, patches)


def encode(resized: Resized, recalled: Recalled, cache: SceneCache, vision: VisionTower) -> list[Visual]:
    """Every picture as the decoder is given it; what was encoded for that is kept."""
    tokens, grids = dict(recalled.tokens), dict(zip(resized.keys, resized.grids, strict=True))
    if recalled.patches:
        encoded = vision.encode(list(recalled.patches.values()), [grids[key] for key in recalled.patches])
        for key, new in zip(recalled.patches, encoded, strict=True):
            cache.keep_tokens(key, new)
            tokens[key] = new
    return [
        _visual(name, tokens.get(key), grids[key], resized)
        for name, key in zip(resized.names, resized.keys, strict=True)
    ]


def _visual(name: Digest, tokens: Floats | None, grid: Grid, resized: Resized) -> Visual:
    if tokens is None or resized.pruning is None:
        return Visual(name, tokens)
    merge = resized.numbers.merge_size
    return Visual(name, *prune(tokens, (grid[1] // merge, grid[2] // merge), resized.pruning))
