"""A checkpoint's or bundle's tokenizer.json, opened so that a text always becomes the same tokens.

transformers writes padding and truncation into the file once it has tokenised with them, and a BPE may drop merges at
random: each would change prompts, and with them boxes, without a word. Knows no prompt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, read_bytes
from gemvg_edge.json_object import parse_json, short
from gemvg_edge.prompt import IMAGE_TOKEN

_LOCATION = re.compile(r"<loc_\d+>")
# How Qwen2 splits a text into words before its merges; Qwen2.5 and Qwen3 do the same.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
LAST_ID = 2**24  # no vocabulary has more, and tables as long as the largest id are made from it


def open_tokenizer(path: Path, fix: str) -> Tokenizer:
    """The tokenizer of a file, without padding, truncation and dropout; GemvgError says what is wrong and the `fix`."""
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: no such file; {fix}")
    stored = read_bytes(path)
    try:
        text = stored.decode("utf-8-sig")
        content = parse_json(text)
        _check_make(content)
        _check_ids(content)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    except BaseException as error:  # the tokenizers library raises plain Exception, and Rust's panics are none
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise GemvgError(f"{printable(path)} is not a tokenizer ({str(error)[:200]}); {fix}") from None
    return tokenizer


def check_tokens(
    tokenizer: Tokenizer, path: Path, answer_format: AnswerFormat, image_token_id: int, stated_in: str
) -> None:
    """GemvgError where a tokenizer is not that of the model that `stated_in` describes: ids would mean other things."""
    if (found := tokenizer.token_to_id(IMAGE_TOKEN)) != image_token_id:
        raise GemvgError(
            f"{printable(path)}: {IMAGE_TOKEN} is token {found}, but {stated_in} has image_token_id {image_token_id}; "
            "take both files from one checkpoint"
        )
    if answer_format.coordinates != "locations":
        return
    names = {name for name in tokenizer.get_vocab(with_added_tokens=True) if _LOCATION.fullmatch(name)}
    wanted = [f"<loc_{k}>" for k in range(answer_format.locations)]
    if missing := next((name for name in wanted if name not in names), None):
        raise GemvgError(
            f"{printable(path)} has no token {missing}, but {stated_in} has {len(wanted)} of them in its answers; "
            "save the tokenizer that the model was trained with"
        )
    if len(names) > len(wanted):
        raise GemvgError(
            f"{printable(path)} has {len(names)} location tokens, but {stated_in} states {len(wanted)}, so that every "
            "box would be in another place; give the number that the model was trained with"
        )


def _check_make(content: Any) -> None:
    """ValueError for a tokenizer of another make than Qwen2's.

    Other parts would split a text otherwise than the models learnt it, and a stranger's could take any time and memory:
    a rule of forty replacements that each double a text, a regular expression that never ends.
    """
    if not isinstance(content, dict) or not isinstance(model := content.get("model"), dict):
        raise ValueError("it has no model")
    if model.get("type", "BPE") != "BPE" or any(model.get(name) for name in AFFIXES):
        raise ValueError(f"its model is {short(model.get('type'))} or has affixes, where Qwen's is byte-level BPE")
    if content.get("normalizer") not in (None, {"type": "NFC"}):
        raise ValueError("its normalizer is not Qwen's, which is NFC")
    splitting = content.get("pre_tokenizer")
    parts = (
        splitting.get("pretokenizers") if isinstance(splitting, dict) and "pretokenizers" in splitting else [splitting]
    )
    for part in parts if isinstance(parts, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        pattern = part.get("pattern") if isinstance(part, dict) else None
        if kind != "ByteLevel" and not (kind == "Split" and pattern == {"Regex": SPLIT}):
            raise ValueError("its pre_tokenizer is not Qwen's: a split by its pattern, and bytes")
    decoder = content.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise ValueError("its decoder is not Qwen's, which is ByteLevel")


def _check_ids(content: dict[str, Any]) -> None:
    """ValueError for ids of no sense, and for two tokens with one; whatever else is wrong the library says."""
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens")
    tokens = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        tokens += [(token.get("content"), token.get("id")) for token in added if isinstance(token, dict)]
    names: dict[int, Any] = {}
    ids: dict[str, int] = {}
    for name, number in tokens:
        if type(number) is not int or not 0 <= number <= LAST_ID:
            raise ValueError(f"a token has the id {short(number)}, not a whole number of 0 to {LAST_ID}")
        if names.setdefault(number, name) != name:
            raise ValueError(f"the tokens {short(names[number])} and {short(name)} have one id, {number}")
        # An added token may stand in the vocabulary too, if it is the same there.
        if isinstance(name, str) and ids.setdefault(name, number) != number:
            raise ValueError(f"the token {short(name)} has two ids, {ids[name]} and {number}")
