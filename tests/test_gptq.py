"""quantize.gptq from folder to folder: what it writes, that it goes on after a kill, and what it says of bad input."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from quantize import gptq
from quantize.calibration import CalibrationPrompt
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, collect_hessians, quantize, read_prompts
from quantize.parts import pack_layers
from quantize.solver import Grid, round_to_nearest
from quantize.stream import block_names, stream
from quantize.torch_model import load_model
from tests.checkpoints import edit_json, torch_logits, write_checkpoint
from tests.damage import remove, set_field, truncate
from tests.families import logits
from train.data.record import Record, write_records

SAMPLES = 6
GROUP = 8  # divides the tiny model's 96 and 104


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random checkpoint as transformers' model, and the folder with it and with calibration records."""
    folder = tmp_path_factory.mktemp("gptq")
    model = write_checkpoint(folder / "checkpoint")
    write_prompts(folder)
    return model, folder


def write_prompts(folder: Path) -> None:
    """Write calibration records, and their pictures of noise."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(SAMPLES):
        images = tuple(folder / f"{number}-{k}.png" for k in range(1 + number % 2))
        for image in images:
            Image.fromarray(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(image)
        box = Box(0, 10.0, 10.0, 40.0, 50.0)
        records.append(Record(images, ((84, 56),) * len(images), f"thing {number}", (box,), "referential", "test"))
    write_records(records, folder / "records.jsonl")


def settings(folder: Path, out: str, **options: Any) -> Settings:
    given = {"group_size": GROUP, "records": folder / "records.jsonl", "samples": SAMPLES, "device": "cpu"}
    return Settings(folder / "checkpoint", folder / out, **{**given, **options})


def prompts_of(folder: Path) -> list[CalibrationPrompt]:
    return read_prompts(settings(folder, "unused"), open_checkpoint(folder / "checkpoint"))


def test_blocks_in_a_row_are_the_model(tiny: tuple[Any, Path]) -> None:
    """Streaming twin: with nothing changed, the head gives transformers' logits."""
    model, folder = tiny
    prompts = prompts_of(folder)
    *_, head = stream(open_checkpoint(folder / "checkpoint"), prompts)
    for prompt, ours in zip(prompts, head.run(), strict=True):
        sizes = [h * w for _, h, w in prompt.grids]
        patches = [part.numpy() for part in torch.split(prompt.patches, sizes)]
        theirs = torch_logits(model, prompt.ids.numpy(), patches, list(prompt.grids))
        assert np.abs(ours.numpy() - theirs).max() < 1e-4


def test_hessians_weigh_tokens(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    weighted = settings(folder, "unused", visual_weight=0.5, answer_weight=3.0)
    prompts = read_prompts(weighted, open_checkpoint(folder / "checkpoint"))
    assert {float(weight) for prompt in prompts for weight in prompt.weights} == {0.5, 1.0, 3.0}
    layer = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][0])
    )
    for block in stream(open_checkpoint(folder / "checkpoint"), prompts):
        if layer in block.linears:
            ours = collect_hessians(block, [layer])[layer]
    plain = torch.zeros_like(ours)
    for prompt in prompts:
        patches = [part.numpy() for part in torch.split(prompt.patches, [h * w for _, h, w in prompt.grids])]
        torch_logits(model, prompt.ids.numpy(), patches, list(prompt.grids))
        plain += sum(w * torch.outer(x, x) for w, x in zip(prompt.weights, seen[-1], strict=True))
    handle.remove()
    assert torch.allclose(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_rounding_to_nearest_is_what_it_says(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    quantize(settings(folder, "rtn", method="rtn"))
    written = open_checkpoint(folder / "rtn")
    for name, module in model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            plain = round_to_nearest(module.weight, Grid(4, GROUP))
            ours = written.quantized(f"model.layers.{name}")
            assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, plain, strict=True))
    for name, tensor in load_file(folder / "checkpoint" / "model.safetensors").items():
        if "proj.weight" not in name or "visual" in name:
            assert np.array_equal(written.read(name.replace("model.language_model.", "model.")), tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8, "group_size": -1, "vision_bits": 8},
        {"sym": False},
        {"positive_scales": True, "vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
        {"desc_act": True, "head_bits": 8, "embedding_bits": 8},
        {"vision_bits": 4, "head_bits": 4, "embedding_bits": 4, "true_sequential": True},
        {"calibration": "text", "search": False, "vision_bits": 8},
    ],
    ids=str,
)
def test_quantised_checkpoints_are_read_back(tiny: tuple[Any, Path], options: dict[str, Any]) -> None:
    model, folder = tiny
    run = settings(folder, "one-of-many", **options)
    shutil.rmtree(run.out, ignore_errors=True)
    quantize(run)
    config = json.loads((run.out / "config.json").read_text())
    stated = config["quantization_config"]
    assert (stated["bits"], stated["group_size"], stated["desc_act"]) == (run.bits, run.group_size, run.desc_act)
    assert stated["checkpoint_format"] == ("gptq" if run.sym else "gptq_v2")
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith("one-of-many")) == ["one-of-many"]
    names = set(load_file(run.out / "model.safetensors"))
    assert "model.language_model.layers.0.mlp.down_proj.qweight" in names
    assert ("model.visual.blocks.0.mlp.fc1.qweight" in names) == (run.vision_bits < 16)
    assert ("lm_head.qweight" in names) == (run.head_bits < 16)
    assert ("model.language_model.embed_tokens.qweight" in names) == (run.embedding_bits < 16)
    quantised = [open_checkpoint(run.out).quantized(f"model.layers.{k}.mlp.down_proj") for k in range(3)]
    assert run.positive_scales == all((layer.scales > 0).all() for layer in quantised) or not run.sym
    written = load_model(run.out)
    difference = max(distances(model, written, prompts_of(folder)))
    assert 0 < difference < (0.5 if run.bits == 8 else 8)


def distances(model: Any, other: Any, prompts: list[CalibrationPrompt]) -> list[float]:
    """Root mean square difference of logits on each prompt."""
    return [float(np.sqrt(np.square(logits(model, p) - logits(other, p)).mean())) for p in prompts]


def test_gptq_is_closer_than_rounding(tiny: tuple[Any, Path]) -> None:
    model, folder = tiny
    errors = {}
    for method in ("gptq", "rtn"):
        quantize(settings(folder, f"close-{method}", method=method))
        errors[method] = np.mean(distances(model, load_model(folder / f"close-{method}"), prompts_of(folder)))
    assert errors["gptq"] < 0.9 * errors["rtn"]


class Killed(BaseException):
    """A kill in the middle of a run."""


def test_a_killed_run_goes_on_where_it_was(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = tiny
    quantize(settings(folder, "whole"))
    computed: list[str] = []
    plain = gptq.quantize_block
    last = "model.layers.1"
    killed: list[str] = []

    def counted(block: Any, run: Settings) -> Any:
        if block.name == last and not killed:
            killed.append(block.name)
            raise Killed
        computed.append(block.name)
        return plain(block, run)

    monkeypatch.setattr(gptq, "quantize_block", counted)
    run = settings(folder, "killed")
    with pytest.raises(Killed):
        quantize(run)
    assert not run.out.exists()
    quantize(run)
    names = block_names(open_checkpoint(folder / "checkpoint"))
    assert computed[computed.index("model.layers.0") + 1 :] == names[names.index(last) :]
    assert computed.count("model.layers.0") == 1
    whole, again = (load_file(folder / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_mended_run_is_not_refused(tiny: tuple[Any, Path]) -> None:
    """What failed before anything was written leaves nothing behind."""
    _, folder = tiny
    with pytest.raises(GemvgError, match="no such file"):
        quantize(settings(folder, "mended", records=folder / "none.jsonl"))
    quantize(settings(folder, "mended"))


def test_a_run_with_other_settings_is_refused(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = tiny
    monkeypatch.chdir(folder)
    monkeypatch.setattr(gptq, "quantize_block", lambda block, run: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        quantize(settings(folder, "other"))
    with pytest.raises(GemvgError, match=r"other settings \(--bits was 4, now 8\); delete it"):
        quantize(settings(folder, "other", bits=8))
    # Paths are compared by where they lead.
    other: dict[str, Any] = {
        "model": Path("checkpoint"),
        "records": Path("..") / folder.name / "records.jsonl",
        "out": Path("./other"),
    }
    with pytest.raises(KeyboardInterrupt):
        quantize(replace(settings(folder, "other"), overwrite=True, **other))


def quantize_until(name: str, run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted at the block of this name."""
    plain = gptq.quantize_block

    def stop_late(block: Any, run: Settings) -> Any:
        if block.name == name:
            raise KeyboardInterrupt
        return plain(block, run)

    with monkeypatch.context() as patch:
        patch.setattr(gptq, "quantize_block", stop_late)
        with pytest.raises(KeyboardInterrupt):
            quantize(run)


def test_a_run_is_not_resumed_with_other_weights(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of one model and half of another would be a checkpoint like any."""
    folder = tiny[1].parent / "changed"
    shutil.copytree(tiny[1] / "checkpoint", folder / "checkpoint")
    for path in tiny[1].glob("*.png"):
        shutil.copy(path, folder)
    shutil.copy(tiny[1] / "records.jsonl", folder)
    run = settings(folder, "out")
    quantize_until("model.layers.1", run, monkeypatch)
    weights, records = folder / "checkpoint" / "model.safetensors", folder / "records.jsonl"
    for file, change in ((weights, lambda b: b[:-1] + bytes([b[-1] ^ 1])), (records, lambda b: b + b"\n")):
        before = file.read_bytes()
        file.write_bytes(change(before))
        told = file.name if file == records else "checkpoint"
        with pytest.raises(GemvgError, match=rf"other settings \(the contents of .*/{told} changed\); delete it"):
            quantize(run)
        file.write_bytes(before)
    quantize(run)
    assert open_checkpoint(run.out).is_quantized("model.layers.0.mlp.up_proj")


def test_many_shards(tiny: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = tiny
    monkeypatch.setattr("quantize.parts.SHARD_BYTES", 100_000)
    quantize(settings(folder, "shards"))
    index = json.loads((folder / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    quantize(settings(folder, "one-shard"))
    many, one = open_checkpoint(folder / "shards"), open_checkpoint(folder / "one-shard")
    assert np.array_equal(many.read("model.norm.weight"), one.read("model.norm.weight"))
    layer = "model.layers.2.mlp.up_proj"
    assert np.array_equal(many.quantized(layer).codes, one.quantized(layer).codes)


def lose_picture(folder: Path) -> None:
    next(folder.glob("2-*.png")).unlink()


def break_weight(folder: Path) -> None:
    file = folder / "checkpoint" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.input_layernorm" in name)
    tensors[name][0] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})


def break_line(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_text().splitlines()
    (folder / "records.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]))


def use_method(name: str) -> Callable[[Path], None]:
    return lambda folder: set_field("config.json", "quantization_config", to={"quant_method": name})(
        folder / "checkpoint"
    )


BAD: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "truncated shard": (
        lambda folder: truncate("model.safetensors")(folder / "checkpoint"), {}, "model.safetensors is truncated or da"
    ),
    "no shard": (lambda folder: remove("model.safetensors")(folder / "checkpoint"), {}, "no model.safetensors"),
    "NaN": (break_weight, {}, r"safetensors: model.layers.1.input_layernorm.weight holds NaN or infinity"),
    "missing image": (lose_picture, {}, r"records.jsonl, record 3: .*2-0.png"),
    "broken record": (break_line, {}, "records.jsonl, record 2: not a record"),
    "no records": (remove("records.jsonl"), {}, "records.jsonl: no such file"),
    "group": (lambda folder: None, {"group_size": 128}, "--group-size 128 does not divide the 96 inputs of model.la"),
    "group size": (lambda folder: None, {"group_size": 0}, "--group-size is 0; give how many inputs share a scale, or"),
    "words": (lambda folder: None, {"bits": 3}, "104 .*at 3 bits both must fill whole 32-bit words"),
    "bits": (lambda folder: None, {"bits": 5}, "--bits is 5; give one of 3, 4, 8"),
    "vision bits": (lambda folder: None, {"vision_bits": 2}, "--vision-bits is 2; give one of 4, 8, 16"),
    "method": (lambda folder: None, {"method": "awq"}, "--method is awq; give one of gptq, rtn"),
    "samples": (lambda folder: None, {"samples": 0}, "--samples and --damping must be above zero"),
    "calibration": (lambda folder: None, {"calibration": "c4"}, "--calibration is c4; give one of grounding, text"),
    "text": (lambda folder: None, {"calibration": "text", "text": Path("none.txt")}, "none.txt cannot be read as text"),
    "method of a config": (
        use_method("eetq"), {}, "quant_method 'eetq' is not read; give the float checkpoint that it was made from, or"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tiny: tuple[Any, Path], tmp_path: Path) -> None:
    damage, options, said = BAD[case]
    folder = tmp_path / "copy"
    shutil.copytree(tiny[1], folder, ignore=lambda path, names: [n for n in names if (Path(path) / n / "x").exists()])
    damage(folder)
    run = settings(folder, "out", **options)
    with pytest.raises(GemvgError, match=said):
        quantize(run)
    assert not run.out.exists()
    assert not (folder / "out.partial").exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tiny: tuple[Any, Path]) -> None:
    run = replace(settings(tiny[1], "unused", method="rtn"), out=Path("/proc/nowhere"))
    with pytest.raises(GemvgError, match=r"/proc/nowhere cannot be written \(.*make room and start again"):
        quantize(run)


def test_a_quantised_checkpoint_is_refused(tiny: tuple[Any, Path]) -> None:
    _, folder = tiny
    quantize(settings(folder, "twice", method="rtn"))
    with pytest.raises(GemvgError, match="is quantised already; give the float checkpoint"):
        quantize(replace(settings(folder, "thrice"), model=folder / "twice"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(tiny: tuple[Any, Path]) -> None:
    """A limit on file sizes stands in for the disk's end: the operating system refuses to write on."""
    _, folder = tiny
    run = settings(folder, "full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(GemvgError, match=r"full cannot be written .*what is done is kept in .*full\.work"):
            quantize(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not run.out.exists()
    quantize(run)
    assert open_checkpoint(run.out).is_quantized("model.layers.0.mlp.up_proj")


def test_overrides_of_others_are_read(tiny: tuple[Any, Path]) -> None:
    """A layer left in float and one of other bits, if the config states these for any: its patterns are not run."""
    _, folder = tiny
    quantize(settings(folder, "mixed", method="rtn"))
    file = folder / "mixed" / "model.safetensors"
    tensors = load_file(file)
    whole = open_checkpoint(folder / "checkpoint")
    prefix = "model.language_model.layers.0.mlp."
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{prefix}up_proj.{part}"]
    tensors[f"{prefix}up_proj.weight"] = whole.read("model.layers.0.mlp.up_proj.weight")
    eight = round_to_nearest(torch.from_numpy(whole.read("model.layers.0.mlp.gate_proj.weight")), Grid(8, -1, False))
    packed = pack_layers({f"{prefix}gate_proj": eight}, "gptq")
    save_file(tensors | packed, file, metadata={"format": "pt"})
    with pytest.raises(GemvgError, match=r"gate_proj is stored in 8 bits and 1 groups, but config\.json states 4 bits"):
        open_checkpoint(folder / "mixed")
    stated = json.loads((folder / "mixed" / "config.json").read_text())["quantization_config"]
    stated["dynamic"] = {"-:.*up_proj": {}, "+:.*mlp.gate_proj": {"bits": 8, "group_size": -1}}
    edit_json(folder / "mixed" / "config.json", quantization_config=stated)
    mixed = open_checkpoint(folder / "mixed")
    assert np.array_equal(mixed.quantized("model.layers.0.mlp.gate_proj").zeros, eight.zeros)
    assert not mixed.is_quantized("model.layers.0.mlp.up_proj")
    edit_json(folder / "mixed" / "config.json", quantization_config={"quant_method": "gptq", "checkpoint_format": "x"})
    with pytest.raises(GemvgError, match="checkpoint_format 'x' is not read"):
        open_checkpoint(folder / "mixed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_rounds_as_a_cpu_does(tiny: tuple[Any, Path]) -> None:
    """Sums differ in the last digits, so a few codes fall the other way; the model stays as close."""
    model, folder = tiny
    errors = {}
    for device in ("cpu", "cuda"):
        quantize(settings(folder, f"on-{device}", device=device, head_bits=8, vision_bits=8))
        errors[device] = np.mean(distances(model, load_model(folder / f"on-{device}"), prompts_of(folder)))
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)
