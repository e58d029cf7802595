"""Pruned pictures: what is left keeps its place, and nothing pruned is taken for whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.pruning import RANDOM, ways
from gemvg_edge import GemvgError, Grounder
from gemvg_edge.boxes import match_boxes
from gemvg_edge.opened import Visual
from gemvg_edge.positions import mrope_positions
from gemvg_edge.prompt import encode_prefix
from gemvg_edge.pruning import METHODS, Pruning, check_pruning, prune

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
PAIR = [EXAMPLES / "scene1-a.png", EXAMPLES / "scene1-b.png"]


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open(threads=1)


def picture(seed: int, height: int = 6, width: int = 9, hidden: int = 16) -> Any:
    return np.random.default_rng(seed).standard_normal((height * width, hidden)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.01, 0.3, 0.5, 0.999])
def test_as_many_are_kept_as_asked_in_order(method: str, keep: float) -> None:
    tokens = picture(1)
    left, kept = prune(tokens, (6, 9), Pruning(keep, method))
    assert len(left) == len(kept) == max(1, math.ceil(keep * 54))
    assert left.dtype == np.float32
    assert np.all(np.diff(kept) > 0)
    assert kept[0] >= 0
    assert kept[-1] < 54
    again, same = prune(tokens.copy(), (6, 9), Pruning(keep, method))
    assert np.array_equal(again, left)
    assert np.array_equal(same, kept)
    if method != "merge":
        assert np.array_equal(left, tokens[kept])


def test_random_pruning_follows_its_seed() -> None:
    kept = [prune(picture(1), (6, 9), Pruning(0.5, "random", seed))[1] for seed in (0, 0, 1)]
    assert np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[0], kept[2])


def test_diverse_pruning_keeps_what_is_unlike_the_rest() -> None:
    tokens = np.tile(picture(1, 1, 1), (54, 1)) + picture(2) * 1e-3
    tokens[[7, 31]] = picture(3, 1, 2)
    _, kept = prune(tokens, (6, 9), Pruning(3 / 54, "diverse"))
    assert {7, 31} <= set(kept.tolist())


def diverse_plainly(tokens: Any, count: int) -> list[int]:
    """The twin: all likenesses, and a search in each round."""
    unit = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float64)
    mean = tokens.mean(axis=0).astype(np.float64)
    chosen = [int((unit @ (mean / np.linalg.norm(mean))).argmin())]
    while len(chosen) < count:
        rest = [k for k in range(len(unit)) if k not in chosen]
        chosen.append(min(rest, key=lambda k: max(unit[k] @ unit[c] for c in chosen)))
    return sorted(chosen)


def test_diverse_pruning_is_its_plain_twin() -> None:
    for seed in range(10):
        tokens = picture(seed, 4, 5)
        assert prune(tokens, (4, 5), Pruning(0.4, "diverse"))[1].tolist() == diverse_plainly(tokens, 8)


def test_merging_makes_one_of_a_region() -> None:
    """Two halves of nearly equal tokens and one odd token become three, each its region's mean at its first place."""
    halves = picture(5, 1, 2)
    tokens = np.repeat(np.concatenate([halves, halves]), 2, axis=0)  # a a b b a a b b: 2 rows of 4
    tokens = tokens + picture(6, 2, 4) * 1e-3
    tokens[7] = picture(7, 1, 1)
    left, kept = prune(tokens, (2, 4), Pruning(3 / 8, "merge"))
    assert kept.tolist() == [0, 2, 7]
    assert np.allclose(left[0], tokens[[0, 1, 4, 5]].mean(axis=0), atol=1e-5)
    assert np.allclose(left[1], tokens[[2, 3, 6]].mean(axis=0), atol=1e-5)
    assert np.array_equal(left[2], tokens[7])


def test_survivors_keep_their_positions(grounder: Grounder) -> None:
    model, merge, grids = grounder.model, 2, [(1, 8, 6), (1, 4, 12)]
    image = model.manifest.model.image_token_id
    whole = encode_prefix(model.tokenizer, model.manifest.prompt, grids, merge)
    places = mrope_positions(whole, image, grids, merge)
    kept = [np.array([0, 5, 11]), np.array([3, 4])]
    ids, positions, position, ends = model._prompt([Visual(b"", None, k) for k in kept], grids)
    at = np.flatnonzero(whole == image)
    stay = np.sort(np.concatenate([np.flatnonzero(whole != image), at[:12][kept[0]], at[12:][kept[1]]]))
    assert np.array_equal(ids, whole[stay])
    assert np.array_equal(positions, places[:, stay])
    assert position == places.max() + 1
    assert ends[-1] == len(ids)
    assert ids[: ends[0]].tolist().count(image) == 3


@pytest.mark.parametrize("method", METHODS)
def test_pruned_and_whole_looks_do_not_mix(method: str, grounder: Grounder) -> None:
    plain = Grounder.open(threads=1, cache_bytes=0)
    wishes: list[dict[str, Any]] = [{}, {"keep": 0.6}, {"keep": 0.3}, {"keep": 1.0}]
    for _ in range(2):
        for wish in wishes:
            ours = grounder.look(PAIR, pruning=method, **wish)
            theirs = plain.look(PAIR, pruning=method, **wish)
            assert ours.timings.image_tokens == theirs.timings.image_tokens
            assert ours.ground("all balls").text == theirs.ground("all balls").text
    counts = [grounder.look(PAIR, pruning=method, **wish).timings.image_tokens for wish in wishes]
    assert counts[0] == counts[3] > counts[1] > counts[2]


def test_ways_of_pruning_are_other_sequences(grounder: Grounder) -> None:
    texts = {method: grounder.look(PAIR, keep=0.25, pruning=method)._seen for method in METHODS}
    assert all(seen.cached in (0, seen.past) for seen in texts.values())
    fresh = Grounder.open(threads=1)
    for method in METHODS:
        assert fresh.look(PAIR, keep=0.25, pruning=method)._seen.cached == 0


def test_a_pruned_answer_still_finds_things(grounder: Grounder) -> None:
    whole, pruned = (grounder.ground(PAIR, "all balls", keep=keep) for keep in (None, 0.8))
    assert len(whole) == len(pruned) > 0
    assert len(match_boxes(pruned.boxes, whole.boxes)) == len(whole)


@pytest.mark.parametrize("keep", [0, -1, 1.01, True, "half", float("nan")])
def test_refuses_shares(keep: Any, grounder: Grounder) -> None:
    with pytest.raises(GemvgError, match=r"keep=.*; give the share of visual tokens to keep, above 0 and at most 1"):
        grounder.look(PAIR, keep=keep)


@pytest.mark.parametrize("method", ["fast", None, 3, []])
def test_refuses_methods(method: Any, grounder: Grounder) -> None:
    with pytest.raises(GemvgError, match=r"pruning=.*; give one of diverse, merge, random"):
        grounder.look(PAIR, keep=0.5, pruning=method)


def test_all_is_kept_unless_less_is_asked_for() -> None:
    assert check_pruning(None, "diverse") is None
    assert check_pruning(1, "merge") is None
    assert check_pruning(float(np.float32(0.5)), "merge") == Pruning(0.5, "merge")


def test_the_benchmark_draws_random_pruning_more_than_once() -> None:
    drawn = [way for way in ways(3) if way.name == RANDOM and way.share == 0.5]
    assert [way.seed for way in drawn] == [0, 1, 2]
    assert {way.name for way in ways(1)} == {"all", "max_pixels", *METHODS}
