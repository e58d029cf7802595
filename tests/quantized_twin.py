"""The plain twin of a quantised bundle: transformers' model with dequantised weights and rounded activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from export.bundle_writer import Recipe
from export.weights import Scheme
from quantize.rtn import dequantize, quantize


def round_activations(x: np.ndarray, block_size: int) -> np.ndarray:
    """What MatMulNBits' accuracy level 4 makes of its input (.., inputs): 8 bits in the weights' blocks."""
    inputs = x.shape[-1]
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -inputs % block_size)]
    blocks = np.pad(x, padding).reshape(*x.shape[:-1], -1, block_size)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale != 0))
    rounded: np.ndarray = (codes * scale).reshape(*x.shape[:-1], -1)
    return rounded[..., :inputs]


@torch.no_grad()
def quantize_like(model: Any, recipe: Recipe) -> None:
    """Make a Qwen2-VL model compute, slowly, what a bundle of this recipe does."""
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # a tied one is quantised, the table is not
    embedding.copy_(embedding.to(getattr(torch, recipe.embedding)))
    for name, layer in linear_layers(model):
        scheme = recipe.vision if "visual." in name else recipe.decoder
        if scheme.bits:
            rows = quantize(layer.weight.numpy(), scheme.bits, scheme.block_size)
            layer.weight.copy_(torch.from_numpy(dequantize(rows, layer.in_features, scheme.bits)))
            layer.register_forward_pre_hook(rounding(scheme))


def linear_layers(model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Every layer that a recipe's scheme is for; the patch embedding is a convolution and stays as it is."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            yield name, layer


def rounding(scheme: Scheme) -> Callable[[Any, tuple[torch.Tensor]], torch.Tensor]:
    """A hook that rounds a layer's input."""
    return lambda layer, inputs: torch.from_numpy(round_activations(inputs[0].numpy(), scheme.block_size))
