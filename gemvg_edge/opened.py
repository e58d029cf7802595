"""An opened model: both networks, the tokenizer and the manifest of one bundle, shared by all scenes.

Knows prompts and caches; no pixels, no answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.bundle import MANIFEST, TOKENIZER, Bundle, Manifest, open_bundle
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines import ENGINES
from gemvg_edge.engines.protocol import Decoder, Floats, VisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.json_object import short
from gemvg_edge.positions import mrope_positions
from gemvg_edge.prompt import encode_prefix
from gemvg_edge.stopping import Stopping, Turn
from gemvg_edge.tokenizer import check_tokens, open_tokenizer

MAX_THREADS = 1024
MAX_TOKENS = 2**20  # of a query or an answer: a scene's cache is made for all of them at once


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
class Seen:
    """Pictures in an engine's cache, and where a question goes on."""

    cache: Any
    past: int  # tokens in the cache
    position: int  # mRoPE's next
    visual: Sequence[Floats] = ()  # each picture's tokens, kept where it may be asked about alone
    grids: Sequence[Grid] = ()


class OpenedModel:
    """Both networks with what they need to be asked, until they are closed."""

    def __init__(
        self, manifest: Manifest, tokenizer: Tokenizer, vision: VisionTower, decoder: Decoder[Any], limits: Limits
    ) -> None:
        shape = manifest.model
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.rope = Rope(shape.head_dim, shape.rope_theta, shape.mrope_section)
        self.limits = limits
        self._engines: tuple[VisionTower, Decoder[Any]] | None = (vision, decoder)
        # ONNX Runtime's sessions may run in several threads at once; TensorRT's engines share buffers and a stream.
        self._turn = Turn() if manifest.tensorrt else None

    def engines(self) -> tuple[VisionTower, Decoder[Any]]:
        """Both networks, to be kept by a request while it works; GemvgError after `close`."""
        if (engines := self._engines) is None:
            raise GemvgError("this Grounder was closed; open one again with Grounder.open")
        return engines

    def in_turn(self, stop: Stopping) -> AbstractContextManager[None]:
        """The engine, where only one request at a time can have it."""
        return self._turn.taken(stop) if self._turn else nullcontext()

    def close(self) -> None:
        """Let the networks go; a request that has them finishes."""
        self._engines = None

    def prefill_pictures(self, decoder: Decoder[Any], visual: Sequence[Floats], grids: Sequence[Grid]) -> Seen:
        """Pictures' visual tokens in a new cache, with room for a question and its answer; under the lock."""
        merge, image_token_id = self.manifest.preprocessing.merge_size, self.manifest.model.image_token_id
        ids = encode_prefix(self.tokenizer, self.manifest.prompt, grids, merge)
        positions = mrope_positions(ids, image_token_id, grids, merge)
        embeddings = embed_prompt(decoder, ids, image_token_id, visual)
        cache = decoder.new_cache(len(ids) + self.limits.query_tokens + self.limits.new_tokens)
        prefill(decoder, self.rope, embeddings, positions, cache, 0)
        kept = (visual, grids) if len(grids) > 1 and self.manifest.answer.unnamed == "each" else ((), ())
        return Seen(cache, len(ids), int(positions.max()) + 1, *kept)


def open_model(folder: Path, engine: str | None, threads: int, limits: Limits, check_hashes: bool) -> OpenedModel:
    """Verify a bundle and open its networks; arguments as in `Grounder.open`."""
    limits.check()
    if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
        raise GemvgError(f"threads={short(threads)}; give 0 for one a physical core, or a number up to {MAX_THREADS}")
    bundle = open_bundle(folder, check_hashes)
    vision, decoder = _open_engine(bundle, engine or ("tensorrt" if bundle.manifest.tensorrt else "onnx"), threads)
    tokenizer = open_tokenizer(bundle.path(TOKENIZER), "copy or export the bundle again")
    shape, file = bundle.manifest.model, bundle.path(TOKENIZER)
    check_tokens(tokenizer, file, bundle.manifest.answer, shape.image_token_id, MANIFEST)
    if (tokens := max(tokenizer.get_vocab().values(), default=0)) >= shape.vocab_size:
        raise GemvgError(f"{file} has a token {tokens}, the model only {shape.vocab_size}; export the bundle again")
    return OpenedModel(bundle.manifest, tokenizer, vision, decoder, limits)


def _open_engine(bundle: Bundle, engine: str, threads: int) -> tuple[VisionTower, Decoder[Any]]:
    """Both networks. An engine is imported only here, so that everything else works without one."""
    built = bundle.manifest.tensorrt is not None
    if engine not in ENGINES:
        raise GemvgError(f"engine={engine!r}; give one of {', '.join(ENGINES)}")
    if built != (engine == "tensorrt"):
        holds = "TensorRT engines" if built else "ONNX graphs"
        fix = "open it with engine='tensorrt'" if built else "build engines with `python -m export.to_tensorrt`"
        raise GemvgError(f"{bundle.folder} holds {holds}, which engine={engine!r} does not run; {fix}")
    if built:
        from gemvg_edge.engines.tensorrt import open_engines

        return open_engines(bundle)
    from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower

    return OnnxVisionTower(bundle, threads, engine), OnnxDecoder(bundle, threads, engine)
