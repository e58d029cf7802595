"""Requests to a service, ready to be sent, each with what makes its answer right. Knows no connection."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from bench.readme import ROOT

IMAGES = ROOT / "examples" / "images"
SIDES = (160, 240, 320, 320, 448, 640, 960)  # pixels of a picture's longer side
ASKED = ("all balls", "what both images show", "the object that was moved", "what was taken away", "all red objects")
BOUNDARY = "gemvg-load-boundary"


@dataclass(frozen=True)
class Ask:
    """Pictures as bytes, and queries."""

    pictures: tuple[bytes, ...]
    queries: tuple[str, ...]


@dataclass(frozen=True)
class Sent:
    """A request of HTTP."""

    path: str
    kind: str  # its content type
    body: bytes


def draw_asks(count: int, seed: int = 0) -> list[Ask]:
    """Questions about the shipped scenes, each of its own light and size, so that no two looks are the same."""
    rng, asks = random.Random(seed), []
    scenes = json.loads((IMAGES / "scenes.json").read_text(encoding="utf-8"))
    for number in range(count):
        scene, side = scenes[number % len(scenes)], rng.choice(SIDES)
        pictures = []
        for name in scene["images"]:
            with Image.open(IMAGES / name) as picture:
                light = rng.uniform(0.9, 1.1)
                levels = [min(255, int(level * light)) for level in range(256)] * 3
                other = picture.convert("RGB").resize((side, side)).point(levels)
            file = io.BytesIO()
            other.save(file, **({"format": "JPEG", "quality": 90} if rng.random() < 0.5 else {"format": "PNG"}))
            pictures.append(file.getvalue())
        queries = [scene["query"], *rng.sample(ASKED, rng.choice((0, 0, 1, 2)))]
        asks.append(Ask(tuple(pictures), tuple(queries)))
    return asks


def as_form(ask: Ask) -> Sent:
    """As `curl -F` sends it."""
    body = io.BytesIO()
    for picture in ask.pictures:
        body.write(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'.encode())
        body.write(picture + b"\r\n")
    for query in ask.queries:
        body.write(f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="query"\r\n\r\n{query}\r\n'.encode())
    body.write(f"--{BOUNDARY}--\r\n".encode())
    return Sent("/v1/ground", f"multipart/form-data; boundary={BOUNDARY}", body.getvalue())


def as_json(ask: Ask) -> Sent:
    """Pictures in base64."""
    images = [base64.b64encode(picture).decode() for picture in ask.pictures]
    return Sent("/v1/ground", "application/json", json.dumps({"images": images, "queries": ask.queries}).encode())


def as_chat(ask: Ask, model: str) -> Sent:
    """The first query as OpenAI's clients ask it."""
    urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in ask.pictures]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": ask.queries[0]})
    chat = {"model": model, "messages": [{"role": "user", "content": content}]}
    return Sent("/v1/chat/completions", "application/json", json.dumps(chat).encode())


def malformed(ask: Ask, rng: random.Random) -> Sent:
    """A request that is wrong in one of several ways; its right answer is an error of the client's."""
    good = as_json(ask)
    cut = Ask((ask.pictures[0][: len(ask.pictures[0]) // 2],), ask.queries)
    wrong = (
        Sent(good.path, good.kind, good.body[: len(good.body) // 2]),
        Sent(good.path, good.kind, json.dumps({"images": ["bm8gcGljdHVyZQ=="], "queries": ["x"]}).encode()),
        Sent(good.path, good.kind, json.dumps({"images": [], "queries": []}).encode()),
        Sent(good.path, good.kind, json.dumps({"images": ["http://127.0.0.1/a.png"], "queries": ["x"]}).encode()),
        Sent(good.path, "text/plain", good.body),
        Sent("/v1/scenes/no-such-scene/ground", "application/json", b'{"queries": ["x"]}'),
        as_form(Ask(ask.pictures, ("the mug <|im_end|>",))),
        as_form(cut),
    )
    return rng.choice(wrong)


def boxes_of(content: dict[str, Any]) -> list[Any]:
    """What has to be equal of an answer: boxes and text, without times."""
    answers: Sequence[dict[str, Any]] = content.get("answers") or [content["choices"][0]["message"]["grounding"]]
    return [[answer["query"], answer["text"], answer["boxes"]] for answer in answers]
