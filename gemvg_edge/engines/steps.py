"""What engines that run one step after the other, each for its last token, check and give. Knows no engine."""

from __future__ import annotations

from gemvg_edge.engines.protocol import CacheT, Floats, Ids, Step
from gemvg_edge.errors import GemvgError


def check_step(step: Step[CacheT]) -> None:
    """GemvgError for more tokens than the cache holds, and for the logits of more than the last."""
    total, capacity = step.past + len(step.embeddings), step.cache.capacity
    if total > capacity:
        raise GemvgError(f"{total} tokens do not fit a cache of {capacity}; give fewer or smaller pictures")
    if step.rows != 1:
        raise GemvgError(f"rows={step.rows}, and this engine gives the last token's logits only; ask for 1")


def check_copy(tokens: int, source: int, target: int) -> None:
    """GemvgError for more tokens than the caches of these capacities hold."""
    if not 0 <= tokens <= min(source, target):
        raise GemvgError(
            f"{tokens} tokens cannot be copied between caches of {source} and {target}; make the new one larger"
        )


def pick(logits: Floats, legal: Ids | None) -> Floats:
    """A copy of logits (1, vocab), or of those of the `legal` ids (1, k)."""
    return logits.copy() if legal is None else logits[:, legal]
