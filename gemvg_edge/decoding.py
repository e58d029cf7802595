"""Prefill and the greedy decode loop. Knows token ids, embeddings and logits only: no text, pictures or boxes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from gemvg_edge.engines.protocol import CacheT, Decoder, Floats
from gemvg_edge.positions import Positions, mrope_table, text_positions
from gemvg_edge.prompt import TokenIds


class Rope(NamedTuple):
    """The decoder's rotary numbers."""

    head_dim: int
    theta: float
    sections: tuple[int, int, int]


def embed_prompt(decoder: Decoder[CacheT], ids: TokenIds, image_token_id: int, pictures: Sequence[Floats]) -> Floats:
    """Token embeddings (tokens, hidden) with the pictures' visual tokens put in their places, in order."""
    embeddings = decoder.embed(ids)
    if pictures:
        embeddings[ids == image_token_id] = np.concatenate(pictures)
    return embeddings


def prefill(
    decoder: Decoder[CacheT], rope: Rope, embeddings: Floats, positions: Positions, cache: CacheT, past: int
) -> Floats:
    """Run embeddings (tokens, hidden) at positions (3, tokens) on top of `past` cached tokens; logits of the last."""
    table = mrope_table(positions, rope.head_dim, rope.theta, rope.sections)
    return decoder.forward(embeddings, cache, past, table)


def decode(
    decoder: Decoder[CacheT],
    rope: Rope,
    logits: Floats,
    cache: CacheT,
    past: int,
    position: int,
    stop_ids: Collection[int],
    max_tokens: int,
) -> list[int]:
    """Greedy tokens after a prefill; the stop token, if it came before `max_tokens`, is the last of them.

    `past` counts cached tokens and `position` is the next token's mRoPE position: pictures make the two differ.
    """
    tokens: list[int] = []
    while True:
        token = int(np.argmax(logits))
        tokens.append(token)
        if token in stop_ids or len(tokens) >= max_tokens:
            return tokens
        embedding = decoder.embed(np.asarray([token]))
        logits = prefill(decoder, rope, embedding, text_positions(position, 1), cache, past)
        past, position = past + 1, position + 1
