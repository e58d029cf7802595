"""A fixed number of items drawn from a stream of unknown length, each as likely (Vitter's algorithm R)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass
class Reservoir(Generic[T]):
    """Holds at most `size` of the items offered so far."""

    size: int
    rng: np.random.Generator
    items: list[T] = field(default_factory=list)
    offered: int = 0

    def offer(self, item: T) -> None:
        """Keep the item with the chance that every earlier one has by now."""
        self.offered += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := int(self.rng.integers(self.offered))) < self.size:
            self.items[place] = item
