"""A temporary head that says what lies under each visual token: how a model learns to see from random weights.

Without it the loss rests on the plateau of ignoring the picture. It is dropped when training ends and costs the model
nothing. Ours, not the paper's: GeM-VG starts from a tower that already sees. A cell is one visual token; the cell that
holds an object's centre answers for it.

What is asked where follows what can be known where:
  * the vision tower has rotary positions only, so it is blind to absolute place (equal patches give equal tokens
    wherever they lie): its tokens are asked for object, name, colour and the box around their own centre;
  * absolute place enters with the decoder's mRoPE: after a third of its layers the visual tokens are asked for the
    box as the answer must say it;
  * just before the middle, the end of a box that a question shows must point at what lies there;
  * in the middle that token must know the thing's name, and the cells of a second picture are asked what they have to
    do with the first: whether their thing stands where it stood, elsewhere or nowhere there, or has left this place,
    and its box there. A first picture's tokens cannot see the second, so whatever compares the two has to be read off
    the second one's cells. It was not learned from answers alone in thousands of steps, and with these questions only
    slowly: two heads of that layer are shown where to look as well (guided_attention.py);
  * before the last layer, the tokens that are about to name a box must point at the cells of what was asked for.
    Without that, thousands of steps went by in which boxes were drawn around anything, whatever the question; asked
    for in the middle already, questions that compare pictures had too few layers to be answered in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from gemvg_edge.images import Grid
from train.losses import location_loss

POINTER_WIDTH = 64
UNNAMED = -1  # the name of a thing that the head has no score for: furniture


@dataclass(frozen=True)
class SeenObject:
    """One object in one picture: its name's index or UNNAMED, its colour's, its box as shares 0..1 of the picture."""

    name: int
    colour: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Fate:
    """What a place of the second picture has to do with the first; boxes as shares 0..1 of their pictures."""

    fate: int  # STAYED, ELSEWHERE, NOWHERE or LEFT
    box: tuple[float, float, float, float]
    firsts: tuple[tuple[float, float, float, float], ...]  # its thing, or its likes, in the first picture
    one_camera: bool  # the same place of the first picture shows the same place of the table


@dataclass(frozen=True)
class Truth:
    """Of one question: which of the sample's seen objects, counted over all its pictures, are meant where."""

    wanted: tuple[int, ...]  # that answer it, in the order of the answer
    marked: tuple[int, ...]  # that it marks
    named: tuple[tuple[int, int], ...] = ()  # of its reasoning's listing: (where a name begins in the answer, object)


# The first picture shows the thing in the same place, in another one, or not at all; or its thing left this place.
STAYED, ELSEWHERE, NOWHERE, LEFT = range(4)


@dataclass(frozen=True)
class FateTargets:
    """What k visual tokens of a batch have to do with earlier pictures."""

    cells: torch.Tensor  # (k,)
    fates: torch.Tensor  # (k,)
    known: torch.Tensor  # (n,): which of the k have a single box in the earlier picture
    boxes: torch.Tensor  # (n, 4): those boxes, shares 0..1
    likes: list[list[int]]  # of each of the k: the earlier picture's tokens that show its thing or its likes
    same_place: list[list[int]]  # of each: the earlier picture's token in the same place, if one camera took both


@dataclass(frozen=True)
class DenseTargets:
    """What is under the visual tokens of a batch, for n objects among all pictures' tokens."""

    cells: torch.Tensor  # (n,): the index of each object's token
    names: torch.Tensor  # (n,)
    colours: torch.Tensor  # (n,)
    boxes: torch.Tensor  # (n, 4): shares 0..1 of the picture
    offsets: torch.Tensor  # (n, 4): from the cell's centre, in cells
    centres: torch.Tensor  # (tokens, 2): x and y of every cell's centre, shares 0..1


@dataclass(frozen=True)
class Pointers:
    """Which of a batch's tokens have to point at which visual tokens, for m of them."""

    rows: torch.Tensor  # (m,): the row of the batch
    places: torch.Tensor  # (m,): the place in that row
    cells: torch.Tensor  # (m, tokens): shares, adding up to 1, over all visual tokens


class DenseHead(nn.Module):
    """Object, name, colour and offsets from the tower's tokens; places and pointers from the decoder's states."""

    def __init__(self, width: int, names: int, colours: int) -> None:
        super().__init__()
        self.names, self.colours = names, colours
        self.tower = nn.Linear(width, 1 + names + colours + 4)
        self.norm = nn.LayerNorm(width)
        self.places = nn.Linear(width, 6 * width)
        self.answer_pointer, self.mark_pointer = PointerHead(width), PointerHead(width)
        self.marked = nn.Linear(width, names + colours)
        self.fates = nn.Linear(width, 4)
        self.firsts = nn.Linear(width, 4 * width)

    def tower_loss(self, tokens: torch.Tensor, targets: DenseTargets) -> torch.Tensor:
        """Visual tokens (tokens, width) against what they show."""
        scores = self.tower(tokens)
        here = torch.zeros(len(tokens), device=tokens.device)
        here[targets.cells] = 1
        name_scores, colour_scores, offsets = scores[targets.cells, 1:].split([self.names, self.colours, 4], dim=1)
        return (
            4 * functional.binary_cross_entropy_with_logits(scores[:, 0], here)
            + _name_loss(name_scores, targets.names)
            + functional.cross_entropy(colour_scores, targets.colours)
            + functional.l1_loss(offsets, targets.offsets)
        )

    def place_loss(self, hidden: torch.Tensor, targets: DenseTargets, location_rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of the visual tokens (tokens, width) against where they lie.

        Read through the model's own location embeddings (locations, width), so that places are learned in the very
        form in which the decoder will have to say them.
        """
        places = self.places(self.norm(hidden)).unflatten(1, (6, -1)) @ location_rows.T  # (tokens, 6, locations)
        boxes = location_loss(places[targets.cells, :4].flatten(0, 1), targets.boxes.flatten())
        return boxes + 0.5 * location_loss(places[:, 4:].flatten(0, 1), targets.centres.flatten())

    def fate_loss(self, hidden: torch.Tensor, targets: FateTargets) -> torch.Tensor:
        """Hidden states of the visual tokens (tokens, width) against the fates of k of them."""
        if not len(targets.cells):
            return hidden.new_zeros(())
        return functional.cross_entropy(self.fates(self.norm(hidden[targets.cells])), targets.fates)

    def first_loss(self, hidden: torch.Tensor, targets: FateTargets, location_rows: torch.Tensor) -> torch.Tensor:
        """Hidden states of the visual tokens (tokens, width) against the boxes of n of them in the earlier picture."""
        if not len(targets.known):
            return hidden.new_zeros(())
        states = self.norm(hidden[targets.cells[targets.known]])
        places = self.firsts(states).unflatten(1, (4, -1)) @ location_rows.T  # (n, 4, locations)
        return location_loss(places.flatten(0, 1), targets.boxes.flatten())

    def marked_loss(self, hidden: torch.Tensor, marks: Pointers, targets: DenseTargets) -> torch.Tensor:
        """Hidden states (batch, sequence, width) where a question's box ends, against what that box shows."""
        if not len(marks.rows):
            return hidden.new_zeros(())
        names, colours = self.marked(self.norm(hidden[marks.rows, marks.places])).split([self.names, self.colours], 1)
        cells = marks.cells.argmax(dim=1)  # (m,)
        shown = (targets.cells[None] == cells[:, None]).int().argmax(dim=1)  # (m,): which object lies in the cell
        return _name_loss(names, targets.names[shown]) + functional.cross_entropy(colours, targets.colours[shown])


def _name_loss(scores: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Scores (n, names) against names (n,) or UNNAMED, which counts for nothing."""
    known = names != UNNAMED
    return functional.cross_entropy(scores[known], names[known]) if known.any() else scores.sum() * 0


class PointerHead(nn.Module):
    """Where tokens point: scaled products of what they ask for with what the visual tokens show."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.asks, self.shows = nn.Linear(width, POINTER_WIDTH), nn.Linear(width, POINTER_WIDTH)

    def loss(self, hidden: torch.Tensor, is_visual: torch.Tensor, pointers: Pointers) -> torch.Tensor:
        """Hidden states (batch, sequence, width): each pointing token against the visual tokens of its own row."""
        if not len(pointers.rows):
            return hidden.new_zeros(())
        states = self.norm(hidden)
        asked, shown = self.asks(states[pointers.rows, pointers.places]), self.shows(states[is_visual])
        scores = asked @ shown.T / POINTER_WIDTH**0.5  # (m, tokens)
        elsewhere = pointers.rows[:, None] != is_visual.nonzero()[None, :, 0]
        return functional.cross_entropy(scores.masked_fill(elsewhere, -1e4), pointers.cells)


def dense_targets(grids: Sequence[Grid], merge: int, objects: Sequence[Sequence[SeenObject]]) -> DenseTargets:
    """Targets of a batch from each picture's patch grid and what it shows; pictures in the order of their tokens."""
    cells, names, colours, boxes, offsets, centres = [], [], [], [], [], []
    first = 0
    for (_, grid_h, grid_w), seen in zip(grids, objects, strict=True):
        rows, columns = grid_h // merge, grid_w // merge
        for thing in seen:
            x1, y1, x2, y2 = thing.box
            row, column = _cell(thing.box, rows, columns)
            x, y = column + 0.5, row + 0.5
            cells.append(first + row * columns + column)
            names.append(thing.name)
            colours.append(thing.colour)
            boxes.append(thing.box)
            offsets.append((x1 * columns - x, y1 * rows - y, x2 * columns - x, y2 * rows - y))
        down, across = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
        centres.append(torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).reshape(-1, 2))
        first += rows * columns
    return DenseTargets(
        torch.tensor(cells),
        torch.tensor(names),
        torch.tensor(colours),
        torch.tensor(boxes),
        torch.tensor(offsets),
        torch.cat(centres),
    )


def _cell(box: tuple[float, float, float, float], rows: int, columns: int) -> tuple[int, int]:
    """Row and column of the cell that holds a box's centre."""
    x1, y1, x2, y2 = box
    return min(rows - 1, int((y1 + y2) / 2 * rows)), min(columns - 1, int((x1 + x2) / 2 * columns))


def fate_targets(
    grids: Sequence[Grid], merge: int, pictures: Sequence[int], fates: Sequence[Sequence[Fate]]
) -> FateTargets:
    """Targets of a batch, whose samples have so many pictures and those fates.

    A thing that came to where another had been hides that it left: the cell is asked for what is there now.
    """
    starts = [0]
    for _, grid_h, grid_w in grids:
        starts.append(starts[-1] + (grid_h // merge) * (grid_w // merge))

    def token(picture: int, box: tuple[float, float, float, float]) -> int:
        rows, columns = grids[picture][1] // merge, grids[picture][2] // merge
        row, column = _cell(box, rows, columns)
        return starts[picture] + row * columns + column

    found: dict[int, tuple[Fate, int]] = {}
    first = 0
    for count, its_fates in zip(pictures, fates, strict=True):
        for fate in sorted(its_fates, key=lambda fate: -fate.fate):
            found[token(first + 1, fate.box)] = fate, first
        first += count
    single = {k: fate.firsts[0] for k, (fate, _) in enumerate(found.values()) if len(fate.firsts) == 1}
    return FateTargets(
        torch.tensor(list(found), dtype=torch.long),
        torch.tensor([fate.fate for fate, _ in found.values()], dtype=torch.long),
        torch.tensor(list(single), dtype=torch.long),
        torch.tensor(list(single.values())),
        [[token(picture, box) for box in fate.firsts] for fate, picture in found.values()],
        [[token(picture, fate.box)] if fate.one_camera else [] for fate, picture in found.values()],
    )
