"""A checkpoint as a row of blocks, each with the calibration inputs that reach it; one block's weights at a time.

Vision blocks, merger, decoder layers, head. `stream` yields a block in float32; whoever takes it may change its
weights, and the next block sees what the changed ones give. Layers are transformers' own, rotary tables the runtime's.
With a work folder the inputs are kept after each block, so that a killed run goes on. Knows no quantisation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    PatchEmbed,
    PatchMerger,
    Qwen2VLDecoderLayer,
    Qwen2VLRMSNorm,
    Qwen2VLVisionBlock,
)

from gemvg_edge.positions import mrope_table, vision_table
from quantize.calibration import CalibrationPrompt
from quantize.checkpoint import Checkpoint
from quantize.tensors import EMBEDDING

HEAD, MERGER = "lm_head", "visual.merger"
ACTIVATIONS = "activations.safetensors"

Inputs = list[torch.Tensor]  # of each prompt (tokens, width)


@dataclass(frozen=True)
class Block:
    """A part of the network with its inputs."""

    name: str  # what its tensors' names begin with
    module: nn.Module
    inputs: Inputs
    weights: Sequence[torch.Tensor | None]  # of each prompt: how much each token counts (tokens), None for all alike
    call: Callable[[nn.Module, int, torch.Tensor], torch.Tensor]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Its linear layers by their tensors' names without `.weight`."""
        return {
            f"{self.name}.{name}" if name else self.name: layer
            for name, layer in self.module.named_modules()
            if isinstance(layer, nn.Linear)
        }

    @contextmanager
    def watching(self, layers: Iterable[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
        """Show `see` what each of these linear layers is given, with its name, whenever the block runs."""

        def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
            return lambda module, inputs: see(name, inputs[0])

        linears = self.linears
        handles = [linears[layer].register_forward_pre_hook(hook(layer)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self) -> Inputs:
        """What the block makes of its inputs."""
        return [self.run_one(k) for k in range(len(self.inputs))]

    @torch.inference_mode()
    def run_one(self, k: int) -> torch.Tensor:
        """What it makes of one prompt's."""
        return self.call(self.module, k, self.inputs[k])


def block_names(checkpoint: Checkpoint) -> list[str]:
    """Every block, in the order in which they are computed."""
    shape = checkpoint.config.shape
    vision = [f"visual.blocks.{k}" for k in range(shape.vision.depth)]
    return [*vision, MERGER, *(f"model.layers.{k}" for k in range(shape.layers)), HEAD]


def stream(
    checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str = "cpu", work: Path | None = None
) -> Iterator[Block]:
    """The blocks one after the other; with no prompts, only their weights. Starts where `work` ended."""
    config = Qwen2VLConfig.from_pretrained(checkpoint.folder)
    for part in (config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    names = block_names(checkpoint)
    first, inputs = _resume(work, len(prompts), device) if work else (0, [])
    if first == 0:
        inputs = _patch_embeddings(checkpoint, config, prompts, device)
    pictures, words = _picture_tables(checkpoint, prompts, device), _word_tables(checkpoint, prompts, device)
    for index, name in enumerate(names[first:], first):
        in_vision = name.startswith("visual.")
        if name == "model.layers.0":
            inputs = [_embed(checkpoint, *pair, device) for pair in zip(prompts, inputs, strict=True)]
        if name == HEAD:
            norm = _load(checkpoint, "model.norm", _empty(Qwen2VLRMSNorm, config.text_config.hidden_size), device)
            norm.variance_epsilon = config.text_config.rms_norm_eps
            with torch.inference_mode():
                inputs = [norm(x) for x in inputs]
        block = Block(
            name,
            _load(checkpoint, name, _build(name, config), device),
            inputs,
            [None if in_vision else prompt.weights.to(device) for prompt in prompts],
            _caller(name, pictures if in_vision else words),
        )
        yield block
        if name != HEAD and prompts:
            inputs = block.run()
            if work:
                _keep(work, index + 1, inputs)


def _empty(kind: type[nn.Module], *arguments: Any, **named: Any) -> nn.Module:
    """A module without memory for its weights."""
    with torch.device("meta"):
        return kind(*arguments, **named).eval()


def _build(name: str, config: Any) -> nn.Module:
    text, vision = config.text_config, config.vision_config
    if name == HEAD:
        return _empty(nn.Linear, text.hidden_size, text.vocab_size, bias=False)
    if name == MERGER:
        return _empty(PatchMerger, vision.hidden_size, vision.embed_dim, vision.spatial_merge_size)
    if name.startswith("visual."):
        return _empty(Qwen2VLVisionBlock, vision)
    return _empty(Qwen2VLDecoderLayer, text, int(name.rpartition(".")[2]))


def _load(checkpoint: Checkpoint, name: str, module: nn.Module, device: str) -> nn.Module:
    tensors = {}
    for part in module.state_dict():
        stored = EMBEDDING if name == HEAD and checkpoint.config.tied_head else f"{name}.{part}"
        tensors[part] = torch.from_numpy(checkpoint.read(stored)).to(device)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def _caller(name: str, tables: Sequence[Any]) -> Callable[[nn.Module, int, torch.Tensor], torch.Tensor]:
    def call(module: nn.Module, k: int, x: torch.Tensor) -> torch.Tensor:
        if name.startswith("visual.") and not tables[k]:  # a text has no pictures
            return x
        if name in (HEAD, MERGER):
            return module(x)  # type: ignore[no-any-return]
        if name.startswith("visual."):
            return module(x, **tables[k])  # type: ignore[no-any-return]
        return module(x[None], position_embeddings=tables[k])[0]  # type: ignore[no-any-return]

    return call


def _picture_tables(checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str) -> list[dict[str, Any]]:
    """For each prompt: rotary rows of all its patches, and where each picture begins."""
    shape, merge = checkpoint.config.shape.vision, checkpoint.config.settings.preprocessing.merge_size
    found: list[dict[str, Any]] = []
    for prompt in prompts:
        tables = [vision_table(grid, merge, shape.head_dim, shape.rope_theta) for grid in prompt.grids]
        if not tables:
            found.append({})
            continue
        cos, sin = (torch.from_numpy(np.concatenate(rows)).to(device) for rows in zip(*tables, strict=True))
        lengths = [0, *(t * h * w for t, h, w in prompt.grids)]
        found.append(
            {
                "position_embeddings": (torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)),
                "cu_seqlens": torch.tensor(lengths).cumsum(0, dtype=torch.int32),
            }
        )
    return found


def _word_tables(
    checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each prompt the decoder's rotary rows (1, tokens, head_dim)."""
    shape = checkpoint.config.shape
    found = []
    for prompt in prompts:
        table = mrope_table(prompt.positions.numpy(), shape.head_dim, shape.rope_theta, shape.mrope_section)
        cos, sin = (torch.from_numpy(rows).to(device) for rows in table)
        found.append((torch.cat([cos, cos], dim=-1)[None], torch.cat([sin, sin], dim=-1)[None]))
    return found


def _patch_embeddings(checkpoint: Checkpoint, config: Any, prompts: Sequence[CalibrationPrompt], device: str) -> Inputs:
    vision = config.vision_config
    module = _empty(PatchEmbed, vision.patch_size, vision.temporal_patch_size, vision.in_channels, vision.embed_dim)
    module = _load(checkpoint, "visual.patch_embed", module, device)
    with torch.inference_mode():
        return [
            module(prompt.patches.to(device)) if prompt.grids else torch.empty(0, vision.embed_dim, device=device)
            for prompt in prompts
        ]


def _embed(checkpoint: Checkpoint, prompt: CalibrationPrompt, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Embeddings (tokens, hidden) with the visual tokens in their places; reads only the table's rows that it needs."""
    ids, places = torch.unique(prompt.ids, return_inverse=True)
    rows = np.concatenate([checkpoint.rows(EMBEDDING, int(k), int(k) + 1) for k in ids])
    embeddings = torch.from_numpy(rows).to(device)[places.to(device)]
    visual = (prompt.ids == checkpoint.config.shape.image_token_id).to(device)
    if prompt.grids:
        embeddings[visual] = pictures
    return embeddings


def _keep(work: Path, following: int, inputs: Inputs) -> None:
    """Write the inputs of the block that follows, all or nothing."""
    partial = work / f"{ACTIVATIONS}.partial"
    tensors = {str(k): x.contiguous() for k, x in enumerate(inputs)}
    save_file(tensors, partial, metadata={"following": str(following)})
    os.replace(partial, work / ACTIVATIONS)


def _resume(work: Path, prompts: int, device: str) -> tuple[int, Inputs]:
    """The block to go on with and its inputs; the first if nothing was kept."""
    if not (work / ACTIVATIONS).is_file():
        return 0, []
    with safe_open(work / ACTIVATIONS, framework="pt") as file:
        return int(file.metadata()["following"]), [file.get_tensor(str(k)).to(device) for k in range(prompts)]
