"""Workers as the HTTP side sees them: requests wait in order, run in the next place that is free, and end in time.

A worker that dies, or that a request has held far past its time, takes its requests with it, each with an error, and
another takes its place. Knows neither HTTP nor models.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import reason
from gemvg_edge.serve.messages import Message, next_message, pack
from gemvg_edge.serve.refusals import BUSY, Refused
from gemvg_edge.serve.settings import Settings, write_settings

FASTEST_RESTART, SLOWEST_RESTART = 0.1, 10.0  # seconds between two starts of a worker that never gets ready
NURSERY_END = 5.0  # seconds
log = logging.getLogger("gemvg_edge")


class Job:
    """A request on its way: `result` is what a worker says in the end, or Refused; `pieces` what it writes meanwhile.

    None is the last piece.
    """

    def __init__(self, number: int, message: Message, pictures: list[bytes], seconds: float) -> None:
        self.number, self.message, self.pictures, self.seconds = number, message, pictures, seconds
        self.came = time.monotonic()
        self.started: float | None = None
        self.result: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.worker: Worker | None = None
        self.late: asyncio.TimerHandle | None = None

    @property
    def queue_ms(self) -> float:
        """How long it waited."""
        return ((self.started or time.monotonic()) - self.came) * 1e3

    def end(self, said: Message | Refused) -> None:
        """Settle it, once."""
        if self.late:
            self.late.cancel()
        if self.result.done():
            return
        self.pieces.put_nowait(None)
        if isinstance(said, Refused):
            self.result.set_exception(said)
            self.result.exception()  # also where nobody waits any more
        else:
            self.result.set_result(said)


class Worker:
    """One process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.about: Message | None = None  # once it is ready
        self.pidfd = -1
        self.running: dict[int, Job] = {}

    def say(self, message: Message, pictures: list[bytes] | None = None) -> None:
        """Send; a worker that is gone is noticed where it is listened to."""
        if not self.writer.is_closing():
            self.writer.writelines(pack(message, pictures or ()))

    def kill(self) -> None:
        """End it now, whatever it does."""
        if self.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.writer.close()


class Pool:
    """The workers and the queue before them; of one event loop."""

    def __init__(self, settings: Settings, lost: Callable[[Worker], None], orphan: Callable[[Job], None]) -> None:
        """`lost` is called with a worker that died, `orphan` with a job that was done when nobody waited any more."""
        self.settings, self._lost, self._orphan = settings, lost, orphan
        self.workers: list[Worker] = []
        self.waiting: dict[int, Job] = {}
        self.restarts = 0
        self.failed: str | None = None  # why the last worker that was started did not get ready
        self._numbers, self._opened, self._closing = count(1), False, False
        self._control: socket.socket | None = None
        self._nursery: subprocess.Popen[bytes] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause = 0.0  # seconds before a worker that did not get ready is started again
        self._mean = 0.1  # seconds of a request, lately

    @property
    def ready(self) -> list[Worker]:
        """Workers that take requests."""
        return [worker for worker in self.workers if worker.about]

    @property
    def running(self) -> int:
        """Requests that are worked on."""
        return sum(len(worker.running) for worker in self.workers)

    async def start(self) -> Message:
        """Start all workers; what the first that is ready tells of the model. GemvgError where it cannot be opened."""
        for _ in range(self.settings.workers):
            await self._start_worker()
        while not self.ready:
            if self.failed is not None:
                raise GemvgError(self.failed)
            await asyncio.sleep(0.01)
        self._opened = True
        about = self.ready[0].about
        assert about is not None
        return about

    async def close(self) -> None:
        """End all workers; requests that still run get an error."""
        self._closing = True
        for worker in list(self.workers):
            worker.kill()
        if self._control:
            self._control.close()
        if self._nursery:
            try:
                await asyncio.to_thread(self._nursery.wait, NURSERY_END)
            except subprocess.TimeoutExpired:
                self._nursery.kill()
        for task in self._tasks:
            task.cancel()

    def submit(self, message: Message, pictures: list[bytes], seconds: float, worker: Worker | None = None) -> Job:
        """Queue a request, for one worker where its scene is there; Refused where as many wait as may."""
        job = Job(next(self._numbers), message, pictures, seconds)
        job.worker = worker
        if len(self.waiting) >= self.settings.max_queue and self._place(job) is None:
            raise Refused(BUSY, "too many requests wait; try again later", retry_after=self.retry_after())
        job.late = asyncio.get_running_loop().call_later(seconds, self._too_late, job)
        self.waiting[job.number] = job
        self._pump()
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for the job any more: what is not done of it is not done."""
        if job.result.done():
            return
        self.waiting.pop(job.number, None)
        if job.worker and job.number in job.worker.running:
            job.worker.say({"do": "cancel", "id": job.number})
        job.end(Refused(BUSY, "cancelled"))
        self._watch(job)

    def give_up(self) -> None:
        """End all requests: a shutdown waits for them no longer."""
        for job in [*self.waiting.values(), *(job for worker in self.workers for job in worker.running.values())]:
            job.end(Refused(BUSY, "the service ends, and this took longer than it waits; ask again", retry_after=1))
        self.waiting.clear()

    def retry_after(self) -> int:
        """Seconds after which the queue has probably moved."""
        places = max(1, len(self.ready))
        return min(60, max(1, math.ceil(self._mean * (len(self.waiting) + self.running) / places)))

    def _place(self, job: Job) -> Worker | None:
        """A worker with room for the job, the least busy one."""
        among = [worker for worker in self.ready if job.worker in (None, worker)]
        free = [worker for worker in among if len(worker.running) < self.settings.at_once]
        return min(free, key=lambda worker: len(worker.running), default=None)

    def _pump(self) -> None:
        """Give out what waits, in order, as far as there is room."""
        for job in list(self.waiting.values()):
            if (worker := self._place(job)) is None:
                continue
            del self.waiting[job.number]
            job.worker, job.started = worker, time.monotonic()
            worker.running[job.number] = job
            left = job.seconds - (job.started - job.came)
            worker.say(job.message | {"id": job.number, "seconds": left}, job.pictures)
            job.pictures = []

    def _too_late(self, job: Job) -> None:
        waited = self.waiting.pop(job.number, None) is not None
        if job.worker and not waited:
            job.worker.say({"do": "cancel", "id": job.number})
        where = "its turn did not come" if waited else "there is no answer"
        fix = "try again later" if waited else "send fewer or smaller pictures, or allow more time"
        after = self.retry_after() if waited else None
        job.end(Refused(504, f"{where} within {job.seconds:g} s; {fix}", retry_after=after))
        self._watch(job)

    def _watch(self, job: Job) -> None:
        """See that a job that was given up ends, or its worker does: one run of a network is never cut."""
        if job.worker and job.number in job.worker.running:
            asyncio.get_running_loop().call_later(self.settings.kill_after, self._hangs, job.worker, job)

    def _hangs(self, worker: Worker, job: Job) -> None:
        if job.number in worker.running and worker in self.workers:
            log.warning("a worker does not come back from a request; it is killed")
            worker.kill()

    async def _start_worker(self) -> None:
        """A socket to a process that the nursery forks."""
        if self._nursery is None or self._nursery.poll() is not None:
            self._start_nursery()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs, suppress(OSError):  # a nursery that just died: the socket says so
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = Worker(reader, writer)
        self.workers.append(worker)
        task = asyncio.ensure_future(self._listen(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_nursery(self) -> None:
        if self._control:
            self._control.close()
        self._control, theirs = socket.socketpair()
        # Threads of libraries that are of no use here would not survive the fork.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "gemvg_edge.serve.nursery"]
        with theirs:
            handle = theirs.fileno()
            command += [str(handle), write_settings(self.settings)]
            self._nursery = subprocess.Popen(command, pass_fds=[handle], env=environment)

    async def _listen(self, worker: Worker) -> None:
        while (said := await next_message(worker.reader)) is not None:
            if "ready" in said:
                worker.about, self.failed, self._pause = said["ready"], None, 0.0
                with suppress(OSError):
                    worker.pidfd = os.pidfd_open(said["ready"]["pid"])
                self._pump()
            elif "failed" in said:
                self.failed = said["failed"]
            else:
                self._heard(worker, said)
        await self._bury(worker)

    def _heard(self, worker: Worker, said: Message) -> None:
        if "text" in said:
            if job := worker.running.get(said["id"]):
                job.pieces.put_nowait(said["text"])
            return
        job = worker.running.pop(said["id"])
        if job.started is not None:
            self._mean += 0.1 * (time.monotonic() - job.started - self._mean)
        if "error" in said:
            status = said["error"]["status"]
            job.end(Refused(status, said["error"]["message"], retry_after=1 if status == BUSY else None))
        elif job.result.done():
            self._orphan(job)
        else:
            job.end(said["done"])
        self._pump()

    async def _bury(self, worker: Worker) -> None:
        """A worker is gone: its requests get an error, and another is started."""
        self.workers.remove(worker)
        worker.writer.close()
        if worker.pidfd >= 0:
            os.close(worker.pidfd)
            worker.pidfd = -1
        for job in worker.running.values():
            job.end(Refused(BUSY, "the process that worked on this was lost; ask again", retry_after=1))
        for job in [job for job in self.waiting.values() if job.worker is worker]:
            del self.waiting[job.number]
            job.end(Refused(404, "this scene was lost with its process; look at its pictures again"))
        self._lost(worker)
        if self._closing:
            return
        if worker.about is None:
            self.failed = self.failed or "a worker ended before it was ready"
            if not self._opened:
                return  # `start` says so
        else:
            log.warning("a worker was lost; another is started")
        self.restarts += 1
        while not self._closing:
            if worker.about is None:
                self._pause = min(SLOWEST_RESTART, max(FASTEST_RESTART, 2 * self._pause))
                log.warning("%s; trying again in %g s", self.failed, self._pause)
                await asyncio.sleep(self._pause)
            try:
                await self._start_worker()
                return
            except OSError as error:  # no more files or processes
                worker.about, self.failed = None, f"a worker cannot be started ({reason(error)})"
