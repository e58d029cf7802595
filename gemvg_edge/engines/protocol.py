"""What an engine must offer: a vision tower and a decoder that own their buffers. Numpy in, numpy out.

Knows no engine; `grounder.py` picks one and imports it only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from gemvg_edge.images import Grid
from gemvg_edge.positions import RopeTable

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


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
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, width), in the order given.

        `width` is the model's embedding_width here and below.
        """


CacheT = TypeVar("CacheT", bound=KeyValueCache)


@dataclass(frozen=True)
class Step(Generic[CacheT]):
    """Tokens of one sequence that go through the decoder together: a prefill, or a token with what rides along."""

    embeddings: Floats  # (tokens, width)
    cache: CacheT  # extended in place; a smaller `past` later rewinds it
    past: int  # tokens in the cache before these
    table: RopeTable  # the tokens' own rotary rows
    rows: int = 1  # of how many of its last tokens logits are wanted
    legal: Ids | None = None  # (k,) the token ids whose logits are wanted; None: all of the vocabulary


class Decoder(Protocol, Generic[CacheT]):
    """The language model, with one graph for prefill and decoding; `CacheT` is the engine's own cache."""

    @property
    def batches(self) -> bool:
        """Whether several steps, or several rows of one, cost little more than one: drafts and batches pay then."""

    @property
    def steady(self) -> int:
        """Of more tokens than this a run gives each the numbers that any other such run gives it; 0: none does."""

    def new_cache(self, capacity: int) -> CacheT:
        """An empty cache for `capacity` tokens."""

    def copy(self, source: CacheT, target: CacheT, tokens: int) -> None:
        """Put the first `tokens` of one cache into another, which holds them at the same places then."""

    def embed(self, ids: Ids) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, width); deepstack features are zeros."""

    def forward(self, steps: Sequence[Step[CacheT]]) -> list[Floats]:
        """Run steps of different caches -> logits of each: (rows, vocab), or (rows, k) of its `legal` ids in order.

        NotFiniteError for NaN and infinity. An engine that does not batch runs one step after the other.
        """
