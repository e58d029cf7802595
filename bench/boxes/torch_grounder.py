"""Ground with the PyTorch checkpoint itself: the reference that a bundle's answers are held against.

The prompt, the patches and the reading of the answer are the runtime's; only the model is transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from gemvg_edge.answer import Answer, read_answer
from gemvg_edge.answer_pieces import Span
from gemvg_edge.boxes import Size
from gemvg_edge.images import patchify, resize
from gemvg_edge.numbering import pictures_in_query
from gemvg_edge.prompt import encode_prefix, encode_query
from gemvg_edge.scores import box_scores
from quantize.torch_model import load_model
from train.checkpoint import CheckpointSettings, read_settings, with_budget


@dataclass(frozen=True)
class TorchGrounder:
    """A checkpoint opened in transformers, with what its folder says about prompts and answers."""

    model: PreTrainedModel
    settings: CheckpointSettings

    @staticmethod
    def open(
        checkpoint: Path, max_pixels: int | None = None, device: str = "cpu", dtype: str = "float32"
    ) -> TorchGrounder:
        """Open a checkpoint folder; `max_pixels` as in train.checkpoint.with_budget."""
        model = load_model(checkpoint, getattr(torch, dtype)).to(device)
        return TorchGrounder(model, with_budget(read_settings(checkpoint), max_pixels))

    @torch.inference_mode()
    def ground(
        self, images: Sequence[Image.Image], query: str, max_new_tokens: int = 256, think: bool = False
    ) -> tuple[str, Answer, int]:
        """Greedy answer to one query: the text, what it says, and how many tokens it took.

        A box's score is the product of its tokens' probabilities, each among the whole vocabulary. A model of single
        pictures is asked about each alone where the query names none, as the runtime does.
        """
        about = self.settings.answer_format.about(pictures_in_query(query))
        if self.settings.answer_format.unnamed == "each" and len(images) > 1 and about is None:
            return self._ground_each(images, query, max_new_tokens, think)
        ids, patches, grids = self.prompt(images, query, think)
        inputs = {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids)[None],
            "mm_token_type_ids": (ids == self.settings.image_token_id).long()[None],
            "pixel_values": patches.to(self.model.dtype),
            "image_grid_thw": grids,
        }
        output = self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = output.sequences[0, len(ids) :].tolist()
        log_probs = [
            float(logits[0].float().log_softmax(-1)[token]) for logits, token in zip(output.logits, tokens, strict=True)
        ]
        tokenizer, stopped = self.settings.tokenizer, tokens[-1] in self.stop_ids
        text = tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=False)
        score = box_scores(tokenizer, tokens, log_probs, text, None)
        answer = self.read(text, [image.size for image in images], about, score)
        if not stopped:
            answer = replace(answer, problem=f"the answer was cut at {max_new_tokens} tokens")
        return text, answer, len(tokens)

    def _ground_each(
        self, images: Sequence[Image.Image], query: str, max_new_tokens: int, think: bool
    ) -> tuple[str, Answer, int]:
        """The question about each picture alone, put together as gemvg_edge.grounding.merge does."""
        texts, answers, counts = zip(*(self.ground([i], query, max_new_tokens, think) for i in images), strict=True)
        boxes = [replace(box, image=k) for k, answer in enumerate(answers) for box in answer.boxes]
        thoughts = [f"Image-{k}: {answer.thinking}" for k, answer in enumerate(answers, 1) if answer.thinking]
        problems = [f"image {k}: {answer.problem}" for k, answer in enumerate(answers, 1) if answer.problem]
        text = "\n".join(f"Image-{k}: {said}" for k, said in enumerate(texts, 1))
        return text, Answer(tuple(boxes), "\n".join(thoughts), problems[0] if problems else None), sum(counts)

    def read(
        self,
        text: str,
        sizes: Sequence[Size],
        unnamed: int | None = None,
        score: Callable[[Sequence[Span]], float] | None = None,
    ) -> Answer:
        """What a text of this checkpoint says about pictures of (width, height); as `gemvg_edge.answer.read_answer`."""
        settings = self.settings
        return read_answer(text, sizes, settings.answer_format, settings.resized(sizes), unnamed, score)

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
