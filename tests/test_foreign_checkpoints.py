"""Checkpoints as people have them: read as transformers reads them, or refused in one sentence, nothing else."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from export.to_onnx import main as export
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import CHAT_TEMPLATE, GROUPED, TOKENIZER, edit_json, edit_tensors, write_checkpoint, write_json
from train.checkpoint import CONFIG, INDEX, SINGLE, read_settings
from train.processor import ImageTextProcessor
from train.rewrite import count_parameters, rewrite_weights

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "checkpoint")


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda folder: edit_tensors(folder, edit)


def edit_config(section: str = "", **changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        (content[section] if section else content).update(changes)
        write_json(folder / CONFIG, content)

    return change


def spoil(name: str, value: float) -> Change:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        stored = next(one for one in tensors if one.endswith(name))
        tensors[stored].view(-1)[-1] = value

    return edit_weights(edit)


def ends_past(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    content = json.loads((folder / CONFIG).read_text())
    content.pop("eos_token_id", None)
    content["text_config"]["eos_token_id"] = 448
    write_json(folder / CONFIG, content)


def nest_preprocessor(folder: Path) -> None:
    """As transformers 5 saves it, with another patch size."""
    numbers = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    write_json(folder / "processor_config.json", {"image_processor": numbers | {"patch_size": 28}})


def drop_rope(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    del content["text_config"]["rope_parameters"]["rope_theta"]
    content["text_config"].pop("rope_theta", None)
    write_json(folder / CONFIG, content)


def edit_rope(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        content["text_config"]["rope_parameters"].update(changes)
        write_json(folder / CONFIG, content)

    return change


def into_adapter(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / SINGLE).rename(folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})


def add_locations(states: int, has: int) -> Change:
    def change(folder: Path) -> None:
        from tests.tokenizers_small import small_tokenizer

        small_tokenizer(locations=has).save(str(folder / "tokenizer.json"))
        edit_json(folder / CONFIG, grounding={"answer": {"coordinates": "locations", "locations": states}})

    return change


def name_a_shard(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "model-1.safetensors")
        write_json(folder / INDEX, {"weight_map": {"lm_head.weight": name}})

    return change


LAYER = "model.layers.2.input_layernorm.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "fewer layers than stored": (edit_config("text_config", num_hidden_layers=2, layer_types=["full_attention"] * 2),
                                 "model.layers.2.*is stored, but config.json describes a model without it"),
    "fewer vision blocks": (edit_config("vision_config", depth=1), "visual.blocks.1.*describes a model without it"),
    "more layers than stored": (edit_config("text_config", num_hidden_layers=10**9), "no tensor model.layers.3"),
    "NaN in a norm": (spoil("layers.1.input_layernorm.weight", np.nan), "input_layernorm.weight holds NaN or infinity"),
    "infinity in the head": (spoil("lm_head.weight", np.inf), "lm_head.weight holds NaN or infinity"),
    "NaN in the vision tower": (spoil("blocks.0.attn.qkv.bias", np.nan), "attn.qkv.bias holds NaN or infinity"),
    "NaN in the table": (spoil("embed_tokens.weight", np.nan), "embed_tokens.weight holds NaN or infinity"),
    "a bias that says something": (
        edit_weights(lambda t: t.update({"lm_head.bias": torch.ones(448)})), "lm_head.bias .* is stored, but config"
    ),
    "a tensor of another model": (
        edit_weights(lambda t: t.update({"visual.deepstack.0.weight": torch.zeros(2, 2)})), "visual.deepstack.0.weight"
    ),
    "no rotary base": (drop_rope, "lacks the field text_config.rope_theta"),
    "positions of half a head": (edit_rope(partial_rotary_factor=0.5), "partial or interleaved rotary positions"),
    "interleaved positions": (edit_rope(mrope_interleaved=True), "partial or interleaved rotary positions"),
    "no end of an answer": (lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[]),
                            "eos_token_id is an empty list; an answer could not end"),
    "an end past the vocabulary": (lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[2, 10**6]),
                                   "eos_token_id is 1000000, not 0 to 447"),
    "an end past the vocabulary in config": (ends_past, "config.json: text_config.eos_token_id is 448, not 0 to 447"),
    "weights in another file": (edit_config(transformers_weights="other.safetensors"),
                                "transformers_weights names 'other.safetensors', which is not followed here"),
    "patches of another size": (nest_preprocessor, "patch_size is 14, but processor_config.json says 28"),
    "heads that do not divide": (edit_config("text_config", num_attention_heads=7), "do not divide each other"),
    "no key heads": (edit_config("text_config", num_key_value_heads=0), "num_key_value_heads is 0, not at least 1"),
    "an epsilon of no sense": (edit_config("text_config", rms_norm_eps=1e300), "rms_norm_eps is 1e.300, not 0 to 1"),
    "four channels": (edit_config("vision_config", in_channels=4), "in_channels is 4, not 3 to 3"),
    "a picture token past the table": (edit_config(image_token_id=10**6), "image_token_id"),
    "fewer locations than tokens": (add_locations(9, 41), "has 41 location tokens, but config.json states 9"),
    "more locations than tokens": (add_locations(60, 41), "has no token <loc_41>, but config.json has 60"),
    "an adapter": (into_adapter, "adapter_config.json does not name the model that it belongs to; give it with --base"),
    "an adapter beside the weights": (lambda folder: write_json(folder / "adapter_config.json", {"peft_type": "LORA"}),
                                      "has an adapter beside its weights .adapter_config.json"),
    "heads of another width": (edit_config("text_config", head_dim=64), "head_dim 64 is not hidden_size / num_att"),
    "another base in the vision tower": (edit_config("vision_config", rope_theta=500.0), "rope_theta and rope_scaling"),
    "a shard elsewhere": (name_a_shard("../model-1.safetensors"), "outside the folder; download"),
    "a shard at the root": (name_a_shard("/etc/passwd"), "outside the folder; download"),
    "a shard that is missing": (name_a_shard("model-2.safetensors"), "model-2.safetensors: this shard .* is missing"),
    "no patches": (lambda folder: edit_json(folder / "preprocessor_config.json", patch_size=0), "patch_size"),
    "a long name": (lambda folder: (folder / SINGLE).rename(folder / "model.bin"), "model.bin, which is not read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_one_model_is_refused(case: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = REFUSED[case]
    change(checkpoint)
    assert export([str(checkpoint), str(checkpoint.with_name("bundle"))]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message.rpartition("\r")[2]
    assert re.search(said, message), message
    assert not checkpoint.with_name("bundle").exists()


HARMLESS: dict[str, Change] = {
    "a zero bias, as GPTQ writers add": edit_weights(lambda t: t.update({"lm_head.bias": torch.zeros(448)})),
    "a rotary table": edit_weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})),
    "a stale index": lambda folder: write_json(
        folder / INDEX, {"weight_map": {"lm_head.weight": "model-9.safetensors"}}
    ),
    "a byte order mark": lambda folder: (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes()),
    "an adapter beside": lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_says_nothing_is_left_out(case: str, checkpoint: Path, original: Path) -> None:
    HARMLESS[case](checkpoint)
    ours, theirs = open_checkpoint(checkpoint), open_checkpoint(original)
    assert ours.config.shape == theirs.config.shape
    assert np.array_equal(ours.read(LAYER), theirs.read(LAYER))


def test_a_stale_index_is_passed_over_everywhere(tmp_path: Path) -> None:
    """`save_pretrained` twice, first in shards: transformers then reads the single file, and so does every stage."""
    from quantize.torch_model import load_model

    folder = tmp_path / "twice"
    write_checkpoint(folder, max_shard_size="200KB")
    assert (folder / INDEX).is_file()
    model = write_checkpoint(tmp_path / "new")
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(7)
    model.save_pretrained(tmp_path / "new")
    shutil.copyfile(tmp_path / "new" / SINGLE, folder / SINGLE)
    assert (open_checkpoint(folder).read("model.norm.weight") == 7).all()
    assert (load_model(folder).model.language_model.norm.weight == 7).all()
    (tmp_path / "again").mkdir()
    rewrite_weights(folder, tmp_path / "again", lambda name, tensor: (name, tensor))
    assert [path.name for path in (tmp_path / "again").iterdir()] == [SINGLE]
    assert count_parameters(folder) == count_parameters(tmp_path / "new")


def test_the_processor_file_of_transformers_5_is_read(checkpoint: Path) -> None:
    numbers = Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 100)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, chat_template=CHAT_TEMPLATE)
    (checkpoint / "preprocessor_config.json").unlink()
    saved = checkpoint / "saved"
    ImageTextProcessor(numbers, tokenizer, CHAT_TEMPLATE).save_pretrained(saved)
    shutil.copyfile(saved / "processor_config.json", checkpoint / "processor_config.json")
    shutil.rmtree(saved)
    expected = Preprocessing(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 100)
    assert read_settings(checkpoint).preprocessing == expected
    # Where both are there, transformers takes this one.
    write_json(checkpoint / "preprocessor_config.json", {"min_pixels": 1, "max_pixels": 28 * 28})
    assert read_settings(checkpoint).preprocessing == expected
    assert Qwen2VLImageProcessorPil.from_pretrained(checkpoint).size["longest_edge"] == expected.max_pixels


TEMPLATES = {
    "generation": CHAT_TEMPLATE + "{% generation %}{% endgeneration %}",
    "break": CHAT_TEMPLATE + "{% for x in [1, 2] %}{% break %}{% endfor %}",
    "continue": CHAT_TEMPLATE + "{% for x in [1, 2] %}{% continue %}{% endfor %}",
    "strftime_now": CHAT_TEMPLATE + "{% if strftime_now('%Y') == '1' %}old{% endif %}",
    "raise_exception": CHAT_TEMPLATE + "{% if false %}{{ raise_exception('no') }}{% endif %}",
    "tojson": CHAT_TEMPLATE + "{% if messages | tojson(indent=2) == '' %}none{% endif %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_in_transformers_own_words_are_rendered(case: str, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATES[case])
    assert export([str(checkpoint), str(checkpoint.with_name("bundle"))]) == 0


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
            "does not end within 1 second",
        ),
        ("{{ 'a' * 10**9 }}", "it needs more than 512 MiB"),
        ("{{ raise_exception('not for two pictures') }}", "not for two pictures"),
        ("{% for", "unexpected 'end of template'|expected token"),
    ],
)
def test_a_template_is_bounded(
    template: str, said: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template is a stranger's program."""
    monkeypatch.setattr("export.template_check.SECONDS", 1)
    (checkpoint / "chat_template.jinja").write_text(template)
    assert export([str(checkpoint), str(checkpoint.with_name("bundle"))]) == 2
    printed = capsys.readouterr().err
    assert re.search(f"the chat template cannot be rendered .*({said})", printed)
    assert printed.count("\n") == 1


def test_a_template_among_named_ones(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "chat_template.json").unlink()
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": named})
    assert export([str(checkpoint), str(checkpoint.with_name("bundle"))]) == 0
    named[1]["template"] = CHAT_TEMPLATE.replace("assistant\n", "robot\n")
    write_json(checkpoint / "tokenizer_config.json", {"chat_template": named})
    assert export([str(checkpoint), str(checkpoint.with_name("bundle")), "--overwrite"]) == 2
    assert "the chat template writes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    write_checkpoint(folder / "checkpoint", GROUPED)
    quantize(Settings(folder / "checkpoint", folder / "int4", method="rtn", group_size=32, device="cpu"))
    return folder / "int4"


def edit_layer(edit: Callable[[dict[str, torch.Tensor], str], object]) -> Change:
    return edit_weights(lambda tensors: edit(tensors, "model.language_model.layers.0.mlp.down_proj"))


def state(**changes: Any) -> Change:
    return lambda folder: edit_config("quantization_config", **changes)(folder)


def uneven(tensors: dict[str, torch.Tensor], layer: str) -> None:
    """Three groups of 128 inputs, and nothing that says which input is of which."""
    del tensors[f"{layer}.g_idx"]
    for part in ("scales", "qzeros"):
        tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"][:3].clone()


def uneven_by_the_config(folder: Path) -> None:
    state(dynamic={"+:.*down_proj": {"group_size": 48}})(folder)
    edit_layer(uneven)(folder)


def lose_the_order(folder: Path) -> None:
    state(desc_act=True)(folder)
    edit_layer(lambda tensors, layer: tensors.pop(f"{layer}.g_idx"))(folder)


CODES: dict[str, tuple[Change, str]] = {
    "uneven groups": (edit_layer(uneven), "is stored in 4 bits and 3 groups, but config.json states 4 bits in groups"),
    "uneven groups without g_idx": (uneven_by_the_config, "there is no g_idx, and 128 inputs are not 3 even groups"),
    "NaN in scales": (edit_layer(lambda t, n: t[f"{n}.scales"].fill_(np.nan)), "scales holds NaN or infinity"),
    "groups past the scales": (edit_layer(lambda t, n: t[f"{n}.g_idx"].fill_(9)), "g_idx of .128,. does not give each"),
    "groups below zero": (edit_layer(lambda t, n: t[f"{n}.g_idx"].fill_(-1)), "does not give each"),
    "codes of another type": (
        edit_layer(lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"].long()})), "qweight is of int64, not int32"
    ),
    "bits of another file": (state(bits=8), "in 4 bits and 3 groups, but config.json states 8 bits"),
    "groups of another file": (state(group_size=64), "3 groups, but config.json states 4 bits in groups of 64"),
    "one group by the config": (state(group_size=-1), "3 groups, but config.json states 4 bits in groups of -1"),
    "bits that nobody has": (state(bits=5), "bits 5 with group_size 32; read are 2, 3, 4, 8 bits"),
    "no bits": (state(bits=None), "lacks the field quantization_config.bits"),
    "groups of nothing": (state(group_size=0), "group_size 0; read are"),
    "an override of no sense": (state(dynamic={"+:.*": {"bits": "4"}}), "dynamic.+:.*bits is '4', not of type int"),
    "codes and floats": (
        edit_layer(lambda t, n: t.update({f"{n}.weight": torch.ones(96, 128)})),
        "down_proj.weight is stored beside the codes of the same layer; keep one of the two",
    ),
    "a bias": (edit_layer(lambda t, n: t.update({f"{n}.bias": torch.ones(96)})), "down_proj.bias .* is stored, but"),
    "activation order without g_idx": (
        lose_the_order, "activation order without g_idx"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CODES)
def test_codes_of_no_sense_are_refused(case: str, quantised: Path, tmp_path: Path) -> None:
    change, said = CODES[case]
    folder = shutil.copytree(quantised, tmp_path / "int4")
    change(folder)
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(folder).quantized("model.layers.0.mlp.down_proj")


def test_numbers_of_no_sense_take_no_memory(checkpoint: Path) -> None:
    for section, field in (
        ("text_config", "num_hidden_layers"),
        ("text_config", "vocab_size"),
        ("vision_config", "depth"),
    ):
        edit_config(section, **{field: 10**12})(checkpoint)
        tracemalloc.start()
        with pytest.raises(GemvgError):
            open_checkpoint(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
