"""`gemvg serve` from its start to its end: queue, deadlines, clients that leave, workers that die, a shutdown."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.service.running import Running, children, serving
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.models import DEFAULT_BUNDLE
from tests.test_serve import PAIR, form, question

ENDLESS = ("--max-new-tokens", "100000", "--at-once", "1")  # with the model of random weights: minutes an answer
ASKED = [*form(PAIR[:1], ["x"]), ("constrained", (None, "false"))]


@pytest.fixture(scope="module")
def endless(random_model: tuple[Any, Path]) -> Path:
    """A bundle that writes nonsense without end."""
    return random_model[1]


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers_of(running: Running) -> list[int]:
    """The processes that hold scenes, by the parent that they were forked from."""
    nursery = children(running.process.pid)
    return [pid for parent in nursery for pid in children(parent)]


def there(running: Running) -> float:
    """Requests that run or wait."""
    found = running.metrics()
    return found["gemvg_running"] + found["gemvg_queue_length"]


@contextmanager
def asking(running: Running, *flags: str) -> Iterator[list[httpx.Response | Exception]]:
    """A request that runs beside the block; what came of it is in the list afterwards."""
    came: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            came.append(httpx.post(f"{running.url}/v1/ground", files=ASKED, timeout=60))
        except httpx.HTTPError as error:
            came.append(error)

    before = there(running)
    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: there(running) > before)
    yield came
    thread.join()


def post(running: Running, **fields: str) -> httpx.Response:
    files = ASKED + [(name, (None, value)) for name, value in fields.items()]
    return httpx.post(f"{running.url}/v1/ground", files=files, timeout=60)


def test_a_full_queue_says_when_to_come_again(endless: Path) -> None:
    with serving(*ENDLESS, "--max-queue", "1", "--timeout", "1.5", bundle=endless) as running:
        with asking(running) as first:
            waited = post(running, timeout="0.3")
        assert (waited.status_code, "its turn did not come within 0.3 s" in waited.text) == (504, True)
        until(lambda: not there(running))
        with asking(running) as first, asking(running) as second:
            refused = post(running)
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert running.metrics()["gemvg_queue_length"] == 1
        answers = [came[0] for came in (first, second)]
        assert all(isinstance(answer, httpx.Response) for answer in answers)
        assert [answer.status_code for answer in answers] == [504, 504]  # type: ignore[union-attr]


def test_what_nobody_waits_for_is_not_done(endless: Path) -> None:
    with serving(*ENDLESS, bundle=endless) as running:
        late = post(running, timeout="0.3")
        assert (late.status_code, "no answer within 0.3 s" in late.text) == (504, True)
        until(lambda: not running.metrics()["gemvg_running"])  # between two tokens, not after a hundred thousand
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/ground", files=ASKED, timeout=0.3)
        until(lambda: not running.metrics()["gemvg_running"])
        name = httpx.get(f"{running.url}/v1/models").json()["data"][0]["id"]
        body = {"model": name, "messages": question("x", PAIR[:1]), "stream": True, "constrained": False}
        # By hand: which weights are drawn decides whether a text that can be shown comes before the end.
        content = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as place:
            place.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            until(lambda: running.metrics()["gemvg_running"] == 1)
        until(lambda: not running.metrics()["gemvg_running"])
        assert running.metrics()["gemvg_worker_restarts"] == 0


def test_a_worker_that_is_killed_takes_its_requests_alone(endless: Path) -> None:
    with serving(*ENDLESS, "--timeout", "20", bundle=endless) as running:
        scene = httpx.post(f"{running.url}/v1/scenes", files=form(PAIR, [])).json()["id"]
        before = running.memory()["service"]
        with asking(running) as lost:
            (worker,) = workers_of(running)
            os.kill(worker, signal.SIGKILL)
        assert isinstance(lost[0], httpx.Response)
        assert (lost[0].status_code, lost[0].headers["retry-after"]) == (503, "1")
        assert "was lost; ask again" in lost[0].text
        until(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)
        assert post(running, max_new_tokens="3").status_code == 200
        gone = httpx.post(f"{running.url}/v1/scenes/{scene}/ground", json={"queries": ["x"]})
        assert gone.status_code == 404
        found = running.metrics()
        assert (found["gemvg_worker_restarts"], found["gemvg_running"], found["gemvg_scenes"]) == (1, 0, 0)
        assert workers_of(running) != [worker]
        assert running.memory()["service"] < before + 10e6


def test_a_killed_nursery_is_replaced_with_the_next_worker() -> None:
    with serving() as running:
        (nursery,), (worker,) = children(running.process.pid), workers_of(running)
        os.kill(nursery, signal.SIGKILL)
        assert post(running).status_code == 200  # by the worker that is there
        os.kill(worker, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{worker}").exists() and running.metrics()["gemvg_workers_ready"] == 1)
        assert post(running).status_code == 200


def test_what_keeps_a_worker_from_starting_may_end(tmp_path: Path) -> None:
    """A bundle that is away for a while, and descriptors that are used up."""
    bundle = tmp_path / "bundle"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    with serving(bundle=bundle) as running:
        bundle.rename(tmp_path / "away")
        for pid in (*children(running.process.pid), *workers_of(running)):
            os.kill(pid, signal.SIGKILL)
        until(lambda: "no such bundle folder" in httpx.get(f"{running.url}/readyz").text)
        (tmp_path / "away").rename(bundle)
        until(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)
        (worker,) = workers_of(running)
        limit = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (8, 4096))
        os.kill(worker, signal.SIGKILL)
        until(lambda: "a worker cannot be started" in running.log.read_text())
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (min(4096, limit[0]), 4096))
        until(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)
        assert post(running).status_code == 200


def test_a_worker_that_never_comes_back_is_killed(endless: Path) -> None:
    with serving(*ENDLESS, "--kill-after", "0.5", bundle=endless) as running:
        (worker,) = workers_of(running)
        os.kill(worker, signal.SIGSTOP)
        assert post(running, timeout="0.3").status_code == 504
        until(lambda: running.metrics()["gemvg_worker_restarts"] == 1)
        assert post(running, max_new_tokens="3").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_shutdown_finishes_what_runs(endless: Path, number: int) -> None:
    with serving("--max-new-tokens", "3000", "--at-once", "1", bundle=endless) as running:
        everyone = [running.process.pid, *children(running.process.pid), *workers_of(running)]
        with asking(running) as came:
            for pid in everyone:  # as Ctrl-C in a terminal and systemd do
                os.kill(pid, number)
            with pytest.raises(httpx.TransportError):
                until(lambda: bool(httpx.get(f"{running.url}/healthz").status_code == 0))
        assert isinstance(came[0], httpx.Response)
        assert came[0].status_code == 200
        assert running.process.wait(20) == 0
        assert running.log.read_text() == ""
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone[1:]))


def test_a_shutdown_does_not_wait_for_ever(endless: Path) -> None:
    with serving(*ENDLESS, "--drain", "0.5", bundle=endless) as running:
        with asking(running) as came:
            running.process.terminate()
        assert isinstance(came[0], httpx.Response)
        assert (came[0].status_code, "the service ends" in came[0].text) == (503, True)
        assert running.process.wait(20) == 0
        assert running.log.read_text() == ""


def test_workers_end_with_their_service() -> None:
    with serving("--workers", "2") as running:
        (nursery,) = children(running.process.pid)
        everyone = [nursery, *workers_of(running)]
        assert len(everyone) == 3
        if find_library() is not None:  # it forks, so it has no thread beside
            assert len(list(Path(f"/proc/{nursery}/task").iterdir())) == 1
        running.process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone))


@pytest.mark.skipif(find_library() is None, reason="the native engine is not built (make native)")
def test_workers_share_the_weights() -> None:
    """What a worker that has answered holds by itself is less than the weights, which are there once."""
    with serving("--workers", "2", "--cache-bytes", "0") as running:
        for _ in range(4):
            assert post(running).status_code == 200
        for worker in workers_of(running):
            rollup = Path(f"/proc/{worker}/smaps_rollup").read_text()
            shared = int(re.search(r"Shared_Dirty: +(\d+)", rollup)[1])  # type: ignore[index]
            assert shared > 15_000  # kB: the weights, and Python with all that it imported


# At the start


def failed(*flags: str, environment: dict[str, str] | None = None) -> str:
    """What a service that does not start says."""
    command = [sys.executable, "-m", "gemvg_edge.cli", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_what_keeps_it_from_starting_is_told(tmp_path: Path, endless: Path) -> None:
    assert "no-such-bundle" in failed("no-such-bundle", "--port", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be listened on (Address already in use)" in failed("--port", str(taken.getsockname()[1]))
    assert "no.such.host.invalid:0 cannot be listened on" in failed("--host", "no.such.host.invalid", "--port", "0")
    assert "--max-bytes is 0; give at least 1" in failed("--max-bytes", "0")
    assert "GEMVG_TOKEN holds no token" in failed(environment=os.environ | {"GEMVG_TOKEN": "short"})
    (tmp_path / "token").write_text("two words here")
    assert "holds no token; give 8 to 4096" in failed("--token-file", str(tmp_path / "token"))
    assert "threads=2000" in failed("--threads", "2000", "--port", "0")


def test_without_the_extra_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('No module named fastapi', name='fastapi')")
    said = failed(environment=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "run `pip install 'gemvg-edge[serve]'`" in said
