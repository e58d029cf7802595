"""Prefill and the greedy decode loop. Knows token ids, embeddings and logits only: no text, pictures or boxes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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


def prefill_token(
    decoder: Decoder[CacheT], rope: Rope, embeddings: Floats, positions: Positions, cache: CacheT, past: int
) -> int:
    """The same; the likeliest token after them."""
    table = mrope_table(positions, rope.head_dim, rope.theta, rope.sections)
    return decoder.next_token(embeddings, cache, past, table)


def decode(
    decoder: Decoder[CacheT],
    rope: Rope,
    first: int,
    cache: CacheT,
    past: int,
    position: int,
    stop_ids: Collection[int],
    max_tokens: int,
    on_token: Callable[[list[int]], None] = lambda tokens: None,
) -> list[int]:
    """Greedy tokens from the `first`, which a prefill gave; a stop token that came before `max_tokens` is the last.

    `past` counts cached tokens and `position` is the next token's mRoPE position: pictures make the two differ.
    `on_token` sees all tokens so far after each; an error from it ends the loop.
    """
    tokens = [first]
    on_token(tokens)
    while tokens[-1] not in stop_ids and len(tokens) < max_tokens:
        embedding = decoder.embed(np.asarray(tokens[-1:]))
        tokens.append(prefill_token(decoder, rope, embedding, text_positions(position, 1), cache, past))
        on_token(tokens)
        past, position = past + 1, position + 1
    return tokens
