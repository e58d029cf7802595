"""A temporary head on the visual tokens that says what lies under each: how a tower learns to see from random weights.

Without it the loss rests on the plateau of ignoring the picture; with it the tower learns objects and places from the first
step. It is dropped when training ends and costs the model nothing. Ours, not the paper's: GeM-VG starts from a tower that
already sees. A cell is one visual token; the cell that holds an object's centre answers for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from gemvg_edge.images import Grid


@dataclass(frozen=True)
class SeenObject:
    """One object in one picture: indices of its name and colour, and its box as shares 0..1 of the picture."""

    name: int
    colour: int
    box: tuple[float, float, float, float]


class DenseHead(nn.Module):
    """Objectness, name, colour and six coordinates (box, and the cell's own centre) for every visual token."""

    def __init__(self, width: int, names: int, colours: int) -> None:
        super().__init__()
        self.names, self.colours = names, colours
        self.classes = nn.Linear(width, 1 + names + colours)
        self.coordinates = nn.Linear(width, 6 * width)

    def loss(
        self,
        tokens: torch.Tensor,
        grids: Sequence[Grid],
        merge: int,
        objects: Sequence[Sequence[SeenObject]],
        location_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Visual tokens (all pictures, width) against what is there.

        Coordinates are read through the model's own location embeddings (locations, width), so the tower learns them in
        the very form in which the decoder will have to say them.
        """
        tokens = tokens.float()  # the model may run in bfloat16
        cells, names, colours, boxes = _targets(grids, merge, objects)
        centres = _cell_centres(grids, merge)  # (tokens, 2)
        here = torch.zeros(len(tokens))
        here[cells] = 1
        scores = self.classes(tokens)
        coordinates = self.coordinates(tokens).unflatten(1, (6, -1)) @ location_rows.T  # (tokens, 6, locations)
        name_scores, colour_scores = scores[cells, 1:].split([self.names, self.colours], dim=1)
        return (
            4 * functional.binary_cross_entropy_with_logits(scores[:, 0], here)
            + functional.cross_entropy(name_scores, names)
            + functional.cross_entropy(colour_scores, colours)
            + location_loss(coordinates[cells, :4].flatten(0, 1), boxes.flatten())
            + 0.5 * location_loss(coordinates[:, 4:].flatten(0, 1), centres.flatten())
        )


def location_loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of (n, locations) against places 0..1, spread over the neighbouring locations."""
    targets = spread(places * (logits.shape[1] - 1), logits.shape[1])
    return functional.cross_entropy(logits.float(), targets)


def spread(centre: torch.Tensor, count: int, width: float = 1.0) -> torch.Tensor:
    """Soft targets (n, count): a bell of `width` steps around each centre, so that near misses cost little."""
    distance = torch.arange(count, device=centre.device) - centre[:, None]
    return torch.softmax(-0.5 * (distance / width) ** 2, dim=1)


def _targets(
    grids: Sequence[Grid], merge: int, objects: Sequence[Sequence[SeenObject]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every object: the index of its cell among all pictures' tokens, its name, its colour, its box."""
    cells, names, colours, boxes = [], [], [], []
    first = 0
    for (_, grid_h, grid_w), seen in zip(grids, objects, strict=True):
        rows, columns = grid_h // merge, grid_w // merge
        for thing in seen:
            x1, y1, x2, y2 = thing.box
            row = min(rows - 1, int((y1 + y2) / 2 * rows))
            column = min(columns - 1, int((x1 + x2) / 2 * columns))
            cells.append(first + row * columns + column)
            names.append(thing.name)
            colours.append(thing.colour)
            boxes.append(thing.box)
        first += rows * columns
    return torch.tensor(cells), torch.tensor(names), torch.tensor(colours), torch.tensor(boxes)


def _cell_centres(grids: Sequence[Grid], merge: int) -> torch.Tensor:
    """(tokens, 2): x and y of each cell's centre as shares of its picture."""
    centres = []
    for _, grid_h, grid_w in grids:
        rows, columns = grid_h // merge, grid_w // merge
        y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).reshape(-1, 2))
    return torch.cat(centres)
