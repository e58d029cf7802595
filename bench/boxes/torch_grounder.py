"""Ground with the PyTorch checkpoint itself: the reference that a bundle's answers are held against.

The prompt, the patches and the reading of the answer are the runtime's; only the model is transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from gemvg_edge.answer import Answer, read_answer
from gemvg_edge.boxes import Size
from gemvg_edge.images import patchify, resize
from gemvg_edge.prompt import encode_prefix, encode_query
from quantize.torch_model import load_model
from train.checkpoint import CheckpointSettings, read_settings, with_budget


@dataclass(frozen=True)
class TorchGrounder:
    """A checkpoint opened in transformers, float32, with what its folder says about prompts and answers."""

    model: PreTrainedModel
    settings: CheckpointSettings

    @staticmethod
    def open(checkpoint: Path, max_pixels: int | None = None) -> TorchGrounder:
        """Open a checkpoint folder; `max_pixels` as in train.checkpoint.with_budget."""
        return TorchGrounder(load_model(checkpoint), with_budget(read_settings(checkpoint), max_pixels))

    @torch.inference_mode()
    def ground(
        self, images: Sequence[Image.Image], query: str, max_new_tokens: int = 256, think: bool = False
    ) -> tuple[str, Answer]:
        """Greedy answer to one query: the text and what it says."""
        ids, patches, grids = self.prompt(images, query, think)
        output = self.model.generate(
            input_ids=ids[None],
            attention_mask=torch.ones_like(ids)[None],
            mm_token_type_ids=(ids == self.settings.image_token_id).long()[None],
            pixel_values=patches,
            image_grid_thw=grids,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        tokens = output[0, len(ids) :].tolist()
        text = self.settings.tokenizer.decode(
            tokens[:-1] if tokens[-1] in self.stop_ids else tokens, skip_special_tokens=False
        )
        return text, self.read(text, [image.size for image in images])

    def read(self, text: str, sizes: Sequence[Size]) -> Answer:
        """What a text of this checkpoint says about pictures of (width, height)."""
        return read_answer(text, sizes, self.settings.answer_format, self.settings.resized(sizes))

    def prompt(
        self, images: Sequence[Image.Image], query: str, think: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (tokens,), patches (patches, values) and grids (pictures, 3) of a question."""
        numbers, tokenizer = self.settings.preprocessing, self.settings.tokenizer
        patches, grids = zip(*(patchify(resize(image, numbers), numbers) for image in images), strict=True)
        prefix = encode_prefix(tokenizer, self.settings.template, grids, numbers.merge_size)
        resized = self.settings.resized([image.size for image in images])
        question = encode_query(tokenizer, self.settings.template, self.settings.answer_format, query, think, resized)
        ids = torch.from_numpy(np.concatenate([prefix, question]))
        return ids, torch.from_numpy(np.concatenate(patches)), torch.tensor(grids)

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer."""
        stop = self.model.generation_config.eos_token_id
        return stop if isinstance(stop, list) else [stop]
