"""The application: all routes, the page, health and counters. Made around a service; starts nothing by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from gemvg_edge import __version__
from gemvg_edge.serve import chat, routes
from gemvg_edge.serve.guard import Guard
from gemvg_edge.serve.refusals import Gone, Refused, error_response
from gemvg_edge.serve.service import Service

PAGE = Path(__file__).parent / "page"
KINDS = {
    "index.html": "text/html",
    "page.js": "text/javascript",
    "page.css": "text/css",
    "sample-a.png": "image/png",
    "sample-b.png": "image/png",
}
# The page runs no script but its own and asks no other site, whatever a picture's name or an answer says.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> FastAPI:
    """The application of a service."""
    app = FastAPI(
        title="gemvg-edge",
        version=__version__,
        description="Several pictures and a sentence in, boxes out. An error is one sentence in `error.message`.",
        docs_url=None,  # its page would fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.include_router(routes.make_router(service))
    app.include_router(chat.make_router(service))

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process that speaks HTTP is there."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses={503: routes.ERRORS[503]})
    async def readyz() -> dict[str, str]:
        """A worker is there to answer."""
        if not service.pool.ready:
            raise Refused(503, service.pool.failed or "no worker is ready yet", retry_after=1)
        return {"status": "ready", "model": service.name}

    @app.get("/metrics", tags=["health"], response_class=Response, responses={401: routes.ERRORS[401]})
    async def metrics() -> Response:
        """Counters, as Prometheus reads them."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for name, kind in KINDS.items():
        path = "/" if name == "index.html" else f"/{name}"
        app.add_api_route(path, page_route(name, kind), methods=["GET", "HEAD"], include_in_schema=False)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_response(error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            methods = methods_at(app, request.scope["path"])
            return error_response(Refused(405, f"this address takes {methods} alone"), {"Allow": methods})
        fixes = {404: "there is nothing at this address; /openapi.json lists what there is"}
        return error_response(Refused(error.status_code, fixes.get(error.status_code, str(error.detail))))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def fault(request: Request, error: Exception) -> Response:
        return error_response(Refused(500, "a fault of the service; its log has more"))  # and it is logged

    app.add_exception_handler(Exception, fault)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(Gone, gone)
    app.openapi = partial(openapi_of, app)  # type: ignore[method-assign]
    app.add_middleware(Guard, service=service)
    return app


def openapi_of(app: FastAPI) -> dict[str, Any]:
    """The document, made once, without the answers of FastAPI's own checks: none of ours comes from these."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def methods_at(app: FastAPI, path: str) -> str:
    """The methods of all routes at an address; of its own, a router tells those of the first."""
    found = {"GET", "HEAD"} if path.strip("/") in {"", *KINDS} else set()
    for pattern, operations in app.openapi()["paths"].items():
        if compile_path(pattern)[0].match(path):
            found |= {method.upper() for method in operations}
    return ", ".join(sorted(found))


def page_route(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A route that gives a file of the page."""
    content = (PAGE / name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return page
