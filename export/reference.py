"""PyTorch's side of verification: transformers' model with the weights that a bundle stands for, in float32.

A checkpoint of codes is dequantised; what the export rounded on its way (`int4-rtn-g32` in the manifest, float16)
is rounded here too. So what is left between the two sides is arithmetic. Needs the training stack.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.bundle import TOKENIZER, Bundle
from gemvg_edge.engines.protocol import Floats
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from gemvg_edge.tokenizer import open_tokenizer
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.rtn import dequantize, quantize

_ROUNDED = re.compile(r"int(\d)-rtn-g(\d+)")
_CODES = re.compile(r"-(gptq|awq)-")


@dataclass(frozen=True)
class Case:
    """Pictures, and a prompt about them that goes on for `steps` tokens of an answer."""

    name: str
    patches: Sequence[Floats]
    grids: Sequence[Grid]
    ids: npt.NDArray[np.int64]
    steps: int


def open_same_model(bundle: Bundle, folder: Path, base: Path | None = None) -> Checkpoint:
    """The checkpoint, an adapter merged; GemvgError where the bundle's manifest or tokenizer says anything else."""
    manifest = bundle.manifest
    checkpoint = open_checkpoint(folder, manifest.profile, base)
    settings = checkpoint.config.settings
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("", asdict(manifest.model), asdict(checkpoint.config.shape)),
        # The pixel budget is the exporter's to choose.
        (
            "preprocessing.",
            asdict(manifest.preprocessing),
            asdict(settings.preprocessing.within(manifest.preprocessing.max_pixels)),
        ),
        ("answer.", asdict(manifest.answer), asdict(settings.answer_format)),
        ("prompt.", asdict(manifest.prompt), asdict(settings.template)),
        ("coordinate_frame.", dict(manifest.coordinate_frame), settings.answer_format.coordinate_frame),
    ]
    for place, ours, theirs in pairs:
        for field in sorted({*ours, *theirs}, key=list({**ours, **theirs}).index):
            if ours.get(field) != theirs.get(field):
                raise GemvgError(
                    f"{bundle.folder} has {place}{field} {ours.get(field)}, {folder} {theirs.get(field)}; "
                    "give the checkpoint that the bundle was exported from"
                )
    # As they are used: of padding and the like, which loading takes away, nothing is left in either.
    ours_read = open_tokenizer(bundle.path(TOKENIZER), "export the bundle again")
    if ours_read.to_str() != settings.tokenizer.to_str():
        raise GemvgError(
            f"{bundle.path(TOKENIZER)} is not the tokenizer of {folder}; give the checkpoint that the bundle was "
            "exported from"
        )
    return checkpoint


def same_codes(bundle: Bundle, checkpoint: Checkpoint) -> bool:
    """Whether the bundle's weights are what the checkpoint holds; not where only one of them has codes."""
    return any(_CODES.search(what) for what in bundle.manifest.weights.values()) == bool(checkpoint.codes_format)


def load_reference(bundle: Bundle, checkpoint: Checkpoint) -> Any:
    """Transformers' model in float32, its weights rounded as the bundle's are."""
    try:
        import torch

        from quantize.torch_model import build_model
    except ImportError as error:
        raise GemvgError(f"PyTorch's side cannot be run ({error}); run `pip install --group train`") from None
    model = build_model(checkpoint)
    weights, precision = bundle.manifest.weights, bundle.manifest.precision
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    head.weight = torch.nn.Parameter(head.weight.clone())  # a tied one is rounded for itself
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                part = "head" if layer is head else "vision" if "visual." in name else "decoder"
                if rounding := _ROUNDED.fullmatch(weights[part]):
                    bits, size = int(rounding[1]), int(rounding[2])
                    rows = quantize(layer.weight.numpy(), bits, size)
                    layer.weight.copy_(torch.from_numpy(dequantize(rows, layer.in_features, bits)))
        if precision != "float32":
            for parameter in model.parameters():
                if parameter is not embedding.weight:
                    parameter.copy_(parameter.to(getattr(torch, precision)))
        if weights["embedding"] == "float16":
            embedding.weight.copy_(embedding.weight.half())
    return model


def run_reference(model: Any, case: Case, image_token_id: int) -> tuple[list[Floats], Floats]:
    """Visual tokens of each picture, and logits (1 + steps, vocab) of the prompt's end and of each token after it.

    The sequence goes through in one piece, without a cache.
    """
    import torch

    pixels, grids = torch.from_numpy(np.concatenate(case.patches)), torch.tensor(case.grids)
    ids = torch.from_numpy(case.ids)[None]
    with torch.inference_mode():
        features: Any = model.model.get_image_features(pixels, grids)
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == image_token_id).int(),  # without it the positions are plain text's
            use_cache=False,
            logits_to_keep=case.steps + 1,
        )
    return visual_tokens(features), output.logits[0].numpy()


def visual_tokens(features: Any) -> list[Floats]:
    """What get_image_features gives -> tokens (tokens, embedding width) of each picture, deepstack features behind."""
    import torch

    parts = [features.pooler_output, *features.get("deepstack_features", [])]
    return [torch.cat(picture, dim=-1).numpy() for picture in zip(*parts, strict=True)]
