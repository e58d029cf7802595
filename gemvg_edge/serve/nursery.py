"""The process that workers are forked from: where the native engine runs it holds the weights, so that all share them.

    python -m gemvg_edge.serve.nursery FD SETTINGS       started by gemvg_edge.serve.pool, with a socket

Each message on the socket brings the socket of a new worker. A worker that was killed leaves the weights where they
are, and the next starts at once. Other engines have threads and devices that no fork takes along: there each worker
opens the bundle itself, and what the engine maps of its files is in memory once.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from dataclasses import replace

from gemvg_edge.command import one_line, told
from gemvg_edge.engines.graph_weights import Unsupported
from gemvg_edge.engines.native import NativeVisionTower, physical_cores
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import Grounder
from gemvg_edge.serve.messages import send
from gemvg_edge.serve.settings import Settings, read_written
from gemvg_edge.serve.worker import Worker


def main() -> None:
    """Fork a worker for each socket that comes, until the service is gone."""
    settings = read_written(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # the service decides when: it lets what runs finish
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no worker is waited for
    with told(settings.verbose), socket.socket(fileno=int(sys.argv[1])) as control:
        shared, refused = None, ""
        try:
            shared = open_shared(settings)
        except (GemvgError, MemoryError, OSError) as error:
            refused = one_line(error) or "out of memory"
        gc.collect()
        gc.freeze()  # or a worker's first collection would copy all pages of objects
        while True:
            data, handles, _, _ = socket.recv_fds(control, 1, 1)
            if not data:
                return
            with socket.socket(fileno=handles[0]) as place:
                if refused:
                    send(place, {"failed": refused})
                    return  # and the next try is a new process: what was missing may be there then
                if not os.fork():
                    control.close()
                    _work(place, shared, settings)


def open_shared(settings: Settings) -> Grounder | None:
    """The model, where a forked child can go on with it; None where every worker has to open it."""
    if settings.engine not in (None, "native"):
        return None
    if settings.engine is None and find_library() is None:
        return None
    try:
        grounder = open_grounder(replace(settings, engine="native"))
    except Unsupported:
        if settings.engine == "native":
            raise
        return None
    if isinstance(vision := grounder.model.engines()[0], NativeVisionTower):
        vision.engine.park()
        return grounder
    grounder.close()  # its vision tower runs on ONNX Runtime
    return None


def open_grounder(settings: Settings) -> Grounder:
    """The bundle, as the settings want it."""
    return Grounder.open(
        settings.bundle,
        engine=settings.engine,
        threads=settings.threads or max(1, physical_cores() // settings.workers),
        max_pixels=settings.max_pixels,
        max_query_tokens=settings.max_query_tokens,
        max_new_tokens=settings.max_new_tokens,
        cache_bytes=settings.cache_bytes,
    )


def _work(place: socket.socket, shared: Grounder | None, settings: Settings) -> None:
    """The life of a worker; ends the process, without what a fork has no right to do at its end."""
    code = 1
    try:
        try:
            grounder = shared or open_grounder(settings)
        except (GemvgError, MemoryError, OSError) as error:
            send(place, {"failed": one_line(error) or "out of memory"})
            return
        Worker(grounder, place, settings).run()
        code = 0
    except Exception:
        logging.getLogger("gemvg_edge").exception("a worker ends by a fault of ours")
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
