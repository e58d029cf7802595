"""A small HTTP service over a Grounder, in Python's standard library: pictures and a query in, JSON out.

    python examples/service.py --port 8080
    curl -F image=@left.png -F image=@right.png -F query="the red mug" http://127.0.0.1:8080/ground

`POST /ground` takes a form (multipart/form-data) with one or more `image` and one `query`, and answers with
`Grounding.to_json`. `GET /health` says whether it is up. An error is `{"error": ...}`: 400 for bad input, 413 for too
many bytes, 503 where it is too busy or too slow. For a network that you trust: there is no TLS and no password.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gemvg_edge import GemvgError, Grounder, TimedOut
from gemvg_edge.models import DEFAULT_BUNDLE

MOST_PICTURES = 8
PATIENCE = 10.0  # seconds that a client may keep silent


class Refused(Exception):
    """A request that gets an error: its status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Service(ThreadingHTTPServer):
    """A thread a request; so many of them at once that memory has a bound."""

    daemon_threads = False  # closing waits for the answers that are on their way

    def __init__(self, address: tuple[str, int], grounder: Grounder, *, most_bytes: int, at_once: int, timeout: float):
        super().__init__(address, Handler)
        self.grounder, self.most_bytes, self.seconds = grounder, most_bytes, timeout
        self.places = threading.BoundedSemaphore(at_once)


class Handler(BaseHTTPRequestHandler):
    """One client."""

    server: Service
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Say that the service is up."""
        if self.path == "/health":
            self._send(200, {"model": self.server.grounder.manifest.name})
        elif self.path == "/ground":
            self._send(405, {"error": "ask POST /ground"})
        else:
            self._send(404, {"error": "ask POST /ground or GET /health"})

    def do_POST(self) -> None:
        """Answer one query about some pictures."""
        try:
            if self.path != "/ground":
                raise Refused(404, "ask POST /ground or GET /health")
            if not self.server.places.acquire(blocking=False):
                raise Refused(503, "too many requests at once; try again later")
            try:
                images, query = read_form(self.headers, self._body())
                answer = self.server.grounder.ground(images, query, timeout=self.server.seconds)
            finally:
                self.server.places.release()
            self._send(200, answer.to_dict())
        except Refused as refused:
            self._send(refused.status, {"error": str(refused)})
        except TimedOut as late:
            self._send(503, {"error": str(late)})
        except GemvgError as error:
            self._send(400, {"error": str(error)})
        except TimeoutError:  # the client kept silent
            self.close_connection = True

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refused(411, "the request has no Content-Length")
        if len(length) > 12 or int(length) > self.server.most_bytes:
            raise Refused(413, f"the request has {length[:20]} bytes, more than {self.server.most_bytes}")
        return self.rfile.read(int(length))

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Connection", "close")  # a body that was refused is still in the pipe
        self.end_headers()
        self.wfile.write(data)


def read_form(headers: Message, body: bytes) -> tuple[list[bytes], str]:
    """The pictures and the query of a multipart form."""
    kind = headers.get("Content-Type", "")
    boundary = headers.get_param("boundary")
    if headers.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise Refused(400, f"the request is {kind[:100] or 'of no type'}; send a form, as `curl -F image=@a.png` does")
    images: list[bytes] = []
    queries: list[bytes] = []
    # Split by hand: email's own reader of bodies would take a picture for text.
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = BytesParser().parsebytes(head.lstrip(b"\r\n")).get_param("name", header="Content-Disposition")
        (images if name == "image" else queries if name == "query" else []).append(content)
    if not 1 <= len(images) <= MOST_PICTURES or len(queries) != 1:
        got = f"this one has {len(images)} and {len(queries)}"
        raise Refused(400, f"the form needs 1 to {MOST_PICTURES} fields `image` and one `query`; {got}")
    try:
        return images, queries[0].decode()
    except UnicodeDecodeError:
        raise Refused(400, "the query is not text in UTF-8") from None


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Answer grounding queries over HTTP.")
    add = parser.add_argument
    add("--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle folder (default: the shipped model)")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8080, help="port to listen on; 0: any that is free (default: %(default)s)")
    add("--timeout", type=float, default=30.0, metavar="SECONDS", help="longest answer (default: %(default)s)")
    add("--most-bytes", type=int, default=32_000_000, metavar="N", help="largest request (default: %(default)s)")
    add("--at-once", type=int, default=4, metavar="N", help="requests that are worked on (default: %(default)s)")
    args = parser.parse_args()

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, stop)
    limits = {"most_bytes": args.most_bytes, "at_once": args.at_once, "timeout": args.timeout}
    with Grounder.open(args.bundle) as grounder:
        try:
            service = Service((args.host, args.port), grounder, **limits)
        except OSError as error:
            parser.error(f"{args.host}:{args.port} cannot be listened on ({error.strerror}); give another --port")
        with service:
            print(f"listening on http://{args.host}:{service.server_port}", flush=True)
            try:
                service.serve_forever()
            except KeyboardInterrupt:
                print("stopping", flush=True)


if __name__ == "__main__":
    main()
