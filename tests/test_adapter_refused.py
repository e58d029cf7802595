"""LoRA folders that are not merged, and how the base is found: one sentence for each way to be wrong."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

from export.to_onnx import main as export
from gemvg_edge.errors import GemvgError
from quantize.adapter import PREFIX, WEIGHTS, find_base
from quantize.checkpoint import open_checkpoint
from tests.adapters import Change, edit_adapter, load_base, say, write_adapter, write_base_and_adapter
from tests.checkpoints import (
    edit_json,
)
from tests.test_hub import ID, cache
from tests.tokenizers_small import small_tokenizer
from train.checkpoint import ADAPTER, CONFIG


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    write_base_and_adapter(folder)
    return folder


def other_patches(folder: Path) -> None:
    shutil.copy(folder.parent / "whole" / "preprocessor_config.json", folder)
    edit_json(folder / "preprocessor_config.json", patch_size=28)


__all__ = ["cache"]

LAYER = "model.language_model.layers.0.mlp.down_proj"


def put(name: str, *shape: int, value: float = 1, dtype: torch.dtype = torch.float32) -> Change:
    return edit_adapter(lambda tensors: tensors.update({PREFIX + name: torch.full(shape, value, dtype=dtype)}))


def drop(part: str) -> Change:
    return edit_adapter(lambda tensors: tensors.pop(f"{PREFIX}{LAYER}.{part}"))


MERGED_BY_PEFT = "merge it with peft's merge_and_unload\\(\\) and save_pretrained\\(\\)"
REFUSED: dict[str, tuple[Change, str]] = {
    "DoRA": (say(use_dora=True), f"use_dora is True, which is not merged here; {MERGED_BY_PEFT}"),
    "LoHa": (say(peft_type="LOHA"), f"an adapter of type 'LOHA' is not merged here; {MERGED_BY_PEFT}"),
    "no type": (say(peft_type=None), "lacks the field peft_type"),
    "a transposed base": (say(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "PiSSA": (say(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4' changed the base's weights"),
    "OLoRA": (say(init_lora_weights="olora"), "changed the base's weights"),
    "token rows": (say(trainable_token_indices=[1, 2]), r"trainable_token_indices is \[1, 2\]"),
    "layers twice": (say(layer_replication=[[0, 2], [1, 3]]), "layer_replication is"),
    "biases of lora_B": (say(lora_bias=True), "lora_bias is True"),
    "parameters": (say(target_parameters=["mlp.experts"]), "target_parameters is"),
    "a field of the future": (say(use_magic_lora=True), "use_magic_lora is True, which is not merged here"),
    "an unknown bias": (say(bias="some"), "bias 'some' is not known"),
    "a pattern that may not end": (say(alpha_pattern={"(q|.)*": 3}), r"alpha_pattern has '\(q\|\.\)\*'; names"),
    "a pattern of no sense": (say(rank_pattern={"q_proj": "8"}), "rank_pattern.q_proj is '8', not of type int"),
    "another rank": (say(r=4), r"lora_A.weight has shape \(8, .*, not \(4, inputs\) as adapter_config.json states"),
    "no rank": (say(r=0), "r is 0, not 1 to"),
    "an alpha past sense": (say(lora_alpha=1e30), "lora_alpha is 1e.30, not"),
    "an alpha that is none": (say(lora_alpha="x"), "lora_alpha is 'x', not of type float"),
    "no base": (say(base_model_name_or_path=None), "does not name the model that it belongs to; give it with --base"),
    "a base elsewhere": (say(base_model_name_or_path="/home/x/qwen"), "names '/home/x/qwen' as its base, which is not"),
    "a revision": (say(base_model_name_or_path="a/b", revision="v2"), "names revision 'v2' of 'a/b'; download that"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "adapter_model.bin, a pickle"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}; save the adapter as safetensors"),
    "no config": (lambda folder: (folder / ADAPTER).write_text("[1]"), "adapter_config.json is not a JSON object"),
    "A alone": (drop("lora_B.weight"), "layers.0.mlp.down_proj.lora_A.weight without its lora_B; save"),
    "B alone": (drop("lora_A.weight"), "down_proj.lora_B.weight .* is merged into nothing of"),
    "a layer too many": (
        put("model.language_model.layers.7.mlp.down_proj.lora_A.weight", 8, 128),
        r"layers.7.mlp.down_proj.lora_A.weight \(8, 128\) is merged into nothing of .*whole; give the base that it was",
    ),
    "a name of no sense": (put("x.inv_freq", 1), "x.inv_freq .* is merged into nothing of"),
    "a zero bias of nothing": (put("lm_head.bias", 448, value=0), "lm_head.bias .* is merged into nothing of"),
    "a magnitude": (put("lm_head.lora_magnitude_vector", 448), "lora_magnitude_vector .* is merged into nothing of"),
    "a table's LoRA": (
        put("model.language_model.embed_tokens.lora_embedding_A", 8, 448), "lora_embedding_A .* is merged into nothing"
    ),
    "LoRA of a norm": (
        lambda folder: (put("model.language_model.norm.lora_A.weight", 8, 96)(folder),
                        put("model.language_model.norm.lora_B.weight", 96, 8)(folder)),
        r"language_model.norm has lora_A \(8, 96\) and lora_B \(96, 8\), which do not fit the weight \(96,\)",
    ),
    "B of another width": (put(f"{LAYER}.lora_B.weight", 97, 8), "which do not fit the weight"),
    "A of another width": (put(f"{LAYER}.lora_A.weight", 8, 8), "which do not fit the weight"),
    "a flat A": (put(f"{LAYER}.lora_A.weight", 8), r"lora_A.weight has shape \(8,\), not"),
    "a convolution": (
        lambda folder: (put("model.visual.patch_embed.proj.lora_A.weight", 8, 3, 2, 14, 14)(folder),
                        put("model.visual.patch_embed.proj.lora_B.weight", 48, 8, 1, 1, 1)(folder)),
        "where the layer is no linear one, merge it with peft",
    ),
    "another vocabulary": (put("lm_head.weight", 450, 96), r"lm_head.weight has shape \(450, 96\), by config.json"),
    "NaN": (put(f"{LAYER}.lora_A.weight", 8, 128, value=np.nan), "lora_A.weight holds NaN or infinity"),
    "past float32": (
        lambda folder: (put(f"{LAYER}.lora_A.weight", 8, 128, value=1e30)(folder),
                        put(f"{LAYER}.lora_B.weight", 96, 8, value=1e30)(folder)),
        "down_proj, merged, holds NaN or infinity",
    ),
    "whole numbers": (put(f"{LAYER}.lora_A.weight", 8, 128, dtype=torch.int32), "down_proj.lora_A.weight has type I32"),
    "twice": (
        lambda folder: (put("lm_head.weight", 448, 96)(folder), put("lm_head.base_layer.weight", 448, 96)(folder)),
        "is stored twice",
    ),
    "half a file": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999]), "truncated"),
    "another tokenizer": (lambda folder: small_tokenizer(locations=5).save(str(folder / "tokenizer.json")),
                          "tokenizer.json has other tokens than .*whole"),
    "other patches": (other_patches, "prepares pictures otherwise than"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_is_one_sentence(
    case: str, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = REFUSED[case]
    shutil.copytree(bases / "whole", tmp_path / "whole")
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    edit_json(folder / ADAPTER, base_model_name_or_path=str(tmp_path / "whole"))
    change(folder)
    assert export([str(folder), str(tmp_path / "bundle")]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message.rpartition("\r")[2]
    assert re.search(said, message), message
    assert not (tmp_path / "bundle").exists()


REAL: dict[str, tuple[Any, str]] = {
    "DoRA": (LoraConfig(r=4, target_modules=["q_proj"], use_dora=True), "use_dora is True"),
    "LoHa": (LoHaConfig(r=4, target_modules=["q_proj"]), "type 'LOHA' is not merged"),
    "the table": (LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]), "lora_embedding_A .* is merged into n"),
    "a convolution": (LoraConfig(r=4, target_modules=["patch_embed.proj"]), "where the layer is no linear one"),
    "token rows": (LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]), "trainable_token_ind"),
    "PiSSA": (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "'pissa' changed the base's"),
    "biases of B": (LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), "lora_bias is True"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of the table
@pytest.mark.parametrize("case", REAL)
def test_what_peft_saves_and_is_not_merged_is_refused(case: str, bases: Path, tmp_path: Path) -> None:
    options, said = REAL[case]
    get_peft_model(load_base(bases / "whole"), options).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(tmp_path / "adapter")


def test_without_torch_the_sentence_says_what_to_install(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(bases / "adapter")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert opened.read("model.norm.weight").shape == (96,)
    with pytest.raises(GemvgError, match=r"merging an adapter needs PyTorch .*pip install --group train"):
        opened.read("model.layers.0.mlp.down_proj.weight")


def test_the_base_is_found_as_written_beside_the_adapter_or_as_told(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    shutil.copytree(bases / "whole", tmp_path / "base")
    edit_json(folder / ADAPTER, base_model_name_or_path="../base")
    (tmp_path / "else" / "where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else" / "where")
    assert find_base(folder, None) == folder / "../base"  # seen from the adapter's folder
    monkeypatch.chdir(folder)
    assert find_base(folder, None) == Path("../base")  # as it is written
    edit_json(folder / ADAPTER, base_model_name_or_path=None)
    opened = open_checkpoint(folder, base=tmp_path / "base")
    assert (opened.folder, opened.scalings[LAYER.replace("language_model.", "")]) == (tmp_path / "base", 20 / 8)
    with pytest.raises(GemvgError, match=r"--base is what an adapter belongs to, but .*base is no adapter's folder"):
        open_checkpoint(tmp_path / "base", base=folder)
    with pytest.raises(
        GemvgError, match=r"is an adapter .it has adapter_config.json., no checkpoint; merge it into its"
    ):
        open_checkpoint(folder, base=bases / "adapter")
    edit_json(tmp_path / "base" / CONFIG, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(
        GemvgError, match="is quantised, and adapters are merged into floats; give the float checkpoint"
    ):
        open_checkpoint(folder, base=tmp_path / "base")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_weights_beside_an_adapter_stay_refused(name: str, bases: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bases / "whole", tmp_path / "both")
    shutil.copytree(bases / "adapter", folder, dirs_exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(GemvgError, match="has an adapter beside its weights"):
        open_checkpoint(folder)


def test_a_base_by_its_hub_id_is_found_in_the_cache(cache: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", cache, r=8, target_modules=["q_proj"])
    edit_json(tmp_path / "adapter" / ADAPTER, base_model_name_or_path=str(ID))
    assert open_checkpoint(tmp_path / "adapter").folder == cache
    edit_json(tmp_path / "adapter" / ADAPTER, base_model_name_or_path=None)
    assert export([str(tmp_path / "adapter"), str(tmp_path / "bundle"), "--base", str(ID)]) == 0


def test_a_hub_id_of_a_base_says_what_to_do(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(bases / "adapter", tmp_path / "adapter")
    edit_json(folder / ADAPTER, base_model_name_or_path="Qwen/Qwen2-VL-2B-Instruct")
    with pytest.raises(
        GemvgError, match=r"names its base: Qwen/Qwen2-VL-2B-Instruct is no folder here.*or give it with"
    ):
        open_checkpoint(folder)
