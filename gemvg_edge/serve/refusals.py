"""What a client is told when it gets no answer: a status and one sentence, in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

BUSY = 503
UNREAD = (401, 403, 408, 413, 415)  # of a request whose body may still be on its way
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error"}


class Refused(Exception):
    """The end of a request that is not answered."""

    def __init__(self, status: int, sentence: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.param, self.retry_after = status, sentence, param, retry_after


class Gone(Exception):
    """The client went away: nobody is told anything."""


def error_content(status: int, sentence: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": sentence, "type": kind, "param": param, "code": HTTPStatus(status).name.lower()}}


def error_response(refused: Refused, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error as HTTP has it."""
    told = dict(headers or {})
    if refused.status in UNREAD:
        told["Connection"] = "close"
    if refused.retry_after is not None:
        told["Retry-After"] = str(refused.retry_after)
    if refused.status == 401:
        told["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_content(refused.status, refused.sentence, refused.param), refused.status, told)
