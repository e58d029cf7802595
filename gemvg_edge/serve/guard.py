"""Who may ask: a token where one is set, and no page of another site; and what is counted of every request.

A page of any site can make a browser send requests to this machine's own addresses. So where the service is for this
machine alone, it answers to its own names only (a site may give its name this machine's address), and a request that a
browser marks with another site's origin is refused. Knows no route.
"""

from __future__ import annotations

import hmac
import logging
import time
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemvg_edge.files import printable
from gemvg_edge.serve.bodies import swallow
from gemvg_edge.serve.refusals import Refused, error_response
from gemvg_edge.serve.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")

CHECKED = ("/v1/", "/metrics")  # what needs the token; the page and the health of the service tell nothing
log = logging.getLogger("gemvg_edge")


class Guard:
    """ASGI middleware around all routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        settings = service.settings
        own = {*LOOPBACK, settings.host} if is_loopback(settings.host) or settings.allow_hosts else set()
        self.hosts = {name.lower() for name in (*own, *settings.allow_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it, and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), [499]  # where nothing is sent, the client was gone

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
            except Refused as refused:
                await swallow(receive, Headers(scope=scope), self.service.settings)
                await error_response(refused)(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        except Exception:
            status[0] = 500  # told outside of here
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # a route's pattern: paths are a client's to choose
            seconds, metrics = time.monotonic() - started, self.service.metrics
            metrics.requests.labels(route, status[0]).inc()
            metrics.seconds.labels(route).observe(seconds)
            log.info("%s %s: %d in %.0f ms", scope["method"], printable(scope["path"])[:200], status[0], seconds * 1e3)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if self.hosts and name_in(host) not in self.hosts:
            raise Refused(403, f"the service is not known as {printable(host)[:100]!r}; see --allow-host")
        origin = headers["origin"].lower() if "origin" in headers else None
        if origin is not None and place_of(origin) != host and name_of(origin) not in self.hosts - {*LOOPBACK}:
            raise Refused(403, "a page of another site may not ask; let a proxy give both one address")
        token = self.service.settings.token
        if token is not None and scope["path"].startswith(CHECKED):
            kind, _, shown = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(shown.strip().encode(), token.encode()):
                raise Refused(401, "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`")


def name_in(host: str) -> str | None:
    """The name in a Host header, without its port."""
    return name_of(f"//{host}")


def name_of(address: str) -> str | None:
    """The host's name in an address; None where it has none."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def place_of(address: str) -> str | None:
    """Host and port of an address; None where it is none."""
    try:
        return urlsplit(address).netloc or None
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
