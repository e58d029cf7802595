"""A queue over scenes: in order, prepared ahead, and no request that fails ends it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge import Cancelled, GemvgError, Grounder, Grounding, Request, TimedOut

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
PAIRS = [[EXAMPLES / f"scene{k}-a.png", EXAMPLES / f"scene{k}-b.png"] for k in range(1, 7)]
QUERIES = ("all balls", "all teddies", "what both images show")


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open(threads=1)


def threads_of_the_queue() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gemvg-queue"]


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_answers_are_those_of_ground_in_order(ahead: int, grounder: Grounder) -> None:
    requests = [
        Request(pair, query, max_pixels=9000 if k % 2 else None) for k, pair in enumerate(PAIRS) for query in QUERIES
    ]
    found = list(grounder.ground_all(requests, ahead=ahead))
    expected = [grounder.ground(one.images, one.query, max_pixels=one.max_pixels) for one in requests]
    assert [one.text for one in found if isinstance(one, Grounding)] == [one.text for one in expected]
    assert [one.query for one in found if isinstance(one, Grounding)] == [one.query for one in requests]
    wait_until(lambda: not threads_of_the_queue())


def test_a_request_that_fails_ends_nothing(grounder: Grounder) -> None:
    cancelled = threading.Event()
    cancelled.set()
    bad: list[tuple[Any, str]] = [
        (Request(["nowhere.png"], "a"), r"nowhere\.png: no such picture file"),
        (Request([], "a"), "no pictures were given"),
        (Request(PAIRS[0], ""), "the query is empty"),
        (Request(PAIRS[0], "mug " * 300), "more than max_query_tokens"),
        (Request(PAIRS[0], "all balls", keep=7), "keep=7; give the share"),
        (Request(PAIRS[0], "all balls", timeout=-1), "timeout=-1; give the seconds"),
        (Request(PAIRS[0], "all balls", timeout=1e-6), "no answer within timeout"),
        (Request(PAIRS[0], "all balls", cancel=cancelled), "was cancelled"),
        ((PAIRS[0], "all balls"), r"requests\[8\] is a tuple; give a Request"),
    ]
    found = list(grounder.ground_all([*(one for one, _ in bad), Request(PAIRS[0], "all balls")]))
    for answer, (_, message) in zip(found[:-1], bad, strict=True):
        with pytest.raises(GemvgError, match=message):
            raise answer  # type: ignore[misc]  # an answer that is no error fails here
    assert [type(found[6]), type(found[7])] == [TimedOut, Cancelled]
    assert isinstance(found[-1], Grounding)


def test_a_failed_generator_is_told_after_the_answers_before_it(grounder: Grounder) -> None:
    def camera() -> Iterator[Request]:
        yield Request(PAIRS[0], "all balls")
        raise OSError("the camera is gone")

    answers = grounder.ground_all(camera())
    assert isinstance(next(answers), Grounding)
    with pytest.raises(OSError, match="the camera is gone"):
        next(answers)
    wait_until(lambda: not threads_of_the_queue())


@pytest.mark.parametrize("ahead", [1, 3])
def test_no_more_than_asked_is_drawn_ahead(ahead: int, grounder: Grounder) -> None:
    drawn: list[int] = []

    def requests() -> Iterator[Request]:
        for k in range(10):
            drawn.append(k)
            yield Request(PAIRS[k % 6], "all balls")

    answers = grounder.ground_all(requests(), ahead=ahead)
    assert not drawn, "nothing starts before the first answer is asked for"
    next(answers)
    for k in range(1, 4):
        wait_until(lambda k=k: len(drawn) == k + ahead)
        time.sleep(0.05)
        assert len(drawn) == k + ahead
        next(answers)
    answers.close()
    wait_until(lambda: not threads_of_the_queue())
    assert len(drawn) <= 5 + ahead


def test_pictures_are_read_while_the_model_works(grounder: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next request's are ready before the present one is answered."""
    order: list[str] = []
    second = threading.Event()
    resize, look = Grounder._resize, Grounder._look

    def resized(self: Grounder, *given: Any) -> Any:
        done = resize(self, *given)
        order.append("ready")
        if len(order) == 2:
            second.set()
        return done

    def slow(self: Grounder, *given: Any) -> Any:
        assert second.wait(20)
        order.append("looked")
        return look(self, *given)

    monkeypatch.setattr(Grounder, "_resize", resized)
    monkeypatch.setattr(Grounder, "_look", slow)
    assert len(list(grounder.ground_all([Request(pair, "all balls") for pair in PAIRS[:2]]))) == 2
    assert order == ["ready", "ready", "looked", "looked"]


def test_each_answer_may_decide_the_next_request(grounder: Grounder) -> None:
    """A generator that waits for an answer holds nothing up: the answer before it does not wait for it."""
    answered = threading.Event()

    def requests() -> Iterator[Request]:
        yield Request(PAIRS[0], "all balls")
        assert answered.wait(20)
        yield Request(PAIRS[1], "all balls")

    answers = grounder.ground_all(requests())
    assert isinstance(next(answers), Grounding)
    answered.set()
    assert isinstance(next(answers), Grounding)
    assert list(answers) == []


def test_nothing_asked_is_nothing_answered(grounder: Grounder) -> None:
    assert list(grounder.ground_all([])) == []
    for ahead in (0, 1.5, True, 2000):
        with pytest.raises(GemvgError, match=r"ahead=.*; give how many requests to prepare at most, 1 to 1024"):
            grounder.ground_all([], ahead=ahead)  # type: ignore[arg-type]


def test_a_closed_grounder_says_so_for_each() -> None:
    grounder = Grounder.open(threads=1)
    grounder.close()
    found = list(grounder.ground_all([Request(PAIRS[0], "all balls")] * 2))
    assert [str(one) for one in found] == ["this Grounder was closed; open one again with Grounder.open"] * 2
