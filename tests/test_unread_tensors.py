"""A tensor that nobody reads is refused by its name, by every command: what it says would be lost without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export.to_onnx import export
from export.verify import verify
from gemvg_edge.bundle import open_bundle
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.rotate import Settings as RotateSettings
from quantize.rotate import rotate
from quantize.smooth import Settings as SmoothSettings
from quantize.smooth import smooth
from quantize.torch_model import load_model
from tests.checkpoints import GROUPED, edit_json, edit_tensors, write_checkpoint
from train.checkpoint import CONFIG
from train.load import load_qwen2_vl
from train.rewrite import cast

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unread")
    write_checkpoint(folder / "checkpoint", GROUPED)
    export(folder / "checkpoint", folder / "bundle")
    return folder


def to_fp8(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{LAYER}.weight_scale_inv"] = torch.ones(1, 1)


# What a file holds beside the model, and the name that is said.
LEFTOVERS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "LoRA that was never merged": (
        lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(4, 96), f"{LAYER}.lora_B.weight": torch.zeros(96, 4)}),
        "lora_A.weight",
    ),
    "a magnitude of DoRA": (lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(96)}), "lora_magnitude"),
    "scales of fp8": (to_fp8, "weight_scale_inv"),
    "a scale of fp8": (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(())}), "weight_scale"),
    "a scale of inputs": (lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1)}), "input_scale"),
    "an order of GPTQ": (lambda t: t.update({f"{LAYER}.g_idx": torch.zeros(96, dtype=torch.int32)}), "g_idx"),
    "zero points of GPTQ": (lambda t: t.update({f"{LAYER}.qzeros": torch.zeros(3, 12, dtype=torch.int32)}), "qzeros"),
    "states of bitsandbytes": (lambda t: t.update({f"{LAYER}.weight.absmax": torch.ones(96)}), "weight.absmax"),
    "a bias": (lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.ones(96)}), "o_proj.bias"),
    "a bias of NaN": (lambda t: t.update({"lm_head.bias": torch.full((448,), torch.nan)}), "lm_head.bias"),
    "a head of rewards": (lambda t: t.update({"score.weight": torch.zeros(1, 96)}), "score.weight"),
    "a part of another model": (lambda t: t.update({"visual.pos_embed.weight": torch.zeros(4, 48)}), "pos_embed"),
}  # fmt: skip
COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "open": lambda given, out: open_checkpoint(given),
    "export": export,
    "verify": lambda given, out: verify(open_bundle(given.parent / "bundle"), given),
    "gptq": lambda given, out: quantize(Settings(given, out, device="cpu", group_size=32)),
    "rtn": lambda given, out: quantize(Settings(given, out, device="cpu", method="rtn", group_size=32)),
    "smooth": lambda given, out: smooth(SmoothSettings(given, out, device="cpu")),
    "rotate": lambda given, out: rotate(RotateSettings(given, out)),
    "load": lambda given, out: load_model(given),
    "train": lambda given, out: load_qwen2_vl(given),
}


@pytest.mark.parametrize("case", LEFTOVERS)
def test_every_command_names_what_it_would_lose(case: str, folder: Path, tmp_path: Path) -> None:
    edit, name = LEFTOVERS[case]
    given = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(folder / "bundle", tmp_path / "bundle")
    edit_tensors(given, edit)
    for command, run in COMMANDS.items():
        with pytest.raises(GemvgError) as error:
            run(given, tmp_path / "out")
        assert name in str(error.value), command
        assert not (tmp_path / "out").exists()


def test_zeros_of_writers_are_left_out_by_every_quantiser(folder: Path, tmp_path: Path) -> None:
    """GPTQ's writers add biases to all layers; ones of zeros say nothing."""
    given = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    edit_tensors(given, lambda t: t.update({"model.layers.1.self_attn.o_proj.bias": torch.zeros(96)}))
    for name, run in (("rtn", COMMANDS["rtn"]), ("rotate", COMMANDS["rotate"])):
        run(given, tmp_path / name)
        again = open_checkpoint(tmp_path / name)
        assert "model.layers.1.self_attn.o_proj.bias" not in again.places


def test_what_is_only_rewritten_stays_whole(folder: Path, tmp_path: Path) -> None:
    """Another number format keeps all tensors, so the next command still sees and names them."""
    given = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    edit_tensors(given, lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1)}))
    cast(given, tmp_path / "out", "bfloat16")
    with pytest.raises(GemvgError, match="input_scale"):
        open_checkpoint(tmp_path / "out")


def test_an_older_key_of_compressed_tensors_is_no_float_checkpoint(folder: Path, tmp_path: Path) -> None:
    given = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    edit_json(given / CONFIG, compression_config={"quant_method": "compressed-tensors"})
    assert "quantization_config" not in json.loads((given / CONFIG).read_text())
    for run in (COMMANDS["train"], lambda given, out: cast(given, out, "bfloat16")):
        with pytest.raises(GemvgError, match="is quantised already; give the float checkpoint that it came from"):
            run(given, tmp_path / "out")
