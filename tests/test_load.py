"""Loading a model to train: all of its weights from its files, or one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemvg_edge.errors import GemvgError
from tests.checkpoints import edit_json, edit_tensors, write_checkpoint, write_json
from train.checkpoint import CONFIG, INDEX, SINGLE
from train.load import load_qwen2_vl
from train.rewrite import cast


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "checkpoint"
    write_checkpoint(folder)
    return folder


def edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda folder: edit_tensors(folder, edit)


def layers(count: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = json.loads((folder / CONFIG).read_text())["text_config"]
        kinds = ["full_attention"] * count
        edit_json(folder / CONFIG, text_config=text | {"num_hidden_layers": count, "layer_types": kinds})

    return change


def cut_short(folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])


NORM = "model.layers.1.input_layernorm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN": (edited(lambda t: t[NORM].fill_(torch.nan)), "layers.1.input_layernorm.weight holds NaN or infinity"),
    "infinity": (edited(lambda t: t["lm_head.weight"][0].fill_(torch.inf)), "lm_head.weight holds NaN"),
    "a weight that is missing": (edited(lambda t: t.pop(NORM)), "lacks .*layers.1.input_layernorm.weight; take"),
    "more layers than stored": (layers(5), "lacks model.language_model.layers.3.* and .* more; take config.json and"),
    "fewer layers than stored": (layers(2), "has, beside what its config describes, .*layers.2.* and .* more; take"),
    "another shape": (edited(lambda t: t.update({NORM: torch.ones(5)})), "cannot be loaded|other shape"),
    "half a file": (cut_short, "cannot be loaded"),
    "codes": (lambda folder: edit_json(folder / CONFIG, quantization_config={"bits": 4}), "is quantised already"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), f"no {SINGLE} and no {INDEX}"),
    "a config of no sense": (lambda folder: write_json(folder / CONFIG, {"model_type": "qwen2_vl", "text_config": 3}),
                             "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_all_of_a_model_is_refused(case: str, original: Path, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    change(folder)
    with pytest.raises(GemvgError, match=said):
        load_qwen2_vl(folder)


def test_a_sound_one_is_loaded(original: Path) -> None:
    stored = load_file(original / SINGLE)
    model = load_qwen2_vl(original)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.language_model.layers[1].input_layernorm.weight, stored[NORM])
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in stored.values())


@pytest.mark.parametrize("case", ["fewer layers than stored", "more layers than stored", "codes"])
def test_what_is_not_all_of_a_model_is_not_written_again(case: str, original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    REFUSED[case][0](folder)
    with pytest.raises(GemvgError, match=r"has 3 layers, but config\.json states \d; take both|is quantised already"):
        cast(folder, tmp_path / "out", "bfloat16")
    assert not (tmp_path / "out").exists()
