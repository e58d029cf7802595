"""Tensors of a checkpoint in pieces of whole rows, through buffers that are used again and again.

Fresh memory for each piece would cost time: the system has to find and clear every page. Knows safetensors files (a
header of JSON, then the numbers, https://github.com/huggingface/safetensors#format), not graphs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint, check_finite

PIECE_BYTES = 4 * 2**20
TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class PieceReader:
    """Reads pieces; each stays as it is until the next but one is asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._headers: dict[Path, tuple[dict[str, Any], int]] = {}
        self._stored, self._converted = ([np.empty(0, np.uint8), np.empty(0, np.uint8)] for _ in range(2))
        self._turn = 0

    def rows(self, name: str, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
        """A float tensor (out, ..) as pieces (rows, ..) of this type, converted where it is stored in another.

        GemvgError where float16 cannot hold a number, and for a file that ends too early.
        """
        shape = self._checkpoint.shape(name)
        if self._checkpoint.is_adapted(name):
            yield from self._merged_rows(name, dtype)
            return
        path, stored_as, start = self._place(name)
        row = int(np.prod(shape[1:])) * stored_as.itemsize
        step = max(1, PIECE_BYTES // row)
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            for first in range(0, shape[0], step):
                count = min(step, shape[0] - first)
                view = self._buffer(self._stored, count * row)
                _fill(file, view, path)
                rows = view.view(stored_as).reshape(count, *shape[1:])
                check_finite(rows, path, name)
                yield rows if stored_as == dtype else self._convert(rows, dtype, name)
                self._turn ^= 1

    def _merged_rows(self, name: str, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
        """The same of a weight that an adapter adds to, which is made as a whole."""
        merged = self._checkpoint.read(name)
        step = max(1, PIECE_BYTES // max(1, merged[0].nbytes))
        for first in range(0, len(merged), step):
            rows = merged[first : first + step]
            yield rows if rows.dtype == dtype else self._convert(rows, dtype, name)
            self._turn ^= 1

    def _convert(self, rows: npt.NDArray[Any], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
        converted = self._buffer(self._converted, rows.size * dtype.itemsize).view(dtype).reshape(rows.shape)
        with np.errstate(over="ignore"):  # reported below
            np.copyto(converted, rows, casting="unsafe")
        if dtype == np.float16 and not np.isfinite(converted).all():
            raise GemvgError(f"{name} holds numbers past float16's 65504; export with --precision bfloat16 or float32")
        return converted

    def _buffer(self, pair: list[npt.NDArray[np.uint8]], size: int) -> npt.NDArray[np.uint8]:
        if len(pair[self._turn]) < size:
            pair[self._turn] = np.empty(size, np.uint8)
        return pair[self._turn][:size]

    def _place(self, name: str) -> tuple[Path, np.dtype[Any], int]:
        """A tensor's file, its type there, and where its bytes begin."""
        path, stored = self._checkpoint.places[name]
        if path not in self._headers:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._headers[path] = json.loads(file.read(length)), 8 + length
        header, start = self._headers[path]
        entry = header[stored]
        if entry["dtype"] not in TYPES:
            raise GemvgError(f"{path}: {name} has type {entry['dtype']}; float32, float16 and bfloat16 are read")
        return path, np.dtype(TYPES[entry["dtype"]]), start + entry["data_offsets"][0]


def _fill(file: FileIO, view: npt.NDArray[np.uint8], path: Path) -> None:
    """Read until the view is full: one call may return less."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:].data)
        if not count:
            raise GemvgError(f"{path} is truncated or damaged; download the checkpoint again")
        done += count
