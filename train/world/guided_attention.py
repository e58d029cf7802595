"""Attention that is shown where to look: a head's own weights against the tokens that it should have looked at.

Comparing two pictures needs heads that go from a thing to its like, or from a place to the same place. From the loss on
answers alone these take thousands of steps to form, if they do; asked for by name they are there within a few hundred.
Ours, and only for training from random weights (dense_head.py): nothing of it stays in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb


@dataclass(frozen=True)
class Looks:
    """Which m tokens of a batch should look where in their own row."""

    rows: torch.Tensor  # (m,)
    places: torch.Tensor  # (m,)
    wanted: torch.Tensor  # (m, sequence): shares, adding up to 1


def find_looks(cells: Sequence[int], wanted: Sequence[Sequence[int]], is_visual: torch.Tensor) -> Looks:
    """Visual tokens that should look at others of their row; all are indices into the batch's (batch, sequence) ones.

    A token that should look at none is left out.
    """
    spots = is_visual.nonzero()  # (tokens, 2)
    pairs = [(cell, others) for cell, others in zip(cells, wanted, strict=True) if others]
    shares = torch.zeros(len(pairs), is_visual.shape[1], device=is_visual.device)
    for k, (_, others) in enumerate(pairs):
        shares[k, spots[list(others), 1]] = 1 / len(others)
    mine = spots[[cell for cell, _ in pairs]]  # (m, 2)
    return Looks(mine[:, 0], mine[:, 1], shares)


def attention_loss(
    attention: Any,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    head: int,
    looks: Looks,
) -> torch.Tensor:
    """Cross-entropy of one head of a Qwen2-VL attention module against where it should look.

    `hidden` (batch, sequence, width) and `rotary` are what the module was given, `mask` (batch, 1, sequence, sequence)
    is true where a query may see a key, or (batch, sequence) where there is a token, which then sees those before it.
    """
    if not len(looks.rows):
        return hidden.new_zeros(())
    size, at = attention.head_dim, (looks.rows, looks.places)
    key_head = head // attention.num_key_value_groups
    queries = _project(attention.q_proj, hidden[at], head, size)[:, None]  # (m, 1, size)
    keys = _project(attention.k_proj, hidden, key_head, size)  # (batch, sequence, size)
    cos, sin = rotary
    queries, _ = apply_rotary_pos_emb(queries, queries, cos[at][:, None], sin[at][:, None], unsqueeze_dim=0)
    keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=0)
    scores = (queries[0] @ keys[0][looks.rows].mT)[:, 0].float() * attention.scaling  # (m, sequence)
    if mask.dim() == 2:
        seen = mask[looks.rows].bool() & (torch.arange(mask.shape[1], device=mask.device) <= looks.places[:, None])
    else:
        seen = mask[looks.rows, 0, looks.places]
    return functional.cross_entropy(scores.masked_fill(~seen, -1e4), looks.wanted)


def _project(layer: Any, hidden: torch.Tensor, head: int, size: int) -> torch.Tensor:
    part = slice(head * size, (head + 1) * size)
    return functional.linear(hidden, layer.weight[part], layer.bias[part])
