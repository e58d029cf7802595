"""AWQ checkpoints: written here by the format's description, word by word, and exported with their codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export.to_onnx import main as export
from export.verify import main as verify
from export.weights import Scheme
from gemvg_edge.bundle import open_bundle
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.gptq_format import dequantize
from quantize.torch_model import load_model
from tests.checkpoints import GROUPED, edit_json, torch_logits, torch_vision, write_checkpoint
from tests.quantized_twin import linear_layers, rounding
from tests.test_engine import FLIPS, NO_FLIP, TWO, Case, Engine, difference
from train.checkpoint import CONFIG, SINGLE

GROUP = 32
STATED = {
    "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP, "zero_point": True,
    "modules_to_not_convert": ["visual"], "backend": "autoawq", "do_fuse": False,
}  # fmt: skip
LAYER = "model.language_model.layers.0.mlp.down_proj"
OURS = "model.layers.0.mlp.down_proj"


def pack_words(codes: np.ndarray) -> np.ndarray:
    """Codes (n, out) -> words (n, out / 8), one word after the other, as AutoAWQ's description has it."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for row in range(codes.shape[0]):
        for word in range(codes.shape[1] // 8):
            eight = [int(code) for code in codes[row, 8 * word : 8 * word + 8]]
            in_order = [eight[0], eight[2], eight[4], eight[6], eight[1], eight[3], eight[5], eight[7]]
            words[row, word] = sum(code << 4 * place for place, code in enumerate(in_order))
    return words.view(np.int32)


def round_weight(weight: np.ndarray, zero_point: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A weight (out, in) -> the three tensors of AWQ's gemm version, and the float32 weight that they stand for."""
    outputs, inputs = weight.shape
    groups = weight.T.reshape(inputs // GROUP, GROUP, outputs)
    high, low = np.maximum(groups.max(1), 0), np.minimum(groups.min(1), 0)  # (groups, out)
    if zero_point:
        scales = ((high - low) / 15).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, 15)
    else:
        scales = (np.maximum(high, -low) / 7).astype(np.float16)
        zeros = np.full_like(high, 8)
    steps = scales.astype(np.float32)[:, None]
    codes = np.clip(np.rint(groups / steps) + zeros[:, None], 0, 15)
    stands_for = ((codes - zeros[:, None]) * steps).reshape(inputs, outputs).T
    tensors = {
        "qweight": pack_words(codes.reshape(inputs, outputs)), "qzeros": pack_words(zeros), "scales": scales,
    }  # fmt: skip
    # safetensors writes the memory as it lies.
    tensors = {part: np.ascontiguousarray(values) for part, values in tensors.items()}
    return tensors, np.ascontiguousarray(stands_for, np.float32)


def write_awq(folder: Path, zero_point: bool = True) -> Any:
    """Make the decoder's layers of a checkpoint AWQ's; the model with the weights that they stand for."""
    model = write_checkpoint(folder, GROUPED)
    tensors = load_file(folder / SINGLE)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "language_model" in name:
            stored = f"{name.replace('model.language_model.', 'model.')}.weight"
            packed, weight = round_weight(tensors.pop(stored), zero_point)
            tensors |= {stored.replace("weight", part): values for part, values in packed.items()}
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    edit_json(folder / CONFIG, quantization_config=STATED | {"zero_point": zero_point})
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["zero points", "no zero points"])
def awq(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, bool]:
    folder = tmp_path_factory.mktemp("awq") / "checkpoint"
    return write_awq(folder, request.param), folder, request.param


def test_the_codes_stand_for_the_written_weights(awq: tuple[Any, Path, bool]) -> None:
    model, folder, zero_point = awq
    opened = open_checkpoint(folder)
    linear = opened.quantized(OURS)
    assert (linear.bits, linear.group_size, linear.symmetric) == (4, GROUP, not zero_point)
    assert opened.shape(f"{OURS}.weight") == (96, 128)
    assert opened.grid(OURS) == (4, 4)
    assert not opened.is_quantized("visual.merger.mlp.0")
    assert np.array_equal(
        dequantize(linear), model.model.language_model.layers[0].mlp.down_proj.weight.detach().numpy()
    )
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_a_bundle_is_its_dequantised_twin(awq: tuple[Any, Path, bool], tmp_path: Path, capsys: Any) -> None:
    """Equal but where a rounded activation falls the other way, as in tests/test_gptq_export.py."""
    model, folder, _ = awq
    assert export([str(folder), str(tmp_path / "bundle")]) == 0
    stated = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["weights"]
    assert (stated["decoder"], stated["vision"], stated["head"]) == ("int4-awq-g32", "float32", "float32")
    capsys.readouterr()
    assert verify([str(tmp_path / "bundle"), "--against", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["passed"] is True
    engine = Engine.open(open_bundle(tmp_path / "bundle"))
    handles = [
        layer.register_forward_pre_hook(rounding(Scheme(4, GROUP)))
        for name, layer in linear_layers(model)
        if "language_model" in name
    ]
    differences = []
    for case in [Case.random(TWO, seed) for seed in range(5)]:
        visual = torch_vision(model, case.patches, case.grids)
        expected = torch_logits(model, case.ids, case.patches, case.grids)[np.array(case.cuts[1:]) - 1]
        differences.append(difference(engine.logits(case, case.cuts, visual=visual), expected) / expected.std())
    for handle in handles:
        handle.remove()
    assert min(differences) <= NO_FLIP
    assert max(differences) <= FLIPS


@pytest.mark.parametrize("dialect", ["standard", "plain"])
def test_tensorrt_takes_no_zero_points(
    dialect: str, awq: tuple[Any, Path, bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, zero_point = awq
    code = export([str(folder), str(tmp_path / "bundle"), "--dialect", dialect, "--precision", "float32"])
    assert code == (2 if zero_point else 0)
    said = "q_proj has zero-points, which TensorRT does not take"
    assert (said in capsys.readouterr().err) == zero_point


def stated(**changes: Any) -> Any:
    return lambda folder: edit_json(folder / CONFIG, quantization_config=STATED | changes)


def tensors(edit: Any) -> Any:
    def change(folder: Path) -> None:
        found = load_file(folder / SINGLE)
        edit(found, next(name for name in found if name.endswith("0.mlp.down_proj.qweight")).removesuffix(".qweight"))
        save_file(found, folder / SINGLE, metadata={"format": "pt"})

    return change


def add(part: str, values: np.ndarray) -> Any:
    return tensors(lambda found, layer: found.update({f"{layer}.{part}": values}))


REFUSED: dict[str, tuple[Any, str]] = {
    "gemv": (stated(version="gemv"), "AWQ of version 'gemv' is laid out otherwise and not read; quantise with AutoAWQ"),
    "fast gemv": (stated(version="gemv_fast"), "AWQ of version 'gemv_fast'"),
    "marlin": (stated(version="marlin"), "AWQ of version 'marlin'"),
    "exllama": (stated(version="exllama"), "AWQ of version 'exllama'"),
    "GPTQModel's name": (stated(version=None, format="gemv"), "AWQ of version 'gemv'"),
    "llm-awq": (stated(backend="llm-awq"), "AWQ of backend 'llm-awq'"),
    "eight bits": (stated(bits=8), "bits 8 with group_size 32; of AWQ files 4 bits are read"),
    "no bits": (stated(bits=None), "lacks the field quantization_config.bits"),
    "groups of nothing": (stated(group_size=0), "group_size 0; of AWQ files"),
    "other groups": (stated(group_size=64), "in 4 bits and 3 groups, but config.json states 4 bits in groups of 64"),
    "the words of GPTQ": (stated(quant_method="gptq"), "down_proj|q_proj"),
    "no zero points": (tensors(lambda t, n: t.pop(f"{n}.qzeros")), "no tensor model.layers.0.mlp.down_proj.qzeros"),
    "no scales": (tensors(lambda t, n: t.pop(f"{n}.scales")), "down_proj is not stored in the AWQ format .*scales"),
    "an order": (add("g_idx", np.zeros(128, np.int32)), "down_proj.g_idx .* is stored"),
    "floats too": (add("weight", np.ones((96, 128), np.float32)),
                   "down_proj.weight is stored beside the codes"),
    "a bias": (add("bias", np.ones(96, np.float16)), "down_proj.bias .* is stored"),
    "scales of activations": (add("act.scales", np.ones(128, np.float16)),
                              "act.scales .* is stored"),
    "wide words": (tensors(lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"].astype(np.int64)})), "is of int64"),
    "fewer scales": (tensors(lambda t, n: t.update({f"{n}.scales": t[f"{n}.scales"][:, :-8].copy()})), "do not fit"),
    "NaN": (tensors(lambda t, n: t[f"{n}.scales"].fill(np.nan)), "scales holds NaN or infinity"),
    "half the words": (tensors(lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"][:, :6].copy()})),
                       r"has shape \(48, 128\), by config.json \(96, 128\)"),
    "flat words": (tensors(lambda t, n: t.update({f"{n}.qweight": t[f"{n}.qweight"].reshape(-1)})), "AWQ format"),
    "nothing": (tensors(lambda t, n: t.update({f"{n}.qweight": np.zeros((0, 12), np.int32)})), "AWQ format"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_awq_of_ours_is_refused(case: str, awq: tuple[Any, Path, bool], tmp_path: Path) -> None:
    change, said = REFUSED[case]
    folder = shutil.copytree(awq[1], tmp_path / "awq")
    change(folder)
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(folder).quantized(OURS)


def test_one_group_and_a_zero_bias_are_read(awq: tuple[Any, Path, bool], tmp_path: Path) -> None:
    folder = shutil.copytree(awq[1], tmp_path / "awq")

    def one_group(found: dict[str, np.ndarray]) -> None:
        for name in list(found):
            if name.endswith((".scales", ".qzeros")):
                found[name] = found[name][:1].copy()

    tensors(lambda found, layer: one_group(found))(folder)
    add("bias", np.zeros(96, np.float16))(folder)
    stated(group_size=-1)(folder)
    assert open_checkpoint(folder).quantized(OURS).group_size == 128


def test_codes_are_not_quantised_again(awq: tuple[Any, Path, bool], tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match="is quantised already; give the float checkpoint that it came from"):
        quantize(Settings(awq[1], tmp_path / "out", method="rtn", device="cpu"))


FOREIGN: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    "compressed-tensors": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "its older key": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_other_methods_say_what_to_give(case: str, tmp_path: Path) -> None:
    config, method = FOREIGN[case]
    write_checkpoint(tmp_path / "checkpoint")
    edit_json(tmp_path / "checkpoint" / CONFIG, **config)
    said = (
        f"quant_method '{method}' is not read; give the float checkpoint that it was made from, or one of GPTQ or AWQ"
    )
    with pytest.raises(GemvgError, match=said):
        open_checkpoint(tmp_path / "checkpoint")
