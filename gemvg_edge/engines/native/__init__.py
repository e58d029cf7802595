"""Our own engine on the CPU: 8-bit products for pictures and prefill, weights at the memory's speed for decoding.

It runs bundles of the `fused` dialect in float32, reading their codes as they are; ONNX Runtime runs the same graphs,
and is its twin in the tests. C++ in `src`, called by ctypes. Knows neither text nor pictures.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import DECODER_GRAPH, VISION_GRAPH, Bundle, ModelShape
from gemvg_edge.engines.embedding import EmbeddingTable
from gemvg_edge.engines.finite import check_finite
from gemvg_edge.engines.graph_weights import (
    FIX,
    Layer,
    Network,
    Tensor,
    Unsupported,
    decoder_operators,
    read_network,
    vision_operators,
)
from gemvg_edge.engines.native.library import Library, Stored, Tokens, open_library
from gemvg_edge.engines.protocol import Floats, Ids, Step, VisionTower
from gemvg_edge.engines.steps import check_copy
from gemvg_edge.engines.vision_inputs import vision_runs
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.images import Grid

CHANNELS = 3
MOST_HEAD = 1024  # values of a head of the vision tower
log = logging.getLogger("gemvg_edge")


class Engine:
    """Threads and scratch memory that both networks of a bundle work in; one call at a time, others wait."""

    def __init__(self, threads: int = 0, path: Path | None = None) -> None:
        self.library = open_library(path)
        self.threads = threads or physical_cores()
        self._start()

    @property
    def handle(self) -> c_void_p:
        """The library's engine; a forked child, which has the weights but not the threads, starts its own."""
        if self._process != os.getpid():
            self._start()
        return self._handle

    def park(self) -> None:
        """End the threads until they are needed again: a process with one thread forks without a risk."""
        self._process = 0
        self._free()

    def _start(self) -> None:
        self._process = os.getpid()
        self._handle = self.library.made("engine", f"starting {self.threads} threads", self.threads)
        self._free = weakref.finalize(self, self.library.engine_free, self._handle)


class NativeVisionTower:
    """Qwen2-VL's vision tower; pictures of one grid share a run."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        model, numbers = bundle.manifest.model, bundle.manifest.preprocessing
        shape, merged = model.vision, numbers.merge_size**2
        self._path = bundle.path(VISION_GRAPH)
        _check_runnable(bundle)
        if shape.window:
            raise Unsupported(f"{printable(self._path)}: windows of attention are not built natively")
        if shape.head_dim > MOST_HEAD or merged % 2:  # the library takes patches in pairs
            what = f"heads of {shape.head_dim} and blocks of {merged} patches"
            raise Unsupported(f"{printable(self._path)}: {what} are not built natively")
        network = read_network(bundle, VISION_GRAPH, vision_operators(shape.depth))
        patch = CHANNELS * numbers.temporal_patch_size * numbers.patch_size**2
        middle = network.layers[3].outputs if len(network.layers) > 3 else 0
        width, last = shape.embed_dim, network.layers[-2].outputs
        wanted = [(width, patch)]
        wanted += [(3 * width, width), (width, width), (middle, width), (width, middle)] * shape.depth
        wanted += [(last, merged * width), (model.hidden_size, last)]
        _check_shapes(self._path, network, wanted, width)
        self._shape, self._merge, self._hidden = shape, numbers.merge_size, model.hidden_size
        kind = int(network.activation == "Gelu")
        numbers_of = (shape.depth, width, shape.heads, shape.head_dim, merged, model.hidden_size, kind)
        self.engine, self._network = engine, _fill(engine, "vision", numbers_of, network)

    def encode(self, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[Floats]:
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, hidden), in the order given."""
        tokens: dict[int, Floats] = {}
        for run in vision_runs(self._shape, self._merge, patches, grids):
            given = [np.ascontiguousarray(run.inputs[name], np.float32) for name in ("patches", "cos", "sin")]
            pictures, count, _ = given[0].shape
            out = np.empty((pictures, count // self._merge**2, self._hidden), np.float32)
            rows, cos, sin, to = (_address(array) for array in (*given, out))
            library = self.engine.library
            problem = library.encode(self.engine.handle, self._network, rows, pictures, count, cos, sin, to)
            library.check(problem, f"looking at {pictures} picture(s) of {count} patches")
            check_finite(out, self._path, "a picture's tokens are", "float32")
            tokens.update(zip(run.members, out, strict=True))
        return [tokens[i] for i in range(len(grids))]


class NativeCache:
    """Keys and values of a scene, in 16 bits."""

    def __init__(self, library: Library, network: c_void_p, capacity: int) -> None:
        self.capacity = capacity
        size = c_int64()
        self.handle = library.made("cache", f"a cache of {capacity} tokens", network, capacity, byref(size))
        self.bytes = size.value
        weakref.finalize(self, library.cache_free, self.handle)


class NativeDecoder:
    """The language model and the embedding table."""

    batches = True
    steady = 16  # FEW_ROWS of weights.h: the sums of a row's products are whole numbers, in any company

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        shape = bundle.manifest.model
        self._path, self._vocab = bundle.path(DECODER_GRAPH), shape.vocab_size
        _check_runnable(bundle)
        if shape.head_dim % 16:
            raise Unsupported(f"{printable(self._path)}: heads of {shape.head_dim} are not built natively")
        network = read_network(bundle, DECODER_GRAPH, decoder_operators(shape))
        _check_shapes(self._path, network, _decoder_shapes(shape, network), shape.hidden_size)
        self._table = EmbeddingTable.open(bundle)
        numbers = (shape.layers, shape.hidden_size, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab_size)
        self._engine, self._network = engine, _fill(engine, "language", numbers, network)

    def new_cache(self, capacity: int) -> NativeCache:
        """An empty cache for `capacity` tokens; GemvgError where there is no memory for it."""
        return NativeCache(self._engine.library, self._network, capacity)

    def copy(self, source: NativeCache, target: NativeCache, tokens: int) -> None:
        """Put the first `tokens` of one cache into another."""
        check_copy(tokens, source.capacity, target.capacity)
        self._engine.library.cache_copy(source.handle, target.handle, tokens)

    def embed(self, ids: Ids) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, hidden)."""
        return self._table.rows(ids)

    def forward(self, steps: Sequence[Step[NativeCache]]) -> list[Floats]:
        """Run steps of different caches together -> logits of each: (rows, vocab), or (rows, k) of its `legal` ids."""
        kept: list[Any] = []  # what the call reads and writes
        results: list[Floats] = []
        described = (Tokens * len(steps))()
        for step, to in zip(steps, described, strict=True):
            count = len(step.embeddings)
            if step.past + count > step.cache.capacity:
                raise GemvgError(
                    f"{step.past + count} tokens do not fit a cache of {step.cache.capacity}; give fewer or smaller "
                    "pictures"
                )
            arrays = [np.ascontiguousarray(array, np.float32) for array in (step.embeddings, *step.table)]
            legal = None if step.legal is None else np.ascontiguousarray(step.legal, np.int64)
            result = np.empty((step.rows, self._vocab if legal is None else len(legal)), np.float32)
            kept += [*arrays, legal]
            results.append(result)
            to.embeddings, to.cos, to.sin = (_address(array) for array in arrays)
            to.cache, to.count, to.past, to.rows = step.cache.handle, count, step.past, step.rows
            to.legal, to.legal_count = (None, 0) if legal is None else (_address(legal), len(legal))
            to.logits = _address(result)
        library = self._engine.library
        what = f"running {sum(len(step.embeddings) for step in steps)} tokens"
        library.check(library.forward(self._engine.handle, self._network, described, len(steps)), what)
        for result in results:
            check_finite(result, self._path, "the logits are", "float32")
        return results


def open_native(bundle: Bundle, threads: int = 0) -> tuple[VisionTower, NativeDecoder]:
    """Both networks of a bundle; GemvgError where there is no library, Unsupported where ONNX Runtime alone runs it.

    A vision tower that is not built natively (Qwen2.5-VL's windows) runs on ONNX Runtime beside our decoder.
    """
    engine = Engine(threads)
    decoder = NativeDecoder(bundle, engine)
    try:
        return NativeVisionTower(bundle, engine), decoder
    except Unsupported as error:
        log.info("the vision tower runs on ONNX Runtime: %s", error)
        from gemvg_edge.engines.onnxruntime import OnnxVisionTower

        return OnnxVisionTower(bundle, threads), decoder


def physical_cores() -> int:
    """How many threads to take where nobody says: one for each core that this process may use."""
    allowed = os.sched_getaffinity(0)
    siblings = set()
    for cpu in allowed:
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(place.read_text(encoding="ascii"))
        except OSError:
            return len(allowed)
    return max(1, len(siblings))


def _check_runnable(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.dialect != "fused" or manifest.precision != "float32":
        raise Unsupported(
            f"{bundle.folder} has the dialect {manifest.dialect} in {manifest.precision}, and the native engine runs "
            "fused in float32; export it so, or open it with engine='onnx'"
        )
    if manifest.model.model_type == "qwen3_vl":
        raise Unsupported(f"{bundle.folder} is a qwen3_vl, which is not built natively; open it with engine='onnx'")


def _decoder_shapes(shape: ModelShape, network: Network) -> list[tuple[int, int]]:
    hidden, width = shape.hidden_size, shape.heads * shape.head_dim
    middle = network.layers[2].outputs if len(network.layers) > 2 else 0
    layer = [(width + 2 * shape.kv_heads * shape.head_dim, hidden), (hidden, width)]
    layer += [(middle, hidden), (middle, hidden), (hidden, middle)]
    return [*layer * shape.layers, (shape.vocab_size, hidden)]


def _check_shapes(path: Path, network: Network, wanted: Sequence[tuple[int, int]], width: int) -> None:
    """Refuse layers of other widths than the manifest's: the library does not look where it writes."""
    found = [(layer.outputs, layer.inputs) for layer in network.layers]
    if found != list(wanted):
        odd = next((f"{a} instead of {b}" for a, b in zip(found, wanted, strict=False) if a != b), "too few or many")
        raise GemvgError(f"{printable(path)} has layers of other widths than the manifest's ({odd}); {FIX}")
    if any(norm.weight.shape != (width,) for norm in network.norms):
        raise GemvgError(f"{printable(path)} has a norm of another width than the manifest's {width}; {FIX}")


def _fill(engine: Engine, kind: str, numbers: Sequence[int], network: Network) -> c_void_p:
    """The network in the library's memory: layers are read one by one, so that no more than one is held twice."""
    library = engine.library
    handle = library.made(kind, f"the {kind} network", (ctypes.c_int32 * len(numbers))(*numbers))
    weakref.finalize(engine, library.network_free, handle)
    for layer in network.layers:
        stored, kept = _stored(layer)
        library.check(library.add_linear(engine.handle, handle, byref(stored)), "reading weights")
        del kept
    for norm in network.norms:
        weight, bias = norm.weight.read(), None if norm.bias is None else norm.bias.read()
        address = None if bias is None else _address(bias)
        problem = library.add_norm(handle, _address(weight), address, len(weight), norm.epsilon)
        library.check(problem, "reading weights")
    return handle


def _stored(layer: Layer) -> tuple[Stored, list[npt.NDArray[Any]]]:
    """A layer's numbers in memory; the arrays must outlive the call that reads them."""
    kept: list[npt.NDArray[Any]] = []

    def address(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.read())
        return _address(kept[-1])

    order = layer.order
    stored = Stored(
        layer.bits, layer.outputs, layer.inputs, layer.block, None, None, None, address(layer.bias), address(order)
    )
    if order is not None and (kept[-1].min() < 0 or kept[-1].max() >= layer.inputs):
        raise GemvgError(f"{printable(order.path)} has an activation order past its {layer.inputs} inputs; {FIX}")
    if layer.bits:
        stored.codes, stored.scales = address(layer.weight), address(layer.scales)
    else:
        stored.floats = address(layer.weight)
    return stored, kept


def _address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
