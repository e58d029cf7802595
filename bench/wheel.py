"""What the wheel costs its user: megabytes of an environment with the runtime alone, and with the service; import time.

    python -m bench.wheel [--save bench/results/wheel.json]

Builds the wheel of this checkout, installs it in an empty environment, grounds the shipped pictures there and serves
the page. Needs an index of packages. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench.readme import ROOT
from bench.results import result_file, save_result
from bench.service.requests import IMAGES, Ask, as_form
from bench.service.running import serving
from gemvg_edge.command import command
from gemvg_edge.errors import GemvgError

PICTURES = [IMAGES / name for name in ("scene1-a.png", "scene1-b.png")]
QUERY = "all balls"
IMPORT = "import time; t = time.perf_counter(); import gemvg_edge; print(time.perf_counter() - t)"
RUNTIME_IMPORT = IMPORT.replace("import gemvg_edge", "from gemvg_edge import Grounder")


def measured(folder: Path, native: bool) -> dict[str, Any]:
    """The figures, and the boxes that the installed runtime and its service find."""
    environment = os.environ | {"GEMVG_NATIVE": "1" if native else "0"}
    environment.pop("PYTHONPATH", None)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    _run(build, environment)
    (wheel,) = folder.glob("*.whl")
    place = folder / "env"
    _run([sys.executable, "-m", "venv", "--without-pip", str(place)], environment)
    python = str(place / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-compile", "--constraint", str(ROOT / "constraints.txt")]
    _run([*install, f"{wheel}[onnx]"], environment)
    runtime = size_of(place)
    imports = [float(_run([python, "-c", code], environment)) for code in [IMPORT, RUNTIME_IMPORT] for _ in range(5)]
    ground = [str(place / "bin" / "gemvg"), "ground", *map(str, PICTURES), "--query", QUERY, "--json"]
    found = json.loads(_run(ground, environment, folder))
    _run([*install, f"{wheel}[onnx,serve]"], environment)
    with serving(environment=environment, python=python, folder=folder) as running:
        with urlopen(f"{running.url}/") as page:
            title = "<title>gemvg-edge</title>" in page.read().decode()
        sent = as_form(Ask(tuple(picture.read_bytes() for picture in PICTURES), (QUERY,)))
        with urlopen(Request(running.url + sent.path, sent.body, {"Content-Type": sent.kind})) as answer:
            served = json.loads(answer.read())["answers"][0]
    return {
        "wheel_mb": wheel.stat().st_size / 1e6, "runtime_mb": runtime, "service_adds_mb": size_of(place) - runtime,
        "import_s": statistics.median(imports[:5]), "import_runtime_s": statistics.median(imports[5:]),
        "boxes": len(found["boxes"]), "same_boxes_served": found["boxes"] == served["boxes"], "page": title,
    }  # fmt: skip


def size_of(folder: Path) -> float:
    """Megabytes of all files, none counted twice."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6


def _run(arguments: list[str], environment: dict[str, str], folder: Path | None = None) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise GemvgError(f"{' '.join(arguments[:6])} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout


@command("bench.wheel")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m bench.wheel", description="What the wheel costs its user.")
    saved = "keep the JSON here too, such as bench/results/wheel.json (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), native=True)
    print("\n".join(f"{name:<18} {value}" for name, value in result.items()))
    save_result(result, args.save)


if __name__ == "__main__":
    main()
