"""What all routes share: the workers, the scenes, the counters, and how a request is read and its answer awaited."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from gemvg_edge.serve.bodies import Held
from gemvg_edge.serve.messages import Message
from gemvg_edge.serve.metrics import Metrics
from gemvg_edge.serve.pool import Job, Pool
from gemvg_edge.serve.refusals import Gone, Refused
from gemvg_edge.serve.scenes import Scenes
from gemvg_edge.serve.settings import Settings


@dataclass
class Service:
    """One service, from its start to its end."""

    settings: Settings
    pool: Pool
    scenes: Scenes
    metrics: Metrics
    held: Held
    about: Message = field(default_factory=dict)  # of the model

    @staticmethod
    def of(settings: Settings) -> Service:
        """One that is not started yet."""
        scenes = Scenes(settings)

        def orphan(job: Job) -> None:
            if job.message["do"] == "look" and job.worker:  # a scene that nobody will ask for
                job.worker.say({"do": "drop", "scene": job.message["scene"]})

        pool = Pool(settings, scenes.lose, orphan)
        return Service(settings, pool, scenes, Metrics(pool, scenes), Held(settings.max_held_bytes))

    @property
    def name(self) -> str:
        """The model's."""
        name: str = self.about["name"]
        return name

    def seconds(self, wanted: float | None) -> float:
        """What a request may take: no longer than the service allows."""
        return min(wanted or self.settings.timeout, self.settings.timeout)

    def check_counts(self, images: int, queries: int, names: tuple[str, str] = ("images", "queries")) -> None:
        """Refused for more of either than a request may have, and for none; `names` are what the client calls them."""
        for count, most, what in (
            (images, self.settings.max_images, names[0]),
            (queries, self.settings.max_queries, names[1]),
        ):
            if not 1 <= count <= most:
                raise Refused(400, f"{what}: the request has {count}; send 1 to {most}", param=what)

    async def result(self, request: Request, job: Job) -> Message:
        """What a worker says to a request; where the client goes away first, nothing more is done for it."""
        gone = asyncio.ensure_future(until_gone(request))
        try:
            both: set[asyncio.Future[Any]] = {job.result, gone}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not job.result.done():
                raise Gone
            return job.result.result()
        finally:
            gone.cancel()
            with suppress(asyncio.CancelledError):
                await gone
            self.pool.leave(job)


async def until_gone(request: Request) -> None:
    """Wait until the client has closed the connection; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
