"""What the process that speaks HTTP and its workers tell each other: a JSON object, and the bytes of some pictures.

JSON and not pickle: a worker reads strangers' pictures, and what it says is not run. Knows no model and no HTTP.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

_HEAD = struct.Struct(">II")  # bytes of the JSON text, and how many pictures
_SIZE = struct.Struct(">Q")  # bytes of a picture
Message = dict[str, Any]


def pack(message: Message, pictures: Sequence[bytes] = ()) -> list[bytes]:
    """A message as the pieces that are sent one after the other; pictures are not copied."""
    text = json.dumps(message).encode()
    pieces = [_HEAD.pack(len(text), len(pictures)) + text]
    for picture in pictures:
        pieces += [_SIZE.pack(len(picture)), picture]
    return pieces


def receive(file: BinaryIO) -> tuple[Message, list[bytes]] | None:
    """The next message, waited for; None where the other side is gone."""
    if (head := _exactly(file, _HEAD.size)) is None:
        return None
    size, count = _HEAD.unpack(head)
    text, pictures = _exactly(file, size), []
    for _ in range(count):
        length = _exactly(file, _SIZE.size)
        picture = length and _exactly(file, _SIZE.unpack(length)[0])
        if picture is None:
            return None
        pictures.append(picture)
    return None if text is None else (json.loads(text), pictures)


def send(place: socket.socket, message: Message) -> None:
    """Send a message without pictures; OSError where the other side is gone."""
    place.sendall(b"".join(pack(message)))


async def next_message(reader: asyncio.StreamReader) -> Message | None:
    """The next message, which has no pictures; None where the other side is gone."""
    try:
        size, _ = _HEAD.unpack(await reader.readexactly(_HEAD.size))
        message: Message = json.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError, ValueError):
        return None
    return message


def _exactly(file: BinaryIO, size: int) -> bytes | None:
    data = file.read(size)
    return data if len(data) == size else None
