"""Which of a batch's tokens must point at which visual tokens: those before boxes, before names, and after marks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from train.world.dense_head import DenseTargets, Pointers
from train.world.samples import WorldSample

_Pointing = tuple[int, int, Sequence[int]]  # row, place in it, objects of the batch


def find_pointers(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    ignored: int,
    tokenizer: Tokenizer,
    box_tokens: tuple[int, int],
    locations: range,
    samples: Sequence[WorldSample],
    targets: DenseTargets,
) -> tuple[Pointers, Pointers, Pointers]:
    """Who points where in a batch (batch, sequence): for answers, at what questions mark, and before names.

    A question's last token points at all that answer it, the token before each box's first number in its answer and its
    reasoning at the next of them, each BOX_END in a question at what that box marks, and of the listing's words the
    token before a thing's name at that thing. Questions without a target point nowhere. `box_tokens` are BOX_START and
    BOX_END, `locations` the ids of location tokens.
    """
    answering, marking, naming = list[_Pointing](), list[_Pointing](), list[_Pointing]()
    first = 0
    for row, sample in enumerate(samples):
        answers = labels[row] != ignored
        starts = (answers[1:] & ~answers[:-1]).nonzero()[:, 0].tolist()  # the places before each answer
        boxes = iter(box_places(input_ids[row], answers, box_tokens[0], locations))
        shown = iter((~answers & (input_ids[row] == box_tokens[1])).nonzero()[:, 0].tolist())
        for start, turn, truth in zip(starts, sample.turns, sample.truths, strict=True):
            objects = [first + k for k in truth.wanted]
            answering += [(row, start, objects)] if objects else []
            answering += [(row, next(boxes), [one]) for one in objects * (2 if turn.think else 1)]
            marking += [(row, next(shown), [first + k]) for k in truth.marked]
            if turn.think and truth.named:
                places = token_places(tokenizer, turn.answer, [place for place, _ in truth.named])
                naming += [(row, start + k, [first + one]) for k, (_, one) in zip(places, truth.named, strict=True)]
        first += sum(map(len, sample.seen))
    tokens = len(targets.centres)
    return tuple(_pointers(pointing, targets.cells, tokens) for pointing in (answering, marking, naming))  # type: ignore[return-value]


def box_places(ids: torch.Tensor, answers: torch.Tensor, box_start: int, locations: range) -> list[int]:
    """The tokens (of `length`, where `answers`) before the first number of each box.

    That is BOX_START where boxes have marks; without them every four locations in a row are a box.
    """
    number = torch.arange(len(ids), device=ids.device)
    located = answers & (ids >= locations.start) & (ids < locations.stop)
    before = torch.where(located, -1, number).cummax(dim=0).values  # the last token that was no location
    firsts = located & ((number - before) % 4 == 1)
    marked = (answers & (ids == box_start)).nonzero()[:, 0].tolist()
    return sorted({*marked, *(firsts.nonzero()[:, 0] - 1).tolist()})


def token_places(tokenizer: Tokenizer, text: str, places: Sequence[int]) -> list[int]:
    """Of characters of a text, in order: how many of its tokens end before each one, a space before it or not."""
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    return [bisect.bisect_right(ends, place) for place in places]


def _pointers(pointing: Sequence[_Pointing], cells: torch.Tensor, tokens: int) -> Pointers:
    shares = torch.zeros(len(pointing), tokens)
    for k, (_, _, objects) in enumerate(pointing):
        shares[k, cells[list(objects)]] = 1 / len(objects)
    rows, places = ([entry[part] for entry in pointing] for part in (0, 1))
    return Pointers(torch.tensor(rows, dtype=torch.long), torch.tensor(places, dtype=torch.long), shares)
