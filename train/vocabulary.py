"""Change what a checkpoint can read and write: another tokenizer, location tokens, or digits again.

    python -m train.vocabulary runs/start runs/moved --tokenizer runs/grown_tokenizer
    python -m train.vocabulary Qwen2-VL-7B runs/7b-locations --locations 1000
    python -m train.vocabulary checkpoints/tabletop runs/start-digits --digits

Folder in, folder out. Works on the safetensors files one shard at a time and changes only the rows of the embedding
table and, where it is not tied to it, of lm_head; so a 7B needs the memory of one shard and no model is built. Every
token of both vocabularies keeps its row, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import encode
from train.checkpoint import CONFIG, TOKENIZER, read_json, read_settings

GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
# Texts beside the weights. Qwen's vocab.json, merges.txt and added_tokens.json say no more than tokenizer.json does.
COMPANIONS = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", GENERATION,
)  # fmt: skip

# What becomes of one tensor; None drops it, and a new name renames it.
Change = Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]


def move_to_tokenizer(checkpoint: Path, tokenizer_folder: Path, out: Path) -> None:
    """The checkpoint with another byte-level tokenizer of Qwen2-VL's make, taken from `tokenizer_folder`.

    A token that the old tokenizer has keeps its row; a new one starts as the mean of the rows of the pieces into
    which the old tokenizer splits its text. Token ids in config.json and generation_config.json follow by content.
    """
    old, config = read_settings(checkpoint).tokenizer, read_json(checkpoint / CONFIG)
    new = read_tokenizer(tokenizer_folder / TOKENIZER)
    pieces = [_pieces(new, token, old) for token in range(_table_rows(new))]

    def rows(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[ids].float().mean(dim=0) for ids in pieces]).to(table.dtype)

    config = _follow(config, old, new, tokenizer_folder / TOKENIZER)
    _set_vocabulary_size(config, len(pieces))
    with writing(checkpoint, out) as folder:
        for name in (TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, folder / name)
        if (folder / GENERATION).is_file():
            _write_json(folder / GENERATION, _follow(read_json(folder / GENERATION), old, new, folder / TOKENIZER))
        _finish(checkpoint, folder, config, rows, {"tokenizer": str(tokenizer_folder)})


def _pieces(new: Tokenizer, token: int, old: Tokenizer) -> list[int]:
    """The old tokens that stand for a new one: the same token, or what its text is split into."""
    name = new.id_to_token(token)
    if name is None:
        raise GemvgError(f"the new tokenizer has no token {token}, but higher ones; save it without gaps")
    if (same := old.token_to_id(name)) is not None:
        return [same]
    text = new.decode([token], skip_special_tokens=False)
    # A part of a character is no text; its bytes are tokens of every byte-level tokenizer.
    found = [old.token_to_id(byte) for byte in name] if "\ufffd" in text else encode(old, text)
    ids = [piece for piece in found if piece is not None]
    if not ids or len(ids) < len(found):
        raise GemvgError(f"the checkpoint's tokenizer cannot write the new token {name!r}; both must be byte-level BPE")
    return ids


def _follow(content: dict[str, Any], old: Tokenizer, new: Tokenizer, file: Path) -> dict[str, Any]:
    """A copy of a config in which every token id, at any depth, names the same token of the new tokenizer."""

    def moved(token: Any) -> Any:
        if isinstance(token, list):
            return [moved(one) for one in token]
        if token is None or (name := old.id_to_token(token)) is None:
            return token  # transformers' defaults, such as a video token, which a small tokenizer may lack
        found = new.token_to_id(name)
        if found is None:
            raise GemvgError(f"{file} has no token {name}, which the checkpoint's config names; add it there")
        return found

    def walked(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: walked(name, inner) for name, inner in value.items()}
        return moved(value) if key.endswith("_token_id") else value

    return {key: walked(key, value) for key, value in content.items()}


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json; GemvgError says that it is missing or broken."""
    if not file.is_file():
        raise GemvgError(f"{file}: no such file; give a folder with a {TOKENIZER}")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise GemvgError(f"{file} is not a tokenizer ({error}); save it again") from None


def _table_rows(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _set_vocabulary_size(config: dict[str, Any], rows: int) -> None:
    """Older checkpoints (Qwen's own among them) keep the decoder's fields at the top of config.json."""
    config.get("text_config", config)["vocab_size"] = rows


def _finish(
    checkpoint: Path,
    folder: Path,
    config: dict[str, Any],
    rows: Callable[[torch.Tensor], torch.Tensor],
    done: dict[str, Any],
) -> None:
    """Write config, weights and the record of what was done, and check that the result can be read."""

    def change(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        is_table = name.endswith("embed_tokens.weight") or name == "lm_head.weight"
        return name, rows(tensor) if is_table else tensor

    # Old tokenizers list added tokens here a second time, by the old ids.
    if (file := folder / "tokenizer_config.json").is_file():
        _write_json(file, {key: value for key, value in read_json(file).items() if key != "added_tokens_decoder"})
    _write_json(folder / CONFIG, config)
    rewrite_weights(checkpoint, folder, change)
    _write_json(folder / "training.json", {"stage": "train.vocabulary", "checkpoint": str(checkpoint), **done})
    read_settings(folder)


@contextmanager
def writing(checkpoint: Path, out: Path) -> Iterator[Path]:
    """A folder with the checkpoint's texts, which becomes `out` when all went well; a crash leaves no half `out`."""
    if out.exists() and not (out / CONFIG).is_file():
        raise GemvgError(f"{out} exists and is no checkpoint; give a new folder")
    if out.resolve() == checkpoint.resolve():
        raise GemvgError(f"{out} is the checkpoint itself; give another folder to write to")
    folder = out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COMPANIONS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    yield folder
    shutil.rmtree(out, ignore_errors=True)
    folder.rename(out)


def rewrite_weights(checkpoint: Path, folder: Path, change: Change) -> None:
    """Write every safetensors file of the checkpoint again, each tensor changed, under the same file names."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        raise GemvgError(f"{checkpoint} has no *.safetensors; download the checkpoint in that format")
    place: dict[str, str] = {}
    size = 0
    for file in files:
        with safe_open(file, framework="pt") as shard:
            changed = [change(name, shard.get_tensor(name)) for name in shard.keys()]  # noqa: SIM118  # no mapping
        tensors = {name: tensor.contiguous() for name, tensor in filter(None, changed)}
        if tensors:
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (checkpoint / INDEX).is_file():
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": place})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Change a checkpoint's vocabulary.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with the tokenizer.json to move to")
    args = parser.parse_args()
    try:
        move_to_tokenizer(args.checkpoint, args.tokenizer, args.out)
    except GemvgError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
