"""Pictures and a query -> token ids. The one template; training, calibration and benchmarks use it too.

It is Qwen-VL's chat template with the pictures first and the query last, so that the pictures' part is a prefix that
can be prefilled once and asked many times. Knows nothing about pixels: a picture is its patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import Size
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.json_object import short
from gemvg_edge.marks import check_marks, localise
from gemvg_edge.positions import visual_tokens

IMAGE_TOKEN = "<|image_pad|>"
END_OF_TURN = "<|im_end|>"
# Tokens that steer the template. A query may hold boxes and object references (MIG-Bench's queries do), never these.
CONTROL_TOKENS = (
    "<|im_start|>", END_OF_TURN, "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    IMAGE_TOKEN, "<|video_pad|>",
)  # fmt: skip

MAX_QUERY = 100_000  # characters: no question has as many, and a tokenizer takes seconds for a megabyte

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptTemplate:
    """What a checkpoint was trained to read; kept under `grounding.prompt` of its config.json."""

    system: str = "You are a helpful assistant."  # Qwen2-VL's default
    query: str = "{query}"
    # What asks for reasoning before the answer. GeM-VG's own words are not known; these are ours.
    think: str = "{query} First think between <think> and </think>, then answer between <answer> and </answer>."
    number_images: bool = False  # "Picture 1: " before each picture: Qwen2-VL's `add_vision_id`
    system_turn: bool = True  # whether the prompt begins with `system`; stock Qwen3-VL's does not

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> PromptTemplate:
        """Read the five fields; `query` and `think` must hold the place `{query}`."""
        template = PromptTemplate(**config)
        for name, text in (("system", template.system), ("query", template.query), ("think", template.think)):
            if isinstance(text, str) and len(text) > MAX_QUERY:
                raise GemvgError(f"grounding.prompt.{name} has {len(text)} characters, more than {MAX_QUERY}")
        for name, text in (("query", template.query), ("think", template.think)):
            if "{query}" not in text:
                raise GemvgError(f"grounding.prompt.{name} is {text!r}; it needs the place {{query}} in it")
        return template

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)


def prefix_text(template: PromptTemplate, images: int) -> str:
    """The text up to and with the last picture, one IMAGE_TOKEN a picture."""
    pictures = "".join(
        (f"Picture {n}: " if template.number_images else "") + f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
        for n in range(1, images + 1)
    )
    system = f"<|im_start|>system\n{template.system}<|im_end|>\n" if template.system_turn else ""
    return f"{system}<|im_start|>user\n{pictures}"


def query_text(template: PromptTemplate, query: str, think: bool = False) -> str:
    """The text after the last picture, up to where the answer (with `think`: the reasoning) starts."""
    wording = template.think if think else template.query
    return wording.replace("{query}", query) + "<|im_end|>\n<|im_start|>assistant\n"


def encode_prefix(tokenizer: Tokenizer, template: PromptTemplate, grids: Sequence[Grid], merge: int) -> TokenIds:
    """Token ids (tokens,) of the prefix, each picture's place repeated once a visual token."""
    if not grids:
        raise GemvgError("no pictures were given; a query needs at least one")
    ids = np.asarray(encode(tokenizer, prefix_text(template, len(grids))), np.int64)
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == token_id(tokenizer, IMAGE_TOKEN)] = [visual_tokens(grid, merge) for grid in grids]
    return np.repeat(ids, repeats)


def encode_query(
    tokenizer: Tokenizer,
    template: PromptTemplate,
    answer_format: AnswerFormat,
    query: str,
    think: bool = False,
    resized: Sequence[Size] | None = None,
) -> TokenIds:
    """Token ids (tokens,) that follow the prefix; the answer's first token comes next.

    `resized`: (width, height) of each picture as the model sees it, for a box in the query of a model of pixels.
    """
    check_query(query)
    text = query_text(template, localise(query.strip(), answer_format, resized), think)
    return np.asarray(encode(tokenizer, text), np.int64)


def check_query(query: str) -> None:
    """Refuse an empty query, one that is no text and one that could rewrite the template."""
    if not isinstance(query, str):
        raise GemvgError(f"the query is empty; say what to look for, as a text (it is a {type(query).__name__})")
    if not query.strip():
        raise GemvgError("the query is empty; say what to look for, such as 'the red mug'")
    if len(query) > MAX_QUERY:
        raise GemvgError(f"the query has {len(query)} characters, more than {MAX_QUERY}; shorten it")
    if any("\ud800" <= character <= "\udfff" for character in query):  # what Python makes of broken UTF-8 in a shell
        raise GemvgError(f"the query {short(query)} is not Unicode text; type it in UTF-8")
    for token in CONTROL_TOKENS:
        if token in query:
            raise GemvgError(f"the query holds the special token {token}, which would rewrite the prompt; leave it out")
    check_marks(query)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text; special tokens written in it become themselves and none are added."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of one token that the tokenizer must have."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise GemvgError(f"tokenizer.json has no token {token}; it is not a Qwen2-VL tokenizer")
    return int(found)
