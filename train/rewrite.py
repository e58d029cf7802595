"""Write a checkpoint again with its tensors changed, one shard at a time; as a command, in another number format.

    python -m train.rewrite runs/tiny/grpo checkpoints/tabletop --dtype float16

No model is built, so a 7B needs the memory of one shard. What it is made of writes every checkpoint of train/.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gemvg_edge.command import OVERWRITE, command
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, same_path
from train.checkpoint import (
    CONFIG,
    INDEX,
    TOKENIZER,
    check_floats,
    read_json,
    read_object,
    read_settings,
    text_section,
    weight_files,
)
from train.hub import checkpoint_folder
from train.output_folder import check_target, new_folder
from train.profiles import OWN, guess_profile, says_itself

GENERATION = "generation_config.json"
RECORD = "training.json"
# Texts beside the weights. Qwen's vocab.json, merges.txt and added_tokens.json say no more than tokenizer.json does.
COMPANIONS = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", GENERATION,
)  # fmt: skip
# What training from random weights was helped by (dense_head.py), for the stage after; in a folder of its own, since
# every *.safetensors beside config.json is taken for the model's weights.
DENSE_HEAD = "training/dense_head.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What becomes of one tensor; None drops it, and a new name renames it.
Change = Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]


def check_out(checkpoint: Path, out: Path, others: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """GemvgError, to be had before any work, where `writing` would refuse to write."""
    if same_path(out, checkpoint):
        raise GemvgError(f"{out} is the checkpoint itself; give another folder to write to")
    check_target(out, CONFIG, [checkpoint, *others], overwrite=overwrite)


@contextmanager
def writing(checkpoint: Path, out: Path, others: Sequence[Path] = (), *, overwrite: bool = False) -> Iterator[Path]:
    """A folder with the checkpoint's texts, which becomes `out` when all went well; a failure leaves nothing of it.

    With `overwrite` what is at `out` is replaced if it was written so too. `out` is neither the checkpoint nor one of
    `others`.
    """
    check_out(checkpoint, out, others, overwrite=overwrite)
    with new_folder(out, CONFIG, [checkpoint, *others], overwrite=overwrite) as folder:
        for name in (*COMPANIONS, DENSE_HEAD):
            if is_file(checkpoint / name):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        try:
            yield folder
            _keep_profile(checkpoint, folder)
        except SafetensorError as error:  # reading has its own sentence: this is a full disk
            raise GemvgError(f"{out} cannot be written ({error}); make room there or give another place") from None


def keep_record(checkpoint: Path, folder: Path) -> None:
    """How a checkpoint was trained is still true of one that says the same in another form."""
    if is_file(checkpoint / RECORD):
        shutil.copyfile(checkpoint / RECORD, folder / RECORD)


def _keep_profile(checkpoint: Path, folder: Path) -> None:
    """Whose words a stranger's checkpoint knows goes with what is made of it, which may have another name."""
    config = read_json(folder / CONFIG)
    grounding = config.get("grounding") or {}
    name = guess_profile(read_object(checkpoint / CONFIG))
    if name != OWN and not says_itself(grounding):
        write_json(folder / CONFIG, config | {"grounding": {**grounding, "profile": name}})


def rewrite_weights(checkpoint: Path, folder: Path, change: Change) -> None:
    """Write every safetensors file of the checkpoint again, each tensor changed, under the same file names."""
    files, index = weight_files(checkpoint)
    _check_whole(checkpoint, files, index)
    place: dict[str, str] = {}
    size = 0
    for file in files:
        with open_shard(file) as shard:
            mine = names_in(shard, file, index)
            changed = [change(name, finite(shard.get_tensor(name), file, name)) for name in mine]
        tensors = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
        if tensors:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if index:
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": place})


def _check_whole(checkpoint: Path, files: Sequence[Path], index: dict[str, str]) -> None:
    """GemvgError where config.json counts other layers than are stored, or the weights are codes."""
    check_floats(checkpoint)
    config = read_object(checkpoint / CONFIG)
    names = set(index)
    for file in files if not index else ():
        with open_shard(file) as shard:
            names |= set(shard.keys())
    text, vision = text_section(config), config.object("vision_config")
    for what, stated in (("layers", text.value("num_hidden_layers", int)), ("blocks", vision.value("depth", int))):
        stored = {int(found[1]) for name in names if (found := re.search(rf"\.{what}\.(\d{{1,9}})\.", name))}
        if len(stored) != stated or max(stored, default=-1) != stated - 1:
            raise GemvgError(
                f"{checkpoint} has {len(stored)} {what}, but {CONFIG} states {stated}; take both from one checkpoint"
            )


@contextmanager
def open_shard(file: Path) -> Iterator[Any]:
    """A safetensors file, to be read by torch; GemvgError where it is cut short or damaged."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise GemvgError(f"{file} is truncated or damaged ({error}); download the checkpoint again") from None


def names_in(shard: Any, file: Path, index: dict[str, str]) -> list[str]:
    """The tensors of an open file that count: where there is an index, those that it says are in this one."""
    return [name for name in shard.keys() if index.get(name, file.name) == file.name]  # noqa: SIM118  # no mapping


def finite(tensor: torch.Tensor, place: Path, name: str) -> torch.Tensor:
    """The tensor; GemvgError, naming the file or folder it is from, where NaN or infinity is in it."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise GemvgError(f"{place}: {name} holds NaN or infinity; go back to a good checkpoint")
    return tensor


def count_parameters(folder: Path) -> int:
    """How many numbers a checkpoint's weights have."""
    count = 0
    for file in weight_files(folder)[0]:
        with open_shard(file) as shard:
            count += sum(math.prod(shard.get_slice(name).get_shape()) for name in shard.keys())  # noqa: SIM118
    return count


def write_json(file: Path, content: dict[str, Any]) -> None:
    """One JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cast(checkpoint: Path, out: Path, dtype: str, *, overwrite: bool = False) -> None:
    """The same checkpoint with its weights in another number format; numbers that do not fit are an error."""
    read_settings(checkpoint)
    config = read_json(checkpoint / CONFIG)

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        changed = tensor.to(DTYPES[dtype])
        if not changed.isfinite().all():
            raise GemvgError(f"{checkpoint}: {name} has numbers that {dtype} cannot hold; use bfloat16 or float32")
        return name, changed

    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    with writing(checkpoint, out, overwrite=overwrite) as folder:
        write_json(folder / CONFIG, config)
        rewrite_weights(checkpoint, folder, change)
        if is_file(head := folder / DENSE_HEAD):
            save_file({name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(head).items()}, head)
        keep_record(checkpoint, folder)


@command("train.rewrite")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m train.rewrite", description="Write a checkpoint in another number format."
    )
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder to read")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), required=True, help="the number format of the weights (required)"
    )
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    cast(checkpoint_folder(args.checkpoint), args.out, args.dtype, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
