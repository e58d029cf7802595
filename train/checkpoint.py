"""What a checkpoint folder says beside its weights: tokenizer, preprocessing, prompt template, answer format.

Reads the Hugging Face layout; our own settings are the key `grounding` of config.json, and a checkpoint without it (Qwen's
own) gets Qwen2-VL's template and digits. Imports no torch, so that export can use it too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from gemvg_edge.prompt import PromptTemplate


@dataclass(frozen=True)
class CheckpointSettings:
    """Everything that turns pictures and a query into a checkpoint's inputs, and its text into boxes."""

    tokenizer: Tokenizer
    preprocessing: Preprocessing
    template: PromptTemplate
    answer_format: AnswerFormat
    image_token_id: int


def read_settings(folder: Path) -> CheckpointSettings:
    """Read the settings of a checkpoint folder; GemvgError names the file that is missing or wrong."""
    config = read_json(folder / "config.json")
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise GemvgError(f"{tokenizer_file} is missing; a checkpoint needs its fast tokenizer file")
    grounding = config.get("grounding", {})
    return CheckpointSettings(
        Tokenizer.from_file(str(tokenizer_file)),
        Preprocessing.from_config(read_json(folder / "preprocessor_config.json")),
        PromptTemplate.from_config(grounding.get("prompt", {})),
        AnswerFormat.from_config(grounding.get("answer", {})),
        int(config["image_token_id"]),
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file."""
    if not file.parent.is_dir():
        raise GemvgError(f"{file.parent}: no such checkpoint folder")
    if not file.is_file():
        raise GemvgError(f"{file} is missing; {file.parent} is not a checkpoint in the Hugging Face layout")
    try:
        content = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise GemvgError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise GemvgError(f"{file} holds no JSON object")
    return content
