"""Bodies of requests, read within bounds of bytes and time: JSON, or a form as `curl -F` sends it.

What clients send at once is counted as it comes, so that slow or large requests cannot fill the memory. Knows no model.
"""

from __future__ import annotations

import base64
import binascii
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from gemvg_edge.serve.refusals import BUSY, Gone, Refused
from gemvg_edge.serve.settings import Settings

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+=-]+)*?)(;base64)?,", re.ASCII | re.IGNORECASE)
MOST_HEAD = 1024  # characters of a data URL before its picture
MOST_VALUES = 10_000  # of a body of JSON, by its commas
MOST_FIELDS = 64  # parts of a form beside its pictures and queries
FIX = "send JSON (application/json), or a form (multipart/form-data) as `curl -F image=@a.png -F query=...` does"
logging.getLogger("python_multipart").addHandler(logging.NullHandler())  # or odd forms would be remarked on stderr
ModelT = TypeVar("ModelT", bound=BaseModel)
Form = list[tuple[str, bytes]]


class Held:
    """How many bytes of requests are in memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0

    @contextmanager
    def counted(self) -> Iterator[Count]:
        """What a request takes, until it is done with."""
        count = Count(self)
        try:
            yield count
        finally:
            self.bytes -= count.bytes


class Count:
    """Bytes of one request."""

    def __init__(self, held: Held) -> None:
        self._held, self.bytes = held, 0

    def add(self, size: int) -> None:
        """So many more; Refused where there is no room for them."""
        if self._held.bytes + size > self._held.limit:
            raise Refused(BUSY, "too many bytes of requests at once; try again later", retry_after=1)
        self._held.bytes += size
        self.bytes += size


async def read(request: Request, count: Count, settings: Settings) -> bytes:
    """The whole body; Refused where it is too large, too slow or packed."""
    try:
        return await _read(request, count, settings)
    except Refused:
        await swallow(request.receive, request.headers, settings)
        raise


async def swallow(receive: Receive, headers: Headers, settings: Settings) -> None:
    """Read on without keeping anything, for a while: a client that still writes would not see what it is told."""
    seen = 0
    if "expect" in headers:  # it writes nothing before it is told to go on
        return
    with anyio.move_on_after(settings.body_timeout / 4):
        while seen <= 4 * settings.max_bytes:
            message = await receive()
            seen += len(message.get("body", b""))
            if not message.get("more_body"):
                return


async def _read(request: Request, count: Count, settings: Settings) -> bytes:
    if (packed := request.headers.get("content-encoding", "identity")).lower() != "identity":
        raise Refused(415, f"the body is packed ({packed[:40]!r}); send it as it is")
    too_large = Refused(413, f"the request has more than {settings.max_bytes} bytes; send fewer or smaller pictures")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > settings.max_bytes):
        raise too_large
    pieces: list[bytes] = []
    with anyio.move_on_after(settings.body_timeout) as limit:
        try:
            async for piece in request.stream():
                if count.bytes + len(piece) > settings.max_bytes:
                    raise too_large
                count.add(len(piece))
                pieces.append(piece)
        except ClientDisconnect:
            raise Gone from None
    if limit.cancelled_caught:
        raise Refused(408, f"the request was not there within {settings.body_timeout:g} s; send it faster or smaller")
    return b"".join(pieces)


def read_json(data: bytes, model: type[ModelT]) -> ModelT:
    """A body of JSON as the model has it; Refused names the field that is wrong."""
    # Each wrong value costs pydantic a kilobyte and a moment, before it tells the first; base64 has no comma.
    if data.count(b",") > MOST_VALUES:
        raise Refused(400, f"the body has more than {MOST_VALUES} values; send fewer")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise refusal_of(error) from None


def refusal_of(error: ValidationError) -> Refused:
    """The first thing that is wrong, as a sentence; what was given is not repeated, which may be a whole picture."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # A field that is not known comes first: it is often the one that is missing, misspelt.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    place = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')[:200]}")
    if first["type"] == "extra_forbidden":
        return Refused(400, f"{place}: there is no such field here; see /openapi.json", param=place)
    return Refused(400, f"{place or 'the body'}: {first['msg'][:300]}", param=place or None)


def kind_of(request: Request) -> str:
    """The media type of a body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_kind(request: Request, *wanted: str) -> str:
    """The media type, one of those wanted; Refused otherwise."""
    if (kind := kind_of(request)) not in wanted:
        fix = FIX if len(wanted) > 1 else f"send {wanted[0]}"
        raise Refused(415, f"the body is {kind[:100] or 'of no type'}; {fix}")
    return kind


def read_form(request: Request, data: bytes, most: int) -> Form:
    """The fields of a form in their order; Refused where it is none, or has more than `most`."""
    _, options = parse_options_header(request.headers.get("content-type", ""))
    if not (boundary := options.get(b"boundary")):
        raise Refused(400, "the form has no boundary; send it as `curl -F` does, which sets the header itself")
    fields: Form = []
    heads: list[dict[bytes, bytes]] = []
    name, value, content = bytearray(), bytearray(), bytearray()

    def begin() -> None:
        if len(heads) == most:
            raise Refused(400, f"the form has more than {most} fields; leave some out")
        heads.append({})
        content.clear()

    def header() -> None:
        heads[-1][bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def end() -> None:
        _, about = parse_options_header(heads[-1].get(b"content-disposition", b""))
        fields.append((about.get(b"name", b"").decode("utf-8", "replace"), bytes(content)))

    def into(buffer: bytearray) -> Any:
        return lambda data, start, stop: buffer.extend(data[start:stop])

    called: Any = {"on_part_begin": begin, "on_part_data": into(content), "on_part_end": end}
    called |= {"on_header_field": into(name), "on_header_value": into(value), "on_header_end": header}
    ended: list[bool] = []
    called["on_end"] = lambda: ended.append(True)
    try:
        parser = MultipartParser(boundary, called)
        parser.write(data)
        parser.finalize()
    except ValueError as error:  # the parser's own errors
        raise Refused(400, f"the form cannot be read ({str(error)[:200]}); send it as `curl -F` does") from None
    if not ended:
        raise Refused(400, "the form is cut short; its last boundary is missing")
    return fields


def read_picture(text: str, where: str) -> bytes:
    """A picture in a data URL, or in base64 by itself; Refused for an address or a path, which are not fetched."""
    head = DATA_URL.match(text[:MOST_HEAD])
    if head is None and ("://" in text[:64] or text[:5].lower() in ("data:", "file:")):
        fix = "send the picture itself, as data:image/png;base64,..."
        raise Refused(400, f"{where} is an address; nothing is fetched: {fix}", param=where)
    if head and not head[3]:
        raise Refused(400, f"{where} is a data URL without base64; send data:image/png;base64,...", param=where)
    try:
        # `base64 FILE` writes lines
        return base64.b64decode("".join((text[head.end() :] if head else text).split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{where} is not base64; send data:image/png;base64,...", param=where) from None
