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


def _check_ids(content: Any) -> None:
    """ValueError for ids of no sense, and for two tokens with one; whatever else is wrong the library says."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return  # not a tokenizer, which the library says too
    vocabulary, added = model.get("vocab"), content.get("added_tokens")
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
