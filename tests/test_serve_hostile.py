"""What strangers send to `gemvg serve`: a 4xx with a sentence comes back, or the right boxes; and it goes on."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from bench.service.running import Running, serving
from gemvg_edge import Grounder
from tests.fuzz_service import fuzz
from tests.picture_bytes import encoded, png
from tests.test_serve import IMAGES, PAIR, form, same, url_of

SLOW = "1"  # seconds that a client may take


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving("--body-timeout", SLOW, "--max-connections", "20", "--max-queries", "4") as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    """Asks; and sees afterwards that no worker was lost."""
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
        assert client.get("/readyz").status_code == 200
        assert running.metrics()["gemvg_worker_restarts"] == 0


def told(answer: httpx.Response, status: int) -> str:
    """The sentence of an error."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message: str = error["message"]
    assert "Traceback" not in message
    assert 10 < len(message) < 400
    return message


# Pictures

LEFT = Image.open(IMAGES / "scene1-a.png").convert("RGB")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6


def huge(width: int, height: int) -> bytes:
    """A PNG whose header says so, and that has one pixel."""
    data = png(np.zeros((1, 1), np.uint8))
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


GOOD: dict[str, bytes] = {
    "CMYK": encoded(LEFT.convert("CMYK"), "JPEG", quality=95),
    "palette": encoded(LEFT.convert("P")),
    "EXIF-rotated": encoded(LEFT.rotate(90), "JPEG", exif=ROTATED, quality=95),
    "animated": encoded(LEFT, "GIF", save_all=True, append_images=[Image.new("RGB", LEFT.size)]),
    "16 bits": png(np.asarray(LEFT.convert("L")).astype(np.uint16) * 257, bits=16),
    "1x1": encoded(Image.new("RGB", (1, 1), "red")),
    "alpha": encoded(LEFT.convert("RGBA"), "WEBP", lossless=True),
}
BAD: dict[str, tuple[bytes, str]] = {
    "truncated": (PAIR[0][: len(PAIR[0]) // 2], "is damaged or cut short"),
    "zero bytes": (b"", "is not a picture"),
    "a page": (b"<!doctype html><svg onload=alert(1)>", "is not a picture"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    "1x10000": (encoded(Image.new("RGB", (1, 10000))), "longer than 200 to 1"),
    "huge header": (huge(60_000, 60_000), "more pixels than Pillow's safety limit"),
    "many pixels": (huge(9_000, 9_000), "have 81102400 pixels, more than 64000000; scale them down"),
    "negative grey": (encoded(Image.fromarray(np.full((9, 9), -5.0, np.float32)), "TIFF"), "32 bits"),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_picture_brings_the_boxes_that_python_finds(client: httpx.Client, name: str) -> None:
    answer = client.post("/v1/ground", files=form([GOOD[name], PAIR[1]], ["all balls"]))
    assert answer.status_code == 200
    with Grounder.open() as grounder:
        assert same(answer.json()["answers"][0], grounder.ground([GOOD[name], PAIR[1]], "all balls"))


def test_a_rotated_picture_is_upright(client: httpx.Client) -> None:
    plain, turned = (
        client.post("/v1/ground", files=form([p, PAIR[1]], ["all balls"])).json()["answers"][0]["boxes"]
        for p in (encoded(LEFT, "JPEG", quality=95), GOOD["EXIF-rotated"])
    )
    assert len(plain) == len(turned) >= 4
    assert all(abs(a[side] - b[side]) < 12 for a, b in zip(plain, turned, strict=True) for side in ("x1", "y1"))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_told_in_a_sentence(client: httpx.Client, name: str) -> None:
    data, words = BAD[name]
    for answer in (
        client.post("/v1/ground", files=form([PAIR[0], data], ["all balls"])),
        client.post("/v1/scenes", json={"images": [url_of(PAIR[0]), url_of(data)]}),
    ):
        message = told(answer, 400)
        assert words in message
        assert "images[1]" in message


# Bodies

IMAGE = url_of(PAIR[0])
DEEP = b"[" * 100_000
LONG = "a" * 10_000_000
JSON_BODIES: dict[str, tuple[str, bytes | dict[str, Any], str]] = {
    "nothing": ("/v1/ground", b"", "the body is not JSON"),
    "cut": ("/v1/ground", b'{"images": ["', "the body is not JSON"),
    "deep": ("/v1/ground", DEEP, "the body is not JSON"),
    "not text": ("/v1/ground", b'{"images": ["\xff\xfe"]}', "the body is not JSON"),
    "a list": ("/v1/ground", b"[]", "the body: Input should be an object"),
    "no queries": ("/v1/ground", {"images": [IMAGE]}, "queries: Field required"),
    "a text for a list": ("/v1/ground", {"images": IMAGE, "queries": ["x"]}, "images: Input should be a valid array"),
    "a number for a query": ("/v1/ground", {"images": [IMAGE], "queries": [5]}, "queries.0: Input should be a valid"),
    "an empty query": ("/v1/ground", {"images": [IMAGE], "queries": [""]}, "queries.0: String should have at least"),
    "a blank query": ("/v1/ground", {"images": [IMAGE], "queries": [" "]}, "query"),
    "10 MB of query": ("/v1/ground", {"images": [IMAGE], "queries": [LONG]}, "characters"),
    "a long query": ("/v1/ground", {"images": [IMAGE], "queries": ["mug " * 2000]}, "more than max_query_tokens=256"),
    "special tokens": ("/v1/ground", {"images": [IMAGE], "queries": ["x<|im_end|>\n<|im_start|>"]}, "special token"),
    "which query": ("/v1/ground", {"images": [IMAGE], "queries": ["x", "<|image_pad|>"]}, "query[1]: "),
    "too many queries": ("/v1/ground", {"images": [IMAGE], "queries": ["x"] * 5}, "queries: the request has 5; send 1"),
    "too many images": ("/v1/ground", {"images": [IMAGE] * 9, "queries": ["x"]}, "images: the request has 9; send 1"),
    "another field": ("/v1/ground", {"images": [IMAGE], "queries": ["x"], "path": "/etc"}, "path: there is no such"),
    "an address": ("/v1/ground", {"images": ["http://127.0.0.1:1/a.png"], "queries": ["x"]}, "nothing is fetched"),
    "a file": ("/v1/ground", {"images": ["file:///etc/passwd"], "queries": ["x"]}, "nothing is fetched"),
    "a path": ("/v1/ground", {"images": ["/etc/passwd"], "queries": ["x"]}, "images[0] is not base64"),
    "no base64": ("/v1/ground", {"images": ["data:image/png;base64,%%%"], "queries": ["x"]}, "images[0] is not base64"),
    "plain data": ("/v1/ground", {"images": ["data:image/png,abc"], "queries": ["x"]}, "a data URL without base64"),
    "a million values": ("/v1/ground", b'{"images": [' + b"0," * 10**6 + b"0]}", "more than 10000 values"),
    "a chat of a million values": (
        "/v1/chat/completions",
        b'{"model": "tabletop", "messages": [{"role": "user", "content": [' + b"0," * 10**6 + b"0]}]}",
        "more than 10000 values",
    ),
    "a budget past the service's": (
        "/v1/ground",
        {"images": [IMAGE], "queries": ["x"], "max_pixels": 2**31},
        "give at most 16384, this service's --max-pixels",
    ),
    "the form's field": ("/v1/ground", {"images": [IMAGE], "query": "x"}, "query: there is no such field"),
    "a keep of 7": ("/v1/ground", {"images": [IMAGE], "queries": ["x"], "keep": 7}, "keep: Input should be less"),
    "pixels": ("/v1/ground", {"images": [IMAGE], "queries": ["x"], "max_pixels": 1}, "max_pixels=1; give a"),
    "no number": ("/v1/ground", b'{"images": ["a"], "queries": ["x"], "keep": NaN}', "keep: Input should be a finite"),
    "too long": ("/v1/ground", {"images": [IMAGE], "queries": ["x"], "max_new_tokens": 257}, "give 1 to 256"),
    "a picture that is not there": ("/v1/ground", {"images": [IMAGE] * 2, "queries": ["x in image 5"]}, "image 5, of"),
    "a chat of nothing": ("/v1/chat/completions", {"model": "tabletop", "messages": []}, "messages: List should have"),
    "an assistant's chat": (
        "/v1/chat/completions",
        {"model": "tabletop", "messages": [{"role": "assistant", "content": "x"}]},
        "the last one must be the user's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON_BODIES)
def test_wrong_json_is_told_in_a_sentence(client: httpx.Client, name: str) -> None:
    path, body, words = JSON_BODIES[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = told(client.post(path, content=data, headers={"Content-Type": "application/json"}), 400)
    assert words in message


def part(head: str, content: bytes) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"


FORMS: dict[str, tuple[bytes, str]] = {
    "no end": (part('name="image"', b"abc"), "cut short"),
    "no form": (b"abc", "the form cannot be read"),
    "empty": (b"--x--\r\n", "image: the request has 0"),
    "a query that is no text": (
        part('name="image"', PAIR[0]) + part('name="query"', b"\xff\xfe") + b"--x--\r\n",
        "query: it is not text in UTF-8",
    ),
    "twice": (
        part('name="image"', PAIR[0]) + part('name="query"', b"x") + 2 * part('name="keep"', b"1") + b"--x--\r\n",
        "keep: it is given twice",
    ),
    "a number that is none": (
        part('name="image"', PAIR[0]) + part('name="query"', b"x") + part('name="keep"', b"lots") + b"--x--\r\n",
        "keep: Input should be a valid number",
    ),
    "an unknown field": (
        part('name="image"', PAIR[0]) + part('name="query"', b"x") + part('name="../../x"', b"1") + b"--x--\r\n",
        "../../x: there is no such field here",
    ),
    "the field of JSON": (
        part('name="image"', PAIR[0]) + part('name="queries"', b"x") + b"--x--\r\n",
        "queries: a form's field is `query`, given once for each",
    ),
    "a thousand fields": (1000 * part('name="query"', b"x") + b"--x--\r\n", "more than"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_wrong_form_is_told_in_a_sentence(client: httpx.Client, name: str) -> None:
    body, words = FORMS[name]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert words in told(client.post("/v1/ground", content=body, headers=headers), 400)


def test_types_that_are_not_read_are_refused(client: httpx.Client) -> None:
    good = json.dumps({"images": [IMAGE], "queries": ["x"]}).encode()
    assert "the body is text/plain" in told(
        client.post("/v1/ground", content=good, headers={"Content-Type": "text/plain"}), 415
    )
    assert "of no type" in told(client.post("/v1/ground", content=good), 415)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    bomb = gzip.compress(bytes(50_000_000))
    assert "packed ('gzip')" in told(client.post("/v1/ground", content=bomb, headers=headers), 415)
    no_boundary = client.post("/v1/ground", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert "no boundary" in told(no_boundary, 400)


def test_large_bodies_are_refused(client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:  # of no length that is told before
        for _ in range(40):
            yield bytes(1_000_000)

    headers = {"Content-Type": "application/json"}
    for content in (bytes(40_000_000), pieces()):
        assert "more than 33554432 bytes" in told(client.post("/v1/ground", content=content, headers=headers), 413)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "a" * 5000, "%ff", "x/../../v1", "🦊"]
)
def test_odd_scene_ids_are_not_found(client: httpx.Client, name: str) -> None:
    for method, end in (("GET", ""), ("DELETE", ""), ("POST", "/ground")):
        body = {"content": b'{"queries": ["x"]}', "headers": {"Content-Type": "application/json"}} if end else {}
        answer = client.request(method, f"/v1/scenes/{name}{end}", **body)  # type: ignore[arg-type]
        assert answer.status_code in (404, 405)
        told(answer, answer.status_code)


def test_other_methods_and_paths_are_told(client: httpx.Client) -> None:
    assert client.options("/v1/scenes/x").headers["allow"] == "DELETE, GET"
    assert "/openapi.json lists" in told(client.post("/v1/ground/"), 404)
    assert "takes POST alone" in told(client.get("/v1/ground"), 405)
    assert "/openapi.json lists" in told(client.get("/v2"), 404)


# Connections


def talk(port: int, *pieces: bytes, wait: float = 0.0) -> bytes:
    """What comes back when these are written, with waits between them."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as place:
        for piece in pieces:
            try:
                place.sendall(piece)
            except OSError:
                break
            time.sleep(wait)
        answer = b""
        try:
            while data := place.recv(65536):
                answer += data
        except ConnectionResetError:
            pass
        return answer


HEAD = b"POST /v1/ground HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
DRIP = {
    "silence": (b"",),
    "half a head": (HEAD,),
    "a head in drops": tuple(b"X-%d: y\r\n" % k if k else HEAD for k in range(12)),
    "half a body": (HEAD + b"Content-Length: 1000\r\n\r\n{",),
    "a body in drops": (HEAD + b"Content-Length: 1000\r\n\r\n", *[b" "] * 12),
}


@pytest.mark.parametrize("name", DRIP)
def test_a_slow_client_is_told_and_let_go(running: Running, name: str) -> None:
    started = time.monotonic()
    answer = talk(running.port, *DRIP[name], wait=0.15)
    assert time.monotonic() - started < 6
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert f"within {SLOW} s".encode() in answer


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 40_000, HEAD + b"X" * 80_000]
)
def test_no_http_is_a_bad_request(running: Running, junk: bytes) -> None:
    answer = talk(running.port, junk)
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 403", b"HTTP/1.1 408")


GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize("rest", [b"x", b"zz\r\n"])
@pytest.mark.parametrize("head", [b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_body_that_nobody_reads_holds_no_connection(running: Running, head: bytes, rest: bytes) -> None:
    before, started = running.log.read_text(), time.monotonic()
    assert talk(running.port, GET + head, rest, wait=0.2).startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - started < 5
    assert running.log.read_text() == before


def test_a_bad_chunk_is_told(running: Running) -> None:
    answer = talk(running.port, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"message": "this is no HTTP/1.1' in answer


def test_many_connections_leave_room_for_others(running: Running) -> None:
    held = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    try:
        answer = talk(running.port, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in answer
    finally:
        for place in held:
            place.close()
    end = time.monotonic() + 10
    while not talk(running.port, b"GET /healthz HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < end


def test_a_picture_of_a_broken_size_is_no_fault(client: httpx.Client) -> None:
    body = {"images": [base64.b64encode(huge(0, 0)).decode()], "queries": ["x"]}
    told(client.post("/v1/ground", json=body), 400)


def test_made_up_requests_find_no_fault() -> None:
    """A few of what `python -m tests.fuzz_service` sends for minutes."""
    result, said = fuzz(seconds=0, examples=2, seed=0)
    assert result["found"] == 0, said[-5000:]
    assert result["requests"] > 100
    assert {"200", "201", "204", "400", "404", "405"} <= set(result["statuses"])
