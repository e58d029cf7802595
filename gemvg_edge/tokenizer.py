"""A checkpoint's or bundle's tokenizer.json, opened so that a text always becomes the same tokens.

transformers writes padding and truncation into the file once it has tokenised with them, and a BPE may drop merges at
random: each would change prompts, and with them boxes, without a word. Knows no prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, read_bytes
from gemvg_edge.json_object import parse_json, short

LAST_ID = 2**24  # no vocabulary has more, and tables as long as the largest id are made from it


def open_tokenizer(path: Path, fix: str) -> Tokenizer:
    """The tokenizer of a file, without padding, truncation and dropout; GemvgError says what is wrong and the `fix`."""
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: no such file; {fix}")
    stored = read_bytes(path)
    try:
        text = stored.decode("utf-8-sig")
        _check_ids(parse_json(text))
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise GemvgError(f"{printable(path)} is not a tokenizer ({str(error)[:200]}); {fix}") from None
    return tokenizer


def _check_ids(content: Any) -> None:
    """ValueError for ids of no sense; whatever else is wrong the library says."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return  # not a tokenizer, which the library says too
    vocabulary = model.get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = content.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    for number in ids:
        if type(number) is not int or not 0 <= number <= LAST_ID:
            raise ValueError(f"a token has the id {short(number)}, not a whole number of 0 to {LAST_ID}")
