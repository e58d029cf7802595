"""What an engine must offer: a vision tower and a decoder that own their buffers. Numpy in, numpy out.

Knows no engine; `grounder.py` picks one and imports it only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gemvg_edge.images import Grid
from gemvg_edge.positions import RopeTable

Floats = npt.NDArray[np.float32]


class KeyValueCache(Protocol):
    """Keys, values and rotary rows of up to `capacity` tokens, kept where the engine wants them, updated in place."""

    @property
    def capacity(self) -> int:
        """The most tokens it can hold."""

    @property
    def bytes(self) -> int:
        """What it takes in memory."""


class VisionTower(Protocol):
    """Pictures as patches -> visual tokens of the language model."""

    def encode(self, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[Floats]:
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, hidden), in the order given."""


CacheT = TypeVar("CacheT", bound=KeyValueCache)


class Decoder(Protocol, Generic[CacheT]):
    """The language model, with one graph for prefill and decoding; `CacheT` is the engine's own cache."""

    def new_cache(self, capacity: int) -> CacheT:
        """An empty cache for `capacity` tokens."""

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, hidden)."""

    def forward(self, embeddings: Floats, cache: CacheT, past: int, table: RopeTable) -> Floats:
        """Embeddings (tokens, hidden) after the `past` tokens in the cache -> logits (vocab,) of the last one.

        `table` holds the tokens' own rotary rows. The cache is extended in place; a smaller `past` later rewinds it.
        """

    def next_token(self, embeddings: Floats, cache: CacheT, past: int, table: RopeTable) -> int:
        """The same, but only the likeliest token: no engine need hand over the logits of the whole vocabulary."""
