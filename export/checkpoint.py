"""A Hugging Face checkpoint folder -> its tensors, one at a time, as float32 numpy.

Reads safetensors (one file or shards with an index) without torch. A file is opened for each read and closed again, so
that what was read does not stay mapped: the peak is the piece asked for. Knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors returns)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from export.config import ModelConfig, read_config
from export.tensors import HEAD, expected_tensors
from gemvg_edge.errors import GemvgError
from train.checkpoint import read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# transformers has saved both; the right-hand names are the hub's, and the ones export/ uses.
RENAMED = (("model.language_model.", "model."), ("model.visual.", "visual."))
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and where each tensor lies."""

    folder: Path
    config: ModelConfig
    places: dict[str, tuple[Path, str]]  # tensor -> file and its name there

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        with self._slice(name) as tensor:
            return tuple(tensor.get_shape())

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor."""
        with self._slice(name) as tensor:
            return np.asarray(tensor[:], np.float32)

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop of a matrix (out, in)."""
        with self._slice(name) as tensor:
            return np.asarray(tensor[start:stop], np.float32)

    def columns(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Columns start..stop of a matrix (out, in)."""
        with self._slice(name) as tensor:
            return np.asarray(tensor[:, start:stop], np.float32)

    @contextmanager
    def _slice(self, name: str) -> Iterator[Any]:
        if name not in self.places:
            raise GemvgError(f"{self.folder}: no tensor {name}; the checkpoint is incomplete or of another model")
        path, stored = self.places[name]
        with _open(path) as file:
            tensor = file.get_slice(stored)
            if (dtype := tensor.get_dtype()) not in FLOAT_TYPES:
                raise GemvgError(f"{path}: {stored} has type {dtype}; export reads float32, float16 and bfloat16")
            yield tensor


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint's config, find its tensors and check their shapes; GemvgError names what is missing."""
    folder = Path(folder)
    config = read_config(folder)
    places = {}
    for path in _shards(folder):
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118  (not a dict)
                places[_canonical(stored)] = (path, stored)
    # transformers does not tie a head that was stored, whatever the config says.
    checkpoint = Checkpoint(folder, replace(config, tied_head=config.tied_head and HEAD not in places), places)
    for name, shape in expected_tensors(checkpoint.config):
        if (found := checkpoint.shape(name)) != shape:
            raise GemvgError(f"{folder}: {name} has shape {found}, by config.json {shape}; they do not belong together")
    return checkpoint


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_object(folder / INDEX).object("weight_map")
        names = {weight_map.value(tensor, str) for tensor in weight_map.content}
        paths = [folder / name for name in sorted(names)]
    elif (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    else:
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f" (it has {others[0]}, which is not read)" if others else ""
        raise GemvgError(f"{folder}: no {SINGLE} and no {INDEX}{found}; save the checkpoint as safetensors")
    for path in paths:
        if not path.is_file():
            raise GemvgError(f"{path}: this shard of the checkpoint is missing; download the checkpoint again")
    return paths


def _canonical(name: str) -> str:
    for old, new in RENAMED:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise GemvgError(f"{path} is truncated or damaged ({error}); download the checkpoint again") from None
