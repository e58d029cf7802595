"""A system in a process of its own: JSON lines in, JSON lines out. Standard library only; runs in any system's Python.

A worker module offers `open_system(settings)`, `first(system, request)`, `again(system, request)` and
`processes(system)`; `boxes(system, request)` where it decodes an answer's syntax itself. Milliseconds everywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


def main(name: str) -> None:
    """Serve the worker module `name` until its input ends."""
    die_with_parent()
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no reply
    worker: Any = None
    system: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            match request["op"]:
                case "open":
                    worker = importlib.import_module(name)
                    system = worker.open_system(request)
                    reply: dict[str, Any] = {}
                case "memory":
                    reply = {"peak_bytes": sum(peak_bytes(pid) for pid in worker.processes(system))}
                case op:
                    reply = getattr(worker, op)(system, request)
        except Exception as error:  # any, of any library: the report tells it
            reply = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    for pid in worker.processes(system) if system is not None else ():
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os._exit(0)  # some runtimes take seconds to tear down


def die_with_parent() -> None:
    """A worker is stopped while it idles: it could not read that its parent has gone."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def peak_bytes(pid: int) -> int:
    """A process's peak resident set, mapped files included."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status tells no VmHWM")
