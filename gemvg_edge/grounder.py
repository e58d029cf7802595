"""The door of the runtime: a bundle, then pictures, then questions.

    grounder = Grounder.open()                      # the bundle that ships with the package
    scene = grounder.look(["left.png", "right.png"])  # vision tower and prefill of the pictures, once
    scene.ground("the red mug").boxes               # prefill of the query and decoding, as often as needed

Puts the other modules in a row; holds no arithmetic of its own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from gemvg_edge.bundle import MANIFEST, TOKENIZER, Bundle, Manifest, open_bundle
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines import ENGINES
from gemvg_edge.engines.protocol import Decoder, Floats, VisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.familiar import unfamiliar
from gemvg_edge.grounding import Grounding, Picture, Timings
from gemvg_edge.images import (
    EDGE_MAX_PIXELS,
    NAME,
    Grid,
    ImageSource,
    Preprocessing,
    check_list,
    load_image,
    patchify,
    resize,
    resized_sizes,
)
from gemvg_edge.json_object import short
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import mrope_positions, visual_tokens
from gemvg_edge.prompt import check_query, encode_prefix
from gemvg_edge.scene import OnText, Scene, Seen
from gemvg_edge.stopping import Stopping, Turn, stopping
from gemvg_edge.tokenizer import check_tokens, open_tokenizer

MAX_THREADS = 1024
MAX_TOKENS = 2**20  # of a query or an answer: a scene's cache is made for all of them at once
MANY_TOKENS = 2048  # of all pictures of a scene; past them a look is slow on any small machine, and says so
log = logging.getLogger("gemvg_edge")


class Grounder:
    """A model that was opened and can look at pictures, from any thread. Use `Grounder.open`, and `with` to close it.

    Pickled by its bundle's path and its options: it is opened again where it arrives.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        vision: VisionTower,
        decoder: Decoder[Any],
        max_query_tokens: int,
        max_new_tokens: int,
        max_pixels: int | None = None,
    ) -> None:
        shape = manifest.model
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.vision = vision
        self.decoder = decoder
        self.rope = Rope(shape.head_dim, shape.rope_theta, shape.mrope_section)
        self.max_query_tokens = max_query_tokens
        self.max_new_tokens = max_new_tokens
        self.preprocessing = manifest.preprocessing.within(max_pixels)
        # ONNX Runtime's sessions may run in several threads at once; TensorRT's engines share buffers and a stream.
        self.turn = Turn() if manifest.tensorrt else None
        self._closed = False
        self._reopen: tuple[str, dict[str, Any]] | None = None
        self._told: set[str] = set()  # warnings are given once

    @staticmethod
    def open(
        bundle: str | os.PathLike[str] = DEFAULT_BUNDLE,
        *,
        engine: str | None = None,
        threads: int = 0,
        max_pixels: int | None = None,
        max_query_tokens: int = 256,
        max_new_tokens: int = 256,
        check_hashes: bool = True,
    ) -> Grounder:
        """Open and verify a bundle folder; by default the small tabletop model that ships with the package.

        `engine` is "onnx" (ONNX Runtime on the CPU), "onnx-cuda" or "onnx-tensorrt" (its other providers), or
        "tensorrt" for a folder that `export.to_tensorrt` built; left out, it is what the folder is for. `threads` is
        the CPU's (0: one a physical core). `max_pixels` is the budget of each picture, in pixels after resizing (left
        out, the bundle's); 28 x 28 of them are a token. The two token limits size the cache of every scene.
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
        if not isinstance(bundle, (str, os.PathLike)) or not isinstance(name := os.fspath(bundle), str) or not name:
            raise GemvgError(f"bundle={short(bundle)}; give the path of a bundle folder")
        opened = open_bundle(Path(bundle), check_hashes)
        opened.manifest.preprocessing.within(max_pixels)  # before the engine is loaded
        chosen = engine or ("tensorrt" if opened.manifest.tensorrt else "onnx")
        vision, decoder = _open_engine(opened, chosen, threads)
        tokenizer = open_tokenizer(opened.path(TOKENIZER), "copy or export the bundle again")
        shape, file = opened.manifest.model, opened.path(TOKENIZER)
        check_tokens(tokenizer, file, opened.manifest.answer, shape.image_token_id, MANIFEST)
        if (tokens := max(tokenizer.get_vocab().values(), default=0)) >= shape.vocab_size:
            raise GemvgError(f"{file} has a token {tokens}, the model only {shape.vocab_size}; export the bundle again")
        grounder = Grounder(opened.manifest, tokenizer, vision, decoder, max_query_tokens, max_new_tokens, max_pixels)
        options: dict[str, Any] = {"engine": engine, "threads": threads, "max_pixels": max_pixels}
        options |= {"max_query_tokens": max_query_tokens, "max_new_tokens": max_new_tokens}
        grounder._reopen = (os.path.abspath(bundle), options | {"check_hashes": check_hashes})
        log.info("opened %s with engine %s: %s", opened.folder, chosen, opened.manifest.name)
        return grounder

    def look(
        self,
        images: Sequence[ImageSource],
        *,
        max_pixels: int | None = None,
        bgr: bool = False,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Scene:
        """Encode and prefill the pictures; each is a path, encoded bytes, a PIL image or an array of pixels.

        Arrays are uint8 of shape (height, width, 3) in RGB order, with `bgr` in OpenCV's, or with alpha last; or grey
        (height, width) of 8 or 16 bits. `max_pixels` is the budget of each picture for this scene. `timeout` (seconds)
        and `cancel` end the work between two of its phases, with TimedOut or Cancelled.
        """
        return self._look(check_list(images), self._numbers(max_pixels), bgr, stopping(timeout, cancel))

    def ground(
        self,
        images: Sequence[ImageSource],
        query: str,
        *,
        think: bool = False,
        max_pixels: int | None = None,
        bgr: bool = False,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_text: OnText | None = None,
    ) -> Grounding:
        """Look and ask in one go; use `look` when the same pictures get several questions. Arguments as there."""
        check_query(query)  # before the expensive half
        stop = stopping(timeout, cancel)
        return self._look(check_list(images), self._numbers(max_pixels), bgr, stop).ask(query, think, stop, on_text)

    def close(self) -> None:
        """Let the engine's memory go once nothing uses it; later questions raise GemvgError. Twice is no error."""
        self._closed = True
        self.vision = self.decoder = None  # type: ignore[assignment]

    def engines(self) -> tuple[VisionTower, Decoder[Any]]:
        """Both networks, to be kept by a request while it works; GemvgError after `close`."""
        vision, decoder = self.vision, self.decoder
        if self._closed or vision is None or decoder is None:
            raise GemvgError("this Grounder was closed; open one again with Grounder.open")
        return vision, decoder

    def in_turn(self, stop: Stopping) -> AbstractContextManager[None]:
        """The engine, where only one request at a time can have it."""
        return self.turn.taken(stop) if self.turn else nullcontext()

    def __enter__(self) -> Grounder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> Any:
        if self._reopen is None:
            raise GemvgError("this Grounder was not made by Grounder.open, so it cannot be opened again elsewhere")
        return _open_again, self._reopen

    def _numbers(self, max_pixels: int | None) -> Preprocessing:
        self.engines()
        return self.preprocessing if max_pixels is None else self.manifest.preprocessing.within(max_pixels)

    def _look(self, images: Sequence[ImageSource], numbers: Preprocessing, bgr: bool, stop: Stopping) -> Scene:
        started = time.perf_counter()
        pictures = [load_image(source, f"images[{k}]", bgr) for k, source in enumerate(images)]
        self._warn(pictures, numbers)
        stop.check()
        patches, grids = zip(*(patchify(resize(picture, numbers), numbers) for picture in pictures), strict=True)
        preprocessed = time.perf_counter()
        with self.in_turn(stop):
            stop.check()
            vision, decoder = self.engines()
            visual = vision.encode(patches, grids)
            encoded = time.perf_counter()
            stop.check()
            seen = self.prefill_pictures(decoder, visual, grids)
            stop.check()
        finished = time.perf_counter()
        timings = Timings(
            preprocess_ms=(preprocessed - started) * 1e3,
            vision_ms=(encoded - preprocessed) * 1e3,
            image_prefill_ms=(finished - encoded) * 1e3,
            image_tokens=seen.past,
        )
        log.info("looked at %d pictures, %d tokens, in %.0f ms", len(pictures), seen.past, timings.total_ms)
        given = [Picture(picture.info[NAME], *picture.size) for picture in pictures]
        return Scene(self, given, seen, numbers, timings)

    def prefill_pictures(self, decoder: Decoder[Any], visual: Sequence[Floats], grids: Sequence[Grid]) -> Seen:
        """Pictures' visual tokens in a new cache, with room for a question and its answer; under the lock."""
        merge, image_token_id = self.manifest.preprocessing.merge_size, self.manifest.model.image_token_id
        ids = encode_prefix(self.tokenizer, self.manifest.prompt, grids, merge)
        positions = mrope_positions(ids, image_token_id, grids, merge)
        embeddings = embed_prompt(decoder, ids, image_token_id, visual)
        cache = decoder.new_cache(len(ids) + self.max_query_tokens + self.max_new_tokens)
        prefill(decoder, self.rope, embeddings, positions, cache, 0)
        kept = (visual, grids) if len(grids) > 1 and self.manifest.answer.unnamed == "each" else ((), ())
        return Seen(cache, len(ids), int(positions.max()) + 1, *kept)

    def _warn(self, pictures: Sequence[Image.Image], numbers: Preprocessing) -> None:
        """Say once what a look of this many pixels costs, and once that pictures are not what the model knows."""
        side = numbers.patch_size
        grids = [(1, h // side, w // side) for w, h in resized_sizes([p.size for p in pictures], numbers)]
        tokens = sum(visual_tokens(grid, numbers.merge_size) for grid in grids)
        if tokens > MANY_TOKENS and "cost" not in self._told:
            self._told.add("cost")
            shape = self.manifest.model
            cache = 2 * 4 * shape.layers * shape.kv_heads * shape.head_dim * tokens
            log.warning(
                "%d pictures take %d tokens, and their cache up to %d MiB: slow on a small machine; give a lower "
                "max_pixels than %d, such as %d (%d tokens a picture at most)",
                len(pictures),
                tokens,
                math.ceil(cache / 2**20),
                numbers.max_pixels,
                EDGE_MAX_PIXELS,
                EDGE_MAX_PIXELS // (side * numbers.merge_size) ** 2,
            )
        if "familiar" not in self._told and (why := unfamiliar(pictures, self.manifest.familiar)):
            self._told.add("familiar")
            log.warning("%s; boxes may mean nothing (the model %s)", why, self.manifest.name)


def _open_again(bundle: str, options: dict[str, Any]) -> Grounder:
    return Grounder.open(bundle, **options)


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
