"""What a stage trained -> the weights of a checkpoint folder: the hub's names, adapters merged, nothing missing.

File by file and without building a model: under DeepSpeed's ZeRO-3 whatever transformers builds is split over the
processes at once, so that rank 0 alone would write tensors of no elements, or wait for the others for ever. Knows no
trainer; what it reads is what Trainer saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from gemvg_edge.images import Preprocessing
from gemvg_edge.prompt import PromptTemplate
from train.checkpoint import ADAPTER, CONFIG, HEAD, PREPROCESSOR, PROCESSOR, hub_name, read_json, weight_files
from train.load import DENSE_PREFIX
from train.rewrite import DTYPES, GENERATION, finite, names_in, open_shard, rewrite_weights, write_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTED = "base_model.model."  # begins the names of an adapter's tensors


def write_weights(trained: Path, start: Path, folder: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Write config and weights of `trained`, which began as `start`, into `folder`; gives back its dense head, if any.

    `dtype` is that of merged weights; others stay as they were trained. GemvgError where the result is not `start`'s
    tensors, each of its shape.
    """
    if not any(trained.glob("*.safetensors")):
        raise ungathered(trained, "its weights", None, ())
    if is_file(trained / ADAPTER):
        merge_adapter(trained, start, folder, dtype)
        head: dict[str, torch.Tensor] = {}
    else:
        head = rename(trained, start, folder)
    check_alike(trained, start, folder)
    return head


def rename(trained: Path, start: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The weights under the hub's names, and what training added to the model, which is given back."""
    head: dict[str, torch.Tensor] = {}
    config, known = read_json(trained / CONFIG), shapes(start)
    tied = config.get("tie_word_embeddings", False) and HEAD not in known

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if name.startswith(DENSE_PREFIX):
            head[name.removeprefix(DENSE_PREFIX)] = tensor
            return None
        # Gathered from several processes, a tied head comes out beside the embeddings that it is.
        return None if tied and name == HEAD else (hub_name(name), tensor)

    # Trainer switches the cache off in the model that it trains; who asks the result wants it as it was.
    cached = {key: value for key, value in read_json(start / CONFIG).items() if key == "use_cache"}
    write_json(folder / CONFIG, {key: value for key, value in config.items() if key != "use_cache"} | cached)
    if is_file(trained / GENERATION):
        write_json(folder / GENERATION, read_json(trained / GENERATION))
    rewrite_weights(trained, folder, change)
    return head


def merge_adapter(adapter: Path, start: Path, folder: Path, dtype: str) -> None:
    """The weights that training began with plus its adapter's products, in float32, written in `dtype`."""
    config = read_json(adapter / ADAPTER)
    scaling = config["lora_alpha"] / config["r"]
    tensors = {name.removeprefix(ADAPTED): tensor for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
    ups = {hub_name(name.replace(".lora_B.", ".")): name for name in tensors if ".lora_B." in name}
    merged = set()

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        weight, name = tensor.float(), hub_name(name)
        if stored := ups.get(name):
            up, down = tensors[stored].float(), tensors[stored.replace(".lora_B.", ".lora_A.")].float()
            if (up.shape, down.shape) != ((weight.shape[0], config["r"]), (config["r"], weight.shape[1])):
                raise ungathered(adapter, stored, tuple(up.shape), (weight.shape[0], config["r"]))
            weight = finite(weight + (up @ down) * scaling, adapter, name)
            merged.add(name)
        return name, weight.to(DTYPES[dtype])

    base = read_json(start / CONFIG)
    for part in (base, base.get("text_config", {}), base.get("vision_config", {})):
        part.pop("torch_dtype", None)
        part["dtype"] = dtype
    write_json(folder / CONFIG, base)
    rewrite_weights(start, folder, change)
    if not tensors or 2 * len(merged) != len(tensors):
        left = sorted(tensors.keys() - {ups[name] for name in merged}) or ["its adapter"]
        raise ungathered(adapter, left[0], None, ())


def check_alike(trained: Path, start: Path, folder: Path) -> None:
    """GemvgError unless `folder` has the tensors of `start`, each of its shape: none empty, none left out."""
    wanted, found = shapes(start), shapes(folder)
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise ungathered(trained, name, found.get(name), shape)
    if more := sorted(set(found) - set(wanted)):
        raise GemvgError(f"{trained} has {more[0]}, which {start} has not; take both from one run")


def ungathered(trained: Path, name: str, found: Sequence[int] | None, wanted: Sequence[int]) -> GemvgError:
    """The sentence for weights that were saved in part."""
    what = f"has shape {list(found)} in place of {list(wanted)}" if found is not None else "was not saved"
    return GemvgError(
        f"{trained}: {name} {what}, as if the processes' shares had not been gathered; what is done is kept in "
        f"{trained.parent}, start again with accelerate's --zero3_save_16bit_model true"
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape by its name on the hub; tables that are computed are none."""
    files, index = weight_files(folder)
    found = {}
    for file in files:
        with open_shard(file) as shard:
            for name in names_in(shard, file, index):
                if not name.endswith(".inv_freq"):
                    found[hub_name(name)] = tuple(shard.get_slice(name).get_shape())
    return found


def set_budget(folder: Path, max_pixels: int | None) -> None:
    """Have a checkpoint's preprocessor say another budget of pixels a picture, in the words that it has; None: no."""
    for name in (PREPROCESSOR, PROCESSOR) if max_pixels is not None else ():
        if not is_file(file := folder / name):
            continue
        whole = read_json(file)
        part = whole.get("image_processor") if name == PROCESSOR else whole
        if isinstance(part, dict):
            least = Preprocessing.from_config(part).within(max_pixels).min_pixels
            part.pop("size", None)
            part |= {"min_pixels": least, "max_pixels": max_pixels}
            write_json(file, whole)


def keep_grounding(folder: Path) -> None:
    """Say in full how the result is asked; and which pictures it knows no longer, since it has seen others now.

    Without that an export would take a fine-tune of Qwen's for Qwen's own.
    """
    config = read_json(folder / CONFIG)
    said = {key: value for key, value in (config.get("grounding") or {}).items() if key != "familiar"}
    write_json(folder / CONFIG, config | {"grounding": said or {"prompt": PromptTemplate().to_config()}})
