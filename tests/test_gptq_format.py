"""The GPTQ file format: what is packed comes back, words hold what GPTQModel's hold, and broken files are told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.errors import GemvgError
from quantize.gptq_format import (
    BITS,
    VERSION_1,
    VERSION_2,
    QuantizedLinear,
    dequantize,
    pack,
    unpack,
)


@st.composite
def linears(draw: st.DrawFn) -> QuantizedLinear:
    """Any bits, group size, order and zero-points, with sides that fill whole words."""
    bits = draw(st.sampled_from(BITS))
    step = 32 if bits == 3 else 32 // bits
    group = step * draw(st.integers(1, 4))
    groups, outputs = draw(st.integers(1, 4)), step * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inputs = group * groups
    g_idx = np.arange(inputs) // group
    if draw(st.booleans()):  # activation order
        g_idx = rng.permutation(g_idx)
    middle = draw(st.booleans())
    return QuantizedLinear(
        rng.integers(0, 2**bits, (outputs, inputs), dtype=np.uint8),
        rng.standard_normal((groups, outputs)).astype(np.float16),
        np.full((groups, outputs), 2 ** (bits - 1), np.uint8)
        if middle
        else rng.integers(0, 2**bits, (groups, outputs), dtype=np.uint8),
        g_idx.astype(np.int32),
        bits,
    )


@given(linears(), st.sampled_from([VERSION_1, VERSION_2]))
def test_what_is_packed_comes_back(linear: QuantizedLinear, version: str) -> None:
    again = unpack(pack(linear, version), version)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(again, linear, strict=True))
    assert np.array_equal(dequantize(again), dequantize(linear))


@given(linears())
def test_words_are_a_stream_of_bits(linear: QuantizedLinear) -> None:
    """The plain twin: every column's codes as a binary text, the lowest bit first."""
    words = pack(linear, VERSION_2)["qweight"].view(np.uint32)
    for column in range(min(3, linear.codes.shape[0])):
        text = "".join(format(code, f"0{linear.bits}b")[::-1] for code in linear.codes[column])
        plain = [int(text[start : start + 32][::-1], 2) for start in range(0, len(text), 32)]
        assert words[:, column].tolist() == plain


def linear(bits: int, zeros: list[int]) -> QuantizedLinear:
    count = len(zeros)
    codes = np.zeros((count, 32), np.uint8)
    ones = np.ones((1, count), np.float16)
    return QuantizedLinear(codes, ones, np.array([zeros], np.uint8), np.zeros(32, np.int32), bits)


def test_version_1_holds_zero_points_less_one() -> None:
    assert pack(linear(4, [8] * 8))["qzeros"].tolist() == [[0x77777777]]
    assert pack(linear(4, [8] * 8), VERSION_2)["qzeros"].view(np.uint32).tolist() == [[0x88888888]]


def test_a_zero_point_of_0_borrows_as_in_gptqmodel() -> None:
    """GPTQModel takes 0x11111111 from the whole word; its fields 7, 15, 5, 6 stand for 8, 0, 7, 7."""
    packed = pack(linear(4, [8, 0, 7, 7, 8, 8, 8, 8]))
    assert packed["qzeros"].view(np.uint32).tolist() == [[0x777765F7]]
    assert unpack(packed).zeros.tolist() == [[8, 0, 7, 7, 8, 8, 8, 8]]


def test_g_idx_may_be_missing_where_groups_are_runs() -> None:
    rng = np.random.default_rng(0)
    whole = QuantizedLinear(
        rng.integers(0, 16, (8, 64), dtype=np.uint8),
        np.ones((2, 8), np.float16),
        np.full((2, 8), 8, np.uint8),
        (np.arange(64) // 32).astype(np.int32),
        4,
    )
    packed = pack(whole)
    del packed["g_idx"]
    again = unpack(packed)
    assert np.array_equal(again.groups, whole.groups)
    assert (again.group_size, again.symmetric) == (32, True)


def test_groups_by_importance_are_no_runs() -> None:
    whole = linear(4, [8] * 8)._replace(scales=np.ones((2, 8), np.float16), zeros=np.full((2, 8), 8, np.uint8))
    assert whole._replace(groups=np.tile(np.arange(2, dtype=np.int32), 16)).group_size is None


def test_dequantize_by_hand() -> None:
    small = QuantizedLinear(
        np.array([[0, 15, 3]], np.uint8),
        np.array([[0.5], [2.0]], np.float16),
        np.array([[8], [1]], np.uint8),
        np.array([0, 0, 1], np.int32),
        4,
    )
    assert dequantize(small).tolist() == [[-4.0, 3.5, 4.0]]


@pytest.mark.parametrize(("codes", "what"), [((8, 12), "12 inputs"), ((4, 32), "4 outputs")])
def test_sides_that_do_not_fill_words_are_refused(codes: tuple[int, int], what: str) -> None:
    outputs, inputs = codes
    odd = QuantizedLinear(
        np.zeros(codes, np.uint8),
        np.ones((1, outputs), np.float16),
        np.full((1, outputs), 8, np.uint8),
        np.zeros(inputs, np.int32),
        4,
    )
    with pytest.raises(GemvgError, match=f"{what} of 4 bits do not fill whole 32-bit words"):
        pack(odd)


@pytest.mark.parametrize(
    ("part", "spoil", "said"),
    [
        ("qweight", lambda array: array[:, :-1], "do not fit"),
        ("qzeros", lambda array: np.concatenate([array, array]), "do not fit"),
        ("scales", lambda array: array[0], "1 dimensions"),
        ("g_idx", lambda array: array[:-1], "g_idx"),
        ("g_idx", lambda array: array + 1, "g_idx"),
    ],
)
def test_parts_that_do_not_fit_are_told(part: str, spoil: object, said: str) -> None:
    packed = pack(linear(4, [8] * 8))
    packed[part] = spoil(packed[part])  # type: ignore[operator]
    with pytest.raises(ValueError, match=said):
        unpack(packed)
