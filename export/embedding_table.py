"""The checkpoint's embedding table -> `embedding.npy`, from which the runtime looks rows up. Knows no graphs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from export.gptq_blocks import Blocks, to_blocks
from export.hashed_file import FileEntry, HashedFile, describe
from export.pieces import PieceReader
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint
from quantize.tensors import EMBEDDING, EMBEDDING_LAYER


def write_embedding(
    checkpoint: Checkpoint, path: Path, dtype: str, on_tensor: Callable[[str], None]
) -> dict[str, FileEntry]:
    """Write the table (vocab, hidden) in this type; one that is quantised keeps its codes."""
    on_tensor(EMBEDDING)
    if checkpoint.is_quantized(EMBEDDING_LAYER):
        _write_codes(to_blocks(checkpoint.quantized(EMBEDDING_LAYER), EMBEDDING_LAYER), path)
        return {path.name: describe(path)}
    with HashedFile(path) as file:
        file.write(table_header(checkpoint.shape(EMBEDDING), dtype))
        for rows in PieceReader(checkpoint).rows(EMBEDDING, np.dtype(dtype)):
            file.write(rows.data.cast("B"))
        return {path.name: file.record()}


def table_header(shape: Sequence[int], dtype: str) -> bytes:
    """What stands before the numbers of a float table (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""
    header = io.BytesIO()
    described = npy.dtype_to_descr(np.dtype(dtype))
    npy.write_array_header_1_0(header, {"descr": described, "fortran_order": False, "shape": tuple(shape)})
    return header.getvalue()


def _write_codes(blocks: Blocks, path: Path) -> None:
    """A quantised table: a row's codes and then its scales, so that looking one up reads one place."""
    if blocks.zeros is not None:
        raise GemvgError(f"{EMBEDDING_LAYER} has zero-points; quantise the table symmetrically")
    rows, count = blocks.scales.shape
    codes = blocks.packed.reshape(rows, -1)
    fields = [("codes", "u1", (codes.shape[1],)), ("scales", "<f2", (count,))]
    table = np.empty(rows, fields)
    table["codes"], table["scales"] = codes, blocks.scales
    np.save(path, table)
