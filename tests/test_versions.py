"""What pyproject.toml promises is what `make lowest` installs, and what needs a newer version says so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.bundle import open_bundle
from gemvg_edge.engines import onnxruntime as engine
from gemvg_edge.errors import GemvgError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# As Python's packaging writes them: name, least version, and for which Pythons.
REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(?:>=|==)(?P<version>[\d.]+)[^;]*(?:;\s*(?P<marker>.+))?")


def least(lines: list[str]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(name, marker) -> version."""
    found = {}
    for line in lines:
        if match := REQUIREMENT.match(line.partition("#")[0].strip()):
            numbers = tuple(map(int, match["version"].split(".")))
            found[match["name"], (match["marker"] or "").replace("'", '"')] = (*numbers, 0, 0)[:3]
    return found


def test_the_lowest_versions_are_those_that_are_tested() -> None:
    promised = least(PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["onnx"])
    assert len(promised) == 5
    assert promised == least((ROOT / "constraints-lowest.txt").read_text().splitlines())


def test_the_gpus_runtime_is_of_the_same_versions() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert [line.replace("onnxruntime-gpu", "onnxruntime") for line in extras["onnx-gpu"]] == extras["onnx"]


def test_the_standard_dialect_names_the_version_that_it_needs(
    random_model: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.to_onnx import main as export

    assert (
        export([str(random_model[1].parent / "checkpoint"), str(tmp_path / "standard"), "--dialect", "standard"]) == 0
    )
    bundle = open_bundle(tmp_path / "standard")
    engine.OnnxVisionTower(bundle)
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(GemvgError, match=r"standard dialect, which needs ONNX Runtime 1\.25 or newer.*1\.23\.2.*fused"):
        engine.OnnxVisionTower(bundle)
