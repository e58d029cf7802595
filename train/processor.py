"""Qwen2-VL's processor without its video half, which transformers 5 cannot build unless torchvision is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


class ImageTextProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers is not followed by mypy
    """Pictures and text only. TRL's trainers take it where they would take Qwen2VLProcessor."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The two parts that are saved and loaded."""
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(folder: Path) -> ImageTextProcessor:
    """The processor of a checkpoint folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return ImageTextProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
