"""A service in a process of its own, as a user starts it. Knows no request."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

PATIENCE = 60  # seconds to its end


@dataclass(frozen=True)
class Running:
    """A service that listens."""

    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path  # what it says on stderr

    def metrics(self) -> dict[str, float]:
        """All of `/metrics`, by name and labels as they stand there; 0 for what has not happened yet."""
        with urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        told = (line.rpartition(" ") for line in lines if line[0] != "#")
        return defaultdict(float, {name: float(value) for name, _, value in told})

    def memory(self) -> dict[str, int]:
        """Resident bytes of each process, as the service tells them."""
        return memory_in(self.metrics())


def memory_in(metrics: Mapping[str, float]) -> dict[str, int]:
    """Resident bytes of each process, of what `Running.metrics` gave."""
    told = ((re.fullmatch(r'gemvg_resident_bytes\{process="(\w+)"\}', name), size) for name, size in metrics.items())
    return {process[1]: int(size) for process, size in told if process}


def children(pid: int) -> list[int]:
    """The processes that a process started and that are there."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@contextmanager
def serving(
    *flags: str,
    bundle: Path | None = None,
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
    folder: Path | None = None,
) -> Iterator[Running]:
    """`gemvg serve` at a port that is free, ended at the end; RuntimeError with its words where it does not start.

    Run by another `python` where the package is installed there, and in another `folder`.
    """
    command = [python, "-m", "gemvg_edge.cli", "serve", "--port", "0", *flags]
    command += [str(bundle)] if bundle else []
    with tempfile.NamedTemporaryFile("w", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder)
        try:
            assert process.stdout is not None
            found = re.search(r"on (http://\S+:(\d+))", process.stdout.readline())
            if found is None:
                process.wait(PATIENCE)
                raise RuntimeError(Path(log.name).read_text(encoding="utf-8"))
            yield Running(found[1], int(found[2]), process, Path(log.name))
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()
                if process.stdout is not None:
                    process.stdout.close()
