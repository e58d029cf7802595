"""Round to nearest: its codes against ONNX Runtime's own quantiser, and MatMulNBits against the dequantised twin."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from quantize.rtn import BLOCK_SIZES, QuantizedRows, dequantize, quantize
from tests.quantized_twin import round_activations


def random_weight(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.01, 3, (outputs, 1))
    return np.asarray(rng.standard_normal((outputs, inputs)) * spread, np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("inputs", [128, 131, 7])
def test_error_is_at_most_half_a_step(bits: int, block_size: int, inputs: int) -> None:
    weight = random_weight(12, inputs)
    rows = quantize(weight, bits, block_size)
    step = np.repeat(np.abs(rows.scales), block_size, axis=1)[:, :inputs]
    error = np.abs(dequantize(rows, inputs, bits) - weight)
    # The end opposite to the extreme has one code less, so there, and only there, a value may be off by a whole step.
    clipped = np.abs(weight) > (2 ** (bits - 1) - 0.5) * step
    assert (error <= step * np.where(clipped, 1.0, 0.5) * (1 + 1e-5)).all()


def test_the_whole_range_of_codes_is_used() -> None:
    weight = np.array([[-4.0, 1, 2, 3.5] * 8, [4.0, -1, -2, -3.5] * 8], np.float32)
    rows = quantize(weight, 4, 32)
    assert np.array_equal(dequantize(rows, 32, 4), weight)
    assert (rows.packed[:, :, 0] & 15 == 0).all()  # the extreme takes the lowest code whatever its sign


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_same_codes_as_onnxruntime(block_size: int) -> None:
    outputs, inputs = 24, 256
    weight = random_weight(outputs, inputs)
    blocks = inputs // block_size
    packed = np.zeros((outputs, blocks, block_size // 2), np.uint8)
    scales, zero_points = np.zeros(outputs * blocks, np.float32), np.zeros(outputs * ((blocks + 1) // 2), np.uint8)
    transposed = np.ascontiguousarray(weight.T)
    quantize_matmul_4bits(packed, transposed, scales, zero_points, block_size, outputs, inputs, True)
    ours = quantize(weight, 4, block_size)
    assert np.array_equal(ours.scales, scales.reshape(outputs, blocks))
    assert np.array_equal(ours.packed, packed)


def test_rows_may_come_in_pieces() -> None:
    weight = random_weight(10, 70)
    whole = quantize(weight, 4, 32)
    pieces = [quantize(weight[a:b], 4, 32) for a, b in ((0, 3), (3, 4), (4, 10))]
    assert np.array_equal(whole.packed, np.concatenate([piece.packed for piece in pieces]))
    assert np.array_equal(whole.scales, np.concatenate([piece.scales for piece in pieces]))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    rows = quantize(np.zeros((3, 40), np.float32), bits, 32)
    assert not dequantize(rows, 40, bits).any()


@pytest.mark.parametrize(("bits", "block_size"), [(3, 32), (4, 48)])
def test_unknown_widths_are_refused(bits: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}, block_size={block_size}"):
        quantize(np.zeros((1, 64), np.float32), bits, block_size)


# Level 0 computes in float32; 4, which export/ uses, rounds activations to 8 bits in the weights' blocks.
@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("inputs", [256, 104])
def test_matmulnbits_reads_the_layout(
    inputs: int, block_size: int, bits: int, tokens: int, accuracy_level: int
) -> None:
    outputs = 40
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, tokens, inputs)).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    rows = quantize(rng.standard_normal((outputs, inputs)).astype(np.float32) / np.sqrt(inputs), bits, block_size)
    seen = round_activations(x, block_size) if accuracy_level == 4 else x
    plain = seen @ dequantize(rows, inputs, bits).T + bias
    assert np.abs(run_matmulnbits(x, rows, bias, bits, block_size, accuracy_level) - plain).max() < 1e-5


def run_matmulnbits(
    x: np.ndarray,
    rows: QuantizedRows,
    bias: np.ndarray,
    bits: int,
    block_size: int,
    accuracy_level: int,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    tensors: dict[str, np.ndarray] = {"q": rows.packed, "s": rows.scales, "b": bias}
    tensors |= {} if zeros is None else {"z": zeros}
    node = helper.make_node(
        "MatMulNBits", ["x", "q", "s", "" if zeros is None else "z", "", "b"], ["y"],
        domain="com.microsoft", K=x.shape[2], N=len(bias),
        bits=bits, block_size=block_size, accuracy_level=accuracy_level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*x.shape[:2], len(bias)])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
