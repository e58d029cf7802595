"""Annotation files of data sets, read without trusting them: a file that cannot be read is one GemvgError sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemvg_edge.errors import GemvgError

# What parsing a malformed entry may raise; a reader turns it into a Fault.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)

# Pickles may call anything. These make containers and arrays of numbers only; numpy moved its own between versions.
_ARRAY, _SCALAR = np.ndarray((0,)).__reduce__()[0], np.float64(0).__reduce__()[0]
_HARMLESS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _HARMLESS[_module, "_reconstruct"] = _ARRAY  # type: ignore[assignment]
    _HARMLESS[_module, "scalar"] = _SCALAR  # type: ignore[assignment]


def read_json(path: Path, kind: type, layout: str) -> Any:
    """The list or dict that a JSON file holds; `layout` tells a user what the folder should look like."""
    _require(path, layout)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GemvgError(f"{path} is not JSON ({error}); download it again") from None
    return _checked(path, content, kind, layout)


def read_pickle(path: Path, kind: type, layout: str) -> Any:
    """The list or dict that a pickle holds, refusing any that would run code."""
    _require(path, layout)
    try:
        with path.open("rb") as file:
            content = _HarmlessUnpickler(file, encoding="utf-8", errors="replace").load()
    except GemvgError as error:
        raise GemvgError(f"{path}: {error}") from None
    except Exception as error:  # a broken pickle may raise whatever it likes
        raise GemvgError(f"{path} is not a pickle that can be read ({error}); download it again") from None
    return _checked(path, content, kind, layout)


def numbers(values: Sequence[Any], count: int) -> list[float]:
    """`count` finite numbers; ValueError or TypeError otherwise."""
    found = [float(value) for value in values]
    if len(found) != count or not np.isfinite(found).all() or any(isinstance(value, (str, bool)) for value in values):
        raise ValueError(f"{values!r} is not {count} numbers")
    return found


def entries(content: dict[str, Any], key: str, path: Path) -> list[Any]:
    """A list that the file must have; what is in it is not checked."""
    if not isinstance(found := content.get(key), list):
        raise GemvgError(f"{path} has no list {key!r}; download it again")
    return found


def identity(entry: Any, key: str = "id") -> int | str | None:
    """An id that an entry names, None where it names none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, (int, str, np.integer)) else None  # type: ignore[return-value]


class _HarmlessUnpickler(pickle.Unpickler):
    """Makes containers and arrays, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (found := _HARMLESS.get((module, name))) is None:
            raise GemvgError(f"the pickle asks for {module}.{name}, which data does not need; do not open it")
        return found


def _require(path: Path, layout: str) -> None:
    if not path.is_file():
        raise GemvgError(f"{path}: no such file; {layout}")


def _checked(path: Path, content: Any, kind: type, layout: str) -> Any:
    if not isinstance(content, kind):
        raise GemvgError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}; {layout}")
    return content
