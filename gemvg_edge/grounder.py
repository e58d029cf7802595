"""The door of the runtime: a bundle, then pictures, then questions.

    grounder = Grounder.open()                      # the bundle that ships with the package
    scene = grounder.look(["left.png", "right.png"])  # vision tower and prefill of the pictures, once
    scene.ground("the red mug").boxes               # prefill of the query and decoding, as often as needed

Puts the other modules in a row; holds no arithmetic of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from gemvg_edge.answer import read_answer
from gemvg_edge.boxes import Box
from gemvg_edge.bundle import MANIFEST, TOKENIZER, Bundle, Manifest, open_bundle
from gemvg_edge.decoding import Rope, decode, embed_prompt, prefill, prefill_token
from gemvg_edge.engines.protocol import Decoder, VisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import ImageSource, load_image, patchify, resize, resized_sizes
from gemvg_edge.json_object import short
from gemvg_edge.marks import mark
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import mrope_positions, text_positions
from gemvg_edge.prompt import check_query, encode_prefix, encode_query
from gemvg_edge.tokenizer import check_tokens, open_tokenizer

MAX_THREADS = 1024
MAX_TOKENS = 2**20  # of a query or an answer: a scene's cache is made for all of them at once
ENGINES = ("onnx", "onnx-cuda", "onnx-tensorrt", "tensorrt")


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each phase, and how many tokens went through it; the first three belong to the scene."""

    preprocess_ms: float = 0.0
    vision_ms: float = 0.0
    image_prefill_ms: float = 0.0
    query_prefill_ms: float = 0.0
    decode_ms: float = 0.0
    image_tokens: int = 0
    query_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Grounding:
    """An answer: boxes in pixels of the original pictures, and how they came about."""

    boxes: tuple[Box, ...]
    text: str  # what the model wrote
    thinking: str  # the reasoning before the answer, where the model gave one
    problem: str | None  # why boxes may be missing: what was malformed in the text; None if nothing was
    timings: Timings


class Scene:
    """Pictures that were looked at, ready for questions, from any thread: one is answered after the other."""

    def __init__(self, grounder: Grounder, sizes: list[tuple[int, int]], past: int, position: int, cache: Any) -> None:
        self.sizes = sizes  # (width, height) of each original picture
        self.resized = resized_sizes(sizes, grounder.manifest.preprocessing)  # and as the model sees it
        self.timings = Timings()
        self._grounder = grounder
        self._past, self._position = past, position
        self._cache = cache
        self._lock = threading.Lock()  # a question extends the cache in place

    def mark(self, box: Box) -> str:
        """A box of one of the scene's pictures as a query shows it: `f"the same object as {scene.mark(box)}"`."""
        if not 0 <= box.image < len(self.sizes):
            raise GemvgError(f"{box} lies in none of the scene's {len(self.sizes)} pictures; they count from 0")
        return mark(box, self.sizes[box.image])

    def ground(self, query: str, *, think: bool = False) -> Grounding:
        """Ask for something; an answer that names nothing, or nothing readable, has no boxes.

        With `think` the model reasons before it answers, if it was trained to: slower, and not always better.
        """
        with self._lock, self._grounder.lock:
            return self._ground(query, think)

    def _ground(self, query: str, think: bool) -> Grounding:
        grounder = self._grounder
        started = time.perf_counter()
        manifest = grounder.manifest
        ids = encode_query(grounder.tokenizer, manifest.prompt, manifest.answer, query, think, self.resized)
        if len(ids) > grounder.max_query_tokens:
            raise GemvgError(
                f"the query takes {len(ids)} tokens, more than max_query_tokens={grounder.max_query_tokens}; "
                "shorten it or open the Grounder with more"
            )
        positions = text_positions(self._position, len(ids))
        first = prefill_token(
            grounder.decoder, grounder.rope, grounder.decoder.embed(ids), positions, self._cache, self._past
        )
        prefilled = time.perf_counter()
        stop_ids = manifest.model.eos_token_ids
        tokens = decode(
            grounder.decoder,
            grounder.rope,
            first,
            self._cache,
            self._past + len(ids),
            self._position + len(ids),
            stop_ids,
            grounder.max_new_tokens,
        )
        finished = time.perf_counter()
        stopped = tokens[-1] in stop_ids
        text: str = grounder.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=False)
        answer = read_answer(text, self.sizes, manifest.answer, self.resized)
        problem = answer.problem if stopped else f"the answer was cut at max_new_tokens={grounder.max_new_tokens}"
        timings = replace(
            self.timings,
            query_prefill_ms=(prefilled - started) * 1e3,
            decode_ms=(finished - prefilled) * 1e3,
            query_tokens=len(ids),
            answer_tokens=len(tokens),
        )
        return Grounding(answer.boxes, text, answer.thinking, problem, timings)


class Grounder:
    """A model that was opened and can look at pictures. Use `Grounder.open`."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        vision: VisionTower,
        decoder: Decoder[Any],
        max_query_tokens: int,
        max_new_tokens: int,
    ) -> None:
        shape = manifest.model
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.vision = vision
        self.decoder = decoder
        self.rope = Rope(shape.head_dim, shape.rope_theta, shape.mrope_section)
        self.max_query_tokens = max_query_tokens
        self.max_new_tokens = max_new_tokens
        # ONNX Runtime's sessions may run in several threads at once; TensorRT's engines share buffers and a stream.
        self.lock: AbstractContextManager[Any] = threading.RLock() if manifest.tensorrt else nullcontext()

    @staticmethod
    def open(
        bundle: str | os.PathLike[str] = DEFAULT_BUNDLE,
        *,
        engine: str | None = None,
        threads: int = 0,
        max_query_tokens: int = 256,
        max_new_tokens: int = 256,
        check_hashes: bool = True,
    ) -> Grounder:
        """Open and verify a bundle folder; by default the small tabletop model that ships with the package.

        `engine` is "onnx" (ONNX Runtime on the CPU), "onnx-cuda" or "onnx-tensorrt" (its other providers), or
        "tensorrt" for a folder that `export.to_tensorrt` built; left out, it is what the folder is for. `threads` is
        the CPU's (0: one a physical core). The two token limits size the cache of every scene.
        """
        if not all(type(n) is int and 1 <= n <= MAX_TOKENS for n in (max_query_tokens, max_new_tokens)):
            raise GemvgError(
                f"max_query_tokens={short(max_query_tokens)} and max_new_tokens={short(max_new_tokens)} must be at "
                f"least 1 and at most {MAX_TOKENS}"
            )
        if type(threads) is not int or not 0 <= threads <= MAX_THREADS:
            raise GemvgError(
                f"threads={short(threads)}; give 0 for one a physical core, or a number up to {MAX_THREADS}"
            )
        if not isinstance(bundle, (str, os.PathLike)) or not os.fspath(bundle):
            raise GemvgError(f"bundle={short(bundle)}; give the path of a bundle folder")
        opened = open_bundle(Path(bundle), check_hashes)
        vision, decoder = _open_engine(opened, engine or ("tensorrt" if opened.manifest.tensorrt else "onnx"), threads)
        tokenizer = open_tokenizer(opened.path(TOKENIZER), "copy or export the bundle again")
        shape, file = opened.manifest.model, opened.path(TOKENIZER)
        check_tokens(tokenizer, file, opened.manifest.answer, shape.image_token_id, MANIFEST)
        if (tokens := max(tokenizer.get_vocab().values(), default=0)) >= shape.vocab_size:
            raise GemvgError(f"{file} has a token {tokens}, the model only {shape.vocab_size}; export the bundle again")
        return Grounder(opened.manifest, tokenizer, vision, decoder, max_query_tokens, max_new_tokens)

    def look(self, images: Sequence[ImageSource]) -> Scene:
        """Encode and prefill the pictures; each is a path, encoded bytes, a PIL image or a uint8 RGB array."""
        if isinstance(images, (str, bytes, os.PathLike, np.ndarray)) or not isinstance(images, Sequence):
            raise GemvgError(
                f"images is a {type(images).__name__}; give a list of pictures, [picture] for a single one"
            )
        if not images:
            raise GemvgError("no pictures were given; a query needs at least one")
        started = time.perf_counter()
        pictures = [load_image(source, f"images[{k}]") for k, source in enumerate(images)]
        with self.lock:
            return self._look(pictures, started)

    def _look(self, pictures: Sequence[Image.Image], started: float) -> Scene:
        numbers = self.manifest.preprocessing
        patches, grids = zip(*(patchify(resize(picture, numbers), numbers) for picture in pictures), strict=True)
        preprocessed = time.perf_counter()
        visual = self.vision.encode(patches, grids)
        encoded = time.perf_counter()

        image_token_id = self.manifest.model.image_token_id
        ids = encode_prefix(self.tokenizer, self.manifest.prompt, grids, numbers.merge_size)
        positions = mrope_positions(ids, image_token_id, grids, numbers.merge_size)
        embeddings = embed_prompt(self.decoder, ids, image_token_id, visual)
        cache = self.decoder.new_cache(len(ids) + self.max_query_tokens + self.max_new_tokens)
        prefill(self.decoder, self.rope, embeddings, positions, cache, 0)
        finished = time.perf_counter()

        scene = Scene(self, [picture.size for picture in pictures], len(ids), int(positions.max()) + 1, cache)
        scene.timings = Timings(
            preprocess_ms=(preprocessed - started) * 1e3,
            vision_ms=(encoded - preprocessed) * 1e3,
            image_prefill_ms=(finished - encoded) * 1e3,
            image_tokens=len(ids),
        )
        return scene

    def ground(self, images: Sequence[ImageSource], query: str, *, think: bool = False) -> Grounding:
        """Look and ask in one go; use `look` when the same pictures get several questions."""
        check_query(query)  # before the expensive half
        return self.look(images).ground(query, think=think)


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
