"""What varies in the simulated world, what does not, and what training never shows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.world.exposure import expose
from train.world.picture_sets import choose_pictures
from train.world.questions import ask
from train.world.render import render
from train.world.samples import CAMERAS_ROLES, held_out_questions
from train.world.scenes import (
    CHECKERS_SEED,
    HELD_OUT_SEED,
    MORE_CAMERAS_SEED,
    NEW_LIGHT_SEED,
    NEW_STYLE_SEED,
    PHOTOGRAPHS_SEED,
    read_scenes,
    style_of,
)
from train.world.textures import (
    FAMILIES,
    HELD_OUT_PHOTOGRAPHS,
    PATTERNS,
    PHOTOGRAPHS,
    SIDE,
    colour_pattern,
    crop_photograph,
    pattern,
)

# sha256 of the pixels of scene 1,000,000, as the plain world has always drawn them.
PLAIN = "13994b9cbad1fb8060cd62ae649bd549cd4d245bc4a696e2021f892845f263c6"


def test_splits_that_are_asked_about_stay_what_they_were(tmp_path: Path) -> None:
    render(tmp_path, HELD_OUT_SEED, scenes=1, size=144, processes=1)
    pictures = sorted((tmp_path / "images").iterdir())
    pixels = b"".join(np.asarray(Image.open(picture)).tobytes() for picture in pictures)
    assert hashlib.sha256(pixels).hexdigest() == PLAIN


def test_each_held_out_split_shows_one_new_thing() -> None:
    seeds = (HELD_OUT_SEED, NEW_LIGHT_SEED, CHECKERS_SEED, PHOTOGRAPHS_SEED, NEW_STYLE_SEED)
    styles = [tuple(style_of(seed))[:2] for seed in seeds]
    assert styles == [
        ("plain", "plain"), ("plain", "new"), ("checkers", "plain"), ("photographs", "plain"), ("checkers", "new"),
    ]  # fmt: skip
    assert {tuple(style_of(seed))[:2] for seed in range(100)} == {("varied", "varied")}
    assert not set(PHOTOGRAPHS) & set(HELD_OUT_PHOTOGRAPHS)


def test_patterns_are_fixed_and_none_is_a_checker() -> None:
    """A checker is two tones that both come back after two squares, across and down, and swap after one."""
    fields = [pattern(number) for number in range(PATTERNS)]
    assert all(np.array_equal(fields[k], pattern(k)) for k in (0, 57, PATTERNS - 1))
    assert all(field.shape == (SIDE, SIDE) and field.min() >= 0 and field.max() <= 1 for field in fields)
    assert len({field.tobytes() for field in fields}) == PATTERNS >= 10 * len(FAMILIES)
    checker = np.indices((SIDE, SIDE)).sum(axis=0) // 16 % 2  # diagonal stripes: not one
    squares = (np.indices((SIDE, SIDE)) // 16).sum(axis=0) % 2
    assert not checkered(checker)
    assert checkered(squares)
    assert not any(checkered(field) for field in fields)


def checkered(field: np.ndarray) -> bool:
    """Whether some shift across, and the same down, swaps the tones, both together do not, and it is no stripes."""
    centred = field - field.mean()
    power = (centred**2).mean() + 1e-9
    for step in range(6, SIDE // 2):
        half = step // 2
        across = (centred[:, step:] * centred[:, :-step]).mean() / power
        down = (centred[step:] * centred[:-step]).mean() / power
        both = (centred[step:, step:] * centred[:-step, :-step]).mean() / power
        falling = (centred[half:, half:] * centred[:-half, :-half]).mean() / power
        rising = (centred[half:, :-half] * centred[:-half, half:]).mean() / power
        if across < -0.6 and down < -0.6 and both > 0.6 and max(abs(falling), abs(rising)) < 0.6:
            return True
    return False


def test_colours_of_a_pattern_differ_and_clutter_is_grey() -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        coloured = colour_pattern(pattern(number), rng)
        assert np.ptp(coloured.mean(axis=2)) > 20
        grey = colour_pattern(pattern(number), rng, saturation=0)
        assert np.ptp(grey, axis=2).max() <= 1


@pytest.mark.parametrize("held_out", [False, True])
def test_photographs_are_cut_anew(held_out: bool) -> None:
    rng = np.random.default_rng(0)
    cuts = [crop_photograph(rng, held_out=held_out) for _ in range(6)]
    assert all(cut.ndim == 3 and cut.shape[0] == cut.shape[1] and cut.dtype == np.uint8 for cut in cuts)
    assert len({cut.tobytes() for cut in cuts}) == 6


def test_cameras_change_light_and_detail_and_never_hue() -> None:
    red = Image.new("RGB", (60, 40), (180, 40, 30))
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        taken = expose(red, rng)
        assert (taken.size, taken.mode) == (red.size, "RGB")
        r, g, b = np.asarray(taken, float).reshape(-1, 3).mean(axis=0)
        assert r > 1.5 * max(g, b), "still red"
        seen.add(taken.tobytes())
    assert len(seen) > 30


def test_scenes_of_four_cameras_are_asked_about_three_or_four_pictures(tmp_path: Path) -> None:
    render(tmp_path, MORE_CAMERAS_SEED, scenes=6, size=96, processes=1)
    scenes = read_scenes(tmp_path)
    assert {len(scene.views) for scene in scenes} == {6}
    asked = held_out_questions(scenes)
    assert {pictures.count for pictures, _ in asked} <= {3, 4}
    assert {question.kind for _, question in asked} == set(CAMERAS_ROLES)
    rng, shown = np.random.default_rng(0), set()
    for _ in range(40):
        pictures = choose_pictures(scenes[0], None, "cameras", rng)
        shown.add(pictures.count)
        question = ask(pictures, "spatial", rng)
        if question and question.marked and question.targets:
            (target,) = question.targets
            assert target.identity == question.marked.identity
            assert target.image != question.marked.image
    assert shown == {3, 4}
