"""What pyproject.toml promises is what `make lowest` installs, and what needs a newer version says so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.bundle import open_bundle
from gemvg_edge.engines import onnxruntime as engine
from gemvg_edge.engines.onnx_providers import BIAS_NEEDS, CUDA12_WHEEL, CUDA13_WHEEL, STANDARD_NEEDS
from gemvg_edge.engines.tensorrt_library import MISSING, driver_advice
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
    """And each extra takes the wheels of one CUDA, those that the sentences of onnx-cuda name."""
    extras = PROJECT["project"]["optional-dependencies"]
    older = [line.replace("onnxruntime-gpu[cuda,cudnn]", "onnxruntime") for line in extras["onnx-cu12"]]
    assert [line.replace("<1.27", "<2") for line in older] == extras["onnx"]
    assert f"`pip install '{extras['onnx-cu12'][0].partition(';')[0]}'`" == CUDA12_WHEEL
    assert f"`pip install '{extras['onnx-cu13'][0]}'`" == CUDA13_WHEEL
    assert least([extras["onnx-cu13"][0].replace("[cuda,cudnn]", "")])["onnxruntime-gpu", ""][:2] == BIAS_NEEDS
    assert least([older[1]])["onnxruntime", 'python_version >= "3.11"'][:2] == STANDARD_NEEDS


@pytest.mark.parametrize(
    ("extra", "major"), [("tensorrt-cu12", 12), ("tensorrt-cu13", 13), ("jetpack6", 12), ("jetpack7", 13)]
)
def test_cuda_python_is_of_the_drivers_cuda(extra: str, major: int) -> None:
    lines = {line.partition(">=")[0]: line for line in PROJECT["project"]["optional-dependencies"][extra]}
    lowest, highest = re.findall(r"\d+(?:\.\d+)?", lines["cuda-python"])
    assert int(float(lowest)) == major
    assert float(highest) <= major + 1
    if extra.startswith("tensorrt"):  # elsewhere it comes with JetPack
        assert f"`pip install '{lines[extra]}'`" in MISSING


def test_a_driver_that_is_too_old_is_named_beside_cuda_python() -> None:
    said = "cuda-python 13.4.4 is newer than this driver of CUDA 12.6; run `pip install 'cuda-python<13'`"
    assert driver_advice("13.4.4", 12060).startswith(said)
    assert "'cuda-python<12.7'" in driver_advice("12.9.10", 12060)
    assert "finds no NVIDIA driver" in driver_advice("13.4.4", 0)


def test_the_standard_dialect_names_the_version_that_it_needs(
    random_model: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.to_onnx import main as export

    assert (
        export(
            [
                str(random_model[1].parent / "checkpoint"),
                str(tmp_path / "standard"),
                "--dialect",
                "standard",
                "--precision",
                "float32",
            ]
        )
        == 0
    )
    bundle = open_bundle(tmp_path / "standard")
    engine.OnnxVisionTower(bundle)
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(GemvgError, match=r"standard dialect, which needs ONNX Runtime 1\.25 or newer.*1\.23\.2.*fused"):
        engine.OnnxVisionTower(bundle)
