"""The last line of every benchmark: one JSON object, which may also be kept under bench/results/."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder, printable, read_text, replacing, write_text
from gemvg_edge.json_object import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def result_file(text: str) -> Path:
    """Where a result may be kept, for argparse's `type`, which shows no other error's words than these."""
    try:
        return check_result(Path(text))
    except GemvgError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_result(file: Path) -> Path:
    """The file, if a result may be kept there; GemvgError for a file that is no such result."""
    if is_folder(file):
        raise GemvgError(f"{printable(file)} is a folder; give the name of a .json")
    if is_file(file):
        try:
            found = parse_json(read_text(file))
        except (GemvgError, ValueError):
            found = None
        if not isinstance(found, dict) or "machine" not in found:
            raise GemvgError(f"{printable(file)} exists and is no benchmark's result; give another place")
    return file


def save_result(result: dict[str, Any], file: Path | None, *, exact: bool = False) -> None:
    """Print the result as one JSON line, with the machine it was measured on, and keep it if a file is named.

    Floats have six digits after the point, all of them with `exact`.
    """
    result = {**(result if exact else _rounded(result)), "machine": machine()}
    if file:
        write_text(file, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def save_figure(figure: Figure, file: Path, dpi: int = 110) -> None:
    """Keep a plot as a PNG beside its result (no name of matplotlib's version in it); the figure is closed."""
    from matplotlib import pyplot  # slow to import, and most runs keep nothing

    with replacing(file) as partial:
        figure.savefig(partial, dpi=dpi, format="png", metadata={"Software": None})
    pyplot.close(figure)


def machine() -> dict[str, Any]:
    """Processor, cores and Python, as far as they can be read."""
    names = [line for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0].split(":", 1)[1].strip() if names else platform.processor()
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()}


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6)  # tables show three digits, and rounding twice would change the last
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value
