"""The files of a LoRA folder, damaged one at a time: merged, or one sentence."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gemvg_edge.errors import GemvgError
from quantize.adapter import WEIGHTS
from quantize.checkpoint import open_checkpoint
from tests.adapters import say, write_adapter
from tests.checkpoints import write_checkpoint
from train.checkpoint import ADAPTER, TOKENIZER

_FILES = (ADAPTER, WEIGHTS, TOKENIZER)
_MARK = b"\n//"  # ends a seed: which file it is
_LAYER = "model.layers.0.self_attn.q_proj.weight"


@lru_cache(maxsize=1)
def _folder() -> Path:
    """A tiny checkpoint and an adapter of it, which stay for the process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-adapters-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_checkpoint(folder / "base")
    patterns: dict[str, Any] = {
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj|k_proj": 5},
    }
    options = {"r": 2, "target_modules": ["q_proj", "k_proj"], "bias": "all", **patterns}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of transformers' names
        write_adapter(folder / "adapter", folder / "base", **options)
    shutil.copyfile(folder / "base" / TOKENIZER, folder / "adapter" / TOKENIZER)
    say(base_model_name_or_path=None)(folder / "adapter")
    return folder


def seeds() -> list[bytes]:
    """Each file as it is, with its number at the end."""
    return [(_folder() / "adapter" / name).read_bytes() + _MARK + str(k).encode() for k, name in enumerate(_FILES)]


def check(data: bytes) -> None:
    """Put the file in its place, open the adapter on its base and merge a layer."""
    content, _, number = data.rpartition(_MARK)
    name = _FILES[int(number) % len(_FILES)] if number.isdigit() and len(number) < 4 else _FILES[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(_folder() / "adapter", Path(scratch, "adapter"))
        (folder / name).write_bytes(content)
        try:
            merged = open_checkpoint(folder, base=_folder() / "base").read(_LAYER)
        except GemvgError:
            return
        assert merged.shape == (96, 96)
        assert np.isfinite(merged).all()
