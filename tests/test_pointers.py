"""Which tokens of a batch of scenes point where: checked against what the model has to write next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemvg_edge.answer_pieces import BOX_END, BOX_START
from gemvg_edge.prompt import token_id
from train.checkpoint import CheckpointSettings, read_settings
from train.collate import IGNORED, collate
from train.small_model import write_small_model
from train.world.dense_head import DenseTargets, dense_targets
from train.world.pointers import find_pointers, token_places
from train.world.render import render
from train.world.samples import SEEN_COLOURS, SEEN_NAMES, WorldSample, draw_sample
from train.world.scenes import read_scenes


@pytest.fixture(scope="module", params=[True, False], ids=["marks", "bare"])
def settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CheckpointSettings:
    write_small_model(folder := tmp_path_factory.mktemp("small"), seed=0)
    read = read_settings(folder)
    return replace(read, answer_format=replace(read.answer_format, marks=request.param))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    render(folder := tmp_path_factory.mktemp("data"), first_seed=0, scenes=6, size=128, processes=1)
    return folder


@pytest.fixture(scope="module")
def samples(folder: Path, settings: CheckpointSettings) -> list[WorldSample]:
    scenes = {scene.seed: scene for scene in read_scenes(folder)}
    dice = (np.random.default_rng([2, draw]) for draw in range(8))
    return [draw_sample(scenes, folder, 6, 0.6, settings.answer_format, rng, 0.2) for rng in dice]


def test_pointers_stand_before_what_they_point_at(settings: CheckpointSettings, samples: list[WorldSample]) -> None:
    batch = collate(samples, settings, pad_id=0)
    ids, labels, tokenizer = batch["input_ids"], batch["labels"], settings.tokenizer
    targets = dense_targets(
        [tuple(grid) for grid in batch["image_grid_thw"].tolist()],
        settings.preprocessing.merge_size,
        [seen for sample in samples for seen in sample.seen],
    )
    start, end, first = (token_id(tokenizer, name) for name in (BOX_START, BOX_END, "<loc_0>"))
    locations, bare = range(first, first + 129), not settings.answer_format.marks
    answers, marks, named = find_pointers(ids, labels, IGNORED, tokenizer, (start, end), locations, samples, targets)
    boxes, followed = 0, 0
    for row, place, cells in zip(answers.rows.tolist(), answers.places.tolist(), answers.cells, strict=True):
        if labels[row, place] == IGNORED:  # a question's last token: the answer comes next
            assert labels[row, place + 1] != IGNORED
            continue
        assert bare or ids[row, place] == start
        followed += int(ids[row, place]) in locations
        said = (ids[row, place + 1 : place + 5] - first) / 128
        (found,) = nearest(cells, targets)
        torch.testing.assert_close(said, targets.boxes[found], atol=0.5 / 128 + 0.5 / 1000, rtol=0)  # by way of 0..1000
        boxes += 1
    assert boxes == int(((labels >= first) & (labels < first + 129)).sum()) / 4 > 40
    assert (followed > 5) == bare, "without marks a box may follow another's last number"
    assert all(ids[row, place] == end for row, place in zip(marks.rows, marks.places, strict=True))
    assert len(marks.rows) > 5
    for row, place, cells in zip(named.rows.tolist(), named.places.tolist(), named.cells, strict=True):
        written = tokenizer.decode(ids[row, place + 1 : place + 14].tolist()).strip()
        (found,) = nearest(cells, targets)
        colour = list(SEEN_COLOURS)[targets.colours[found]]
        assert written.startswith(f"{colour} {list(SEEN_NAMES)[targets.names[found]]}"), written
    assert len(named.rows) > 20


def nearest(cells: torch.Tensor, targets: DenseTargets) -> list[int]:
    """Which objects lie in the cells that a pointer points at; the test's scenes have one to a cell."""
    return [k for k, cell in enumerate(targets.cells.tolist()) if cells[cell] > 0][:1]


def test_a_word_is_found_whether_its_space_is_its_own_or_not(settings: CheckpointSettings) -> None:
    text = "<think>Image-1: red mug, blue ball.</think>"
    for word in ("red", "blue"):
        (before,) = token_places(settings.tokenizer, text, [text.index(word)])
        ids = settings.tokenizer.encode(text, add_special_tokens=False).ids
        assert settings.tokenizer.decode(ids[before:]).strip().startswith(word)
