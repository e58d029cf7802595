"""Deadlines, cancelling and streaming: a request ends in time, says so, and leaves the scene as it was."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pytest

from gemvg_edge import Cancelled, GemvgError, Grounder, Scene, TimedOut
from gemvg_edge.stopping import Stopping, Turn, stopping

IMAGES = Path(__file__).parents[1] / "examples" / "images"
PAIR = [IMAGES / "scene1-a.png", IMAGES / "scene1-b.png"]
QUERY = "all balls"


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open(threads=1)


@pytest.fixture
def scene(grounder: Grounder) -> Scene:
    return grounder.look(PAIR)


def test_pieces_of_text_make_up_the_answer(scene: Scene) -> None:
    pieces: list[str] = []
    grounding = scene.ground(QUERY, on_text=pieces.append)
    assert "".join(pieces) == grounding.text
    assert len(pieces) > 5
    assert all(pieces)


def test_a_request_ends_at_its_deadline_and_the_next_is_whole(scene: Scene) -> None:
    whole = scene.ground(QUERY).text
    with pytest.raises(TimedOut, match="no answer within timeout=1e-06 s; give it longer") as caught:
        scene.ground(QUERY, timeout=1e-6)
    assert isinstance(caught.value, GemvgError)
    assert isinstance(caught.value, TimeoutError)
    assert scene.ground(QUERY, timeout=60).text == whole


def test_a_deadline_is_looked_at_between_tokens(scene: Scene) -> None:
    """A slow reader of the text takes the time away; one more token at most is made after it is gone."""
    pieces: list[str] = []

    def slow(piece: str) -> None:
        pieces.append(piece)
        time.sleep(1.5)

    with pytest.raises(TimedOut):
        scene.ground(QUERY, timeout=2, on_text=slow)
    assert 1 <= len(pieces) <= 3


def test_looking_ends_too(grounder: Grounder) -> None:
    with pytest.raises(TimedOut):
        grounder.look(PAIR, timeout=1e-6)
    with pytest.raises(TimedOut):
        grounder.ground(PAIR, QUERY, timeout=1e-6)


def test_a_cancelled_request_ends_after_a_token(scene: Scene) -> None:
    cancel = threading.Event()
    pieces: list[str] = []

    def enough(piece: str) -> None:
        pieces.append(piece)
        cancel.set()

    with pytest.raises(Cancelled, match="cancelled before it was answered"):
        scene.ground(QUERY, cancel=cancel, on_text=enough)
    assert len(pieces) == 1
    assert scene.ground(QUERY).boxes


def test_waiting_for_a_busy_scene_ends_too(scene: Scene) -> None:
    started, go_on = threading.Event(), threading.Event()

    def hold(piece: str) -> None:
        started.set()
        go_on.wait(30)

    busy = threading.Thread(target=lambda: scene.ground(QUERY, on_text=hold))
    busy.start()
    started.wait(30)
    try:
        with pytest.raises(TimedOut):
            scene.ground(QUERY, timeout=0.05)
        cancel = threading.Event()
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(Cancelled):
            scene.ground(QUERY, cancel=cancel)
    finally:
        go_on.set()
        busy.join()
    assert scene.ground(QUERY).boxes


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "5", True])
def test_refuses_timeouts(timeout: object, scene: Scene) -> None:
    with pytest.raises(GemvgError, match="give the seconds that an answer may take"):
        scene.ground(QUERY, timeout=timeout)  # type: ignore[call-overload]


def test_refuses_other_events(scene: Scene) -> None:
    with pytest.raises(GemvgError, match=r"cancel is a bool; give a threading\.Event"):
        scene.ground(QUERY, cancel=True)  # type: ignore[call-overload]


def test_several_questions_bring_as_many_answers(scene: Scene) -> None:
    queries = [QUERY, "all teddies", QUERY]
    assert [found.text for found in scene.ground(queries)] == [scene.ground(query).text for query in queries]
    assert scene.ground([]) == []
    with pytest.raises(GemvgError, match="the query is empty"):
        scene.ground([QUERY, ""])
    with pytest.raises(GemvgError, match="query is a int; give a text, or a list of texts"):
        scene.ground(7)  # type: ignore[call-overload]


def test_a_closed_grounder_says_so() -> None:
    with Grounder.open(threads=1) as grounder:
        scene = grounder.look(PAIR)
        assert scene.ground(QUERY).boxes
    for late in (lambda: scene.ground(QUERY), lambda: grounder.look(PAIR), lambda: grounder.ground(PAIR, QUERY)):
        with pytest.raises(GemvgError, match="this Grounder was closed; open one again"):
            late()
    grounder.close()


def test_a_grounder_is_pickled_by_its_path_and_options(grounder: Grounder) -> None:
    opened = Grounder.open(threads=1, max_pixels=4096, max_new_tokens=99)
    again = pickle.loads(pickle.dumps(opened))
    assert (again.model.limits.new_tokens, again.preprocessing.max_pixels) == (99, 4096)
    assert again.ground(PAIR, QUERY).text == opened.ground(PAIR, QUERY).text
    with pytest.raises(GemvgError, match="a Scene holds its engine's memory and cannot be pickled"):
        pickle.dumps(grounder.look(PAIR))


def test_on_text_cannot_ask_what_it_is_called_from(scene: Scene) -> None:
    """It would wait for itself for ever."""
    with pytest.raises(GemvgError, match="on_text asked for more of what it is called from"):
        scene.ground(QUERY, on_text=lambda piece: scene.ground(QUERY))
    assert scene.ground(QUERY).boxes
    with pytest.raises(GemvgError, match="on_text is a int; give a function"):
        scene.ground(QUERY, on_text=5)  # type: ignore[call-overload]


def test_closing_lets_what_runs_finish() -> None:
    """Whatever phase a request is in, it is answered or told that the Grounder was closed."""
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1):
        grounder = Grounder.open(threads=1)
        timer = threading.Timer(delay, grounder.close)
        timer.start()
        said = ""
        try:
            said = grounder.ground(PAIR, QUERY).text
        except GemvgError as error:
            said = str(error)
        timer.join()
        assert said.startswith(("this Grounder was closed", "Image-1: "))
        with pytest.raises(GemvgError, match="this Grounder was closed"):
            grounder.look(PAIR)


def test_an_on_text_that_is_empty_is_called_too(scene: Scene) -> None:
    class Pieces(list[str]):
        def __call__(self, piece: str) -> None:
            self.append(piece)

    pieces = Pieces()
    assert scene.ground(QUERY, on_text=pieces).text == "".join(pieces)


def test_turns_go_in_the_order_of_coming() -> None:
    """One that may be cancelled looks up all the time and keeps its place all the same."""
    turn, order = Turn(), []

    def work(name: int) -> None:
        cancel = threading.Event() if name % 2 else None
        with turn.taken(stopping(30, cancel)):
            order.append(name)
            time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    with turn.taken(Stopping()):
        for k, thread in enumerate(threads):
            thread.start()
            while len(turn._waiting) <= k:
                time.sleep(0.001)
        time.sleep(0.2)  # some look up several times
    for thread in threads:
        thread.join()
    assert order == list(range(8))
