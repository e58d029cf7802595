"""A checkpoint as a row of blocks, each with the calibration inputs that reach it; one block's weights at a time.

Vision blocks, merger, decoder layers, head. `stream` yields a block in float32; whoever takes it may change its
weights, and the next block sees what the changed ones give. Layers are transformers' own, rotary tables the runtime's.
With a work folder the inputs are kept after each block, so that a killed run goes on. A vision tower with windows
(Qwen2.5-VL) gets its patches window by window and gives its tokens back in order. Deepstack mergers (Qwen3-VL) stand
behind the vision block that they read; what they give waits for its decoder layer. Knows no quantisation.
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
from transformers.vision_utils import get_vision_window_index

from gemvg_edge.decoding import Rope
from gemvg_edge.positions import place_table, vision_table
from quantize.calibration import CalibrationPrompt
from quantize.checkpoint import Checkpoint
from quantize.tensors import EMBEDDING, PLACES
from quantize.torch_model import Family, family

HEAD, MERGER = "lm_head", "visual.merger"
DEEPSTACK = "visual.deepstack_merger_list."  # and a number
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
    shape, deepstack = checkpoint.config.shape, checkpoint.config.deepstack_blocks
    vision = []
    for k in range(shape.vision.depth):
        vision.append(f"visual.blocks.{k}")
        if k in deepstack:
            vision.append(f"{DEEPSTACK}{deepstack.index(k)}")
    return [*vision, MERGER, *(f"model.layers.{k}" for k in range(shape.layers)), HEAD]


def finished_blocks(work: Path) -> int:
    """How many blocks an earlier run got through, whose last output is kept."""
    if not (work / ACTIVATIONS).is_file():
        return 0
    with safe_open(work / ACTIVATIONS, framework="pt") as file:
        return int(file.metadata()["following"])


def stream(
    checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str = "cpu", work: Path | None = None
) -> Iterator[Block]:
    """The blocks one after the other; with no prompts, only their weights. Starts where `work` ended."""
    kind = family(checkpoint.config.shape.model_type)
    config = kind.config.from_pretrained(checkpoint.folder)
    for part in (config.text_config, config.vision_config):
        part._attn_implementation = "sdpa"
    names = block_names(checkpoint)
    first = finished_blocks(work) if work else 0
    inputs, features = _read_kept(work, len(prompts), device) if work and first else ([], [])
    pictures, words = _layouts(checkpoint, prompts, device), _word_tables(checkpoint, prompts, device)
    if first == 0:
        inputs = _patch_embeddings(checkpoint, kind, prompts, pictures, device)
    for index, name in enumerate(names[first:], first):
        in_vision = name.startswith("visual.")
        if name == "model.layers.0":
            inputs = [_embed(checkpoint, *pair, device) for pair in zip(prompts, inputs, strict=True)]
        if name == HEAD:
            norm = _empty(kind.norm, config.text_config.hidden_size, config.text_config.rms_norm_eps)
            norm = _load(checkpoint, "model.norm", norm, device)
            with torch.inference_mode():
                inputs = [norm(x) for x in inputs]
        block = Block(
            name,
            _load(checkpoint, name, _build(checkpoint, kind, name, config), device),
            inputs,
            [None if in_vision else prompt.weights.to(device) for prompt in prompts],
            _vision_caller(checkpoint, name, pictures) if in_vision else _caller(name, words),
        )
        yield block
        if name != HEAD and prompts:
            if name.startswith(DEEPSTACK):
                features.append(block.run())
            else:
                inputs = block.run()
            if features and not in_vision:  # the first layers take one each
                added = zip(prompts, inputs, features.pop(0), strict=True)
                inputs = [_at_pictures(checkpoint, *one) for one in added]
            if work:
                _keep(work, index + 1, inputs, features)


def _empty(kind: Callable[..., nn.Module], *arguments: Any, **named: Any) -> nn.Module:
    """A module without memory for its weights."""
    with torch.device("meta"):
        return kind(*arguments, **named).eval()


def _build(checkpoint: Checkpoint, kind: Family, name: str, config: Any) -> nn.Module:
    text, shape = config.text_config, checkpoint.config.shape
    if name == HEAD:
        return _empty(nn.Linear, shape.hidden_size, shape.vocab_size, bias=False)
    if name == MERGER or name.startswith(DEEPSTACK):
        merge = checkpoint.config.settings.preprocessing.merge_size
        merger = kind.merger if name == MERGER else kind.deepstack_merger
        return _empty(merger, shape.hidden_size, shape.vision.embed_dim, merge)
    if name.startswith("visual."):
        return _empty(kind.vision_block, config.vision_config)
    return _empty(kind.decoder_layer, text, int(name.rpartition(".")[2]))


def _load(checkpoint: Checkpoint, name: str, module: nn.Module, device: str) -> nn.Module:
    tensors = {}
    for part in module.state_dict():
        stored = EMBEDDING if name == HEAD and checkpoint.config.tied_head else f"{name}.{part}"
        tensors[part] = torch.from_numpy(checkpoint.read(stored)).to(device)
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False)


def _caller(name: str, tables: Sequence[Any]) -> Callable[[nn.Module, int, torch.Tensor], torch.Tensor]:
    def call(module: nn.Module, k: int, x: torch.Tensor) -> torch.Tensor:
        if name == HEAD:
            return module(x)  # type: ignore[no-any-return]
        return module(x[None], position_embeddings=tables[k])[0]  # type: ignore[no-any-return]

    return call


def _vision_caller(
    checkpoint: Checkpoint, name: str, layouts: Sequence[Layout | None]
) -> Callable[[nn.Module, int, torch.Tensor], torch.Tensor]:
    full = [f"visual.blocks.{k}" for k in checkpoint.config.full_attention_blocks]

    def call(module: nn.Module, k: int, x: torch.Tensor) -> torch.Tensor:
        layout = layouts[k]
        if layout is None:  # a text has no pictures
            return x
        if name == MERGER or name.startswith(DEEPSTACK):
            return module(x)[layout.order.argsort()]  # type: ignore[no-any-return]
        borders = layout.pictures if name in full else layout.windows
        return module(x, cu_seqlens=borders, position_embeddings=layout.rope)  # type: ignore[no-any-return]

    return call


@dataclass(frozen=True)
class Layout:
    """How the patches of one prompt's pictures go through the vision tower; without windows a picture is one window."""

    order: torch.Tensor  # (tokens): the merged tokens, window after window
    rope: tuple[torch.Tensor, torch.Tensor]  # cos and sin (patches, head_dim), in that order
    pictures: torch.Tensor  # at which patch each picture begins, and the end
    windows: torch.Tensor  # and each window


def _layouts(checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str) -> list[Layout | None]:
    """The layout of each prompt that has pictures."""
    shape, numbers = checkpoint.config.shape.vision, checkpoint.config.settings.preprocessing
    found: list[Layout | None] = []
    for prompt in prompts:
        if not prompt.grids:
            found.append(None)
            continue
        lengths = [0, *(t * h * w for t, h, w in prompt.grids)]
        pictures = windows = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
        order = torch.arange(sum(lengths) // numbers.merge_size**2)
        if shape.window:
            side = shape.window * numbers.merge_size * numbers.patch_size  # pixels
            grids = torch.tensor(prompt.grids)
            order, windows = get_vision_window_index(grids, numbers.merge_size, side, numbers.patch_size)
        tables = [vision_table(grid, numbers.merge_size, shape.head_dim, shape.rope_theta) for grid in prompt.grids]
        cos, sin = (_ordered(torch.from_numpy(np.concatenate(rows)), order) for rows in zip(*tables, strict=True))
        rope = torch.cat([cos, cos], dim=-1).to(device), torch.cat([sin, sin], dim=-1).to(device)
        found.append(Layout(order.to(device), rope, pictures, windows))
    return found


def _ordered(patches: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of patches (patches, width) with those of each merged token side by side, the tokens in another order."""
    return patches.reshape(len(order), -1, patches.shape[-1])[order].reshape(patches.shape)


def _word_tables(
    checkpoint: Checkpoint, prompts: Sequence[CalibrationPrompt], device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each prompt the decoder's rotary rows (1, tokens, head_dim)."""
    rope = Rope.of(checkpoint.config.shape)
    found = []
    for prompt in prompts:
        cos, sin = (torch.from_numpy(rows).to(device) for rows in rope.table(prompt.positions.numpy()))
        found.append((torch.cat([cos, cos], dim=-1)[None], torch.cat([sin, sin], dim=-1)[None]))
    return found


def _patch_embeddings(
    checkpoint: Checkpoint,
    kind: Family,
    prompts: Sequence[CalibrationPrompt],
    layouts: Sequence[Layout | None],
    device: str,
) -> Inputs:
    numbers, width = checkpoint.config.settings.preprocessing, checkpoint.config.shape.vision.embed_dim
    patch = numbers.patch_size, numbers.temporal_patch_size, checkpoint.config.channels
    module = _load(checkpoint, "visual.patch_embed", _empty(kind.patch_embed, *patch, width), device)
    found = []
    with torch.inference_mode():
        for prompt, layout in zip(prompts, layouts, strict=True):
            if layout is None:
                found.append(torch.empty(0, width, device=device))
                continue
            rows = module(prompt.patches.to(device)) + _places(checkpoint, prompt, device)
            found.append(_ordered(rows, layout.order))
    return found


def _places(checkpoint: Checkpoint, prompt: CalibrationPrompt, device: str) -> torch.Tensor | float:
    """Each patch's learned place (patches, width); nothing where a tower has none."""
    side, merge = checkpoint.config.shape.vision.place_side, checkpoint.config.settings.preprocessing.merge_size
    if not side:
        return 0.0
    tables = [place_table(grid, merge, side) for grid in prompt.grids]
    index, weight = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*tables, strict=True))
    rows = torch.from_numpy(checkpoint.read(PLACES)).to(device)
    return (rows[index] * weight[..., None]).sum(dim=1)


def _embed(checkpoint: Checkpoint, prompt: CalibrationPrompt, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """Embeddings (tokens, hidden) with the visual tokens in their places; reads only the table's rows that it needs."""
    ids, places = torch.unique(prompt.ids, return_inverse=True)
    rows = np.concatenate([checkpoint.rows(EMBEDDING, int(k), int(k) + 1) for k in ids])
    embeddings = torch.from_numpy(rows).to(device)[places.to(device)]
    visual = (prompt.ids == checkpoint.config.shape.image_token_id).to(device)
    if prompt.grids:
        embeddings[visual] = pictures
    return embeddings


def _at_pictures(
    checkpoint: Checkpoint, prompt: CalibrationPrompt, x: torch.Tensor, feature: torch.Tensor
) -> torch.Tensor:
    """Tokens (tokens, hidden) with a feature (visual tokens, hidden) added to those of pictures."""
    if not prompt.grids:
        return x
    visual = (prompt.ids == checkpoint.config.shape.image_token_id).to(x.device)
    return x.masked_scatter(visual[:, None], x[visual] + feature)


def _keep(work: Path, following: int, inputs: Inputs, features: Sequence[Inputs]) -> None:
    """Write the inputs of the block that follows, and the deepstack features that wait, all or nothing."""
    partial = work / f"{ACTIVATIONS}.partial"
    tensors = {f"{n}.{k}": x.contiguous() for n, row in enumerate([inputs, *features]) for k, x in enumerate(row)}
    save_file(tensors, partial, metadata={"following": str(following)})
    os.replace(partial, work / ACTIVATIONS)


def _read_kept(work: Path, prompts: int, device: str) -> tuple[Inputs, list[Inputs]]:
    """The inputs of the block to go on with, and the deepstack features that wait."""
    with safe_open(work / ACTIVATIONS, framework="pt") as file:
        count = len(file.keys()) // max(1, prompts)
        inputs, *features = [[file.get_tensor(f"{n}.{k}").to(device) for k in range(prompts)] for n in range(count)]
    return inputs, features
