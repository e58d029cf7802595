"""llama.cpp's server as a measured system: HTTP on the loopback, its own clock and log. See serve.py.

Standard library only. `again` sends the same pictures: the server finds them in its prompt cache.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from serve import die_with_parent  # type: ignore[import-not-found,unused-ignore]

# A line of the log begins with minutes.seconds.milliseconds.microseconds since the start; encoding ends where the
# decoder's work on its tokens begins.
STAGE = re.compile(r"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*(encoding mtmd batch|decoding image batch)", re.MULTILINE)
GREEDY = {"temperature": 0, "top_k": 1, "samplers": ["top_k"], "ignore_eos": True, "cache_prompt": True}


@dataclass
class Server:
    """A running server, where it listens and writes, and what it was shown."""

    process: subprocess.Popen[bytes]
    address: str
    log: IO[bytes]
    read: int = 0  # of the log, bytes
    pictures: tuple[str, ...] = ()


def open_system(settings: dict[str, Any]) -> Server:
    """Start it with its defaults but one slot and the threads asked for, and wait until it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, threads = Path(settings["model"]), str(settings["threads"])
    log = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the server lives)
    command = [settings["server"], "-m", folder / "model.gguf", "--mmproj", folder / "mmproj.gguf", "-t", threads,
               "-tb", threads, "-c", str(settings["context"]), "-np", "1", "--host", "127.0.0.1", "--port", str(port),
               "--offline", "--no-webui", "-lv", "4"]  # fmt: skip
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    while True:
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
            return server
        except OSError:
            if process.poll() is not None:
                said = new_log(server).strip().splitlines()[-3:]
                raise RuntimeError(f"llama-server ended with {process.returncode}: {' '.join(said)}") from None
            time.sleep(0.05)


def processes(system: Server) -> list[int]:
    """The server's; this one only asks."""
    return [system.process.pid]


def first(system: Server, request: dict[str, Any]) -> dict[str, Any]:
    """New pictures and a question."""
    system.pictures = tuple(request["pictures"])
    reply, milliseconds, log = _ask(system, request["question"], 1 + request["tokens"])
    timings, vision = reply["timings"], vision_ms(log)
    decoding = timings["predicted_ms"]
    return {
        "first_token_ms": milliseconds - decoding,
        "vision_ms": vision,
        "prefill_ms": timings["prompt_ms"] - vision,
        "prompt_tokens": reply["usage"]["prompt_tokens"],
        "token_ms": decoding / max(1, timings["predicted_n"] - 1),
    }


def again(system: Server, request: dict[str, Any]) -> dict[str, Any]:
    """Another question on the same pictures."""
    reply, milliseconds, _ = _ask(system, request["question"], 2)
    timings = reply["timings"]
    kept = timings.get("cache_n", 0)
    return {"first_token_ms": milliseconds - timings["predicted_ms"], "way": f"prompt cache, {kept} tokens kept"}


def vision_ms(log: str) -> float:
    """The milliseconds that the server's log says went into encoding pictures."""
    total, began = 0.0, None
    for minutes, seconds, milliseconds, microseconds, stage in STAGE.findall(log):
        now = (int(minutes) * 60 + int(seconds)) * 1e3 + int(milliseconds) + int(microseconds) / 1e3
        if stage.startswith("encoding"):
            began = now
        elif began is not None:
            total, began = total + now - began, None
    return total


def _ask(system: Server, question: str, tokens: int) -> tuple[dict[str, Any], float, str]:
    """The reply, the milliseconds until it came, and what the server logged meanwhile."""
    started = time.perf_counter()
    content: list[dict[str, Any]] = []
    for picture in system.pictures:
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    content.append({"type": "text", "text": question})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, **GREEDY}
    asked = urllib.request.Request(
        f"{system.address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=600) as response:
        reply = json.loads(response.read())
    milliseconds = (time.perf_counter() - started) * 1e3
    return reply, milliseconds, new_log(system)


def new_log(system: Server) -> str:
    """What the server wrote since this was asked last; read aside of the place where it writes."""
    size = os.fstat(system.log.fileno()).st_size
    text = os.pread(system.log.fileno(), size - system.read, system.read).decode(errors="replace")
    system.read = size
    return text
