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
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from gemvg_edge.bundle import Manifest
from gemvg_edge.cache import CACHE_BYTES
from gemvg_edge.errors import GemvgError
from gemvg_edge.familiar import unfamiliar
from gemvg_edge.grounding import Grounding, Timings
from gemvg_edge.images import (
    EDGE_MAX_PIXELS,
    ImageSource,
    Preprocessing,
    check_aspect,
    check_list,
    load_image,
    resized_sizes,
)
from gemvg_edge.json_object import short
from gemvg_edge.looking import Resized, encode, recall, resize_all
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.opened import Limits, OpenedModel, open_model
from gemvg_edge.pictures import NAME
from gemvg_edge.positions import visual_tokens
from gemvg_edge.prompt import check_query
from gemvg_edge.pruning import PRUNING, Pruning, check_pruning
from gemvg_edge.queueing import Request, in_turn
from gemvg_edge.scene import Scene
from gemvg_edge.stopping import Stopping, stopping
from gemvg_edge.streaming import OnText

MANY_TOKENS = 2048  # of all pictures of a scene; past them a look is slow on any small machine, and says so
log = logging.getLogger("gemvg_edge")


class Grounder:
    """A model that was opened and can look at pictures, from any thread. Use `Grounder.open`, and `with` to close it.

    Pickled by its bundle's path and its options: it is opened again where it arrives.
    """

    def __init__(self, model: OpenedModel, max_pixels: int | None = None) -> None:
        self.model = model
        self.preprocessing = model.manifest.preprocessing.within(max_pixels)
        self._reopen: tuple[str, dict[str, Any]] | None = None
        self._told: set[str] = set()  # warnings are given once

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.model.manifest

    @staticmethod
    def open(
        bundle: str | os.PathLike[str] | None = None,
        *,
        engine: str | None = None,
        threads: int = 0,
        max_pixels: int | None = None,
        max_query_tokens: int = 256,
        max_new_tokens: int = 256,
        check_hashes: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> Grounder:
        """Open and verify a bundle folder; without one the small tabletop model that ships with the package.

        `engine` is "native" (our own, on the CPU), "onnx" (ONNX Runtime on the CPU), "onnx-cuda" (ONNX Runtime on a
        GPU), or "tensorrt" for a folder that `export.to_tensorrt` built; left out, the fastest that runs the folder
        here. `threads` is the CPU's (0: one a physical core). `max_pixels` is the budget of each picture, in pixels
        after resizing (left out, the bundle's); 28 x 28 of them are a token. The two token limits size the cache of
        every scene. `cache_bytes` bounds what is kept of earlier looks, for those that show some of the same pictures
        (256 MiB unless given, some scenes of a 2B model; 0 keeps nothing); answers are the same with and without.
        """
        bundle = DEFAULT_BUNDLE if bundle is None else bundle
        if not isinstance(bundle, (str, os.PathLike)) or not isinstance(name := os.fspath(bundle), str) or not name:
            raise GemvgError(f"bundle={short(bundle)}; give the path of a bundle folder")
        limits = Limits(max_query_tokens, max_new_tokens)
        model = open_model(Path(bundle), engine, threads, limits, check_hashes, cache_bytes)
        grounder = Grounder(model, max_pixels)
        options: dict[str, Any] = {"engine": engine, "threads": threads, "max_pixels": max_pixels}
        options |= {"max_query_tokens": max_query_tokens, "max_new_tokens": max_new_tokens}
        grounder._reopen = (
            os.path.abspath(bundle),
            options | {"check_hashes": check_hashes, "cache_bytes": cache_bytes},
        )
        log.info("opened %s: %s", bundle, grounder.manifest.name)
        return grounder

    def look(
        self,
        images: Sequence[ImageSource],
        *,
        max_pixels: int | None = None,
        bgr: bool = False,
        keep: float | None = None,
        pruning: str = PRUNING,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Scene:
        """Encode and prefill the pictures; each is a path, encoded bytes, a PIL image or an array of pixels.

        Arrays are uint8 of shape (height, width, 3) in RGB order, with `bgr` in OpenCV's, or with alpha last; or grey
        (height, width) of 8 or 16 bits. `max_pixels` is the budget of each picture for this scene. `keep` is the share
        of its visual tokens that the decoder is given (left out, all), chosen by `pruning`: "diverse", "merge" or
        "random"; boxes may be lost, and docs/howto/pixels.md says how many. `timeout` (seconds) and `cancel` end the
        work between two of its phases, with TimedOut or Cancelled. GemvgError names the picture that cannot be read.
        """
        fewer = check_pruning(keep, pruning)
        stop = stopping(timeout, cancel)
        return self._look(self._resize(check_list(images), max_pixels, bgr, fewer, stop), stop)

    def ground(
        self,
        images: Sequence[ImageSource],
        query: str,
        *,
        think: bool = False,
        constrained: bool = True,
        max_pixels: int | None = None,
        bgr: bool = False,
        keep: float | None = None,
        pruning: str = PRUNING,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        on_text: OnText | None = None,
    ) -> Grounding:
        """Look and ask in one go; use `look` when the same pictures get several questions.

        Arguments as there and in `Scene.ground`.
        """
        check_query(query)  # before the expensive half
        fewer = check_pruning(keep, pruning)
        stop = stopping(timeout, cancel)
        resized = self._resize(check_list(images), max_pixels, bgr, fewer, stop)
        return self._look(resized, stop).ask(query, think, stop, on_text, constrained)

    def ground_all(
        self, requests: Iterable[Request], *, ahead: int = 1
    ) -> Generator[Grounding | GemvgError, None, None]:
        """Answer a `Request` after the other, in their order; one that fails brings its GemvgError and ends nothing.

        The pictures of the next `ahead` requests are read and resized in a thread while the model works, and requests
        are drawn there: a generator of them may wait for a camera. An exception of its own is raised here, in its turn.
        """
        return in_turn(requests, self._prepare, self._answer, ahead)

    def close(self) -> None:
        """Let the engine's memory go once nothing uses it; later questions raise GemvgError. Twice is no error."""
        self.model.close()

    def __repr__(self) -> str:
        return f"<Grounder of {self.manifest.name}>"

    def __enter__(self) -> Grounder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> Any:
        if self._reopen is None:
            raise GemvgError("this Grounder was not made by Grounder.open, so it cannot be opened again elsewhere")
        return _open_again, self._reopen

    def _prepare(self, request: Request, stop: Stopping) -> Resized:
        check_query(request.query)
        fewer = check_pruning(request.keep, request.pruning)
        return self._resize(check_list(request.images), request.max_pixels, request.bgr, fewer, stop)

    def _answer(self, request: Request, resized: Resized, stop: Stopping) -> Grounding:
        return self._look(resized, stop).ask(request.query, request.think, stop, None, request.constrained)

    def _resize(
        self, images: Sequence[ImageSource], max_pixels: int | None, bgr: bool, pruning: Pruning | None, stop: Stopping
    ) -> Resized:
        """The first half of a look, which needs no engine and may be done ahead of its turn."""
        self.model.engines()
        numbers = self.preprocessing if max_pixels is None else self.manifest.preprocessing.within(max_pixels)
        started = time.perf_counter()
        pictures = [load_image(source, f"images[{k}]", bgr) for k, source in enumerate(images)]
        for picture in pictures:
            check_aspect(*picture.size, picture.info[NAME])
        unlike = self._unlike(pictures, numbers)
        self._warn(pictures, numbers, unlike)
        stop.check()
        return resize_all(pictures, numbers, pruning, "; ".join(unlike.values()) or None, started)

    def _look(self, resized: Resized, stop: Stopping) -> Scene:
        """The other half: what of these pictures no earlier look left goes through both networks."""
        started = time.perf_counter()
        recalled = recall(resized, self.model.cache, self.model.asks_alone and len(resized.keys) > 1)
        patched = time.perf_counter()
        with self.model.in_turn(stop):
            stop.check()
            vision, decoder = self.model.engines()
            turn = time.perf_counter()
            visual = encode(resized, recalled, self.model.cache, vision)
            encoded = time.perf_counter()
            stop.check()
            seen = self.model.prefill_pictures(decoder, visual, resized.grids, recalled.prefix)
            stop.check()
        finished = time.perf_counter()
        timings = Timings(
            preprocess_ms=resized.ms + (patched - started) * 1e3,
            vision_ms=(encoded - turn) * 1e3,
            image_prefill_ms=(finished - encoded) * 1e3,
            image_tokens=seen.past,
            cached_tokens=seen.cached,
        )
        log.info(
            "looked at %d pictures, %d tokens (%d of them known), in %.0f ms",
            len(resized.pictures),
            seen.past,
            seen.cached,
            timings.total_ms,
        )
        return Scene(self.model, resized.pictures, seen, resized.numbers, timings, resized.warning)

    def _unlike(self, pictures: Sequence[Image.Image], numbers: Preprocessing) -> dict[str, str]:
        """What about a look is unlike the training, by its kind."""
        known, most = self.manifest.familiar, self.manifest.preprocessing.max_pixels
        unlike = {}
        if known.pictures and numbers.max_pixels > most:
            unlike["budget"] = f"max_pixels={numbers.max_pixels} is past the {most} of the training"
        if why := unfamiliar(pictures, known):
            unlike["familiar"] = why
        return unlike

    def _warn(self, pictures: Sequence[Image.Image], numbers: Preprocessing, unlike: Mapping[str, str]) -> None:
        """Say once what a look of this many pixels costs, and once each what is unlike the training."""
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
        for kind, warning in unlike.items():
            if kind not in self._told:
                self._told.add(kind)
                log.warning("%s; boxes may mean nothing (the model %s)", warning, self.manifest.name)


def _open_again(bundle: str, options: dict[str, Any]) -> Grounder:
    return Grounder.open(bundle, **options)
