"""One scene and several, asked from several threads: each answer is the one that a single thread gets."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge import Grounder, Scene
from gemvg_edge.engines.protocol import Floats, Step

IMAGES = Path(__file__).parents[1] / "examples" / "images"
THREADS, ANSWERS = 8, 1000
QUERIES = (
    "all balls", "all teddies", "what both images show", "the object that was moved", "what was taken away",
    "the first object from the left in image 1", "the third object from the left in image 2",
)  # fmt: skip


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open(threads=1)


def pictures(scene: int) -> list[Path]:
    return [IMAGES / f"scene{scene}-{letter}.png" for letter in "ab"]


def test_a_scene_answers_threads_as_it_answers_one(grounder: Grounder) -> None:
    scene = grounder.look(pictures(1))
    alone = {query: scene.ground(query).text for query in QUERIES}
    assert len(set(alone.values())) > 4
    asked = [QUERIES[k % len(QUERIES)] for k in range(ANSWERS)]
    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(scene.ground, asked))
    assert [grounding.text for grounding in found] == [alone[query] for query in asked]


def test_scenes_in_threads_answer_as_in_one(grounder: Grounder) -> None:
    """Looking in threads as well."""
    asked = [(1 + k % 6, QUERIES[k % len(QUERIES)]) for k in range(6 * THREADS)]
    alone = [grounder.ground(pictures(scene), query).text for scene, query in asked]

    def look_and_ask(one: tuple[int, str]) -> str:
        return grounder.ground(pictures(one[0]), one[1]).text

    with ThreadPoolExecutor(THREADS) as threads:
        assert list(threads.map(look_and_ask, asked)) == alone
        scenes: list[Scene] = list(threads.map(grounder.look, [pictures(1 + k % 6) for k in range(THREADS)]))
        answers = list(threads.map(lambda k: scenes[k % THREADS].ground(QUERIES[0]).text, range(5 * THREADS)))
    assert answers == [scenes[k % THREADS].ground(QUERIES[0]).text for k in range(5 * THREADS)]


def test_eight_threads_over_eight_scenes(grounder: Grounder) -> None:
    """Each thread asks each scene every question, in an order of its own."""
    scenes = [grounder.look(pictures(1 + k % 6)) for k in range(8)]
    alone = {(k, query): scenes[k].ground(query).text for k in range(8) for query in QUERIES}

    def ask_all(thread: int) -> bool:
        order = sorted(alone, key=lambda one: hash((thread, *one)))
        return all(scenes[k].ground(query).text == alone[k, query] for k, query in order)

    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(ask_all, range(THREADS)))


def test_a_scene_goes_on_after_a_question_that_failed(grounder: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = grounder.look(pictures(1))
    before = scene.ground(QUERIES[0]).text
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def interrupted(steps: Sequence[Step[Any]]) -> list[Floats]:
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return plain(steps)

        decoder = grounder.model.engines()[1]
        plain = decoder.forward
        patch.setattr(decoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scene.ground(QUERIES[0])
    assert scene.ground(QUERIES[0]).text == before
