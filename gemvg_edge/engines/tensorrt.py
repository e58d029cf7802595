"""TensorRT: a bundle of engines on the GPU that `python -m export.to_tensorrt` built them for.

Everything is preallocated and happens in one stream: the cache is updated in place, and a decode step is one CUDA graph
for each cache. Knows engines and buffers, neither text nor
pictures. Needs TensorRT and cuda-python.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import DECODER_ENGINE, HEAD_ENGINE, VISION_ENGINE, Bundle
from gemvg_edge.engines.cuda_memory import DeviceBlock, Graph, HostBlock, Stream, current_gpu
from gemvg_edge.engines.embedding import EmbeddingTable
from gemvg_edge.engines.finite import check_finite
from gemvg_edge.engines.placement import Copy2D, cache_copies, choose_profile, new_plane_bytes, offsets, whole_slots
from gemvg_edge.engines.protocol import Floats, Step
from gemvg_edge.engines.steps import check_copy, check_step, pick
from gemvg_edge.engines.tensorrt_execution import Execution, Shared, load_engine, trt
from gemvg_edge.engines.tensorrt_library import check_build, new_log
from gemvg_edge.engines.vision_inputs import vision_runs
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.positions import RopeTable

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DECODE_PROFILE = 1  # one token; export.tensorrt_build writes the profiles in this order
PER_PICTURE = ("patches", "valid")  # inputs of the vision engine that each picture of a run has its own of


def open_engines(bundle: Bundle) -> tuple[TensorRTVisionTower, TensorRTDecoder]:
    """Both halves of a bundle of engines, in one stream and with one piece of memory for activations."""
    build = bundle.manifest.tensorrt
    if build is None:
        raise GemvgError(
            f"{bundle.folder} holds graphs and no engines; build them with `python -m export.to_tensorrt BUNDLE OUT`"
        )
    gpu = current_gpu()
    check_build(build, trt.__version__, gpu.compute_capability, gpu.name, bundle.folder)
    log = new_log(trt)
    runtime = trt.Runtime(log)
    names = [VISION_ENGINE, DECODER_ENGINE] + [HEAD_ENGINE] * build.split_head
    engines = [load_engine(runtime, bundle.path(name), log) for name in names]
    scratch = DeviceBlock(max(engine.device_memory_size_v2 for engine in engines), "activations")
    shared = Shared(Stream(), scratch, log)
    head = engines[2] if build.split_head else None
    return TensorRTVisionTower(bundle, engines[0], shared), TensorRTDecoder(bundle, engines[1], head, shared)


class TensorRTVisionTower:
    """The vision engine, picture by picture: one fills the GPU, and a profile for several would cost memory."""

    def __init__(self, bundle: Bundle, engine: Any, shared: Shared) -> None:
        self._path = bundle.path(VISION_ENGINE)
        self._execution = Execution(engine, self._path, shared)
        self._stream = shared.stream
        profiles = range(engine.num_optimization_profiles)
        self._most = [int(engine.get_tensor_profile_shape("patches", i)[2][1]) for i in profiles]
        self._shape = bundle.manifest.model.vision
        self._width = bundle.manifest.model.embedding_width
        self._merge = bundle.manifest.preprocessing.merge_size
        self._precision = bundle.manifest.precision
        self._block = DeviceBlock(0, "pictures")

    def encode(self, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[Floats]:
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, width), in the order given."""
        tokens: dict[int, Floats] = {}
        for run in vision_runs(self._shape, self._merge, patches, grids):
            for k, member in enumerate(run.members):
                own = {name: run.inputs[name][k : k + 1] for name in PER_PICTURE if name in run.inputs}
                encoded = self._encode(run.inputs | own)
                tokens[member] = encoded if run.token_order is None else encoded[run.token_order]
        return [tokens[i] for i in range(len(grids))]

    def _encode(self, inputs: dict[str, npt.NDArray[Any]]) -> Floats:
        """One picture's inputs -> (slots / merge^2, width)."""
        slots = inputs["patches"].shape[1]
        count, most = slots // self._merge**2, max(self._most) // self._merge**2
        profile = choose_profile(self._most, slots)
        if profile is None:
            raise GemvgError(
                f"a picture takes {count} visual tokens, and {self._path} at most {most}; give a smaller picture, or "
                f"build with `python -m export.to_tensorrt --max-visual-tokens {count}`"
            )
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        tokens: Floats = np.empty((count, self._width), np.float32)
        starts, size = offsets([array.nbytes for array in (*arrays.values(), tokens)])
        if size > self._block.bytes:
            self._block = DeviceBlock(size, "pictures")
        addresses = [self._block.address + start for start in starts]
        self._execution.select(profile)
        for (name, array), address in zip(arrays.items(), addresses, strict=False):
            self._stream.upload(address, array.ctypes.data, array.nbytes)
            self._execution.bind_input(name, address, array.shape)
        self._execution.bind("tokens", addresses[-1])
        self._execution.enqueue()
        self._stream.download(tokens.ctypes.data, addresses[-1], tokens.nbytes)
        self._stream.wait()
        check_finite(tokens, self._path, "a picture's tokens are", self._precision)
        return tokens


class TensorRTCache:
    """Keys and values of every layer in one block, and the recorded decode step that reads and writes them."""

    def __init__(self, capacity: int, slots: int, plane_bytes: int, planes: int) -> None:
        self.capacity = capacity
        self.slots = slots  # what there is room for, at least `capacity`
        self.plane_bytes = plane_bytes
        self.block = DeviceBlock(planes * plane_bytes, "a scene's cache")  # (planes, kv_heads, slots, head_dim)
        # The graph is void once its execution context changes, so each has its own (TensorRT, best practices).
        self.step: tuple[Execution, Graph] | None = None

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self.block.bytes


class TensorRTDecoder:
    """The decoder engine, and the head's where it is one of its own; the embedding table stays in its file."""

    steady = 0
    batches = False  # an engine holds one sequence's cache, and gives the logits of its last token

    def __init__(self, bundle: Bundle, engine: Any, head: Any, shared: Shared) -> None:
        manifest, shape = bundle.manifest, bundle.manifest.model
        self._path, self._engine, self._shared, self._shape = bundle.path(DECODER_ENGINE), engine, shared, shape
        self._table = EmbeddingTable.open(bundle)
        self._in_place, self._precision = manifest.dialect == "standard", manifest.precision
        self._planes = 2 * shape.layers
        self._row_bytes = shape.head_dim * ITEM_BYTES[manifest.precision]
        profiles = range(engine.num_optimization_profiles)
        self._most = [int(engine.get_tensor_profile_shape("places", i)[2][1]) for i in profiles]
        self._slots = int(engine.get_tensor_shape("past_key_0")[2])  # of every cache: an engine is built for one length
        self._prefills: dict[int, Execution] = {}

        self._inputs = HostBlock(self._layout(max(self._most))[1])
        self._device_inputs = DeviceBlock(self._inputs.bytes, "a step's inputs")
        self._new = DeviceBlock(self._new_bytes(max(self._most)), "new keys and values")
        (self._logits_at, self._hidden_at), size = offsets([4 * shape.vocab_size, 4 * shape.hidden_size])
        self._results, self._device_results = HostBlock(size), DeviceBlock(size, "logits")
        self._all_slots = self._upload_slots()
        self._head = None if head is None else self._bind_head(head, bundle.path(HEAD_ENGINE))

    def new_cache(self, capacity: int) -> TensorRTCache:
        """An empty cache for `capacity` tokens."""
        slots = self._slots
        if capacity > slots:
            raise GemvgError(
                f"{capacity} tokens do not fit {self._path}, which holds {slots}; give fewer or smaller pictures, or "
                f"build with `python -m export.to_tensorrt --max-tokens {whole_slots(capacity)}`"
            )
        cache = TensorRTCache(capacity, slots, self._shape.kv_heads * slots * self._row_bytes, self._planes)
        self._shared.stream.clear(cache.block)  # what is masked still gets multiplied, and must not be NaN
        return cache

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, width)."""
        return self._table.rows(ids)

    def forward(self, steps: Sequence[Step[TensorRTCache]]) -> list[Floats]:
        """Run the steps one after the other -> (1, vocab) or (1, k) logits of each one's last token."""
        return [self._run(step) for step in steps]

    def copy(self, source: TensorRTCache, target: TensorRTCache, tokens: int) -> None:
        """Put the first `tokens` of one cache into another, on the device."""
        check_copy(tokens, source.capacity, target.capacity)
        if tokens:
            row, rows = self._row_bytes, self._planes * self._shape.kv_heads
            part = Copy2D(0, target.slots * row, 0, source.slots * row, tokens * row, rows)
            self._shared.stream.copy(target.block, source.block, [part])
            self._shared.stream.wait()

    def _logits(self) -> Floats:
        """The last pass's (1, vocab), as they lie on the host."""
        return self._results.view(self._logits_at, (1, self._shape.vocab_size), np.float32)

    def _run(self, step: Step[TensorRTCache]) -> Floats:
        check_step(step)
        table, most = step.table, max(self._most)
        for start in range(0, len(step.embeddings), most):
            part = slice(start, start + most)
            rotary = RopeTable(table.cos[part], table.sin[part])
            self._pass(step.embeddings[part], step.cache, step.past + start, rotary)
        return pick(self._logits(), step.legal)

    def _pass(self, embeddings: Floats, cache: TensorRTCache, past: int, table: RopeTable) -> None:
        """Up to `max(self._most)` tokens; the last one's logits are on the GPU and the host."""
        tokens = len(embeddings)
        places = np.arange(past, past + tokens)
        values = (embeddings, table.cos, table.sin, places, tokens - 1)
        for (_, shape, dtype, at), value in zip(self._layout(tokens)[0], values, strict=True):
            self._inputs.view(at, shape, dtype)[...] = value
        if tokens == 1:
            cache.step = cache.step or self._record(cache)
            cache.step[1].launch()
        else:
            profile = choose_profile(self._most, tokens)
            assert profile is not None
            if profile not in self._prefills:
                self._prefills[profile] = Execution(self._engine, self._path, self._shared, profile)
            self._bind(self._prefills[profile], cache, tokens, self._seen(cache, past + tokens))
            self._enqueue(self._prefills[profile], tokens)
        if not self._in_place:
            kv_heads = self._shape.kv_heads
            copies = cache_copies(self._planes, kv_heads, cache.slots, self._row_bytes, past, tokens)
            self._shared.stream.copy(cache.block, self._new, copies)
        self._shared.stream.wait()
        check_finite(self._logits(), self._path, "the logits are", self._precision)

    def _record(self, cache: TensorRTCache) -> tuple[Execution, Graph]:
        """The decode step of one cache as a CUDA graph; the step that the inputs hold is run on the way."""
        execution = Execution(self._engine, self._path, self._shared, DECODE_PROFILE)
        self._bind(execution, cache, 1, cache.slots)  # one recorded step for every length
        self._enqueue(execution, 1)  # what TensorRT puts off until the first run must not be recorded
        self._shared.stream.wait()
        return execution, self._shared.stream.capture(lambda: self._enqueue(execution, 1))

    def _enqueue(self, execution: Execution, tokens: int) -> None:
        stream, start = self._shared.stream, self._logits_at
        stream.upload(self._device_inputs.address, self._inputs.address, self._layout(tokens)[1])
        execution.enqueue()
        if self._head is not None:
            self._head.enqueue()
        # All logits, to see that they are numbers: 0.6 MB of the 7B's vocabulary, against gigabytes a step.
        size = 4 * self._shape.vocab_size
        stream.download(self._results.address + start, self._device_results.address + start, size)

    def _layout(self, tokens: int) -> tuple[list[tuple[str, tuple[int, ...], str, int]], int]:
        """(name, shape, type, offset) of a pass's inputs in their block, and how much of it they take."""
        width, half = self._shape.embedding_width, self._shape.head_dim // 2
        shapes = [(1, tokens, width), (1, tokens, half), (1, tokens, half), (1, tokens), (1,)]
        types = ["f4", "f4", "f4", "i8", "i8"]
        names = ["inputs_embeds", "cos", "sin", "places", "rows"]
        sizes = [int(np.prod(shape)) * int(kind[1]) for shape, kind in zip(shapes, types, strict=True)]
        starts, size = offsets(sizes)
        return list(zip(names, shapes, types, starts, strict=True)), size

    def _seen(self, cache: TensorRTCache, total: int) -> int:
        """How many places a pass looks at: those that hold a token, or all where the graph reads a cache whole."""
        return min(whole_slots(total), cache.slots) if self._in_place else cache.slots

    def _bind(self, execution: Execution, cache: TensorRTCache, tokens: int, seen: int) -> None:
        shape = self._shape
        for name, dims, _, at in self._layout(tokens)[0]:
            execution.bind_input(name, self._device_inputs.address + at, dims)
        execution.bind_input("slots", self._all_slots.address, (seen,))
        dims, distance = (1, shape.kv_heads, cache.slots, shape.head_dim), self._new_bytes(tokens) // self._planes
        for plane in range(self._planes):
            name = f"{('key', 'value')[plane % 2]}_{plane // 2}"
            past = cache.block.address + plane * cache.plane_bytes
            execution.bind_input(f"past_{name}", past, dims)
            if self._in_place:
                execution.bind(f"present_{name}", past)
            else:
                execution.bind(f"new_{name}", self._new.address + plane * distance)
        results = self._device_results.address
        if self._head is None:
            execution.bind("logits", results + self._logits_at)
        else:
            execution.bind("hidden", results + self._hidden_at)

    def _bind_head(self, head: Any, path: Path) -> Execution:
        execution, results = Execution(head, path, self._shared), self._device_results.address
        for name, at in (("hidden", self._hidden_at), ("logits", self._logits_at)):
            execution.bind(name, results + at)
        return execution

    def _new_bytes(self, tokens: int) -> int:
        """All new keys and values of so many tokens; none where the engine itself writes the cache."""
        return 0 if self._in_place else self._planes * new_plane_bytes(self._shape.kv_heads, tokens, self._row_bytes)

    def _upload_slots(self) -> DeviceBlock:
        slots = np.arange(self._slots, dtype=np.int64)
        block = DeviceBlock(slots.nbytes, "slot numbers")
        self._shared.stream.upload(block.address, slots.ctypes.data, slots.nbytes)
        self._shared.stream.wait()
        return block
