"""A trace's file: named arrays in an .npz with a mark of ours, and how two traces are compared. Knows no networks.

BUNDLE.md says what each array is.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import Manifest
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, refuse_inputs, replacing

FORMAT, VERSION = "gemvg-edge-trace", 1
ABOUT = ("bundle", "bundle_sha256", "dialect", "engine")  # what a trace must say of itself
MOST_BYTES = 4 * 2**30  # of a stranger's trace
FIX = "write it again with `python -m export.trace BUNDLE`"
# Absolute, of what is computed from pictures and positions alone; whatever is not named here, and no float, is exact.
ARITHMETIC = {"patches": 1e-5, "place_weight": 1e-5, "vision_cos": 1e-4, "vision_sin": 1e-4, "cos": 1e-4, "sin": 1e-4}
# Of what networks give, in standard deviations of the array: other engines add in another order, and kernels that
# round activations to 8 bits give another code now and then, which is a step of a 127th for all that follows.
NETWORKS = ("visual_tokens", "embeddings", "free_logits", "answer_logits")
FLOAT_WEIGHTS = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.25}
CODES = 0.25
WHOLE_FLOATS = "onnx"  # the engine that computes float32 in float32; others keep keys and values, or multiply, in less
CHOSEN = {"free_ids": "free_logits", "answer_ids": "answer_logits"}

Arrays = dict[str, npt.NDArray[Any]]
Read = Mapping[str, npt.NDArray[Any]]


def write_trace(path: Path, arrays: Read) -> None:
    """Write the arrays in their order, all or nothing: the same arrays are the same bytes."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name, array in arrays.items():
            # np.savez's own layout, but with a date that is none; the array stands there as np.save writes it.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), (1, 0), allow_pickle=False)


def read_trace(path: Path) -> Arrays:
    """All arrays of a trace; GemvgError for a file that is none."""
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: no such trace; {FIX}")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"its arrays take {size / 2**30:.1f} GiB, and {MOST_BYTES / 2**30:.0f} are read")
        with np.load(path, allow_pickle=False) as archive:
            arrays: Arrays = {name: archive[name] for name in archive.files}
        about = json.loads(text_of(arrays["about"]))
        found = about["format"], about["version"]
        silent = [name for name in ABOUT if not isinstance(about.get(name), str)]
    except Exception as error:  # numpy's reader and zipfile let most of their errors out
        raise GemvgError(f"{printable(path)} is not a trace ({str(error)[:200]}); {FIX}") from None
    if found != (FORMAT, VERSION):
        raise GemvgError(f"{printable(path)} is {found[0]} {found[1]}, not {FORMAT} {VERSION}; {FIX}")
    if silent:
        raise GemvgError(f"{printable(path)} does not say its {silent[0]}; {FIX}")
    return arrays


def check_place(path: Path, bundle: Path, *, overwrite: bool) -> None:
    """GemvgError where a trace would take the place of something else, or become a foreign file of the bundle."""
    refuse_inputs(path, [bundle, *bundle.iterdir()], "--out")
    if bundle.resolve() in path.resolve().parents:
        raise GemvgError(
            f"--out {printable(path)} lies in the bundle, which holds its own files only; give another place"
        )
    if path.exists() and not overwrite:
        try:
            read_trace(path)
        except GemvgError:
            raise GemvgError(
                f"--out {printable(path)} is there already and no trace; add --overwrite to replace it, or give another"
            ) from None


def to_bytes(text: str) -> npt.NDArray[np.uint8]:
    """A text as UTF-8, since few readers of .npy know its text types."""
    return np.frombuffer(text.encode(), np.uint8)


def text_of(array: npt.NDArray[Any]) -> str:
    """The text of such an array."""
    return bytes(array.astype(np.uint8)).decode()


def network_limit(manifest: Manifest, *engines: str) -> float:
    """How far the networks of two engines may be apart on a bundle, in standard deviations."""
    if any(what.startswith("int") for part, what in manifest.weights.items() if part != "embedding"):
        return CODES
    less = any(engine != WHOLE_FLOATS for engine in engines)
    return max(FLOAT_WEIGHTS[manifest.precision], FLOAT_WEIGHTS["float16"] if less else 0.0)


def limit_of(name: str, network: float) -> float:
    """The largest difference of an array that is none; 0 for what is exact."""
    kind = name.rstrip("0123456789").removesuffix("_")
    return network if kind in NETWORKS else ARITHMETIC.get(kind, 0.0)


def difference(name: str, ours: Read, theirs: Read, network: float) -> float:
    """How far one array is off, in the units of its limit; infinite where that has no meaning."""
    a, b = ours[name], theirs[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return np.inf
    if name in CHOSEN:
        return _choice(a, b, theirs[CHOSEN[name]], network)
    if not a.size or np.array_equal(a, b):
        return 0.0
    if limit_of(name, network) == 0:
        return np.inf
    off = float(np.abs(a - b).max())
    if limit_of(name, network) == network:
        off /= float(b.std()) or 1.0
    return off if np.isfinite(off) else np.inf


def _choice(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], logits: npt.NDArray[Any], network: float) -> float:
    """0 where the same tokens are best, or others so near to the best that either may be."""
    rows = np.arange(len(theirs))
    gaps = (logits[rows, theirs] - logits[rows, ours]) / (float(logits.std()) or 1.0)
    return 0.0 if not gaps.size or float(gaps.max()) <= 2 * network else np.inf
