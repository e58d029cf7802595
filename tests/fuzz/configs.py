"""The JSON files of a checkpoint, damaged one at a time: a model that can be read, or one sentence."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint, write_json

_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
          "tokenizer.json", "model.safetensors.index.json", "chat_template.json")  # fmt: skip
_MARK = b"\n//"  # ends a seed: which file it is


@lru_cache(maxsize=1)
def _checkpoint() -> Path:
    """A tiny checkpoint in two shards, which stays for the process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-configs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_checkpoint(folder, max_shard_size="400KB")
    numbers = json.loads((folder / "preprocessor_config.json").read_text())
    write_json(folder / "processor_config.json", {"image_processor": numbers})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    return folder


def seeds() -> list[bytes]:
    """Each file as it is, with its number at the end."""
    return [(_checkpoint() / name).read_bytes() + _MARK + str(k).encode() for k, name in enumerate(_FILES)]


def check(data: bytes) -> None:
    """Put the file in its place and open the checkpoint."""
    content, _, number = data.rpartition(_MARK)
    name = _FILES[int(number) % len(_FILES)] if number.isdigit() and len(number) < 4 else _FILES[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        shutil.copytree(_checkpoint(), folder, copy_function=_link)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        try:
            opened = open_checkpoint(folder)
        except GemvgError:
            return
        assert opened.config.shape.eos_token_ids
        assert opened.config.settings.preprocessing.max_pixels >= opened.config.settings.preprocessing.min_pixels
        opened.read("model.norm.weight")


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
