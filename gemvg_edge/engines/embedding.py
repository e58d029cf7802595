"""The embedding table of a bundle, looked up where it lies: it stays in its file, whatever the engine.

Plain floats, or codes with their scales. numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import EMBEDDING, Bundle
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.errors import GemvgError

Table = npt.NDArray[Any]
FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


class EmbeddingTable:
    """Rows of `embedding.npy`."""

    def __init__(self, table: Table, hidden: int, width: int) -> None:
        self._table, self._hidden, self._width = table, hidden, width

    @staticmethod
    def open(bundle: Bundle) -> EmbeddingTable:
        """Map the file; GemvgError where it does not hold a row of the model's width for each token."""
        path, shape = bundle.path(EMBEDDING), bundle.manifest.model
        try:
            table: Table = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so never more than the file has
        except Exception as error:  # a header is a Python literal, and numpy's reader lets most of its errors out
            raise GemvgError(
                f"{path} is not a numpy array ({str(error)[:200]}); copy or export the bundle again"
            ) from None
        if not isinstance(table, np.ndarray):
            raise GemvgError(f"{path} is not a numpy array but an archive; copy or export the bundle again")
        wanted = (shape.vocab_size, shape.hidden_size)
        if not _holds_codes(table, wanted) and (table.shape != wanted or table.dtype not in FLOATS):
            found = f"{table.shape} of {table.dtype}"
            raise GemvgError(
                f"{path} has shape {found} instead of {wanted} of float32 or float16; export the bundle again"
            )
        return EmbeddingTable(table, shape.hidden_size, shape.embedding_width)

    def rows(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Token ids (tokens,) -> (tokens, embedding width); what only pictures have is zeros."""
        rows = self._table[ids]
        rows = rows.astype(np.float32) if rows.dtype.names is None else dequantize_rows(rows, self._hidden)
        return rows if self._width == self._hidden else np.pad(rows, ((0, 0), (0, self._width - self._hidden)))


def dequantize_rows(rows: Table, width: int) -> Floats:
    """Rows of a quantised table, each `codes` (8 bits, or two of 4 in a byte) and `scales` -> (rows, width)."""
    codes, scales = rows["codes"], rows["scales"].astype(np.float32)
    middle = 128
    if codes.shape[1] < width:
        codes, middle = np.stack([codes & 15, codes >> 4], axis=-1), 8
    values = (codes.astype(np.float32) - middle).reshape(len(rows), scales.shape[1], -1)
    return (values * scales[:, :, None]).reshape(len(rows), width)


def _holds_codes(table: Table, wanted: tuple[int, int]) -> bool:
    if table.dtype.names != ("codes", "scales") or table.shape != wanted[:1]:
        return False
    codes, scales = (table.dtype[name].shape for name in ("codes", "scales"))
    if len(codes) != 1 or len(scales) != 1 or not scales[0]:
        return False
    usual = np.dtype([("codes", "u1", codes), ("scales", "<f2", scales)])
    return table.dtype == usual and 2 * codes[0] in (2 * wanted[1], wanted[1]) and wanted[1] % scales[0] == 0
