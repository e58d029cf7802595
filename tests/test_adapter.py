"""LoRA folders as peft saves them: opened on their base they read as peft's own merge, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from quantize.adapter import PREFIX, WEIGHTS
from quantize.checkpoint import Checkpoint, in_modules, open_checkpoint
from quantize.tensors import EMBEDDING, expected_tensors
from quantize.torch_model import build_model, family
from tests.adapters import edit_adapter, load_base, merge, write_adapter
from tests.checkpoints import (
    GROUPED,
    GROUPED_2_5,
    random_pictures,
    random_prompt,
    torch_logits,
    write_checkpoint,
)
from train.checkpoint import HEAD

DECODER = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def assert_merged(opened: Checkpoint, merged: Any) -> None:
    weights = merged.state_dict()
    names = [name for name, _ in expected_tensors(opened.config)]
    assert len(names) + opened.config.tied_head == len(weights)
    for name in names:
        assert np.array_equal(opened.read(name), weights[in_modules(name)].numpy()), name


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_checkpoint(folder / "whole", GROUPED)
    write_checkpoint(folder / "tied", GROUPED, tied=True)
    write_checkpoint(folder / "qwen2_5", GROUPED_2_5)
    write_adapter(folder / "adapter", folder / "whole", r=8, lora_alpha=20, target_modules="all-linear")
    return folder


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder and vision tower": ("whole", {"r": 8, "lora_alpha": 20, "target_modules": "all-linear"}),
    "decoder": ("whole", {"r": 16, "lora_alpha": 32, "target_modules": DECODER, "task_type": "CAUSAL_LM"}),
    "an uneven rank": ("whole", {"r": 5, "lora_alpha": 7, "target_modules": ["qkv", "fc2", "q_proj", "down_proj"]}),
    "rank 1": ("whole", {"r": 1, "lora_alpha": 1, "target_modules": ["mlp.0", "mlp.2", "up_proj"]}),
    "rsLoRA": ("whole", {"r": 24, "lora_alpha": 5, "use_rslora": True, "target_modules": ["attn.proj", "o_proj"]}),
    "patterns": ("whole", {
        "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj", "v_proj", "qkv"],
        "rank_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 9, r"^model.visual.blocks.0.attn.qkv": 6},
        "alpha_pattern": {r"layers\.2\.self_attn\.v_proj": 2, "q_proj": 30, "k_proj|v_proj": 11},
    }),
    "rsLoRA with patterns": ("whole", {
        "r": 4, "use_rslora": True, "target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 3},
        "alpha_pattern": {".*q_proj": 5},
    }),
    "some layers": ("whole", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "all biases": ("whole", {"r": 4, "target_modules": ["q_proj", "fc1", "o_proj"], "bias": "all"}),
    "their biases": ("whole", {"r": 4, "target_modules": ["q_proj", "fc1", "o_proj"], "bias": "lora_only"}),
    "a head": ("whole", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "LoRA of a head": ("whole", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "norms": ("whole", {"r": 4, "target_modules": ["mlp.0"], "modules_to_save": ["merger.ln_q", "input_layernorm"]}),
    "another start": ("whole", {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "on a tied head": ("tied", {"r": 4, "target_modules": ["q_proj", "fc1"]}),
    "a head of a tied model": ("tied", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a table of a tied model": ("tied", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "table and head": ("tied", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "table and head, still tied": ("tied", {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    }),
    "Qwen2.5-VL": ("qwen2_5", {"r": 6, "lora_alpha": 5, "target_modules": "all-linear"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of tied heads
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_reads_as_peft_merges_it(case: str, bases: Path, tmp_path: Path) -> None:
    base, options = CASES[case]
    kind = "qwen2_5_vl" if base == "qwen2_5" else "qwen2_vl"
    write_adapter(tmp_path / "adapter", bases / base, kind, **options)
    opened, merged = open_checkpoint(tmp_path / "adapter"), merge(tmp_path / "adapter", bases / base, kind)
    assert_merged(opened, merged)
    plain = open_checkpoint(bases / base)
    changed = [n for n, _ in expected_tensors(plain.config) if not np.array_equal(plain.read(n), opened.read(n))]
    assert changed, "an adapter of nothing would pass"
    ours = build_model(opened).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in merged.state_dict().items())


def test_at_true_widths(tmp_path: Path) -> None:
    """Sums of a wide layer's product are split among threads and vectors."""
    options: dict[str, Any] = {"r": 64, "lora_alpha": 17, "target_modules": ["gate_proj", "down_proj"]}
    write_checkpoint(tmp_path / "base", wide())
    write_adapter(tmp_path / "adapter", tmp_path / "base", **options)
    assert_merged(open_checkpoint(tmp_path / "adapter"), merge(tmp_path / "adapter", tmp_path / "base"))


def wide() -> dict[str, Any]:
    text = GROUPED["text_config"] | {"hidden_size": 768, "num_attention_heads": 6, "intermediate_size": 2048}
    text |= {"rope_parameters": text["rope_parameters"] | {"mrope_section": [16, 24, 24]}, "num_hidden_layers": 1}
    return {"text_config": text, "vision_config": GROUPED["vision_config"] | {"hidden_size": 768}}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_of_a_tied_head_computes_as_it_was_trained(bases: Path, tmp_path: Path) -> None:
    """Peft's merge would change the table too, which no training saw."""
    write_adapter(tmp_path / "adapter", bases / "tied", r=4, target_modules=["q_proj", "lm_head"])
    unmerged = PeftModel.from_pretrained(load_base(bases / "tied"), tmp_path / "adapter").eval().base_model.model
    opened = open_checkpoint(tmp_path / "adapter")
    assert not opened.config.tied_head
    assert np.array_equal(opened.read(EMBEDDING), open_checkpoint(bases / "tied").read(EMBEDDING))
    grids = [(1, 4, 4)]
    prompt = random_prompt(grids), random_pictures(grids), grids
    expected = torch_logits(unmerged, *prompt)
    assert np.abs(torch_logits(build_model(opened), *prompt) - expected).max() < 1e-4
    assert np.abs(torch_logits(merge(tmp_path / "adapter", bases / "tied"), *prompt) - expected).max() > 0.1
    head = opened.read(HEAD)
    edit_adapter(lambda t: t.pop(f"{PREFIX}lm_head.base_layer.weight"))(tmp_path / "adapter")  # which peft saves along
    assert np.array_equal(open_checkpoint(tmp_path / "adapter").read(HEAD), head)


def test_names_of_older_transformers_are_the_same_layers(bases: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("model.model.language_model.", "model.model.").replace(
                "model.model.visual.", "model.visual."
            )
            tensors[old] = tensors.pop(name)

    edit_adapter(rename)(folder)
    assert f"{PREFIX}visual.merger.mlp.0.lora_A.weight" in load_file(folder / WEIGHTS)
    assert_merged(open_checkpoint(folder), merge(bases / "adapter", bases / "whole"))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_merged_in_float32(stored: torch.dtype, bases: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    edit_adapter(lambda t: t.update({name: tensor.to(stored) for name, tensor in t.items()}))(folder)
    assert_merged(open_checkpoint(folder), merge(folder, bases / "whole"))


def test_a_bfloat16_base_is_merged_in_float32(tmp_path: Path) -> None:
    """Peft rounds each merged weight to the base's type; here it is float32 until the export rounds it, if it does."""
    write_checkpoint(tmp_path / "base", GROUPED, bfloat16=True)
    write_adapter(tmp_path / "adapter", tmp_path / "base", r=4, target_modules=["q_proj"])
    opened = open_checkpoint(tmp_path / "adapter")
    assert_merged(opened, merge(tmp_path / "adapter", tmp_path / "base"))  # of the base in float32
    name = "model.layers.0.self_attn.q_proj.weight"
    assert opened.dtype(name) == opened.stored(name).dtype == np.dtype(np.float32)
    assert opened.dtype("model.layers.0.self_attn.o_proj.weight").name == "bfloat16"
    base = family("qwen2_vl").model.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()[in_modules(name)]
    assert torch.equal(torch.from_numpy(opened.read(name)).to(torch.bfloat16), theirs)
