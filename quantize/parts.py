"""The output of quantising: a file a block while the work goes on, and in the end a checkpoint of ordinary shards.

Tensors that are not quantised are copied as they are stored. All have the names that transformers' modules have, not
the hub's: GPTQModel finds quantised layers by no others. Everything is written beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from gemvg_edge import __version__
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint, in_modules
from quantize.gptq_format import QuantizedLinear, pack
from quantize.solver import Grid
from quantize.stream import HEAD, block_names
from quantize.tensors import expected_tensors
from train.checkpoint import CONFIG, INDEX, SINGLE, read_json
from train.rewrite import DENSE_HEAD, write_json, writing
from train.stage import may_replace, unwritten

START = "start"  # the part of what comes before the first block and between vision tower and decoder
SHARD_BYTES = 10**9
RECORD = "quantization.json"


def write_part(checkpoint: Checkpoint, work: Path, name: str, changed: Mapping[str, npt.NDArray[Any]]) -> None:
    """One block's tensors: what changed, and the rest as the checkpoint has it. Codes take their weight's place."""
    tensors = dict(changed)
    for tensor in _tensors_of(checkpoint, name):
        if tensor not in changed and tensor.replace(".weight", ".qweight") not in changed:
            tensors[tensor] = checkpoint.stored(tensor)
    file = _part_file(work, name)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)


def pack_layers(quantized: Mapping[str, QuantizedLinear], version: str) -> dict[str, npt.NDArray[Any]]:
    """The tensors of quantised layers by their names."""
    return {f"{layer}.{part}": v for layer, q in quantized.items() for part, v in pack(q, version).items()}


def as_stored(checkpoint: Checkpoint, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """A tensor's new values in the type that it is stored in; GemvgError where they do not fit."""
    stored = values.astype(checkpoint.dtype(name))
    if not np.isfinite(stored.astype(np.float32)).all():
        raise GemvgError(
            f"{checkpoint.folder}: {name} would leave the range of {stored.dtype}; cast it to float32 first"
        )
    return stored


def write_checkpoint(
    checkpoint: Checkpoint, work: Path, run: Any, changes: dict[str, Any], record: dict[str, Any], own_head: bool
) -> None:
    """Put the parts together in shards, with config (changed), tokenizer and a record of what was done.

    `own_head`: there is a head now, though it may have been the embedding table before. An adapter may bring one too.
    """
    config = read_json(checkpoint.folder / CONFIG) | changes
    parted = checkpoint.adapter is not None and not checkpoint.config.tied_head
    if own_head or parted:
        for section in (config, config.get("text_config", {})):
            section["tie_word_embeddings"] = False
    parts = [_part_file(work, name) for name in (START, *block_names(checkpoint))]
    with writing(checkpoint.folder, run.out, overwrite=may_replace(run)) as folder:
        write_json(folder / CONFIG, config)
        write_json(folder / RECORD, record)
        shutil.rmtree(folder / Path(DENSE_HEAD).parent, ignore_errors=True)  # of use to training only
        _write_shards(folder, _shards(parts))


def quantization_config(
    usual: Grid, desc_act: bool, damping: float, version: str, grids: Mapping[str, Grid]
) -> dict[str, Any]:
    """GPTQ's `quantization_config`, with an override for each part whose grid is another than the decoder's."""
    patterns = {"visual": r"(model\.)?visual\..*", HEAD: HEAD, "model.embed_tokens": r".*embed_tokens"}
    dynamic = {}
    for part, pattern in patterns.items():
        grid = next((grid for layer, grid in grids.items() if layer.startswith(part)), None)
        if grid and grid != usual:
            dynamic[f"+:{pattern}"] = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric}
    return {
        "quant_method": "gptq",
        "bits": usual.bits,
        "group_size": usual.group_size,
        "sym": usual.symmetric,
        "desc_act": desc_act,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "lm_head": HEAD in grids,
        "dynamic": dynamic,
        "meta": {"quantizer": [f"gemvg-edge:{__version__}"], "damp_percent": damping},
    }


@contextmanager
def writing_parts(out: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written into one sentence."""
    try:
        yield
    except OSError as error:
        raise unwritten(out, error) from None


def _tensors_of(checkpoint: Checkpoint, name: str) -> list[str]:
    names = [tensor for tensor, _ in expected_tensors(checkpoint.config)]
    if name != START:
        return [tensor for tensor in names if tensor.startswith(f"{name}.")]
    blocks = tuple(f"{block}." for block in block_names(checkpoint))
    return [tensor for tensor in names if not tensor.startswith(blocks)]


def _part_file(work: Path, name: str) -> Path:
    return work / f"{name}.safetensors"


def _shards(parts: Sequence[Path]) -> list[list[Path]]:
    """Neighbouring parts together, as long as they stay below SHARD_BYTES."""
    shards: list[list[Path]] = []
    size = SHARD_BYTES
    for part in parts:
        if size + part.stat().st_size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.stat().st_size
    return shards


def _write_shards(folder: Path, shards: Sequence[Sequence[Path]]) -> None:
    places: dict[str, str] = {}
    total = 0
    for number, parts in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {in_modules(name): tensor for part in parts for name, tensor in load_file(part).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
