"""Scenes that clients keep: who has them, how long, and how much memory they may take. The scenes are the workers'."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gemvg_edge.serve.messages import Message
from gemvg_edge.serve.pool import Worker
from gemvg_edge.serve.refusals import Refused
from gemvg_edge.serve.settings import Settings


@dataclass
class Kept:
    """A scene that a worker holds."""

    worker: Worker
    about: Message  # as its client was told
    bytes: int
    used: float  # when it was asked last, on time.monotonic's clock
    asked: int = 0  # by so many requests now


class Scenes:
    """What is kept under which id; of one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.kept: dict[str, Kept] = {}  # the one asked longest ago first

    @property
    def bytes(self) -> int:
        """What all of them hold."""
        return sum(one.bytes for one in self.kept.values())

    def keep(self, name: str, worker: Worker, about: Message, size: int) -> None:
        """Keep a scene, and let go of those asked longest ago until all fit; Refused where it does not fit alone."""
        if size > self.settings.max_scene_bytes:
            worker.say({"do": "drop", "scene": name})
            limit = self.settings.max_scene_bytes
            raise Refused(413, f"the scene takes {size} bytes, more than {limit}; send fewer or smaller pictures")
        self.kept[name] = Kept(worker, about, size, time.monotonic())
        self._make_room()
        if name not in self.kept:
            raise Refused(503, "all scenes that are kept are being asked; try again later", retry_after=1)

    @contextmanager
    def asked(self, name: str) -> Iterator[Kept]:
        """The scene of an id while it is asked, when nobody lets it go; Refused where there is none."""
        one = self.find(name)
        one.asked += 1
        try:
            yield one
        finally:
            one.asked -= 1
            self._make_room()

    def find(self, name: str) -> Kept:
        """The scene of an id, which is used now; Refused where there is none."""
        if (one := self.kept.pop(name, None)) is None:
            raise Refused(404, "there is no such scene, or no more; look at its pictures again (POST /v1/scenes)")
        one.used = time.monotonic()
        self.kept[name] = one  # last now
        return one

    def _make_room(self) -> None:
        idle = [name for name, one in self.kept.items() if not one.asked]
        while idle and (len(self.kept) > self.settings.max_scenes or self.bytes > self.settings.max_scene_bytes):
            self.drop(idle.pop(0))

    def drop(self, name: str) -> None:
        """Let a scene go."""
        one = self.kept.pop(name)
        one.worker.say({"do": "drop", "scene": name})

    def expire(self) -> None:
        """Let go of what nobody asked for long enough."""
        before = time.monotonic() - self.settings.scene_seconds
        for name in [name for name, one in self.kept.items() if one.used < before and not one.asked]:
            self.drop(name)

    def lose(self, worker: Worker) -> None:
        """A worker is gone, with its scenes."""
        for name in [name for name, one in self.kept.items() if one.worker is worker]:
            del self.kept[name]


def new_name() -> str:
    """An id that nobody can guess."""
    return secrets.token_urlsafe(16)
