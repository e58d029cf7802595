"""Where things lie in a GPU's memory: offsets of tensors in a block, the copies that fill a cache, the size of one.

Pure arithmetic in bytes and tokens. Knows no CUDA, so that a machine without a GPU can check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256  # bytes, what IExecutionContext::setTensorAddress asks of every pointer
SLOTS = 64  # a cache's capacity is a multiple of this, so that each layer's part of it starts aligned
BESIDE_PICTURES = 256  # tokens of template, question and answer, about eight boxes in digits


class Copy2D(NamedTuple):
    """Arguments of cudaMemcpy2DAsync, in bytes; offsets are from the starts of the two blocks."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    height: int


def align(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Tensors of so many bytes in one block: the aligned offset of each, and the size of the block."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += align(size)
    return starts, end


def whole_slots(tokens: int) -> int:
    """The next capacity that a cache may have."""
    return -(-tokens // SLOTS) * SLOTS


def scene_slots(pictures: int, visual_tokens: int) -> int:
    """The capacity for so many pictures of at most so many tokens, with a question and its answer."""
    return whole_slots(pictures * visual_tokens + BESIDE_PICTURES)


def new_plane_bytes(kv_heads: int, tokens: int, row_bytes: int) -> int:
    """Distance between the new keys and values of one layer, (kv_heads, tokens, head_dim), and the next ones'."""
    return align(kv_heads * tokens * row_bytes)


def cache_copies(planes: int, kv_heads: int, capacity: int, row_bytes: int, past: int, tokens: int) -> list[Copy2D]:
    """New keys and values, `planes` of (kv_heads, tokens, head_dim), into (planes, kv_heads, capacity, head_dim).

    `row_bytes` is one head's key of one token. One copy where the new ones lie without gaps, else one a plane.
    """
    width, target_pitch = tokens * row_bytes, capacity * row_bytes
    start = past * row_bytes
    distance = new_plane_bytes(kv_heads, tokens, row_bytes)
    if distance == kv_heads * width:
        return [Copy2D(start, target_pitch, 0, width, width, planes * kv_heads)]
    return [
        Copy2D(start + plane * kv_heads * target_pitch, target_pitch, plane * distance, width, width, kv_heads)
        for plane in range(planes)
    ]


def choose_profile(most: Sequence[int], count: int) -> int | None:
    """The optimisation profile for `count` tokens or patches: the tightest whose largest size takes them."""
    fitting = [(limit, index) for index, limit in enumerate(most) if limit >= count]
    return min(fitting)[1] if fitting else None
