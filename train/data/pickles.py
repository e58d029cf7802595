"""Pickles of data, read without running what they ask for: plain values come out, and arrays of numbers as lists.

A pickle is a program: it calls what it names, and its machine can be made to use any memory. So nothing is called here
but the functions below, and Python's own machine in Python is used, whose memo grows with the file alone.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, read_bytes

SHOWN = 200  # characters of a reason
WIDEST = 64  # values in a tuple: sizes, and what a call is given
DEEPEST = 3  # tuples in tuples; hashing deeper ones uses up the machine's stack
_NUMBERS = re.compile(r"[|<>=]?(b1|[iu][1248]|f[248]|[SU]\d{1,4}|O8?)")


def load_pickle(path: Path) -> Any:
    """What a pickle holds; GemvgError for one that is damaged, or asks for more than containers and arrays."""
    stored = read_bytes(path)
    try:
        return _DataUnpickler(io.BytesIO(stored), encoding="utf-8", errors="replace").load()
    except GemvgError as error:
        raise GemvgError(f"{printable(path)}: {printable(str(error))}") from None
    except Exception as error:  # a broken pickle may raise whatever it likes
        why = printable(f"{type(error).__name__}: {error}"[:SHOWN])
        raise GemvgError(f"{printable(path)} is not a pickle that can be read ({why}); download it again") from None


class _Array(list[Any]):
    """An array as nested lists, filled by the state that its pickle gives."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, columns_first, stored = state
        self[:] = _values(stored, kind, shape, "F" if columns_first else "C")


class _Type:
    """What an array's numbers are, such as <f8."""

    __slots__ = ("name",)

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
            raise ValueError("an array of something else than numbers")
        self.name = name

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.name = state[1] + self.name.lstrip("<>=|")


def _values(stored: Any, kind: Any, shape: Any, order: Any) -> list[Any]:
    if not isinstance(kind, _Type):
        raise TypeError("an array without a type")
    if kind.name.lstrip("<>=|").startswith("O"):
        values = np.empty(len(stored), object)
        values[:] = stored
    else:
        values = np.frombuffer(stored, kind.name)
    return list(np.atleast_1d(values.reshape(shape, order=order)).tolist())


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _array_of(stored: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    return _Array(_values(stored, kind, shape, order))


def _type_of(name: Any, *_: Any) -> _Type:
    return _Type(name)


def _number(kind: Any, stored: Any) -> Any:
    return _values(stored, kind, (1,), "C")[0]


def _as_bytes(text: str, *_: Any) -> bytes:
    """How the protocols of Python 2 hold bytes."""
    return text.encode("latin-1")


_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # an argument that is not used
    ("numpy", "dtype"): _type_of,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _as_bytes,
}
for _module in ("numpy.core", "numpy._core"):  # numpy moved its own between versions
    _HARMLESS[f"{_module}.multiarray", "_reconstruct"] = _empty_array
    _HARMLESS[f"{_module}.multiarray", "scalar"] = _number
    _HARMLESS[f"{_module}.numeric", "_frombuffer"] = _array_of


class _DataUnpickler(pickle._Unpickler):
    """Makes containers and lists of numbers, and nothing that runs."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (found := _HARMLESS.get((module, name))) is None:
            raise GemvgError(f"the pickle asks for {module:.99}.{name:.99}, which data does not need; do not open it")
        return found

    def load_build(self) -> None:
        """Only ours have a state; Python's own would set attributes of whatever stands there."""
        state = self.stack.pop()
        if not isinstance(thing := self.stack[-1], (_Array, _Type)):
            raise TypeError("a state of what has none")
        thing.__setstate__(state)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


def _bounded(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def load_bounded(self: Any) -> None:
        load(self)
        if _too_deep(self.stack[-1], DEEPEST):
            raise ValueError("tuples that are too long or nested too deeply")

    return load_bounded


def _too_deep(value: Any, depth: int) -> bool:
    if not isinstance(value, tuple):
        return False
    return depth == 0 or len(value) > WIDEST or any(_too_deep(item, depth - 1) for item in value)


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _DataUnpickler.dispatch[_code[0]] = _bounded(_DataUnpickler.dispatch[_code[0]])
