"""Streams a checkpoint's tensors into a graph's external-data file and hands back initialisers that point there.

A float matrix goes through in pieces, row by row as it is stored, and where its type is the graph's own no number is
touched. So a 7B export needs little more memory than some pieces. A layer that the checkpoint has as GPTQ codes keeps
them, whatever the scheme. Knows how a linear layer is stored, not what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import GraphBuilder

from export.gptq_blocks import Blocks, to_blocks
from export.gptq_grid import to_grid
from export.hashed_file import HashedFile
from export.pieces import PieceReader
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint
from quantize.rtn import quantize

PAGE = 4096  # large tensors start on a page, so that they can be mapped on their own


@dataclass(frozen=True)
class Scheme:
    """How float layers are stored: in the graph's precision, or rounded to 4 or 8 bits in blocks along the inputs."""

    bits: int | None = None
    block_size: int = 32

    def name(self, precision: str) -> str:
        """What the manifest says was done."""
        return f"int{self.bits}-rtn-g{self.block_size}" if self.bits else precision


DENSE = Scheme()


@dataclass(frozen=True)
class DenseLinear:
    """Floats, as the checkpoint lays them out; Gemm transposes."""

    weight: ir.Value  # (out, in)
    bias: ir.Value | None


@dataclass(frozen=True)
class BlockLinear:
    """Blocks in MatMulNBits' layout."""

    packed: ir.Value  # (out, blocks, block_size * bits / 8) uint8
    scales: ir.Value  # (out, blocks)
    zeros: ir.Value | None  # (out, blocks * bits / 8) uint8; None where all blocks are symmetric
    bias: ir.Value | None
    order: ir.Value | None  # (in): which input each column stands for; None where they are in order
    inputs: int
    outputs: int
    scheme: Scheme


@dataclass(frozen=True)
class GridLinear:
    """Signed codes in DequantizeLinear's layout."""

    codes: ir.Value  # (in, out) int4 or int8
    scales: ir.Value  # (in / block_size, out), or (out)
    bias: ir.Value | None
    order: ir.Value | None  # as in BlockLinear
    inputs: int
    block_size: int  # inputs that share a scale; 0 for all


class Place(NamedTuple):
    """Where a tensor's bytes begin."""

    path: Path
    offset: int


Linear = DenseLinear | BlockLinear | GridLinear


def take_in_order(g: GraphBuilder, x: ir.Value, order: ir.Value | None) -> ir.Value:
    """X (rows, in) with its columns as a layer in activation order wants them."""
    if order is None:
        return x
    taken: ir.Value = g.op.Gather(x, order, axis=1)
    return taken


class WeightWriter:
    """An external-data file being written, and the graph that its tensors belong to."""

    def __init__(
        self,
        g: GraphBuilder,
        checkpoint: Checkpoint,
        file: HashedFile,
        elsewhere: Mapping[str, Place],
        on_tensor: Callable[[str], None],
        dtype: ir.DataType,
        grid: bool,
    ) -> None:
        self._g, self._checkpoint, self._reader = g, checkpoint, PieceReader(checkpoint)
        self._file, self._on_tensor = file, on_tensor
        self._elsewhere = elsewhere  # tensors that another file of the bundle holds as this graph wants them
        self.dtype = dtype  # of the graph's floats
        self._grid = grid

    def vector(self, name: str) -> ir.Value:
        """A norm's weight or a bias."""
        value = self._floats(name, [name])
        self._on_tensor(name)
        return value

    def matrix(self, name: str) -> ir.Value:
        """A float table, as the checkpoint lays it out."""
        value = self._floats(name, [name], self._checkpoint.shape(name))
        self._on_tensor(name)
        return value

    def linear(self, name: str, parts: Sequence[str], scheme: Scheme, bias: bool) -> Linear:
        """One linear layer from the `.weight` (and `.bias`) of parts whose outputs are laid side by side."""
        weights = [f"{part}.weight" for part in parts]
        shapes = [self._checkpoint.shape(weight) for weight in weights]
        outputs = sum(shape[0] for shape in shapes)
        inputs = int(np.prod(shapes[0][1:]))  # the patch embedding is a convolution's kernel
        bias_value = self._floats(f"{name}.bias", [f"{part}.bias" for part in parts]) if bias else None
        if any(self._checkpoint.is_quantized(part) for part in parts):
            linear = self._write_codes(name, parts, bias_value)
        elif scheme.bits is None:
            linear = DenseLinear(self._floats(f"{name}.weight", weights, (outputs, inputs)), bias_value)
        else:
            linear = self._write_blocks(name, weights, scheme, inputs, outputs, bias_value)
        for part in parts:
            self._on_tensor(f"{part}.weight")
            if bias:
                self._on_tensor(f"{part}.bias")
        return linear

    def _floats(self, name: str, parts: Sequence[str], shape: tuple[int, ...] | None = None) -> ir.Value:
        """Tensors below each other in the graph's float type."""
        shape = shape or (sum(self._checkpoint.shape(part)[0] for part in parts),)
        if len(parts) == 1 and parts[0] in self._elsewhere:
            return self._point(name, self.dtype, shape, self._elsewhere[parts[0]])
        pieces = (piece for part in parts for piece in self._reader.rows(part, self.dtype.numpy()))
        return self._write(name, self.dtype, shape, pieces)

    def _write_blocks(
        self, name: str, weights: Sequence[str], scheme: Scheme, inputs: int, outputs: int, bias: ir.Value | None
    ) -> BlockLinear:
        assert scheme.bits is not None
        blocks = -(-inputs // scheme.block_size)
        scales: list[npt.NDArray[Any]] = []
        bits, size = scheme.bits, scheme.block_size

        def pieces() -> Iterable[npt.NDArray[np.uint8]]:
            for weight in weights:
                for rows in self._reader.rows(weight, np.dtype(np.float32)):
                    quantized = quantize(rows, bits, size)
                    scales.append(quantized.scales.astype(self.dtype.numpy()))
                    yield quantized.packed

        packed = self._write(f"{name}.packed", ir.DataType.UINT8, (outputs, blocks, size * bits // 8), pieces())
        scale = self._write(f"{name}.scales", self.dtype, (outputs, blocks), scales)
        return BlockLinear(packed, scale, None, bias, None, inputs, outputs, scheme)

    def _write_codes(self, name: str, parts: Sequence[str], bias: ir.Value | None) -> Linear:
        if float_parts := [part for part in parts if not self._checkpoint.is_quantized(part)]:
            raise GemvgError(f"{float_parts[0]} is stored as float, but {name} holds it beside quantised layers")
        if self._grid:
            return self._write_grid(name, parts, bias)
        blocks = [to_blocks(self._checkpoint.quantized(part), part) for part in parts]
        self._check_alike(name, parts, [(part.bits, part.block_size) for part in blocks], [b.order for b in blocks])
        bits, block_size = blocks[0].bits, blocks[0].block_size
        outputs, (_, count) = sum(len(part.scales) for part in blocks), blocks[0].scales.shape
        shape = (outputs, count, block_size * bits // 8)
        packed = self._write(f"{name}.packed", ir.DataType.UINT8, shape, [part.packed for part in blocks])
        scales = self._scales(name, (outputs, count), [part.scales for part in blocks])
        zeros = None
        if any(part.zeros is not None for part in blocks):
            width = -(-count * bits // 8)
            pieces = [_middle(part, width) if part.zeros is None else part.zeros for part in blocks]
            zeros = self._write(f"{name}.zeros", ir.DataType.UINT8, (outputs, width), pieces)
        inputs = self._checkpoint.shape(f"{parts[0]}.weight")[1]
        order = self._order(name, blocks[0].order)
        return BlockLinear(packed, scales, zeros, bias, order, inputs, outputs, Scheme(bits, block_size))

    def _write_grid(self, name: str, parts: Sequence[str], bias: ir.Value | None) -> GridLinear:
        grids = [to_grid(self._checkpoint.quantized(part), part) for part in parts]
        self._check_alike(name, parts, [(grid.bits, grid.block_size) for grid in grids], [g.order for g in grids])
        inputs, outputs = len(grids[0].codes), sum(grid.codes.shape[1] for grid in grids)
        codes = np.concatenate([grid.codes for grid in grids], axis=1)  # (in, out)
        bits, block_size = grids[0].bits, grids[0].block_size
        if bits == 4:
            pairs = codes.view(np.uint8).reshape(-1, 2)  # outputs come in whole words of 32 bits
            packed = np.bitwise_or(pairs[:, 0] & 15, pairs[:, 1] << 4)
            value = self._write(f"{name}.codes", ir.DataType.INT4, (inputs, outputs), [packed])
        else:
            value = self._write(f"{name}.codes", ir.DataType.INT8, (inputs, outputs), [codes])
        scales = np.concatenate([grid.scales for grid in grids], axis=-1)
        scale = self._scales(name, scales.shape, [scales])
        return GridLinear(value, scale, bias, self._order(name, grids[0].order), inputs, block_size)

    def _scales(self, name: str, shape: Sequence[int], pieces: Sequence[npt.NDArray[Any]]) -> ir.Value:
        return self._write(f"{name}.scales", self.dtype, shape, [piece.astype(self.dtype.numpy()) for piece in pieces])

    def _order(self, name: str, order: npt.NDArray[np.int64] | None) -> ir.Value | None:
        return None if order is None else self._write(f"{name}.order", ir.DataType.INT64, order.shape, [order])

    def _check_alike(self, name: str, parts: Sequence[str], grids: Sequence[Any], orders: Sequence[Any]) -> None:
        if len(set(grids)) > 1:
            raise GemvgError(f"the parts of {name} have several bits or group sizes; quantise {', '.join(parts)} alike")
        if not all(np.array_equal(order, orders[0]) for order in orders):
            raise GemvgError(f"the parts of {name} have several activation orders; quantise without desc_act")

    def _write(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Iterable[npt.NDArray[Any]]
    ) -> ir.Value:
        length = int(np.prod(shape) * dtype.itemsize)
        self._file.write(b"\0" * (-self._file.tell() % (PAGE if length >= PAGE else 64)))
        offset = self._file.tell()
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).view(np.uint8).data.cast("B"))
        written = self._file.tell() - offset
        assert written == length, f"{name}: {written} bytes written for shape {shape}"
        return self._point(name, dtype, shape, Place(self._file.path, offset))

    def _point(self, name: str, dtype: ir.DataType, shape: Sequence[int], place: Place) -> ir.Value:
        length, path = int(np.prod(shape) * dtype.itemsize), place.path
        tensor = ir.ExternalTensor(
            path.name, place.offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent
        )
        return self._g.initializer(tensor, name, qualify=False)


def _middle(blocks: Blocks, width: int) -> npt.NDArray[np.uint8]:
    """Zero-points of symmetric blocks, written out."""
    return np.full((len(blocks.scales), width), 0x88 if blocks.bits == 4 else 0x80, np.uint8)
