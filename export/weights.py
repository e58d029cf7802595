"""Streams a checkpoint's tensors into a graph's external-data file and hands back initialisers that point there.

Matrices go through in pieces of about PIECE_BYTES, so a 7B export needs little more memory than one piece. A layer that
the checkpoint has as GPTQ codes keeps them, whatever the scheme. Knows how a linear layer is stored (float32 or
blocks), not what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript import GraphBuilder

from export.gptq_blocks import Blocks, to_blocks
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint
from quantize.rtn import quantize

PIECE_BYTES = 64 * 2**20
PAGE = 4096  # large tensors start on a page, so that they can be mapped on their own


@dataclass(frozen=True)
class Scheme:
    """How linear layers are stored: 32 bits as float32, 4 or 8 bits in blocks along the inputs."""

    bits: int = 32
    block_size: int = 32

    @property
    def name(self) -> str:
        """What the manifest says was done."""
        return "float32" if self.bits == 32 else f"int{self.bits}-rtn-g{self.block_size}"


FLOAT32 = Scheme()


@dataclass(frozen=True)
class DenseLinear:
    """float32, transposed for MatMul."""

    weight: ir.Value  # (in, out)
    bias: ir.Value | None


@dataclass(frozen=True)
class BlockLinear:
    """Blocks in MatMulNBits' layout."""

    packed: ir.Value  # (out, blocks, block_size * bits / 8) uint8
    scales: ir.Value  # (out, blocks)
    zeros: ir.Value | None  # (out, blocks * bits / 8) uint8; None where all blocks are symmetric
    bias: ir.Value | None
    inputs: int
    outputs: int
    scheme: Scheme


Linear = DenseLinear | BlockLinear


class WeightWriter:
    """An external-data file being written, and the graph that its tensors belong to."""

    def __init__(self, g: GraphBuilder, checkpoint: Checkpoint, path: Path, on_tensor: Callable[[str], None]) -> None:
        self._g, self._checkpoint, self._path, self._on_tensor = g, checkpoint, path, on_tensor
        self._file = path.open("wb")

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def vector(self, name: str) -> ir.Value:
        """A norm's weight or a bias, as it is."""
        values = self._read(name)
        return self._write(name, ir.DataType.FLOAT, values.shape, [values])

    def linear(self, name: str, parts: Sequence[str], scheme: Scheme, bias: bool) -> Linear:
        """One linear layer from the `.weight` (and `.bias`) of parts whose outputs are laid side by side."""
        weights = [f"{part}.weight" for part in parts]
        shapes = [self._checkpoint.shape(weight) for weight in weights]
        outputs = sum(shape[0] for shape in shapes)
        inputs = int(np.prod(shapes[0][1:]))  # the patch embedding is a convolution's kernel
        bias_value = None
        if bias:
            values = np.concatenate([self._read(f"{part}.bias") for part in parts])
            bias_value = self._write(f"{name}.bias", ir.DataType.FLOAT, values.shape, [values])
        if any(self._checkpoint.is_quantized(part) for part in parts):
            linear: Linear = self._write_codes(name, parts, inputs, outputs, bias_value)
        elif scheme.bits == 32:
            pieces = self._transposed_pieces(weights, inputs, outputs)
            weight = self._write(f"{name}.weight", ir.DataType.FLOAT, (inputs, outputs), pieces)
            linear = DenseLinear(weight, bias_value)
        else:
            linear = self._write_blocks(name, weights, scheme, inputs, outputs, bias_value)
        for weight_name in weights:
            self._on_tensor(weight_name)
        return linear

    def _read(self, name: str) -> npt.NDArray[np.float32]:
        values = self._checkpoint.read(name)
        self._on_tensor(name)
        return values

    def _transposed_pieces(
        self, weights: Sequence[str], inputs: int, outputs: int
    ) -> Iterable[npt.NDArray[np.float32]]:
        if len(self._checkpoint.shape(weights[0])) > 2:
            yield self._checkpoint.read(weights[0]).reshape(outputs, inputs).T
            return
        step = max(1, PIECE_BYTES // (4 * outputs))
        for start in range(0, inputs, step):
            columns = [self._checkpoint.columns(name, start, min(start + step, inputs)) for name in weights]
            yield np.concatenate(columns).T  # (step, out)

    def _write_blocks(
        self, name: str, weights: Sequence[str], scheme: Scheme, inputs: int, outputs: int, bias: ir.Value | None
    ) -> BlockLinear:
        blocks = -(-inputs // scheme.block_size)
        scales: list[npt.NDArray[np.float32]] = []

        def pieces() -> Iterable[npt.NDArray[np.uint8]]:
            for weight in weights:
                for rows in row_pieces(self._checkpoint, weight):
                    quantized = quantize(rows, scheme.bits, scheme.block_size)
                    scales.append(quantized.scales)
                    yield quantized.packed

        block_bytes = scheme.block_size * scheme.bits // 8
        packed = self._write(f"{name}.packed", ir.DataType.UINT8, (outputs, blocks, block_bytes), pieces())
        scale = self._write(f"{name}.scales", ir.DataType.FLOAT, (outputs, blocks), scales)
        return BlockLinear(packed, scale, None, bias, inputs, outputs, scheme)

    def _write_codes(
        self, name: str, parts: Sequence[str], inputs: int, outputs: int, bias: ir.Value | None
    ) -> BlockLinear:
        if float_parts := [part for part in parts if not self._checkpoint.is_quantized(part)]:
            raise GemvgError(f"{float_parts[0]} is stored as float, but {name} holds it beside quantised layers")
        blocks = [to_blocks(self._checkpoint.quantized(part), part) for part in parts]
        if len({(part.bits, part.block_size) for part in blocks}) > 1:
            raise GemvgError(f"the parts of {name} have several bits or group sizes; quantise {', '.join(parts)} alike")
        bits, block_size = blocks[0].bits, blocks[0].block_size
        count = blocks[0].scales.shape[1]
        shape = (outputs, count, block_size * bits // 8)
        packed = self._write(f"{name}.packed", ir.DataType.UINT8, shape, [part.packed for part in blocks])
        scales = self._write(f"{name}.scales", ir.DataType.FLOAT, (outputs, count), [part.scales for part in blocks])
        zeros = None
        if any(part.zeros is not None for part in blocks):
            width = -(-count * bits // 8)
            pieces = [_middle(part, width) if part.zeros is None else part.zeros for part in blocks]
            zeros = self._write(f"{name}.zeros", ir.DataType.UINT8, (outputs, width), pieces)
        return BlockLinear(packed, scales, zeros, bias, inputs, outputs, Scheme(bits, block_size))

    def _write(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], pieces: Iterable[npt.NDArray[Any]]
    ) -> ir.Value:
        length = int(np.prod(shape) * dtype.itemsize)
        self._file.write(b"\0" * (-self._file.tell() % (PAGE if length >= PAGE else 64)))
        offset = int(self._file.tell())
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).data)
        written = self._file.tell() - offset
        assert written == length, f"{name}: {written} bytes written for shape {shape}"
        tensor = ir.ExternalTensor(
            self._path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent
        )
        return self._g.initializer(tensor, name, qualify=False)


def _middle(blocks: Blocks, width: int) -> npt.NDArray[np.uint8]:
    """Zero-points of symmetric blocks, written out."""
    return np.full((len(blocks.scales), width), 0x88 if blocks.bits == 4 else 0x80, np.uint8)


def row_pieces(checkpoint: Checkpoint, name: str) -> Iterable[npt.NDArray[np.float32]]:
    """A matrix (out, in) in pieces of whole rows."""
    rows, inputs = checkpoint.shape(name)
    step = max(1, PIECE_BYTES // (4 * inputs))
    for start in range(0, rows, step):
        yield checkpoint.rows(name, start, min(start + step, rows))
