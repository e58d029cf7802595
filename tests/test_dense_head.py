"""The temporary head: which token answers for which object, and that its losses can be driven to their floor."""

from __future__ import annotations

import pytest
import torch

from train.world.dense_head import (
    ELSEWHERE,
    LEFT,
    NOWHERE,
    POINTER_WIDTH,
    STAYED,
    DenseHead,
    Fate,
    PointerHead,
    Pointers,
    SeenObject,
    dense_targets,
    fate_targets,
)

GRIDS = [(1, 8, 12), (1, 6, 4)]  # 4 x 6 and 3 x 2 cells of 2 x 2 patches
OBJECTS = [
    [SeenObject(0, 1, (0.5, 0.25, 0.6, 0.5)), SeenObject(2, 0, (0.9, 0.8, 1.0, 1.0))],
    [SeenObject(1, 2, (0.0, 0.0, 0.4, 0.2))],
]


def test_the_cell_under_the_centre_answers() -> None:
    targets = dense_targets(GRIDS, 2, OBJECTS)
    # Centres (0.55, 0.375) -> column 3, row 1; (0.95, 0.9) -> column 5, row 3; then the second picture's first cell.
    assert targets.cells.tolist() == [1 * 6 + 3, 3 * 6 + 5, 24]
    assert targets.names.tolist() == [0, 2, 1]
    assert targets.colours.tolist() == [1, 0, 2]
    # From the centre of column 3, row 1, in cells: x 0.5 * 6 - 3.5, y 0.25 * 4 - 1.5, ...
    torch.testing.assert_close(targets.offsets[0], torch.tensor([-0.5, -0.5, 0.1, 0.5]))


def test_centres_are_in_the_order_of_the_tokens() -> None:
    centres = dense_targets(GRIDS, 2, OBJECTS).centres
    assert centres.shape == (24 + 6, 2)
    torch.testing.assert_close(centres[:2], torch.tensor([[0.5 / 6, 0.125], [1.5 / 6, 0.125]]))
    torch.testing.assert_close(centres[[6, 24, 26]], torch.tensor([[0.5 / 6, 0.375], [0.25, 0.5 / 3], [0.25, 0.5]]))


def test_an_object_at_the_very_edge_stays_in_its_picture() -> None:
    targets = dense_targets([(1, 4, 4)], 2, [[SeenObject(0, 0, (1.0, 1.0, 1.0, 1.0))]])
    assert targets.cells.tolist() == [3]


@pytest.mark.parametrize("part", ["tower", "place"])
def test_a_head_that_sees_its_targets_learns_them(part: str) -> None:
    torch.manual_seed(0)
    targets = dense_targets(GRIDS, 2, OBJECTS)
    head, rows = DenseHead(32, names=3, colours=3), torch.randn(21, 32)
    tokens = torch.nn.Parameter(torch.randn(30, 32))
    optimizer = torch.optim.Adam([*head.parameters(), tokens], lr=0.02)
    losses = []
    for _ in range(300):
        loss = head.tower_loss(tokens, targets) if part == "tower" else head.place_loss(tokens, targets, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Soft targets have entropy: about 1.42 for the four box numbers and half as much again for the centres.
    floor = 0.0 if part == "tower" else 1.5 * 1.42
    assert losses[-1] < floor + 0.1 < losses[0]


def test_pointing_at_the_right_token_costs_least() -> None:
    head = PointerHead(POINTER_WIDTH)
    torch.nn.init.eye_(head.asks.weight)
    torch.nn.init.eye_(head.shows.weight)
    is_visual = torch.tensor([[True, True, False], [True, True, False]])
    hidden = torch.randn(2, 3, POINTER_WIDTH)
    hidden[0, 2] = hidden[0, 1]  # row 0 asks for what its second visual token shows
    losses = [
        head.loss(hidden, is_visual, Pointers(torch.tensor([0]), torch.tensor([2]), torch.eye(4)[[cell]])).item()
        for cell in range(4)
    ]
    assert losses[1] < losses[0] < losses[2], "tokens of another row are out of reach"
    nobody = Pointers(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0, 4))
    assert head.loss(hidden, is_visual, nobody) == 0


def test_what_a_question_marks_is_asked_by_name_and_colour() -> None:
    torch.manual_seed(0)
    targets = dense_targets(GRIDS, 2, OBJECTS)
    head, hidden = DenseHead(32, names=3, colours=3), torch.randn(1, 4, 32)
    marks = Pointers(torch.tensor([0]), torch.tensor([2]), torch.eye(30)[[int(targets.cells[1])]])
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(100):
        loss = head.marked_loss(hidden, marks, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    said = head.marked(head.norm(hidden[0, 2]))
    assert said[:3].argmax() == targets.names[1]
    assert said[3:].argmax() == targets.colours[1]


def test_fates_lie_in_the_cells_of_the_second_picture() -> None:
    grids = [(1, 8, 8), (1, 8, 8), (1, 8, 8), (1, 8, 8), (1, 4, 8)]  # 4 x 4 cells a picture, and 2 x 4
    place, other = (0.0, 0.0, 0.1, 0.1), (0.8, 0.8, 1.0, 1.0)
    fates = [
        [Fate(STAYED, (0.5, 0.0, 0.7, 0.2), ((0.4, 0.0, 0.6, 0.2),), True), Fate(LEFT, place, (place,), True)],
        [],  # a single picture has no second one
        [
            Fate(NOWHERE, (0.0, 0.0, 0.2, 0.2), (), False),
            Fate(LEFT, place, (place,), False),
            Fate(ELSEWHERE, (0.9, 0.9, 1.0, 1.0), (place, other), False),
        ],
    ]
    targets = fate_targets(grids, 2, [2, 1, 2], fates)
    # The second pictures' first cells are 16 and 64. What came to cell 64 hides that another thing left it.
    assert targets.cells.tolist() == [16, 18, 64, 71]
    assert targets.fates.tolist() == [LEFT, STAYED, NOWHERE, ELSEWHERE]
    assert targets.known.tolist() == [0, 1]
    assert targets.boxes.tolist() == [pytest.approx(place), pytest.approx((0.4, 0.0, 0.6, 0.2))]
    assert targets.likes == [[0], [2], [], [48, 63]]
    assert targets.same_place == [[0], [2], [], []]


def test_fates_and_first_boxes_can_be_learned() -> None:
    torch.manual_seed(0)
    grids = [(1, 8, 8), (1, 8, 8)]
    fates = [[Fate(STAYED, (0.5, 0.0, 0.7, 0.2), ((0.4, 0.0, 0.6, 0.2),), True)]]
    fates[0].append(Fate(NOWHERE, (0.0, 0.0, 0.2, 0.2), (), True))
    targets = fate_targets(grids, 2, [2], fates)
    head, hidden, rows = DenseHead(32, names=3, colours=3), torch.randn(32, 32), torch.randn(21, 32)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    for _ in range(200):
        fate, first = head.fate_loss(hidden, targets), head.first_loss(hidden, targets, rows)
        optimizer.zero_grad()
        (fate + first).backward()
        optimizer.step()
    assert fate < 0.05
    assert first < 1.42 + 0.1  # the entropy of its soft targets
    nothing = fate_targets(grids, 2, [2], [[]])
    assert head.fate_loss(hidden, nothing) == head.first_loss(hidden, nothing, rows) == 0
