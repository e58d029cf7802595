"""Protocol buffers, field by field: what reading ONNX takes of https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

from collections.abc import Iterator


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: an int of a varint, else bytes. ValueError says what is wrong."""
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if kind == 2:
            size, at = _varint(view, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(view):
            raise ValueError("it is cut short")
        yield number, view[at : at + size]
        at += size


def contents(message: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The same, where only bytes matter: numbers have no content."""
    for number, value in fields(message):
        yield number, memoryview(b"") if isinstance(value, int) else value


def varints(packed: int | memoryview) -> list[int]:
    """The numbers of a repeated field's entry, packed or not; they are below 2^64."""
    if isinstance(packed, int):
        return [packed]
    numbers, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        numbers.append(value)
    return numbers


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise ValueError("it is cut short")
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number without end")
