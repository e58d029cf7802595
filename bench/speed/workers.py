"""Systems as processes of their own that are asked in JSON lines, and stopped while another is asked."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.peers.conversion import HERE, ROOT, Prepared
from gemvg_edge.errors import GemvgError

PATIENCE = 900  # seconds for one reply
SERVE = "import sys; sys.path[:0] = [{peers!r}, {root!r}]; import serve; serve.main({worker!r})"


class Worker:
    """A running system. Its session holds all of its processes."""

    def __init__(self, prepared: Prepared, log: Path) -> None:
        code = SERVE.format(peers=str(HERE), root=str(ROOT), worker=prepared.worker)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.prepared, self.log = prepared, log
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [prepared.python, "-c", code],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            )  # fmt: skip

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """A request's reply; GemvgError says what went wrong in there."""
        assert self.process.stdin
        assert self.process.stdout
        with suppress(BrokenPipeError):  # the reply that is missing says it
            self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            state = "ended" if ready else f"gave no reply in {PATIENCE} s"
            raise GemvgError(f"{self.prepared.name}: its process {state} at `{op}`; what it said: {self.log}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise GemvgError(f"{self.prepared.name}: `{op}` failed: {reply['error']}")
        return reply

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run; outside of this it is stopped, so that a spinning thread of it slows no other."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it and all that it started."""
        self._signal(signal.SIGKILL)
        with self.process, suppress(BrokenPipeError):  # waits, and closes the pipes
            pass

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def open_worker(prepared: Prepared, log: Path, threads: int, context: int) -> tuple[Worker, float]:
    """A system that is ready to be asked, and the seconds from its process's start until then."""
    started = time.perf_counter()
    worker = Worker(prepared, log)
    try:
        worker.ask("open", threads=threads, context=context, **prepared.settings)
    except BaseException:
        worker.close()
        raise
    seconds = time.perf_counter() - started
    worker._signal(signal.SIGSTOP)
    return worker, seconds
