"""A worker of `gemvg serve`: a process that answers requests of the one that speaks HTTP, some at once.

While one request has the engine, another reads its pictures. A picture that kills Pillow or fills the memory kills this
process and no other. Ends with the socket to its service. Knows no HTTP.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from gemvg_edge import __version__
from gemvg_edge.command import one_line
from gemvg_edge.errors import GemvgError, TimedOut
from gemvg_edge.grounder import Grounder
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.pictures import picture_size
from gemvg_edge.scene import CUT, Scene
from gemvg_edge.serve.messages import Message, receive, send
from gemvg_edge.serve.settings import Settings
from gemvg_edge.streaming import OnText

log = logging.getLogger("gemvg_edge")
BAD, UNAVAILABLE, LATE, FAULT, MISSING = 400, 503, 504, 500, 404  # what HTTP will say


@dataclass(frozen=True)
class Job:
    """A request as it came."""

    message: Message
    pictures: list[bytes]
    end: float  # on time.monotonic's clock
    cancel: threading.Event = field(default_factory=threading.Event)

    def left(self) -> float:
        """Seconds that it may still take."""
        return max(0.001, self.end - time.monotonic())


class SceneGone(Exception):
    """A question about a scene that is not kept here."""


class Worker:
    """The model, the scenes that are kept, and what was asked."""

    def __init__(self, grounder: Grounder, place: socket.socket, settings: Settings) -> None:
        self.grounder, self.place, self.settings = grounder, place, settings
        self.scenes: dict[str, Scene] = {}
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._known: dict[int, Job] = {}
        self._sending = threading.Lock()
        for _ in range(settings.at_once):
            threading.Thread(target=self._work, daemon=True).start()

    def run(self) -> None:
        """Take what comes, until the service is gone."""
        about = describe(self.grounder) | {"shipped": self.settings.bundle == DEFAULT_BUNDLE, "pid": os.getpid()}
        self._say({"ready": about})
        file: BinaryIO = self.place.makefile("rb")
        while (came := receive(file)) is not None:
            message, pictures = came
            match message["do"]:
                case "cancel":
                    if (job := self._known.get(message["id"])) is not None:
                        job.cancel.set()
                case "drop":
                    self.scenes.pop(message["scene"], None)
                case _:
                    job = self._known[message["id"]] = Job(message, pictures, time.monotonic() + message["seconds"])
                    self._waiting.put(job)

    def _work(self) -> None:
        while True:
            job = self._waiting.get()
            number = job.message["id"]
            try:
                said = {"done": self._answer(job)}
            except SceneGone:
                said = _refusal(MISSING, "this scene was let go; look at its pictures again")
            except TimedOut as error:
                said = _refusal(LATE, one_line(error))
            except GemvgError as error:
                said = _refusal(BAD, one_line(error))
            except MemoryError:
                said = _refusal(UNAVAILABLE, "there is not enough memory for these pictures now; send fewer or smaller")
            except Exception:
                log.exception("a request failed by a fault of ours")
                said = _refusal(FAULT, "a fault of the service; its log has more")
            del self._known[number], job  # with the pictures
            self._say({"id": number, **said})

    def _answer(self, job: Job) -> Message:
        message = job.message
        if message["do"] == "ask":
            if (scene := self.scenes.get(message["scene"])) is None:
                raise SceneGone
            return self._ask(scene, job)
        most, wanted = self.grounder.preprocessing.max_pixels, message["look"]["max_pixels"]
        if wanted is not None and wanted > most:
            raise GemvgError(
                f"max_pixels={wanted}; give at most {most}, this service's --max-pixels or its model's own"
            )
        check_pixels(job.pictures, self.settings.max_image_pixels)
        scene = self.grounder.look(job.pictures, **message["look"], timeout=job.left(), cancel=job.cancel)
        known = {"warning": scene.warning}
        if message["do"] == "ground":
            return known | self._ask(scene, job)
        self.scenes[message["scene"]] = scene
        images = [picture._asdict() for picture in scene.pictures]
        return known | {"images": images, "bytes": scene.bytes, "look_ms": scene.timings.look_ms}

    def _ask(self, scene: Scene, job: Job) -> Message:
        asked = job.message["ask"] | {"timeout": job.left(), "cancel": job.cancel}
        queries = asked.pop("queries")
        if job.message.get("stream"):
            answers = [scene.ground(queries[0], on_text=self._writer(job), **asked)]
        else:
            answers = scene.ground(queries, **asked)
        # Whether an answer was cut is no field of its JSON, whose sentence tells people.
        cut = [CUT in (answer.problem or "") for answer in answers]
        return {"answers": [answer.to_dict() for answer in answers], "cut": cut}

    def _writer(self, job: Job) -> OnText:
        return lambda piece: self._say({"id": job.message["id"], "text": piece})

    def _say(self, message: Message) -> None:
        with self._sending, suppress(OSError):  # the service is gone, and `run` will see it
            send(self.place, message)


def check_pixels(pictures: list[bytes], most: int) -> None:
    """GemvgError where the headers of a request's pictures say that they have more pixels together."""
    pixels = 0
    for k, data in enumerate(pictures):
        width, height = picture_size(data, f"images[{k}] ({len(data)} bytes)")
        pixels += width * height
        if pixels > most:
            raise GemvgError(f"the pictures up to images[{k}] have {pixels} pixels, more than {most}; scale them down")


def describe(grounder: Grounder) -> Message:
    """What a service tells of its model."""
    manifest = grounder.manifest
    return {
        "name": manifest.name,
        "type": manifest.model.model_type,
        "engine": engine_of(grounder),
        "version": __version__,
        "max_pixels": grounder.preprocessing.max_pixels,
        "trained_pictures": manifest.familiar.pictures or None,
    }


def engine_of(grounder: Grounder) -> str:
    """The module that runs the language model, such as native or onnxruntime."""
    return type(grounder.model.engines()[1]).__module__.rpartition(".")[2]


def _refusal(status: int, sentence: str) -> Message:
    return {"error": {"status": status, "message": sentence}}
