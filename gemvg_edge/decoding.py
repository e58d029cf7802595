"""Prefill and the greedy decode loop, several answers in step. Knows token ids and logits: no text, pictures or boxes.

What an answer's grammar leaves no choice about is not decoded: it rides along with the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest
from typing import Generic, NamedTuple

import numpy as np

from gemvg_edge.bundle import ModelShape
from gemvg_edge.engines.protocol import CacheT, Decoder, Floats, Ids, Step
from gemvg_edge.grammar import Walk, free
from gemvg_edge.positions import Positions, RopeTable, mrope_table, text_positions
from gemvg_edge.prompt import TokenIds

DRAFT = 6  # tokens that are tried at once where a text repeats what was said
LOOKUP = 3  # and how many of its last tokens must have come before


class Rope(NamedTuple):
    """The decoder's rotary numbers."""

    head_dim: int
    theta: float
    sections: tuple[int, int, int]
    interleaved: bool = False

    @staticmethod
    def of(shape: ModelShape) -> Rope:
        """Those of a model."""
        return Rope(shape.head_dim, shape.rope_theta, shape.mrope_section, shape.mrope_interleaved)

    def table(self, positions: Positions) -> RopeTable:
        """The rows of tokens at positions (3, tokens)."""
        return mrope_table(positions, *self)


def embed_prompt(decoder: Decoder[CacheT], ids: TokenIds, image_token_id: int, pictures: Sequence[Floats]) -> Floats:
    """Token embeddings (tokens, width) with the pictures' visual tokens put in their places, in order."""
    embeddings = decoder.embed(ids)
    if pictures:
        embeddings[ids == image_token_id] = np.concatenate(pictures)
    return embeddings


def prefill(
    decoder: Decoder[CacheT], rope: Rope, embeddings: Floats, positions: Positions, cache: CacheT, past: int
) -> Floats:
    """Run embeddings (tokens, width) at positions (3, tokens) on top of `past` cached tokens; logits of the last."""
    (logits,) = decoder.forward([Step(embeddings, cache, past, rope.table(positions))])
    last: Floats = logits[-1]
    return last


class Writing(Generic[CacheT]):
    """An answer that is being written: the tokens so far, and what of them the decoder has not seen yet."""

    def __init__(
        self,
        prompt: Iterable[int],
        cache: CacheT,
        past: int,
        position: int,
        stop_ids: Collection[int],
        max_tokens: int,
        walk: Walk | None = None,
    ) -> None:
        """`prompt` comes after the `past` tokens in the cache; its first token has the mRoPE `position`."""
        self.tokens: list[int] = []  # of the answer; a stop token that came before `max_tokens` is the last
        self.log_probs: list[float] = []  # of each, among those that could have come
        self._prompt, self._cache, self._past, self._position = list(prompt), cache, past, position
        self._stop_ids, self._max_tokens = stop_ids, max_tokens
        self._ran = 0  # of the prompt and the answer
        self._walk = walk or free()
        self._legal: Ids | None = None
        self._follow(next(self._walk))

    @property
    def done(self) -> bool:
        """Whether nothing comes after the tokens that are there."""
        return bool(self.tokens) and (self.tokens[-1] in self._stop_ids or len(self.tokens) >= self._max_tokens)

    def next_step(self, decoder: Decoder[CacheT], rope: Rope) -> tuple[Step[CacheT], list[int]]:
        """What has to be run for the next token, and the tokens after it that are only guessed."""
        whole = self._prompt + self.tokens
        draft: list[int] = []
        if self._legal is None and decoder.batches and self.tokens:
            draft = look_up(whole, min(DRAFT, self._max_tokens - len(self.tokens) - 1))
        ids = np.array(whole[self._ran :] + draft, np.int64)
        table = rope.table(text_positions(self._position + self._ran, len(ids)))
        step = Step(decoder.embed(ids), self._cache, self._past + self._ran, table, 1 + len(draft), self._legal)
        self._ran = len(whole)
        return step, draft

    def take(self, logits: Floats, draft: Sequence[int]) -> None:
        """Logits (1 + drafted, ids) of a step -> the next token, and as many after it as were guessed right."""
        for row, guess in zip_longest(logits, draft):
            before = len(self.tokens)
            best = int(row.argmax())
            token = best if self._legal is None else int(self._legal[best])
            self._accept(token, float(-np.log(np.exp(row - row[best]).sum(dtype=np.float64))))
            if token != guess or self.done:
                return
            self._ran += 1  # its keys and values are in their place
            if self._legal is not None or len(self.tokens) > before + 1:
                return

    def _accept(self, token: int, log_prob: float) -> None:
        self.tokens.append(token)
        self.log_probs.append(log_prob)
        if not self.done:
            self._follow(self._walk.send(token))

    def _follow(self, legal: Ids | None) -> None:
        """Write what has no alternative, up to the next choice."""
        while legal is not None and len(legal) == 1:
            self.tokens.append(int(legal[0]))
            self.log_probs.append(0.0)
            if self.done:
                return
            legal = self._walk.send(self.tokens[-1])
        self._legal = legal


def advance(decoder: Decoder[CacheT], rope: Rope, writings: Sequence[Writing[CacheT]]) -> None:
    """One step of every answer that is not done, all in one call of the decoder."""
    waiting = [writing for writing in writings if not writing.done]
    steps = [writing.next_step(decoder, rope) for writing in waiting]
    for writing, (_, draft), logits in zip(waiting, steps, decoder.forward([step for step, _ in steps]), strict=True):
        writing.take(logits, draft)


def decode(
    decoder: Decoder[CacheT],
    rope: Rope,
    writings: Sequence[Writing[CacheT]],
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Write greedily until all are done; `on_step` is called after each step, and an error from it ends the loop."""
    while any(not writing.done for writing in writings):
        advance(decoder, rope, writings)
        on_step()


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """What followed the last LOOKUP tokens where they came before, the last time that they did; up to `most` tokens."""
    end = list(tokens[-LOOKUP:])
    for start in range(len(tokens) - LOOKUP - 1, -1, -1):
        if list(tokens[start : start + LOOKUP]) == end:
            return list(tokens[start + LOOKUP : start + LOOKUP + max(0, most)])
    return []
