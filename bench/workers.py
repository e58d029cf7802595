"""What more workers of `gemvg serve` take in memory: the weights are there once.

    python -m bench.workers [--bundle FOLDER] [--save bench/results/workers.json]

Starts the service with one, two and four workers, asks until each has answered, and adds up what the kernel counts as
each process's share (PSS). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.results import result_file, save_result
from bench.service.clients import Clients
from bench.service.requests import as_form, draw_asks
from bench.service.running import children, serving
from gemvg_edge.bundle import open_bundle
from gemvg_edge.command import command
from gemvg_edge.models import DEFAULT_BUNDLE

WORKERS = (1, 2, 4)


def shares(pid: int) -> list[float]:
    """MiB of a process and of all below it, each its share of what several have."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return [int(found[1]) / 1024, *(share for child in children(pid) for share in shares(child))]


def row(bundle: Path, workers: int) -> dict[str, Any]:
    """The memory of so many workers that have answered."""
    flags = ("--workers", str(workers), "--cache-bytes", "0", "--timeout", "600")
    with serving(*flags, bundle=bundle) as running:
        clients = Clients(running, 2 * workers)
        clients.send([(as_form(ask), "whole") for ask in draw_asks(2 * workers)])
        assert all(status == 200 for status, _, _ in clients.results.values())
        found = shares(running.process.pid)
    return {"workers": workers, "all_mib": sum(found), "service_mib": found[0], "largest_mib": max(found)}


@command("bench.workers")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.workers", description="Memory of several workers.")
    add = parser.add_argument
    add(
        "--bundle",
        type=Path,
        default=DEFAULT_BUNDLE,
        metavar="FOLDER",
        help="bundle folder to serve (default: the shipped model)",
    )
    saved = "keep the JSON here too, such as bench/results/workers.json (default: print it alone)"
    add("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    manifest = open_bundle(args.bundle, check_hashes=False).manifest
    weights = sum(record.bytes for record in manifest.files.values()) / 2**20
    rows = [row(args.bundle, workers) for workers in tqdm(WORKERS, leave=False)]
    for one in rows:
        print(f"{one['workers']} workers  {one['all_mib']:.0f} MiB in all")
    save_result({"bundle": manifest.name, "bundle_mib": weights, "rows": rows}, args.save)


if __name__ == "__main__":
    main()
