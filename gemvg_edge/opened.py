"""An opened model: both networks, the tokenizer and the manifest of one bundle, shared by all scenes.

Knows prompts and caches, and what earlier looks left; no pixels, no answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gemvg_edge.bundle import MANIFEST, TOKENIZER, Manifest, open_bundle
from gemvg_edge.cache import CACHE_BYTES, Digest, Prefix, SceneCache
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines.opening import open_engine
from gemvg_edge.engines.protocol import Decoder, Floats, Ids, KeyValueCache, VisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.json_object import short
from gemvg_edge.positions import Positions, mrope_positions, visual_tokens
from gemvg_edge.prompt import TokenIds, encode, encode_prefix
from gemvg_edge.stopping import Stopping, Turn
from gemvg_edge.tokenizer import check_tokens, open_tokenizer

MAX_THREADS = 1024
MAX_TOKENS = 2**20  # of a query or an answer: a scene's cache is made for all of them at once
PICTURE_END = "<|vision_end|>"
log = logging.getLogger("gemvg_edge")


@dataclass(frozen=True)
class Limits:
    """The most tokens of a query and of an answer; they size the cache of every scene."""

    query_tokens: int
    new_tokens: int

    def check(self) -> None:
        """GemvgError for what is no number of tokens."""
        if not all(type(n) is int and 1 <= n <= MAX_TOKENS for n in (self.query_tokens, self.new_tokens)):
            raise GemvgError(
                f"max_query_tokens={short(self.query_tokens)} and max_new_tokens={short(self.new_tokens)} must be at "
                f"least 1 and at most {MAX_TOKENS}"
            )


@dataclass(frozen=True)
class Visual:
    """A picture as the decoder is given it."""

    key: Digest  # of the picture, and of how it was pruned
    tokens: Floats | None  # (kept, embedding width), or None where its keys and values are at hand
    kept: Ids | None = None  # (kept,) which of the picture's tokens these are; None: all


@dataclass(frozen=True)
class Seen:
    """Pictures in an engine's cache, and where a question goes on."""

    cache: Any
    past: int  # tokens in the cache
    position: int  # mRoPE's next
    visual: Sequence[Visual] = ()  # each picture's tokens, kept where it may be asked about alone
    grids: Sequence[Grid] = ()
    cached: int = 0  # of its tokens, those that were taken from an earlier look


class OpenedModel:
    """Both networks with what they need to be asked, until they are closed."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        vision: VisionTower,
        decoder: Decoder[Any],
        limits: Limits,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.rope = Rope.of(manifest.model)
        self.limits = limits
        self.cache = SceneCache(cache_bytes)
        self._engines: tuple[VisionTower, Decoder[Any]] | None = (vision, decoder)
        # ONNX Runtime's sessions may run in several threads at once; other engines share buffers.
        self._turn = Turn() if manifest.tensorrt or decoder.batches else None

    def engines(self) -> tuple[VisionTower, Decoder[Any]]:
        """Both networks, to be kept by a request while it works; GemvgError after `close`."""
        if (engines := self._engines) is None:
            raise GemvgError("this Grounder was closed; open one again with Grounder.open")
        return engines

    def in_turn(self, stop: Stopping) -> AbstractContextManager[None]:
        """The engine, where only one request at a time can have it."""
        return self._turn.taken(stop) if self._turn else nullcontext()

    def close(self) -> None:
        """Let the networks go, and what earlier looks left; a request that has them finishes."""
        self._engines = None
        self.cache.close()

    @property
    def asks_alone(self) -> bool:
        """Whether a question may be asked about each picture by itself."""
        return self.manifest.answer.unnamed == "each"

    def prefill_pictures(
        self, decoder: Decoder[Any], visual: Sequence[Visual], grids: Sequence[Grid], prefix: Prefix | None = None
    ) -> Seen:
        """Pictures in a new cache, with room for a question and its answer; under the lock.

        `prefix` is what earlier looks left of the first of them, looked for here where it is not given.
        """
        keys = [one.key for one in visual]
        prefix = prefix or self.cache.prefix(keys)
        ids, positions, position, ends = self._prompt(visual, grids)
        cache = decoder.new_cache(len(ids) + self.limits.query_tokens + self.limits.new_tokens)
        known = prefix.pictures if prefix else 0
        past = int(ends[known - 1]) if known else 0
        if prefix:
            decoder.copy(prefix.cache, cache, past)  # a scene extends its cache in place, so it has one of its own
        if past < len(ids):
            tokens = [one.tokens for one in visual[known:] if one.tokens is not None]
            embeddings = embed_prompt(decoder, ids[past:], self.manifest.model.image_token_id, tokens)
            # A run a picture, whatever is known, where a sum's last digit depends on how many tokens go through
            # together: it would choose another coordinate now and then.
            least = np.diff(ends, prepend=0).min() if ends[-1] == len(ids) else 0
            steady = 0 < decoder.steady < least
            places = (past, len(ids)) if steady else (past, *map(int, ends[known:]), len(ids))
            for start, end in pairwise(dict.fromkeys(places)):
                here = slice(start - past, end - past)
                prefill(decoder, self.rope, embeddings[here], positions[:, start:end], cache, start)
            self._keep(decoder, keys, cache, len(ids))
        kept = (visual, grids) if len(grids) > 1 and self.asks_alone else ((), ())
        return Seen(cache, len(ids), position, *kept, cached=past)

    def _prompt(
        self, visual: Sequence[Visual], grids: Sequence[Grid]
    ) -> tuple[TokenIds, Positions, int, npt.NDArray[np.int64]]:
        """Ids (tokens,) and positions (3, tokens) of the pictures, mRoPE's next, and where each picture ends.

        What of a picture was pruned is missing, and all else is at the place that it has in the whole.
        """
        merge, image_token_id = self.manifest.preprocessing.merge_size, self.manifest.model.image_token_id
        ids = encode_prefix(self.tokenizer, self.manifest.prompt, grids, merge)
        positions = mrope_positions(ids, image_token_id, grids, merge)
        places = np.split(np.flatnonzero(ids == image_token_id), np.cumsum([visual_tokens(g, merge) for g in grids]))
        stays = np.ones(len(ids), bool)
        for one, here in zip(visual, places, strict=False):  # the last piece is empty
            if one.kept is not None:
                stays[here] = False
                stays[here[one.kept]] = True
        # What closes a picture belongs to it, where it is a token and cannot become one with the text that follows.
        closing = len(encode(self.tokenizer, PICTURE_END)) == 1
        ends = np.cumsum(stays)[[here[-1] + closing for here in places[:-1]]]
        return ids[stays], positions[:, stays], int(positions.max()) + 1, ends

    def _keep(self, decoder: Decoder[Any], keys: Sequence[Digest], cache: KeyValueCache, tokens: int) -> None:
        """Keep the pictures' keys and values for later looks, in a cache without room for more."""
        if not self.cache.holds(cache.bytes * tokens // cache.capacity):
            return
        try:
            trimmed = decoder.new_cache(tokens)
            decoder.copy(cache, trimmed, tokens)
        except GemvgError as error:  # the scene is whole without it
            log.info("nothing of these pictures is kept for later looks: %s", error)
            return
        self.cache.keep_prefix(keys, trimmed)


def open_model(
    folder: Path, engine: str | None, threads: int, limits: Limits, check_hashes: bool, cache_bytes: int = CACHE_BYTES
) -> OpenedModel:
    """Verify a bundle and open its networks; arguments as in `Grounder.open`."""
    limits.check()
    if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
        raise GemvgError(f"threads={short(threads)}; give 0 for one a physical core, or a number up to {MAX_THREADS}")
    bundle = open_bundle(folder, check_hashes)
    vision, decoder = open_engine(bundle, engine, threads)
    tokenizer = open_tokenizer(bundle.path(TOKENIZER), "copy or export the bundle again")
    shape, file = bundle.manifest.model, bundle.path(TOKENIZER)
    check_tokens(tokenizer, file, bundle.manifest.answer, shape.image_token_id, MANIFEST)
    if (tokens := max(tokenizer.get_vocab().values(), default=0)) >= shape.vocab_size:
        raise GemvgError(f"{file} has a token {tokens}, the model only {shape.vocab_size}; export the bundle again")
    return OpenedModel(bundle.manifest, tokenizer, vision, decoder, limits, cache_bytes)
