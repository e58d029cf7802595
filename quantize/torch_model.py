"""A checkpoint in transformers: which of its classes a family of models has, and the whole model in float32.

Of a checkpoint of codes the model computes with the weights that they stand for, so no kernel of anyone's is needed.
A further family is one more case in `family`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from quantize.checkpoint import Checkpoint, in_modules, open_checkpoint
from quantize.model_config import GENERATION
from quantize.tensors import expected_tensors
from train.load import from_folder

Part = Callable[..., torch.nn.Module]


@dataclass(frozen=True)
class Family:
    """transformers' classes of one model type, whole and in parts; all families' parts take the same arguments here."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    patch_embed: Part  # (patch_size, temporal_patch_size, channels, width)
    vision_block: Part  # (vision config)
    merger: Part  # (hidden size of the decoder, width, merge size)
    deepstack_merger: Part  # the same; families without one have their merger here
    decoder_layer: Part  # (text config, number)
    norm: Part  # (hidden size, epsilon)


def family(model_type: str) -> Family:
    """The classes of a model type."""
    match model_type:
        case "qwen2_vl":
            return Family(
                Qwen2VLConfig,
                Qwen2VLForConditionalGeneration,
                modeling_qwen2_vl.PatchEmbed,
                modeling_qwen2_vl.Qwen2VLVisionBlock,
                modeling_qwen2_vl.PatchMerger,
                modeling_qwen2_vl.PatchMerger,
                modeling_qwen2_vl.Qwen2VLDecoderLayer,
                modeling_qwen2_vl.Qwen2VLRMSNorm,
            )
        case "qwen2_5_vl":
            return Family(
                Qwen2_5_VLConfig,
                Qwen2_5_VLForConditionalGeneration,
                modeling_qwen2_5_vl.Qwen2_5_VisionPatchEmbed,
                modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock,
                modeling_qwen2_5_vl.Qwen2_5_VLPatchMerger,
                modeling_qwen2_5_vl.Qwen2_5_VLPatchMerger,
                modeling_qwen2_5_vl.Qwen2_5_VLDecoderLayer,
                modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm,
            )
        case "qwen3_vl":
            return Family(
                Qwen3VLConfig,
                Qwen3VLForConditionalGeneration,
                _qwen3_patch_embed,
                modeling_qwen3_vl.Qwen3VLVisionBlock,
                _qwen3_merger,
                partial(_qwen3_merger, use_postshuffle_norm=True),
                modeling_qwen3_vl.Qwen3VLTextDecoderLayer,
                modeling_qwen3_vl.Qwen3VLTextRMSNorm,
            )
    raise GemvgError(f"unknown model type {model_type!r}")


def _qwen3_patch_embed(patch: int, temporal: int, channels: int, width: int) -> torch.nn.Module:
    sizes = {"patch_size": patch, "temporal_patch_size": temporal, "in_channels": channels, "hidden_size": width}
    return modeling_qwen3_vl.Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(**sizes))  # type: ignore[no-any-return]


def _qwen3_merger(hidden: int, width: int, merge: int, use_postshuffle_norm: bool = False) -> torch.nn.Module:
    config = Qwen3VLVisionConfig(out_hidden_size=hidden, hidden_size=width, spatial_merge_size=merge)
    return modeling_qwen3_vl.Qwen3VLVisionPatchMerger(config, use_postshuffle_norm)  # type: ignore[no-any-return]


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A checkpoint for inference, its codes dequantised if it has any; GemvgError as `open_checkpoint`."""
    return build_model(open_checkpoint(folder), dtype)


def build_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same of an opened checkpoint; an adapter is merged."""
    folder = checkpoint.folder
    kind = family(checkpoint.config.shape.model_type)
    if not checkpoint.codes_format and not checkpoint.adapter:
        return from_folder(kind.model, folder, dtype)[0].eval()
    config = kind.config.from_pretrained(folder)
    if checkpoint.codes_format:
        del config.quantization_config  # or transformers asks for kernels
    if not checkpoint.config.tied_head:  # an adapter may have parted them
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    names = [name for name, _ in expected_tensors(checkpoint.config)]
    weights = {in_modules(name): torch.from_numpy(checkpoint.read(name)) for name in names}
    model = kind.model.from_pretrained(None, config=config, state_dict=weights, dtype=dtype).eval()
    if is_file(folder / GENERATION):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
