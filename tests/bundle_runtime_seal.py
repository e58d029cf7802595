"""The seal's part of bundle_runtime.py: a manifest -> its digest, by BUNDLE.md alone, without a writer of JSON."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


def seal(manifest: dict[str, Any]) -> str:
    others = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(write(others).encode("ascii")).hexdigest()


def write(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return number(value)
        case str():
            return f'"{"".join(letter(one) for one in value)}"'
        case list():
            return f"[{','.join(write(one) for one in value)}]"
        case dict():
            return "{" + ",".join(f"{write(name)}:{write(value[name])}" for name in sorted(value)) + "}"
    return str(value)


def number(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e16:
        return np.format_float_scientific(value, trim="-", exp_digits=2)
    return np.format_float_positional(value, trim="0")


def letter(one: str) -> str:
    if " " <= one <= "~" or one in ESCAPES:
        return ESCAPES.get(one, one)
    halves = one.encode("utf-16-be")
    return "".join(f"\\u{halves[k : k + 2].hex()}" for k in range(0, len(halves), 2))
