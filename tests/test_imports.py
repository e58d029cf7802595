"""What importing costs: `import gemvg_edge` is near to nothing, and grounding needs no training stack."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import gemvg_edge

ENGINES = {"onnxruntime", "tensorrt"}
TRAINING = {
    "accelerate", "datasets", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "pybullet",
    "safetensors", "scipy", "torch", "torchvision", "tqdm", "transformers", "trl",
}  # fmt: skip
WORKSHOP = {"train", "quantize", "export", "bench"}


def fresh_python(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def loaded_by(code: str) -> set[str]:
    """The packages that a new interpreter has loaded after some code."""
    modules: list[str] = json.loads(fresh_python(f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"))
    return {module.partition(".")[0] for module in modules}


def test_importing_is_fast() -> None:
    # Processor time, so that a busy machine does not count.
    code = "import time; start = time.process_time(); import gemvg_edge; print(time.process_time() - start)"
    assert statistics.median(float(fresh_python(code)) for _ in range(5)) < 0.3


def test_importing_loads_nothing_heavy() -> None:
    assert not loaded_by("import gemvg_edge") & (TRAINING | ENGINES | WORKSHOP | {"numpy", "PIL", "tokenizers"})


@pytest.mark.parametrize(
    "code",
    ["from gemvg_edge import Grounder", "import gemvg_edge.draw, gemvg_edge.answer"],
)
def test_the_runtime_waits_with_its_engine(code: str) -> None:
    loaded = loaded_by(code)
    assert not loaded & (TRAINING | ENGINES | WORKSHOP)
    assert "PIL" in loaded


def test_the_command_starts_light() -> None:
    """What takes time to import waits until an interrupt is answered with a line."""
    assert not loaded_by("import gemvg_edge.cli") & (TRAINING | ENGINES | WORKSHOP | {"numpy", "PIL", "tokenizers"})


def test_the_engine_brings_no_training_stack() -> None:
    loaded = loaded_by("import gemvg_edge.engines.onnxruntime")
    assert "onnxruntime" in loaded
    assert not loaded & (TRAINING | WORKSHOP)


@pytest.mark.parametrize("name", gemvg_edge.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(gemvg_edge, name)
    assert isinstance(value, str) or (value.__name__ == name and value.__doc__)
    assert name in dir(gemvg_edge)


def test_every_name_the_pages_use_is_public() -> None:
    errors, functions = ["Cancelled", "GemvgError", "TimedOut"], ["draw_boxes", "mark"]
    expected = ["Box", "Grounder", "Grounding", "Request", "Scene", "__version__", *errors, *functions]
    assert sorted(gemvg_edge.__all__) == sorted(expected)
    assert fresh_python("from gemvg_edge import *; print(Grounder.__module__)").strip() == "gemvg_edge.grounder"


def test_other_names_do_not_resolve() -> None:
    with pytest.raises(AttributeError, match="module 'gemvg_edge' has no attribute 'Grounders'"):
        gemvg_edge.Grounders  # noqa: B018


TELLS = """
import os, sys
from gemvg_edge import Grounder
from PIL import Image
Grounder.open(engine="onnx").ground([Image.new("RGB", (64, 64))], "the mug")
"""


def test_the_engine_keeps_nothing_in_the_home_and_reports_to_nobody(tmp_path: Path) -> None:
    """ONNX Runtime does both, unless it is told not to before it is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", TELLS], check=True, env=environment | {"HOME": str(tmp_path)})
    assert list(tmp_path.rglob("*")) == []
