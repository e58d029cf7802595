"""A checkpoint's model in transformers, for training: all of its weights from the files, all of them numbers.

transformers loads what it finds: a weight that is missing stays random, one that the config does not describe is left
out, and NaN is a number to it, each with a warning at most. Knows no stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from gemvg_edge.command import one_line
from gemvg_edge.errors import GemvgError
from train.checkpoint import CONFIG, check_floats, weight_files
from train.rewrite import finite

# Of modules that training adds to a model and Trainer saves with it (train/world/dense_head.py).
DENSE_PREFIX = "dense_head."


def load_qwen2_vl(
    folder: Path, dtype: torch.dtype | str = torch.float32, **loading: Any
) -> Qwen2VLForConditionalGeneration:
    """The model in one number format (`"auto"`: as it is stored); GemvgError where the folder is not all of a model.

    `loading` is transformers' own.
    """
    weight_files(folder)  # its errors name what is missing
    check_floats(folder)
    model, told = from_folder(Qwen2VLForConditionalGeneration, folder, dtype, **loading)
    wrong = {
        "lacks": sorted(told["missing_keys"]),
        "has, beside what its config describes,": sorted(
            name for name in told["unexpected_keys"] if not name.startswith(DENSE_PREFIX)
        ),
    }
    for what, names in wrong.items():
        if names:
            raise GemvgError(
                f"{folder} {what} {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}; take {CONFIG} and "
                "the weights from one checkpoint"
            )
    return model


def from_folder(kind: type[Any], folder: Path, dtype: torch.dtype | str, **loading: Any) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' classes, of finite weights, and what it said of loading; GemvgError otherwise."""
    try:
        model, told = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **loading
        )
    except Exception as error:  # transformers answers a stranger's config with whatever it stumbles over
        raise GemvgError(
            f"{folder} cannot be loaded ({one_line(error)[:200]}); take {CONFIG} and the weights from one checkpoint"
        ) from None
    check_finite(model, folder)
    return model, told


def check_finite(model: PreTrainedModel | torch.nn.Module, folder: Path) -> None:
    """GemvgError for a weight with NaN or infinity in it, which would be learned from without a word."""
    for name, weight in model.named_parameters():
        finite(getattr(weight, "ds_tensor", weight), folder, name)  # this process's share, where ZeRO-3 has split it
