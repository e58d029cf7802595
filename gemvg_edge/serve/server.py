"""`gemvg serve`: listen, open the model, answer, and end when told, once what runs is answered."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import reason
from gemvg_edge.serve.app import make_app
from gemvg_edge.serve.guard import is_loopback
from gemvg_edge.serve.refusals import error_content
from gemvg_edge.serve.service import Service
from gemvg_edge.serve.settings import Settings

log = logging.getLogger("gemvg_edge")
MOST_HEAD = 64 * 1024  # bytes of a request before its body
GIVE_UP = 2.0  # seconds for telling clients that a shutdown does not wait any longer
SWEEP = 1.0  # seconds between two looks for scenes that nobody asks any more


class Server(uvicorn.Server):
    """uvicorn's, which says when it listens, and whose signals `run` takes: its own would end the loop too early."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


def serve(settings: Settings) -> int:
    """Serve until SIGINT or SIGTERM; the exit code. GemvgError where the place is taken or no model can be opened."""
    with listening(settings) as place, suppress(asyncio.CancelledError):  # told to end before it could begin
        asyncio.run(run(settings, place))
    return 0


def listening(settings: Settings) -> socket.socket:
    """A socket at the address, before a model is opened for nothing."""
    address = (settings.host, settings.port)
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        # Of TCP by name, or asyncio would not switch off Nagle's wait, which costs an answer 40 ms.
        with ExitStack() as unused:
            place = unused.enter_context(socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
            place.listen(settings.max_connections)
            unused.pop_all()
        return place
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise GemvgError(f"{where} cannot be listened on ({reason(error)}); give another --host or --port") from None


async def run(settings: Settings, place: socket.socket) -> None:
    """The life of a service."""
    service, loop, main = Service.of(settings), asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, main.cancel)
    try:
        service.about = await service.pool.start()
        if not is_loopback(settings.host) and settings.token is None:
            log.warning("whoever reaches %s may ask: there is no token (--token-file)", settings.host)
        server = Server(
            uvicorn.Config(
                make_app(service),
                http=patient(settings),
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.drain + GIVE_UP,  # type: ignore[arg-type]  # any number of seconds
                h11_max_incomplete_event_size=MOST_HEAD,
            )
        )

        def stop(number: int) -> None:
            server.handle_exit(number, None)
            loop.call_later(settings.drain, service.pool.give_up)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        sweeper = asyncio.ensure_future(sweep(service))
        await server.serve(sockets=[place])
        sweeper.cancel()
        print("stopped", flush=True)
    finally:
        await service.pool.close()


async def sweep(service: Service) -> None:
    """Let go of scenes that nobody asks."""
    while True:
        await asyncio.sleep(SWEEP)
        service.scenes.expire()


def patient(settings: Settings) -> type[H11Protocol]:
    """Uvicorn's own protocol with a time for what it lets a client do for ever: send no head, read no answer."""

    class Patient(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "too many connections; try again later")
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head_is_there()
            elif self._late is None:
                self._wait_for_head()

        def connection_lost(self, error: Exception | None) -> None:
            self._head_is_there()
            self.resume_writing()
            super().connection_lost(error)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:  # nobody will read the rest, which may never come
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._refuse(400, "this is no HTTP/1.1 that can be read; send a request as curl does")
            else:  # an answer is there or under way
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(settings.body_timeout, self.transport.abort)

        def resume_writing(self) -> None:
            if self._unread:
                self._unread.cancel()
                self._unread = None
            super().resume_writing()

        def _wait_for_head(self) -> None:
            what = f"no request came within {settings.body_timeout:g} s; send it faster"
            self._late = self.loop.call_later(settings.body_timeout, self._refuse, 408, what)

        def _refuse(self, status: int, sentence: str) -> None:
            self.transport.write(plain_response(status, sentence))
            self.transport.close()

        def _head_is_there(self) -> None:
            if self._late:
                self._late.cancel()
                self._late = None

    return Patient


def plain_response(status: int, sentence: str) -> bytes:
    """An error where there is no request yet that could get one."""
    content = json.dumps(error_content(status, sentence)).encode()
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Content-Type: application/json", "Retry-After: 1"]
    lines += ["Connection: close", f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content
