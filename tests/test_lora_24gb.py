"""The script for one GPU, every command of it with a two-layer model on a CPU; run again, it keeps what is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.readme import ROOT
from tests.checkpoints import GROUPED, write_checkpoint, write_json
from tests.forking_python import forking_python
from tests.training import weights

BUDGET = 28 * 28 * 12
TWO_LAYERS = GROUPED | {"text_config": GROUPED["text_config"] | {"num_hidden_layers": 2}}


def write_pictures(folder: Path) -> None:
    """Six pictures labelled as COCO has them."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    rng = np.random.default_rng(0)
    for k in range(6):
        pixels = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train2017" / f"{k}.png")
    labels = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 120, "height": 90} for k in range(6)],
        "annotations": [
            {"id": k + 1, "image_id": k, "category_id": 1 + k % 2, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0}
            for k in range(6)
        ],
        "categories": [{"id": 1, "name": "beaker"}, {"id": 2, "name": "dish"}],
    }
    write_json(folder / "annotations" / "instances_train2017.json", labels)


@pytest.mark.slow
def test_from_photographs_to_a_bundle(tmp_path: Path) -> None:
    write_pictures(tmp_path / "shop")
    write_checkpoint(tmp_path / "model", TWO_LAYERS)
    write_json(tmp_path / "model" / "tokenizer_config.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    given = (tmp_path / "model" / "preprocessor_config.json").read_bytes()
    out = tmp_path / "out"
    with forking_python(tmp_path / "bin") as python:
        settings = {
            "MODEL": str(tmp_path / "model"), "PICTURES": str(tmp_path / "shop"), "OUT": str(out), "METHOD": "lora",
            "STEPS": "2", "ACCUMULATE": "2", "WARMUP": "1", "MAX_PIXELS": str(BUDGET), "GROUP": "32", "SAMPLES": "2",
            "PYTHON": str(python),
        }  # fmt: skip

        def run() -> str:
            script = ["bash", str(ROOT / "examples" / "lora_24gb.sh")]
            done = subprocess.run(script, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        assert '"passed": true' in run()
        trained = (out / "trained" / "config.json").stat().st_mtime_ns
        shutil.rmtree(out / "bundle")
        assert '"passed": true' in run()
    assert (out / "trained" / "config.json").stat().st_mtime_ns == trained, "it was kept"
    assert (tmp_path / "model" / "preprocessor_config.json").read_bytes() == given
    for name in ("trained", "gptq"):
        assert json.loads((out / name / "preprocessor_config.json").read_text())["max_pixels"] == BUDGET
    assert json.loads((out / "bundle" / "manifest.json").read_text())["preprocessing"]["max_pixels"] == BUDGET
    before, after = weights(tmp_path / "model"), weights(out / "trained")
    changed = {name for name, tensor in after.items() if not before[name].bfloat16().equal(tensor.bfloat16())}
    assert changed
    assert all("_proj" in name and "language_model" in name for name in changed)
