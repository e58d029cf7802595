"""Inputs made from seeds by a few edits each, as hypothesis draws and shrinks them. Knows no reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import strategies as st

# What breaks readers of numbers, of texts and of JSON.
PIECES = (
    b"0", b"-1", b"1e999", b"NaN", b"Infinity", b"1" * 400, b"9" * 5000, b"-0.0", b"null", b"true", b"[]", b"{}", b'"',
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{" * 3000, b"[" * 3000, b"../", b"/", b"\n", b"\r\n",
    b"2147483648", b"4294967296", b"9223372036854775808", b"1" + b"0" * 300, b"\xff\xff\xff\xff", b"\x00\x00\x00\x00",
)  # fmt: skip


class Edit(NamedTuple):
    """One change: what, where (a share of the length), how much, and of what."""

    kind: str
    place: float
    amount: int
    value: int


KINDS = ("flip", "set", "cut", "repeat", "drop the end", "insert", "replace a number", "splice")
edits = st.lists(
    st.builds(Edit, st.sampled_from(KINDS), st.floats(0, 1), st.integers(1, 64), st.integers(0, 2**16)), max_size=6
)


def mutate(data: bytes, changes: Sequence[Edit], others: Sequence[bytes]) -> bytes:
    """The data with the changes made one after another; `others` are spliced in."""
    for change in changes:
        data = _apply(data, change, others)
    return data


def _apply(data: bytes, edit: Edit, others: Sequence[bytes]) -> bytes:
    at = min(len(data) - 1, int(edit.place * len(data))) if data else 0
    piece = PIECES[edit.value % len(PIECES)]
    match edit.kind:
        case "flip" if data:
            return data[:at] + bytes([data[at] ^ 1 << edit.value % 8]) + data[at + 1 :]
        case "set" if data:
            return data[:at] + bytes([edit.value % 256]) + data[at + 1 :]
        case "cut":
            return data[:at] + data[at + edit.amount :]
        case "repeat":
            return data[:at] + data[at : at + edit.amount] * 2 + data[at + edit.amount :]
        case "drop the end":
            return data[:at]
        case "insert":
            return data[:at] + piece + data[at:]
        case "replace a number":
            return _replace_number(data, at, piece)
        case "splice" if others:
            other = others[edit.value % len(others)]
            return data[:at] + other[int(edit.place * len(other)) :]
    return data


def _replace_number(data: bytes, at: int, piece: bytes) -> bytes:
    """The first digits from `at` on become the piece."""
    start = next((k for k in range(at, len(data)) if chr(data[k]).isdigit()), len(data))
    end = next((k for k in range(start, len(data)) if not chr(data[k]).isdigit()), len(data))
    return data[:start] + piece + data[end:]
