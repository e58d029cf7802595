"""ONNX Runtime: the `fused` bundle on a CPU, through IOBinding with key/value buffers that are updated in place.

Knows graphs and buffers, neither text nor pictures. Needs the extra `gemvg-edge[onnx]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import DECODER_GRAPH, EMBEDDING, VISION_GRAPH, Bundle
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.positions import RopeTable, vision_table

try:
    import onnxruntime
except ImportError as error:
    raise GemvgError(f"onnxruntime cannot be imported ({error}); run `pip install gemvg-edge[onnx]`") from None


class OnnxVisionTower:
    """The vision graph; pictures of one grid share a run, so attention stays inside each without a mask."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._session = _open_session(bundle.path(VISION_GRAPH), threads)
        self._shape = bundle.manifest.model.vision
        self._merge = bundle.manifest.preprocessing.merge_size

    def encode(self, patches: Sequence[Floats], grids: Sequence[Grid]) -> list[Floats]:
        """Patches (n_i, patch_dim) of each picture -> its tokens (n_i / merge^2, hidden), in the order given."""
        tokens: dict[int, Floats] = {}
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            table = vision_table(grid, self._merge, self._shape.head_dim, self._shape.rope_theta)
            inputs = {"patches": np.stack([patches[i] for i in members]), "cos": table.cos, "sin": table.sin}
            (batch,) = self._session.run(["tokens"], inputs)  # (B, n / merge^2, hidden)
            tokens.update(zip(members, batch, strict=True))
        return [tokens[i] for i in range(len(grids))]


class OnnxCache:
    """Key/value buffers of every layer, each bound as the graph's past and as its present, and the rotary rows."""

    def __init__(self, session: Any, layers: int, kv_heads: int, head_dim: int, vocab: int, capacity: int) -> None:
        self.capacity = capacity
        self.binding = session.io_binding()
        self.cos: Floats = np.zeros((capacity, head_dim // 2), np.float32)
        self.sin: Floats = np.zeros_like(self.cos)
        self.last_index = np.zeros(1, np.int32)  # total - 1, the form that GroupQueryAttention takes
        self.total = np.zeros((), np.int32)
        self.logits: Floats = np.empty((1, 1, vocab), np.float32)
        self._keys_values = [np.zeros((1, kv_heads, capacity, head_dim), np.float32) for _ in range(2 * layers)]
        fixed = {"cos": self.cos, "sin": self.sin, "seqlens_k": self.last_index, "total": self.total}
        for name, array in fixed.items():
            self.binding.bind_cpu_input(name, array)
        # ONNX Runtime wraps numpy memory without a copy, and writes in place where past and present are one buffer.
        self.binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(self.logits))
        names = [f"{part}_{layer}" for layer in range(layers) for part in ("key", "value")]
        for name, array in zip(names, self._keys_values, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(f"present_{name}", value)

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(array.nbytes for array in self._keys_values) + 2 * self.cos.nbytes + self.logits.nbytes


class OnnxDecoder:
    """The decoder graph and the embedding table, which stays in its file."""

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._session = _open_session(bundle.path(DECODER_GRAPH), threads)
        self._shape = bundle.manifest.model
        self._table = _open_embedding(bundle)

    def new_cache(self, capacity: int) -> OnnxCache:
        """An empty cache for `capacity` tokens."""
        shape = self._shape
        return OnnxCache(self._session, shape.layers, shape.kv_heads, shape.head_dim, shape.vocab_size, capacity)

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids (tokens,) -> rows of the embedding table (tokens, hidden)."""
        rows = self._table[ids]
        return rows.astype(np.float32) if rows.dtype.names is None else dequantize_rows(rows, self._shape.hidden_size)

    def forward(self, embeddings: Floats, cache: OnnxCache, past: int, table: RopeTable) -> Floats:
        """Embeddings (tokens, hidden) after the `past` tokens in the cache -> logits (vocab,) of the last one."""
        total = past + len(embeddings)
        if total > cache.capacity:
            raise GemvgError(f"{total} tokens do not fit a cache of {cache.capacity}; give fewer or smaller pictures")
        cache.cos[past:total], cache.sin[past:total] = table
        cache.last_index[0], cache.total[()] = total - 1, total
        inputs = np.ascontiguousarray(embeddings[None], np.float32)  # named, since the binding does not own it
        cache.binding.bind_cpu_input("inputs_embeds", inputs)
        self._session.run_with_iobinding(cache.binding)
        logits: Floats = cache.logits[0, 0].copy()
        return logits


def dequantize_rows(rows: npt.NDArray[Any], width: int) -> Floats:
    """Rows of a quantised table, each `codes` (8 bits, or two of 4 in a byte) and `scales` -> (rows, width)."""
    codes, scales = rows["codes"], rows["scales"].astype(np.float32)
    middle = 128
    if codes.shape[1] < width:
        codes, middle = np.stack([codes & 15, codes >> 4], axis=-1), 8
    values = (codes.astype(np.float32) - middle).reshape(len(rows), scales.shape[1], -1)
    return (values * scales[:, :, None]).reshape(len(rows), width)


def _open_embedding(bundle: Bundle) -> npt.NDArray[Any]:
    path, shape = bundle.path(EMBEDDING), bundle.manifest.model
    try:
        table: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GemvgError(f"{path} is not a numpy array ({error}); copy or export the bundle again") from None
    wanted = (shape.vocab_size, shape.hidden_size)
    if table.dtype.names == ("codes", "scales") and table.shape == wanted[:1]:
        codes, scales = (table.dtype[name].shape[0] for name in ("codes", "scales"))
        if codes in (shape.hidden_size, shape.hidden_size / 2) and shape.hidden_size % scales == 0:
            return table
    if table.shape != wanted or table.dtype not in (np.float32, np.float16):
        found = f"{table.shape} of {table.dtype}"
        raise GemvgError(f"{path} has shape {found} instead of {wanted} of float32 or float16; export the bundle again")
    return table


def _open_session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # 0: one a physical core
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise GemvgError(f"{path} cannot be run by ONNX Runtime {onnxruntime.__version__}: {error}") from None
