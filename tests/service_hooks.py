"""What schemathesis sends to `gemvg serve` in place of a made-up picture: now and then a real one, or a damaged one."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import schemathesis

from bench.service.requests import IMAGES

PATIENCE = 10.0
_PICTURES = [(IMAGES / name).read_bytes() for name in ("scene1-a.png", "scene1-b.png")]


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """A body with pictures where it has texts for pictures; the same body always brings the same."""
    if not isinstance(body, dict):
        return body
    if isinstance(images := body.get("images"), list):
        body["images"] = [_picture(image) for image in images]
    if isinstance(images := body.get("image"), list):
        body["image"] = [_bytes(image) or image for image in images]
    for turn in body["messages"] if isinstance(body.get("messages"), list) else ():
        for part in turn["content"] if isinstance(turn, dict) and isinstance(turn.get("content"), list) else ():
            if isinstance(part, dict) and isinstance(url := part.get("image_url"), dict) and "url" in url:
                url["url"] = _picture(url["url"])
    if isinstance(seconds := body.get("timeout"), float) and 0.1 <= seconds < PATIENCE:
        body["timeout"] = PATIENCE  # one that is too short for an answer is no fault
    if isinstance(body.get("model"), str) and _number(body["model"]) % 4:
        body["model"] = "tabletop"
    return body


def _picture(value: Any) -> Any:
    data = _bytes(value) if isinstance(value, str) else None
    return value if data is None else f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _bytes(value: Any) -> bytes | None:
    """A picture whole or cut, or None to leave what was made up."""
    number = _number(value)
    match number % 4:
        case 0:
            return None
        case 1:
            return _PICTURES[0][: number % len(_PICTURES[0])]
    return _PICTURES[number % 2]


def _number(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big")
