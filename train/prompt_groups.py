"""What GRPO asks: records -> groups, each one question in one mode, in the runtime's own tokens.

TRL builds its prompts with a processor and a chat template. Ours hold nothing but the runtime's text and tokenizer, so
the token ids are those of gemvg_edge.prompt (tests/test_prompt_groups.py), whatever template the checkpoint has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.image_utils import make_flat_list_of_images
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemvg_edge.marks import localise
from gemvg_edge.prompt import END_OF_TURN, IMAGE_TOKEN, prefix_text, query_text
from train.checkpoint import CheckpointSettings
from train.data.record import Mode, Record
from train.processor import ImageTextProcessor

END_OF_TEXT = "<|endoftext|>"
# The runtime's own text with the pictures' places cut out: the template has nothing left to add.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def ask(settings: CheckpointSettings, record: Record, mode: Mode) -> list[dict[str, Any]]:
    """The record's question as TRL takes it: the runtime's own text, cut where the pictures go."""
    shown = localise(record.query, settings.answer_format, settings.resized(record.sizes))
    query = query_text(settings.template, shown, think=mode == "cot")
    first, *others = (prefix_text(settings.template, len(record.images)) + query).split(IMAGE_TOKEN)
    parts = [{"type": "text", "text": first}]
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def draw_modes(draws: int, cot_share: float, seed: int) -> list[Mode]:
    """Each group's mode; group k's depends on (seed, k) alone, so a longer run starts like a shorter one."""
    return ["cot" if np.random.default_rng([seed, k]).random() < cot_share else "direct" for k in range(draws)]


def draw_records(draws: int, records: int, seed: int) -> list[int]:
    """Which record each group asks about: all of them in one random order, then in another."""
    rounds = -(-draws // records)
    order = [np.random.default_rng([seed, 1, k]).permutation(records).tolist() for k in range(rounds)]
    return [number for numbers in order for number in numbers][:draws]


def group_dataset(
    records: Sequence[Record], settings: CheckpointSettings, draws: int, cot_share: float, seed: int
) -> Dataset:
    """One row a group, made when it is asked for; its pictures are still paths."""
    modes, numbers = draw_modes(draws, cot_share, seed), draw_records(draws, len(records), seed)

    def load(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [(records[numbers[k]], modes[k]) for k in rows["draw"]]
        return {
            "draw": rows["draw"],
            "prompt": [ask(settings, record, mode) for record, mode in chosen],
            "record": [record for record, _ in chosen],
            "mode": [mode for _, mode in chosen],
        }

    dataset = Dataset.from_dict({"draw": range(draws)})
    dataset.set_transform(load)
    return dataset


class SharedPictures(Qwen2VLImageProcessorPil):  # type: ignore[misc]  # transformers is not followed by mypy
    """Cuts a picture that is given several times once; TRL gives a group's pictures once an answer."""

    def preprocess(self, images: Any, *, return_tensors: Any = None, **settings: Any) -> BatchFeature:
        """As its parent's; the same picture means the same object."""
        flat = make_flat_list_of_images(images)
        own = {id(image): image for image in flat}
        found = super().preprocess(list(own.values()), **settings)
        pieces = np.split(found["pixel_values"], np.cumsum(found["image_grid_thw"].prod(axis=1))[:-1])
        place = {key: k for k, key in enumerate(own)}
        order = [place[id(image)] for image in flat]
        shared = {
            "pixel_values": np.concatenate([pieces[k] for k in order]),
            "image_grid_thw": found["image_grid_thw"][order],
        }
        return BatchFeature(shared, tensor_type=return_tensors)


def group_processor(folder: Path, settings: CheckpointSettings) -> ImageTextProcessor:
    """TRL's processor made of the runtime's tokenizer and text.

    Padded on the left, which TRL takes for granted: on the right, the pictures of a shorter prompt would be looked for
    beside their places, and every later position would be wrong without an error.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=settings.tokenizer, eos_token=END_OF_TURN, pad_token=END_OF_TEXT, padding_side="left"
    )
    return ImageTextProcessor(SharedPictures.from_pretrained(folder), tokenizer, chat_template=CHAT_TEMPLATE)
