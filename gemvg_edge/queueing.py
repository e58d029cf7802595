"""A queue over scenes: the next pictures are read and resized in a thread while the model works on the present ones.

Answers come in the order of the requests, and a request that fails is one answer. Knows neither pixels nor answers.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gemvg_edge.errors import GemvgError
from gemvg_edge.images import ImageSource
from gemvg_edge.json_object import short
from gemvg_edge.pruning import PRUNING
from gemvg_edge.stopping import Stopping, stopping

MOST_AHEAD = 1024


@dataclass(frozen=True)
class Request:
    """A question about some pictures, as `Grounder.ground` takes it; `timeout` counts from its turn."""

    images: Sequence[ImageSource] = field(repr=False)
    query: str
    think: bool = False
    constrained: bool = True
    max_pixels: int | None = None
    bgr: bool = False
    keep: float | None = None
    pruning: str = PRUNING
    timeout: float | None = None  # seconds
    cancel: threading.Event | None = None


Ready = TypeVar("Ready")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Prepared(Generic[Ready]):
    request: Request
    ready: Ready | GemvgError


@dataclass(frozen=True)
class _End:
    error: BaseException | None  # of what brings the requests


def in_turn(
    requests: Iterable[Request],
    prepare: Callable[[Request, Stopping], Ready],
    answer: Callable[[Request, Ready, Stopping], Answer],
    ahead: int,
) -> Generator[Answer | GemvgError, None, None]:
    """The answer to each request, or the GemvgError that it ended with; `prepare` runs in a thread of its own.

    Requests are drawn there too, at most `ahead` before the one that is answered. What they raise is raised here.
    """
    if type(ahead) is not int or not 1 <= ahead <= MOST_AHEAD:
        raise GemvgError(f"ahead={short(ahead)}; give how many requests to prepare at most, 1 to {MOST_AHEAD}")
    return _answers(requests, prepare, answer, ahead)


def _answers(
    requests: Iterable[Request],
    prepare: Callable[[Request, Stopping], Ready],
    answer: Callable[[Request, Ready, Stopping], Answer],
    ahead: int,
) -> Generator[Answer | GemvgError, None, None]:
    waiting: queue.SimpleQueue[_Prepared[Ready] | _End] = queue.SimpleQueue()
    room, over = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        end = None
        try:
            _prepare_all(requests, prepare, waiting, room, over)
        except BaseException as error:
            end = error
        waiting.put(_End(end))

    # A daemon, since it may wait for a request that never comes when the program ends.
    threading.Thread(target=work, name="gemvg-queue", daemon=True).start()
    try:
        while isinstance(one := waiting.get(), _Prepared):
            room.release()
            yield _answer(one, answer)
        if one.error is not None:
            raise one.error
    finally:  # also where the caller takes no more
        over.set()
        room.release()


def _prepare_all(
    requests: Iterable[Request],
    prepare: Callable[[Request, Stopping], Ready],
    waiting: queue.SimpleQueue[_Prepared[Ready] | _End],
    room: threading.Semaphore,
    over: threading.Event,
) -> None:
    room.acquire()
    for number, request in enumerate(requests):
        if over.is_set():
            return
        try:
            if not isinstance(request, Request):
                raise GemvgError(f"requests[{number}] is a {type(request).__name__}; give a Request")
            waiting.put(_Prepared(request, prepare(request, stopping(None, request.cancel))))
        except GemvgError as error:
            waiting.put(_Prepared(request, error))
        room.acquire()  # before the next is drawn, or a camera's frame would be old when its turn comes
        if over.is_set():
            return


def _answer(one: _Prepared[Ready], answer: Callable[[Request, Ready, Stopping], Answer]) -> Answer | GemvgError:
    if isinstance(one.ready, GemvgError):
        return one.ready
    try:
        return answer(one.request, one.ready, stopping(one.request.timeout, one.request.cancel))
    except GemvgError as error:
        return error
