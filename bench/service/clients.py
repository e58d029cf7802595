"""Clients at once: threads that send requests and keep what comes back; some leave midway. Know no right answer."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from bench.service.requests import Sent
from bench.service.running import Running

LEFT = "left"  # how a request is sent whose client goes away; any other is waited for


class Clients:
    """Threads that send requests from one list, each the next that is left."""

    def __init__(self, running: Running, count: int) -> None:
        self.running, self.count = running, count
        self.results: dict[int, tuple[int, Any, float]] = {}  # by request: status, content, seconds

    def send(self, requests: Sequence[tuple[Sent, str]]) -> float:
        """Send all; the seconds that it took."""
        todo, lock = iter(list(enumerate(requests))), threading.Lock()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                connection = self._connect()
                while True:
                    with lock:
                        number, (sent, how) = next(todo, (-1, (Sent("", "", b""), "")))
                    if number < 0:
                        return
                    connection = self._one(connection, number, sent, how)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(self.count)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return time.perf_counter() - started

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.running.port, timeout=600)

    def _one(
        self, connection: http.client.HTTPConnection, number: int, sent: Sent, how: str
    ) -> http.client.HTTPConnection:
        started = time.perf_counter()
        if how == LEFT:  # in the middle of the body, or while the answer is made
            connection.putrequest("POST", sent.path)
            connection.putheader("Content-Type", sent.kind)
            connection.putheader("Content-Length", str(len(sent.body)))
            connection.endheaders()
            connection.send(sent.body if number % 20 else sent.body[: len(sent.body) // 2])
            time.sleep(0.01)
            connection.close()
            return self._connect()
        connection.request("POST", sent.path, sent.body, {"Content-Type": sent.kind})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        self.results[number] = (answer.status, content, time.perf_counter() - started)
        return connection
