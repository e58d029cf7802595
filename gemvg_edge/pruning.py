"""Fewer visual tokens of a picture, chosen by the tokens alone: what is left keeps its place in the picture.

Boxes need the places: GAP (arXiv 2506.21873) measured that renumbering what survives loses most of them. Nothing is
trained here, and the question is not looked at, so a scene is pruned once. docs/howto/pixels.md has what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from gemvg_edge.engines.protocol import Floats, Ids
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import short

PRUNING = "diverse"  # the method unless one is named
Size = tuple[int, int]  # height, width of a picture in visual tokens


@dataclass(frozen=True)
class Pruning:
    """How much of each picture's visual tokens is kept, and which of them."""

    keep: float  # a share, above 0 and below 1
    method: str
    seed: int = 0  # of the method "random"


def check_pruning(keep: float | None, method: str) -> Pruning | None:
    """What `look(keep=..., pruning=...)` asks for, None where all is kept; GemvgError for what is neither."""
    if not isinstance(method, str) or method not in METHODS:
        raise GemvgError(f"pruning={short(method)}; give one of {', '.join(METHODS)}")
    if keep is None:
        return None
    if not isinstance(keep, Real) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise GemvgError(f"keep={short(keep)}; give the share of visual tokens to keep, above 0 and at most 1")
    return None if keep == 1 else Pruning(float(keep), method)


def prune(tokens: Floats, size: Size, pruning: Pruning) -> tuple[Floats, Ids]:
    """Visual tokens (tokens, width) of one picture, by row -> those kept (kept, width), and which (kept,)."""
    count = max(1, math.ceil(pruning.keep * len(tokens)))
    if count >= len(tokens):
        return tokens, np.arange(len(tokens))
    return METHODS[pruning.method](tokens, size, count, pruning.seed)


def _random(tokens: Floats, size: Size, count: int, seed: int) -> tuple[Floats, Ids]:
    """Any: the baseline that a method has to beat."""
    kept = np.sort(np.random.default_rng(seed).choice(len(tokens), count, replace=False))
    return tokens[kept], kept


def _diverse(tokens: Floats, size: Size, count: int, seed: int) -> tuple[Floats, Ids]:
    """Each time that which is least like all that were chosen: DivPrune's (arXiv 2503.02175) greedy max-min choice.

    It starts from the token least like the mean, and not from the pair furthest apart, which takes all pairs to find.
    """
    unit = _unit(tokens)
    nearest = unit @ _unit(tokens.mean(axis=0, keepdims=True))[0]  # (tokens,) the likeness to what was chosen
    chosen = [int(nearest.argmin())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < count:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(nearest.argmin()))
        np.maximum(nearest, unit @ unit[chosen[-1]], out=nearest)
        nearest[chosen] = np.inf
    kept = np.sort(chosen)
    return tokens[kept], kept


def _merge(tokens: Floats, size: Size, count: int, seed: int) -> tuple[Floats, Ids]:
    """Neighbours most alike become one, the mean of all that it stands for, at the place of the first of them.

    ToMe (arXiv 2210.09461) merges any two; here the two touch, so that a token stands for one region of its picture.
    """
    height, width = size
    unit = _unit(tokens)
    index = np.arange(height * width).reshape(height, width)
    pairs = np.concatenate(
        [
            np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], axis=1),
            np.stack([index[:-1].ravel(), index[1:].ravel()], axis=1),
        ]
    )  # (pairs, 2)
    alike = np.einsum("ph,ph->p", unit[pairs[:, 0]], unit[pairs[:, 1]])
    region = np.arange(len(tokens))  # which region each token belongs to: its first token's number
    left = len(tokens)
    for a, b in pairs[np.argsort(-alike, kind="stable")]:
        if left == count:
            break
        first, second = sorted((int(region[a]), int(region[b])))
        if first != second:
            region[region == second] = first
            left -= 1
    kept, of = np.unique(region, return_inverse=True)
    sums = np.zeros((len(kept), tokens.shape[1]))
    np.add.at(sums, of, tokens)
    return (sums / np.bincount(of)[:, None]).astype(np.float32), kept


def _unit(tokens: Floats) -> Floats:
    """Rows of length 1."""
    unit: Floats = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    return unit


METHODS: dict[str, Callable[[Floats, Size, int, int], tuple[Floats, Ids]]] = {
    "diverse": _diverse,
    "merge": _merge,
    "random": _random,
}
