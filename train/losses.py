"""The loss on an answer's tokens: a weighed mean, and coordinates that lose little when they are nearly right."""

from __future__ import annotations

import torch
from torch.nn import functional


def answer_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, first_location: int, locations: int
) -> torch.Tensor:
    """Mean cross-entropy of (n, vocabulary) logits against n targets, weighed by n numbers (collate.py).

    Location tokens, of which there are `locations` from `first_location` on, are spread over their neighbours.
    """
    place = targets - first_location
    is_location = (place >= 0) & (place < locations)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    if is_location.any():
        soft = spread(place[is_location].float(), locations)
        log_p = torch.log_softmax(logits[is_location], dim=1)[:, first_location : first_location + locations]
        losses = losses.index_put((is_location.nonzero()[:, 0],), -(soft * log_p).sum(dim=1))
    return (losses * weights).sum() / weights.sum()


def location_loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (n, locations) against places 0..1, spread over the neighbouring locations."""
    return functional.cross_entropy(logits, spread(places * (logits.shape[1] - 1), logits.shape[1]))


def spread(centre: torch.Tensor, count: int, width: float = 1.0) -> torch.Tensor:
    """Soft targets (n, count): a bell of `width` steps around each centre, so that near misses cost little."""
    distance = torch.arange(count, device=centre.device) - centre[:, None]
    return torch.softmax(-0.5 * (distance / width) ** 2, dim=1)
