"""A Hugging Face checkpoint folder -> its tensors, one at a time, as float32 numpy; also of GPTQ and AWQ checkpoints.

Reads safetensors (one file or shards with an index) without torch. A file is opened for each read and closed again, so
that what was read does not stay mapped: the peak is the piece asked for. A layer that is stored as codes reads as the
weight that they stand for, or as the codes themselves; one that an adapter belongs to reads as merged. Knows
nothing of graphs and solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors returns)
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject
from quantize import codes
from quantize.adapter import (
    DOWN,
    MERGE,
    UP,
    Adapter,
    add_product,
    check_settings,
    lay_on,
    name_in_model,
    open_adapter,
    read_scaling,
)
from quantize.gptq_format import QuantizedLinear, dequantize
from quantize.model_config import ModelConfig, read_config
from quantize.tensors import expected_tensors
from train.checkpoint import CONFIG, HEAD, RENAMED, check_floats, hub_name, read_object, weight_files

CHECKED = 2**18  # numbers that are looked through at a time
FLOAT_TYPES = ("F32", "F16", "BF16")
# All bits but the sign's, and from which number on they are infinity or no number.
NOT_FINITE = {2: {"float16": (0x7FFF, 0x7C00), "bfloat16": (0x7FFF, 0x7F80)}, 4: {"float32": (0x7FFFFFFF, 0x7F800000)}}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config, where each tensor lies, and how its codes are laid out if it has any."""

    folder: Path
    config: ModelConfig
    places: dict[str, tuple[Path, str]]  # tensor -> file and its name there
    shapes: dict[str, tuple[int, ...]]  # of each as it is stored
    codes_format: str | None = None  # as quantize.codes names it
    adapter: Adapter | None = None  # merged on the way; `folder` is that of its base
    scalings: Mapping[str, float] = field(default_factory=dict)  # of the layers that it adds to, without `.weight`

    @property
    def folders(self) -> list[Path]:
        """The folders that it is read from."""
        return [self.folder, *([self.adapter.folder] if self.adapter else [])]

    def is_adapted(self, name: str) -> bool:
        """Whether an adapter adds to a tensor. It is float32 then, whatever the base is stored in."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.scalings

    def is_quantized(self, layer: str) -> bool:
        """Whether a layer, named without `.weight`, is stored as codes."""
        return self.codes_format is not None and f"{layer}.qweight" in self.places

    def quantized(self, layer: str) -> QuantizedLinear:
        """The codes of such a layer."""
        names = {part: f"{layer}.{part}" for part in codes.parts(self._layout)}
        parts = {part: self.stored(name) for part, name in names.items() if name in self.places}
        try:
            return codes.unpack(self._layout, parts)
        except (ValueError, KeyError) as error:
            raise self._misfit(layer, str(error)) from None

    @property
    def _layout(self) -> str:
        assert self.codes_format is not None  # only asked of a quantised layer
        return self.codes_format

    def _misfit(self, layer: str, what: str) -> GemvgError:
        name = codes.method(self._layout).upper()
        return GemvgError(f"{self.folder}: {layer} is not stored in the {name} format ({what})")

    def grid(self, layer: str) -> tuple[int, int]:
        """(bits, number of groups) of a quantised layer, without reading it."""
        zeros, packed = self._shape(f"{layer}.qzeros"), self._shape(f"{layer}.qweight")
        if len(zeros) != 2 or len(packed) != 2 or 0 in (*zeros, *packed):
            raise self._misfit(layer, f"qweight {packed}, qzeros {zeros}")
        return codes.bits_of(self._layout, packed, zeros), zeros[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if self.is_quantized(layer := name.removesuffix(".weight")):
            bits = max(1, self.grid(layer)[0])
            return codes.weight_shape(self._layout, self._shape(f"{layer}.qweight"), bits)
        return self._shape(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        self._check_place(name)
        return self.shapes[name]

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that a tensor is stored in, without reading it."""
        if self.is_adapted(name):
            return np.dtype(np.float32)
        with self._slice(name) as tensor:
            return np.asarray(tensor[:0]).dtype

    def stored(self, name: str) -> npt.NDArray[Any]:
        """A whole tensor in the type that it is stored in."""
        if self.is_adapted(name):
            return self.read(name)
        with self._slice(name) as tensor:
            return self._checked(name, np.asarray(tensor[:]))

    def _checked(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        check_finite(values, self.places[name][0], name)
        return values

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor."""
        if self.is_quantized(layer := name.removesuffix(".weight")):
            return dequantize(self.quantized(layer))
        values = self._floats(name, slice(None)).astype(np.float32, copy=False)
        return self._merged(layer, values) if self.is_adapted(name) else values

    def _merged(self, layer: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        down, up = self.read(f"{layer}.{DOWN}"), self.read(f"{layer}.{UP}")
        merged = add_product(weight, down, up, self.scalings[layer])
        check_finite(merged, self.places[f"{layer}.{DOWN}"][0], f"{layer}, merged,")
        return merged

    def rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows start..stop of a matrix (out, in)."""
        if self.is_quantized(name.removesuffix(".weight")) or self.is_adapted(name):
            return self.read(name)[start:stop]
        return self._floats(name, slice(start, stop)).astype(np.float32, copy=False)

    def _floats(self, name: str, part: Any) -> npt.NDArray[Any]:
        with self._slice(name) as tensor:
            if (dtype := tensor.get_dtype()) not in FLOAT_TYPES:
                path = self.places[name][0]
                raise GemvgError(f"{path}: {name} has type {dtype}; float32, float16 and bfloat16 are read")
            return self._checked(name, np.asarray(tensor[part]))

    @contextmanager
    def _slice(self, name: str) -> Iterator[Any]:
        self._check_place(name)
        path, stored = self.places[name]
        with _open(path) as file:
            yield file.get_slice(stored)

    def _check_place(self, name: str) -> None:
        if name not in self.places:
            raise GemvgError(f"{self.folder}: no tensor {name}; the checkpoint is incomplete or of another model")


def open_checkpoint(folder: str | Path, profile: str | None = None, base: Path | None = None) -> Checkpoint:
    """Read a checkpoint's config, find its tensors and check their shapes; GemvgError names what is missing.

    `profile` as in train.checkpoint.read_settings. An adapter's folder opens as its base, merged: that which it names,
    or `base`.
    """
    adapter = open_adapter(Path(folder), base)
    folder = adapter.base if adapter else Path(folder)
    config = read_config(folder, profile)
    if adapter:
        check_settings(adapter, config.settings)
    places, shapes = _find_tensors(*weight_files(folder))
    if adapter:
        theirs = _find_tensors([adapter.weights], {}, name_in_model)
        lay_on(adapter, theirs, (places, shapes), config.tied_head and HEAD not in places)
    # transformers does not tie a head that was stored, whatever the config says.
    stored_head = HEAD in places or HEAD.replace("weight", "qweight") in places
    config = replace(config, tied_head=config.tied_head and not stored_head)
    layout = codes.read_format(stated := read_object(folder / CONFIG))
    checkpoint = Checkpoint(folder, config, places, shapes, layout, adapter)
    used = set()
    layers = []
    scalings = {}
    for name, shape in expected_tensors(checkpoint.config):
        if (found := checkpoint.shape(name)) != shape:
            place = places[name][0].parent if name in places else folder
            raise GemvgError(f"{place}: {name} has shape {found}, by config.json {shape}; they do not belong together")
        if checkpoint.is_quantized(layer := name.removesuffix(".weight")):
            layers.append((layer, shape[1]))
            used |= {f"{layer}.{part}" for part in codes.parts(checkpoint._layout)}
        else:
            used.add(name)
        down, up = f"{layer}.{DOWN}", f"{layer}.{UP}"
        if adapter and name.endswith(".weight") and down in places and places[down][0] == adapter.weights:
            scalings[layer] = read_scaling(adapter, places[down][1], shapes[down], shapes.get(up), shape)
            used |= {down, up}
    _check_unused(checkpoint, sorted(set(places) - used))
    if layout:
        _check_grids(checkpoint, stated, layers)
    return replace(checkpoint, scalings=scalings)


def check_finite(values: npt.NDArray[Any], path: Path, name: str) -> None:
    """GemvgError for floats with NaN or infinity among them: one is enough to spoil every answer."""
    kinds = NOT_FINITE.get(values.dtype.itemsize, {})
    if values.dtype.name not in kinds or not values.size:
        return
    mask, least = kinds[values.dtype.name]
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    # Comparing bits keeps pace with the disk, in pieces that a cache holds; bfloat16 has no fast isfinite.
    pieces = (bits[start : start + CHECKED] for start in range(0, len(bits), CHECKED))
    if any(int((piece & piece.dtype.type(mask)).max()) >= least for piece in pieces):
        raise GemvgError(
            f"{path}: {name} holds NaN or infinity; download the checkpoint again or go back to a good one"
        )


def _check_grids(checkpoint: Checkpoint, config: JsonObject, layers: Sequence[tuple[str, int]]) -> None:
    """GemvgError for a layer (name, inputs) whose bits and groups are not what the config states."""
    stated = codes.stated_grids(checkpoint._layout, config)
    ordered = codes.in_activation_order(checkpoint._layout, config)
    for layer, inputs in layers:
        bits, groups = checkpoint.grid(layer)
        if (bits, groups) not in {(b, 1 if size == -1 else -(-inputs // size)) for b, size in stated}:
            grids = ", ".join(f"{b} bits in groups of {size}" for b, size in sorted(stated))
            raise GemvgError(
                f"{checkpoint.folder}: {layer} is stored in {bits} bits and {groups} groups, but {CONFIG} states "
                f"{grids}; take both from one checkpoint"
            )
        if ordered and f"{layer}.g_idx" not in checkpoint.places:
            raise GemvgError(f"{checkpoint.folder}: {layer} is in activation order without g_idx; quantise it again")


def _check_unused(checkpoint: Checkpoint, names: list[str]) -> None:
    """GemvgError for a tensor that would be left out though it says something; zeros and rotary tables do not."""
    for name in names:
        shape = checkpoint.shapes[name]
        if checkpoint.adapter and checkpoint.places[name][0] == checkpoint.adapter.weights:
            raise GemvgError(
                f"{checkpoint.adapter.weights}: {checkpoint.places[name][1]} {shape} is merged into nothing of "
                f"{checkpoint.folder}; give the base that it was trained on with --base, or {MERGE}"
            )
        if name.endswith(".inv_freq"):
            continue
        if checkpoint.is_quantized(name.removesuffix(".weight")):
            raise GemvgError(
                f"{checkpoint.folder}: {name} is stored beside the codes of the same layer; keep one of the two"
            )
        if not name.endswith(".bias") or len(shape) != 1 or np.any(checkpoint.stored(name)):
            raise GemvgError(
                f"{checkpoint.folder}: {name} {shape} is stored, but {CONFIG} describes a model without it; take both "
                "from one checkpoint"
            )


def _find_tensors(
    files: Sequence[Path], index: Mapping[str, str], rename: Callable[[str], str] = str
) -> tuple[dict[str, tuple[Path, str]], dict[str, tuple[int, ...]]]:
    """Where each tensor lies (file and its name there), and its shape as stored."""
    places: dict[str, tuple[Path, str]] = {}
    shapes = {}
    for path in files:
        with _open(path) as file:
            for stored in file.keys():  # noqa: SIM118  (not a dict)
                name = hub_name(rename(stored))
                if index and index.get(stored, path.name) != path.name:
                    continue  # a copy that the index does not mean
                if name in places:
                    raise GemvgError(f"{path}: {stored} is stored twice; download the checkpoint again")
                places[name], shapes[name] = (path, stored), tuple(file.get_slice(stored).get_shape())
    return places, shapes


def open_float_checkpoint(folder: Path, base: Path | None = None) -> Checkpoint:
    """The same, for work that begins with float weights; GemvgError for a quantised one."""
    checkpoint = open_checkpoint(folder, base=base)
    check_floats(checkpoint.folder)
    return checkpoint


def in_modules(name: str) -> str:
    """A tensor's name in transformers' modules, from its name on the hub."""
    for new, old in RENAMED:
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
