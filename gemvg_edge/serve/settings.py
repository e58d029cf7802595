"""What `gemvg serve` is told: where to listen, how many work, and a bound on everything that a client can make grow.

The command line is made of it. Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemvg_edge.command import path_name, positive_number, whole_number
from gemvg_edge.engines import ENGINES
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import read_text
from gemvg_edge.models import DEFAULT_BUNDLE

MIB = 2**20
TOKEN = "GEMVG_TOKEN"  # the environment's variable
LEAST_TOKEN, MOST_TOKEN = 8, 4096  # characters


def _flag(default: Any, kind: Any, metavar: str, text: str, low: float = 1) -> Any:
    return field(default=default, metadata={"kind": kind, "metavar": metavar, "text": text, "low": low})


@dataclass(frozen=True)
class Settings:
    """A field a flag; bytes and seconds unless its text says otherwise."""

    bundle: Path = DEFAULT_BUNDLE
    engine: str | None = None
    token: str | None = None  # what a client has to show, where there is one
    allow_hosts: tuple[str, ...] = ()
    verbose: bool = False
    host: str = _flag("127.0.0.1", str, "ADDRESS", "address to listen on: this machine alone unless given")
    port: int = _flag(8000, whole_number, "N", "port to listen on; 0 is any that is free", 0)
    workers: int = _flag(1, whole_number, "N", "processes that hold the model; the weights are there once")
    threads: int = _flag(0, whole_number, "N", "processor threads of a worker; 0 shares the physical cores", 0)
    at_once: int = _flag(2, whole_number, "N", "requests of a worker at once: one reads pictures as another computes")
    max_queue: int = _flag(32, whole_number, "N", "requests that wait; one more gets 503", 0)
    timeout: float = _flag(30.0, positive_number, "SECONDS", "longest request, its wait in the queue included", 0)
    body_timeout: float = _flag(10.0, positive_number, "SECONDS", "longest a client may take to send a request", 0)
    kill_after: float = _flag(
        10.0, positive_number, "SECONDS", "past a request's time until the worker that still holds it is killed", 0
    )
    drain: float = _flag(30.0, positive_number, "SECONDS", "longest that a shutdown waits for what runs", 0)
    max_connections: int = _flag(256, whole_number, "N", "connections at once; one more gets 503")
    max_bytes: int = _flag(32 * MIB, whole_number, "BYTES", "largest request")
    max_held_bytes: int = _flag(256 * MIB, whole_number, "BYTES", "memory that the bodies of all requests may take")
    max_images: int = _flag(8, whole_number, "N", "pictures of a request")
    max_image_pixels: int = _flag(
        64_000_000, whole_number, "PIXELS", "of a request's pictures together, looked at before they are decoded"
    )
    max_queries: int = _flag(16, whole_number, "N", "queries of a request")
    max_query_tokens: int = _flag(256, whole_number, "N", "longest query, in tokens")
    max_new_tokens: int = _flag(256, whole_number, "N", "longest answer, in tokens")
    scene_seconds: float = _flag(
        300.0, positive_number, "SECONDS", "a scene that nobody asks is let go after so long", 0
    )
    max_scenes: int = _flag(32, whole_number, "N", "scenes that are kept; the one asked longest ago makes room")
    max_scene_bytes: int = _flag(512 * MIB, whole_number, "BYTES", "most memory that all kept scenes may take")
    cache_bytes: int = _flag(
        256 * MIB, whole_number, "BYTES", "of a worker, for pictures that come again; 0 keeps none", 0
    )
    max_pixels: int | None = _flag(None, whole_number, "PIXELS", "largest budget of a picture, after resizing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `gemvg serve`."""
    add = parser.add_argument
    add("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help="bundle folder (default: the shipped model)")
    add("--engine", choices=ENGINES, help="what runs the bundle (default: the fastest that runs it here)")
    add(
        "--token-file",
        type=path_name,
        metavar="PATH",
        help=f"file with the bearer token that clients must show (default: the environment's {TOKEN}, or none needed)",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further name of this service, for browsers (default: its address, and localhost there)",
    )
    for one in _flags():
        told = "the bundle's" if one.default is None else f"{one.default:g}" if one.type == "float" else one.default
        about = f"{one.metadata['text']} (default: {told})"
        kind, metavar = one.metadata["kind"], one.metadata["metavar"]
        add(f"--{one.name.replace('_', '-')}", type=kind, default=one.default, metavar=metavar, help=about)
    add("--verbose", action="store_true", help="say on stderr what is asked and how it was answered")


def read_settings(options: argparse.Namespace) -> Settings:
    """Settings of a command line; GemvgError names the flag that is out of its range."""
    values = {one.name: getattr(options, one.name) for one in _flags()}
    for one in _flags():
        value, low = values[one.name], one.metadata["low"]
        if isinstance(value, (int, float)) and value < low:
            raise GemvgError(f"--{one.name.replace('_', '-')} is {value}; give at least {low:g}")
    for name, most in (("port", 65535), ("at_once", 64), ("workers", 256)):
        if values[name] > most:
            raise GemvgError(f"--{name.replace('_', '-')} is {values[name]}; give at most {most}")
    for name in options.allow_host:
        if not name or not all(c.isalnum() or c in ".-_" for c in name):
            raise GemvgError(f"--allow-host is {name[:100]!r}; give a name alone, such as robot.example")
    return Settings(
        bundle=options.bundle,
        engine=options.engine,
        token=_token(options.token_file),
        allow_hosts=tuple(options.allow_host),
        verbose=options.verbose,
        **values,
    )


def write_settings(settings: Settings) -> str:
    """Settings as an argument of another process, without the token."""
    return json.dumps(asdict(replace(settings, token=None)), default=str)


def read_written(text: str) -> Settings:
    """What `write_settings` wrote."""
    content = json.loads(text)
    return Settings(**content | {"bundle": Path(content["bundle"]), "allow_hosts": tuple(content["allow_hosts"])})


def _flags() -> list[Any]:
    return [one for one in fields(Settings) if one.metadata]


def _token(path: Path | None) -> str | None:
    """The token in a file or in the environment; not on the command line, which every user of the machine can read."""
    where = TOKEN if path is None else str(path)
    text = os.environ.get(TOKEN) if path is None else read_text(path)
    if text is None:
        return None
    token = text.strip()
    if not (LEAST_TOKEN <= len(token) <= MOST_TOKEN and token.isascii() and token.isprintable() and " " not in token):
        raise GemvgError(
            f"{where} holds no token; give {LEAST_TOKEN} to {MOST_TOKEN} printable ASCII characters without spaces"
        )
    return token
