"""Change what a checkpoint can read and write: another tokenizer, location tokens, those without marks, digits again.

    python -m train.vocabulary runs/start runs/moved --tokenizer runs/grown_tokenizer
    python -m train.vocabulary Qwen2-VL-7B runs/7b-locations --locations 1000
    python -m train.vocabulary checkpoints/tabletop runs/start-bare --bare-boxes
    python -m train.vocabulary checkpoints/tabletop runs/start-digits --digits

Folder in, folder out. Works on the safetensors files one shard at a time and changes only the rows of the embedding
table and, where it is not tied to it, of lm_head; so a 7B needs the memory of one shard and no model is built. Every
token of both vocabularies keeps its row, bit for bit.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import RELATIVE_FRAME
from gemvg_edge.command import OVERWRITE, command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from gemvg_edge.prompt import encode
from train.checkpoint import CONFIG, TOKENIZER, read_json, read_settings, read_tokenizer
from train.hub import checkpoint_folder
from train.rewrite import GENERATION, check_out, rewrite_weights, write_json, writing

# An answer starts one such line for each image; as one token it saves four steps.
IMAGE_TAGS = tuple(f"Image-{n}: " for n in range(1, 10))
ROW_MULTIPLE = 128  # a table that was padded for the hardware's sake stays so


def move_to_tokenizer(checkpoint: Path, tokenizer_folder: Path, out: Path, *, overwrite: bool = False) -> None:
    """The checkpoint with another byte-level tokenizer of Qwen2-VL's make, taken from `tokenizer_folder`.

    A token that the old tokenizer has keeps its row; a new one starts as the mean of the rows of the pieces into
    which the old tokenizer splits its text. Token ids in config.json and generation_config.json follow by content.
    """
    check_out(checkpoint, out, [tokenizer_folder], overwrite=overwrite)
    old, config = read_settings(checkpoint).tokenizer, read_json(checkpoint / CONFIG)
    new = read_tokenizer(tokenizer_folder / TOKENIZER)
    pieces = [_pieces(new, token, old) for token in range(_table_rows(new))]

    def rows(table: torch.Tensor) -> torch.Tensor:
        return torch.stack([table[ids].float().mean(dim=0) for ids in pieces]).to(table.dtype)

    config = _follow(config, old, new, tokenizer_folder / TOKENIZER)
    with writing(checkpoint, out, [tokenizer_folder], overwrite=overwrite) as folder:
        for name in (TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
            if is_file(tokenizer_folder / name):
                shutil.copyfile(tokenizer_folder / name, folder / name)
        if is_file(folder / GENERATION):
            write_json(folder / GENERATION, _follow(read_json(folder / GENERATION), old, new, folder / TOKENIZER))
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


def add_locations(checkpoint: Path, out: Path, count: int, *, overwrite: bool = False) -> None:
    """The checkpoint with tokens <loc_0>..<loc_{count-1}> and IMAGE_TAGS, told to answer in them.

    A location starts as the mean of the rows of the digits that would say the same place in 0..1000, which the model
    may know already, plus a smooth wave as strong as the table's rows: digits alone cannot tell 123 from 321, and
    neighbours should start near each other. An image tag starts as the mean of the tokens that it replaces. Tokens
    that the checkpoint has already stay as they are, so a location model that was turned to digits can be turned back.
    """
    answer = AnswerFormat("locations", count)
    if count < 2:
        raise GemvgError(f"--locations {count}: a coordinate needs at least 2 location tokens; 1000 is usual")
    old, config = read_settings(checkpoint).tokenizer, read_json(checkpoint / CONFIG)
    names = [f"<loc_{k}>" for k in range(count)]
    present = sum(token.startswith("<loc_") for token in old.get_vocab())
    if present not in (0, count):
        raise GemvgError(
            f"{checkpoint} has {present} location tokens; give --locations {present}, or another checkpoint"
        )
    new = Tokenizer.from_str(old.to_str())
    said = [str(round(k * RELATIVE_FRAME / (count - 1))) for k in range(count)]  # <loc_k> in digits
    texts = dict(zip((*names, *IMAGE_TAGS), (*said, *IMAGE_TAGS), strict=True))
    new.add_tokens([AddedToken(name, special=False, normalized=False) for name in texts])
    first_new, tokens = _table_rows(old), _table_rows(new)

    def rows(table: torch.Tensor) -> torch.Tensor:
        grown = torch.zeros(_grown_rows(len(table), first_new, tokens), table.shape[1], dtype=table.dtype)
        grown[: len(table)] = table
        for token in range(first_new, tokens):
            pieces = encode(old, texts[str(new.id_to_token(token))])
            grown[token] = table[pieces].float().mean(dim=0).to(table.dtype)
        if not present:  # then they are the first new tokens
            scale = table[:first_new].std().float()
            grown[first_new : first_new + count] += (waves(count, table.shape[1]) * scale).to(table.dtype)
        return grown

    with writing(checkpoint, out, overwrite=overwrite) as folder:
        new.save(str(folder / TOKENIZER))
        _set_answer(config, answer)
        _finish(checkpoint, folder, config, rows, {"locations": count})


def answer_in_digits(checkpoint: Path, out: Path, *, overwrite: bool = False) -> None:
    """The checkpoint told to answer in digits. Its location tokens stay; fine-tuning teaches it the digits."""
    read_settings(checkpoint)
    config = read_json(checkpoint / CONFIG)
    _set_answer(config, AnswerFormat())
    with writing(checkpoint, out, overwrite=overwrite) as folder:
        _finish(checkpoint, folder, config, lambda table: table, {"digits": True})


def drop_marks(checkpoint: Path, out: Path, *, overwrite: bool = False) -> None:
    """The checkpoint of locations told to answer without marks around its boxes, which fine-tuning teaches it.

    Weights and tokenizer stay: a question still shows boxes with their marks.
    """
    answer, config = read_settings(checkpoint).answer_format, read_json(checkpoint / CONFIG)
    if answer.coordinates != "locations":
        raise GemvgError(f"{checkpoint} answers in {answer.coordinates}; give it locations first, with --locations N")
    _set_answer(config, replace(answer, marks=False))
    with writing(checkpoint, out, overwrite=overwrite) as folder:
        _finish(checkpoint, folder, config, lambda table: table, {"bare_boxes": True})


def waves(count: int, width: int) -> torch.Tensor:
    """Waves of k (count, width), from half a wave to sixteen over all of them, with a root mean square of 1."""
    k = torch.arange(count, dtype=torch.float32)[:, None] / (count - 1)  # (count, 1)
    frequency = torch.pi * torch.exp2(torch.linspace(0, 5, width // 2))
    return torch.cat([torch.sin(k * frequency), torch.cos(k * frequency)], dim=1) * 2**0.5


def _grown_rows(rows: int, old_tokens: int, new_tokens: int) -> int:
    """Spare rows are used first, and the table never shrinks."""
    if new_tokens <= rows:
        return rows
    return new_tokens if rows == old_tokens else -(-new_tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def _set_answer(config: dict[str, Any], answer: AnswerFormat) -> None:
    config["grounding"] = {**(config.get("grounding") or {}), "answer": answer.to_config()}


def _table_rows(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


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
        if is_table:
            tensor = rows(tensor)
            # Older checkpoints, Qwen's own among them, keep the decoder's fields at the top of config.json.
            config.get("text_config", config)["vocab_size"] = len(tensor)
        return name, tensor

    # Old tokenizers list added tokens here a second time, by the old ids.
    if is_file(file := folder / "tokenizer_config.json"):
        write_json(file, {key: value for key, value in read_json(file).items() if key != "added_tokens_decoder"})
    rewrite_weights(checkpoint, folder, change)
    write_json(folder / CONFIG, config)
    write_json(folder / "training.json", {"stage": "train.vocabulary", "checkpoint": str(checkpoint), **done})
    read_settings(folder)


@command("train.vocabulary")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.vocabulary", description="Change a checkpoint's vocabulary.")
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder to read")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    what = parser.add_mutually_exclusive_group(required=True)
    locations = "answer in N location tokens, 1000 is usual (one of these four is required)"
    what.add_argument("--locations", type=whole_number, metavar="N", help=locations)
    bare = "answer in the locations that it has, without marks around boxes: four tokens a box and not six"
    what.add_argument("--bare-boxes", action="store_true", help=bare)
    what.add_argument("--digits", action="store_true", help="answer in digits, 0 to 1000")
    tokenizer = "move to the tokenizer.json of this folder (one of these four is required)"
    what.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=tokenizer)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    checkpoint = checkpoint_folder(args.checkpoint)
    if args.digits:
        answer_in_digits(checkpoint, args.out, overwrite=args.overwrite)
    elif args.bare_boxes:
        drop_marks(checkpoint, args.out, overwrite=args.overwrite)
    elif args.tokenizer:
        move_to_tokenizer(checkpoint, args.tokenizer, args.out, overwrite=args.overwrite)
    else:
        add_locations(checkpoint, args.out, args.locations, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
