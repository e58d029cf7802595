"""ONNX Runtime: a bundle's graphs on a CPU or through CUDA, key/value buffers bound once and updated in place.

Knows graphs and buffers, neither text nor pictures. Needs onnxruntime (the extra `onnx`), or onnxruntime-gpu for CUDA
(`onnx-cu12`, `onnx-cu13`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import DECODER_GRAPH, VISION_GRAPH, Bundle, Manifest
from gemvg_edge.engines.embedding import EmbeddingTable
from gemvg_edge.engines.finite import check_finite
from gemvg_edge.engines.graph_contract import check_contract, decoder_contract, vision_contract
from gemvg_edge.engines.graph_ops import adds_bias_to_codes, check_operators
from gemvg_edge.engines.onnx_providers import (
    PROVIDERS,
    RECORD,
    check_available,
    check_cache_placement,
    check_started,
    load_cuda,
    reads_on_cpu,
    refusal,
    warn_of_cpu,
    why_not_opened,
)
from gemvg_edge.engines.placement import whole_slots
from gemvg_edge.engines.protocol import Floats, Step
from gemvg_edge.engines.steps import check_copy, check_step, pick
from gemvg_edge.engines.vision_inputs import vision_runs
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid

# Since 1.29 it keeps a number for this machine in the home and reports to its makers; its own call to end that comes
# too late. Whoever wants it sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime
except ImportError as error:
    if error.__cause__ and not isinstance(error.__cause__, Exception):  # a signal, which the library takes for a fault
        raise error.__cause__ from None
    raise GemvgError(f"onnxruntime cannot be imported ({error}); run `pip install onnxruntime`") from None

SAID = 160  # characters of an error of its own: the last ones say why
# numpy's type, since it has no bfloat16, and TensorProto.DataType
ELEMENT_TYPES = {"float32": (np.float32, 1), "float16": (np.float16, 10), "bfloat16": (np.uint16, 16)}


class OnnxVisionTower:
    """The vision graph; pictures of one grid share a run, so attention stays inside each without a mask."""

    def __init__(self, bundle: Bundle, threads: int = 0, engine: str = "onnx", session: Any = None) -> None:
        self._path = bundle.path(VISION_GRAPH)
        self._session = session or open_session(bundle, VISION_GRAPH, threads, engine)
        check_contract(self._path, self._session, vision_contract(bundle.manifest))
        self._shape = bundle.manifest.model.vision
        self._merge = bundle.manifest.preprocessing.merge_size
        self._precision = bundle.manifest.precision

    def encode(self, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[Floats]:
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, width), in the order given."""
        tokens: dict[int, Floats] = {}
        for run in vision_runs(self._shape, self._merge, patches, grids):
            with _running(self._path, f"{len(run.members)} picture(s) of {run.inputs['patches'].shape[1]} patches"):
                (batch,) = self._session.run(["tokens"], run.inputs)  # (B, n / merge^2, width)
            check_finite(batch, self._path, "a picture's tokens are", self._precision)
            ordered = batch if run.token_order is None else batch[:, run.token_order]
            tokens.update(zip(run.members, ordered, strict=True))
        return [tokens[i] for i in range(len(grids))]


class OnnxCache:
    """Key/value buffers of every layer, bound as the graph's past, and as its present where the graph writes it."""

    def __init__(self, session: Any, manifest: Manifest, capacity: int, device: str) -> None:
        shape, fused = manifest.model, manifest.dialect == "fused"
        self.capacity = capacity
        self.binding = session.io_binding()
        half = shape.head_dim // 2
        # The fused attention finds a token's rotary row by its place; the other dialects are given the new tokens' own.
        self.rotary: Floats | None = np.zeros((2, capacity, half), np.float32) if fused else None
        self.logits: Floats = np.empty((1, shape.vocab_size), np.float32)
        stored_as, element_type = ELEMENT_TYPES[manifest.precision]
        dims = (1, shape.kv_heads, capacity, shape.head_dim)
        names = [f"{part}_{layer}" for layer in range(shape.layers) for part in ("key", "value")]
        # Zeros, since what a mask hides is still multiplied, and NaN times 0 is NaN.
        self.keys_values = {name: np.zeros(dims, stored_as) for name in names}
        self.bytes = sum(array.nbytes for array in self.keys_values.values()) + self.logits.nbytes
        # A device's pieces by the names of the keys and values, and of the rotary tables; none on the CPU.
        self.on_device: dict[str, Any] = {}
        self._slots = np.empty(0, np.int64)
        self._held: list[Any] = []  # an address is all that the binding knows
        for name, array in self.keys_values.items():
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)  # the CPU's is numpy's own memory
            # By address, since so a buffer has the graph's type, and may be bfloat16, which numpy has not.
            place = (device, 0, element_type, dims, buffer.data_ptr())
            self.binding.bind_input(f"past_{name}", *place)
            if manifest.dialect != "plain":  # written in place where past and present are one buffer
                self.binding.bind_output(f"present_{name}", *place)
            self._held.append(buffer)
            if device != "cpu":
                self.on_device[name] = buffer
        if device != "cpu":
            self.keys_values.clear()  # the device has its own
        self._bind_fixed(session, device)
        self.binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(self.logits))

    def _bind_fixed(self, session: Any, device: str) -> None:
        """Bind what a step changes little of, or nothing: binding again would copy all of it to the device again."""
        if self.rotary is None:
            return
        self.bytes += self.rotary.nbytes
        for name, table in zip(("cos", "sin"), self.rotary, strict=True):
            # The CPU reads this memory itself, also where CUDA leaves the table to it.
            on_cpu = device == "cpu" or bool(reads_on_cpu(session, [name]))
            value = onnxruntime.OrtValue.ortvalue_from_numpy(table, "cpu" if on_cpu else device, 0)
            self.binding.bind_ortvalue_input(name, value)
            self._held.append(value)
            if not on_cpu:
                self.on_device[name] = value
                self.bytes += table.nbytes

    def look_at(self, count: int) -> None:
        """Bind the places that attention goes over, the first `count`; a graph that reads the cache whole needs all."""
        if count != len(self._slots):
            self._slots = np.arange(count, dtype=np.int64)
            self.binding.bind_cpu_input("slots", self._slots)

    def write_rotary(self, first: int, cos: Floats, sin: Floats) -> None:
        """Put the rows (tokens, half) of the tokens from `first` on into the tables of a fused graph."""
        assert self.rotary is not None
        for name, table, rows in zip(("cos", "sin"), self.rotary, (cos, sin), strict=True):
            part = table[first : first + len(rows)]
            if name in self.on_device and not np.array_equal(part, rows):
                part[...] = rows
                self.on_device[name].update_inplace(table)  # whole: ONNX Runtime's Python copies no parts
            else:
                part[...] = rows


class OnnxDecoder:
    """The decoder graph of any dialect, and the embedding table. `session`: the graph, opened otherwise."""

    steady = 0
    batches = False  # a graph holds one sequence's cache, and gives the logits of its last token

    def __init__(self, bundle: Bundle, threads: int = 0, engine: str = "onnx", session: Any = None) -> None:
        self._path = bundle.path(DECODER_GRAPH)
        self._session = session or open_session(bundle, DECODER_GRAPH, threads, engine)
        contract = decoder_contract(bundle.manifest)
        check_contract(self._path, self._session, contract)
        self._manifest = bundle.manifest
        self._table = EmbeddingTable.open(bundle)
        self._device = "cpu" if engine == "onnx" else "cuda"
        if self._device != "cpu":
            cached = [name for part in contract for name in part if name.startswith(("past_", "present_"))]
            check_cache_placement(self._path, self._session, cached)

    def new_cache(self, capacity: int) -> OnnxCache:
        """An empty cache for `capacity` tokens; GemvgError where there is no memory for it."""
        try:
            return OnnxCache(self._session, self._manifest, capacity, self._device)
        except (MemoryError, RuntimeError) as error:  # the latter from a device's allocator
            raise GemvgError(
                f"a cache of {capacity} tokens finds no memory ({_last_words(error)}); give fewer or smaller pictures, "
                "or open the Grounder with lower max_query_tokens and max_new_tokens"
            ) from None

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, width)."""
        return self._table.rows(ids)

    def forward(self, steps: Sequence[Step[OnnxCache]]) -> list[Floats]:
        """Run the steps one after the other -> (1, vocab) or (1, k) logits of each one's last token."""
        return [self._run(step) for step in steps]

    def copy(self, source: OnnxCache, target: OnnxCache, tokens: int) -> None:
        """Put the first `tokens` of one cache into another; what a device holds goes through the host."""
        check_copy(tokens, source.capacity, target.capacity)
        for name, array in source.keys_values.items():
            target.keys_values[name][:, :, :tokens] = array[:, :, :tokens]
        for name in source.on_device if tokens else ():
            if name.startswith(("key_", "value_")):
                held = target.on_device[name].numpy()  # ONNX Runtime's Python copies whole buffers only
                held[:, :, :tokens] = source.on_device[name].numpy()[:, :, :tokens]
                target.on_device[name].update_inplace(held)
        if source.rotary is not None:
            target.write_rotary(0, *source.rotary[:, :tokens])

    def _run(self, step: Step[OnnxCache]) -> Floats:
        cache, past, tokens = step.cache, step.past, len(step.embeddings)
        total = past + tokens
        check_step(step)
        inputs: dict[str, npt.NDArray[Any]] = {"inputs_embeds": np.ascontiguousarray(step.embeddings[None], np.float32)}
        if cache.rotary is not None:
            cache.write_rotary(past, *step.table)
            inputs |= {"seqlens_k": np.array([total - 1], np.int32), "total": np.array(total, np.int32)}
        else:
            plain = self._manifest.dialect == "plain"
            cache.look_at(cache.capacity if plain else min(whole_slots(total), cache.capacity))
            inputs |= {"cos": step.table.cos[None], "sin": step.table.sin[None]}
            inputs |= {"places": np.arange(past, total)[None], "rows": np.array([tokens - 1])}
        for name, array in inputs.items():  # `inputs` outlives the run, which the binding needs: it does not own them
            cache.binding.bind_cpu_input(name, array)
        with _running(self._path, f"{tokens} tokens after {past}"):
            if self._manifest.dialect == "plain":
                self._run_plain(cache, past, total)
            else:
                self._session.run_with_iobinding(cache.binding)
        check_finite(cache.logits, self._path, "the logits are", self._manifest.precision)
        return pick(cache.logits, step.legal)

    def _run_plain(self, cache: OnnxCache, past: int, total: int) -> None:
        """Run a graph that gives the new keys and values alone, and put them into their places."""
        for name in cache.keys_values:
            cache.binding.bind_output(f"new_{name}", "cpu")
        self._session.run_with_iobinding(cache.binding)
        # In the order they were bound in: the logits come first.
        for array, new in zip(cache.keys_values.values(), cache.binding.get_outputs()[1:], strict=True):
            array[:, :, past:total] = new.numpy()


@contextmanager
def _running(path: Path, what: str) -> Iterator[None]:
    """One sentence for whatever ONNX Runtime raises while it runs: its exceptions have no common base."""
    try:
        yield
    except GemvgError:
        raise
    except Exception as error:
        raise GemvgError(
            f"{path} cannot be run on {what} ({_last_words(error)}); give fewer or smaller pictures, "
            "or a bundle of the fused dialect, which needs the least memory"
        ) from None


def _last_words(error: Exception) -> str:
    return " ".join(str(error).split())[-SAID:]


def open_session(bundle: Bundle, graph: str, threads: int = 0, engine: str = "onnx") -> Any:
    """One of a bundle's graphs; GemvgError where this ONNX Runtime, or any, cannot run it so."""
    path, manifest = bundle.path(graph), bundle.manifest
    check_operators(path)
    biased = engine != "onnx" and adds_bias_to_codes(path)
    if why := refusal(onnxruntime.__version__, engine, manifest.dialect, manifest.precision, biased):
        raise GemvgError(f"{bundle.folder} {why}")
    return open_graph(path, threads, engine)


def open_graph(path: Path, threads: int = 0, engine: str = "onnx", entries: dict[str, str] | None = None) -> Any:
    """A graph opened by ONNX Runtime; `entries` are further configuration of the session."""
    said = "" if engine == "onnx" else load_cuda(onnxruntime)
    check_available(onnxruntime, engine, said)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: one a physical core
    options.log_severity_level = 4  # what goes wrong is raised, and one sentence is enough
    for key, value in ((entries or {}) | ({} if engine == "onnx" else RECORD)).items():
        options.add_session_config_entry(key, value)
    try:
        # Without `enable_fallback=0` it would print what failed, and go on with the CPU alone.
        session = onnxruntime.InferenceSession(str(path), options, providers=list(PROVIDERS[engine]), enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base
        why = why_not_opened(error, said)
        raise GemvgError(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {why}") from None
    check_started(onnxruntime, session, engine, said)
    if engine != "onnx":
        warn_of_cpu(path, session)
    return session
