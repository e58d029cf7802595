"""GPTQ codes in a bundle: the kernel's layout holds the same weights, and the runtime computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from export.gptq_blocks import to_blocks
from export.gptq_grid import to_grid
from export.to_onnx import main as export
from export.verify import TOLERANCES
from export.verify import main as verify
from export.weights import Scheme
from gemvg_edge.bundle import DIALECTS, EMBEDDING, open_bundle
from gemvg_edge.engines.embedding import dequantize_rows
from gemvg_edge.engines.onnxruntime import OnnxDecoder
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from quantize.gptq_format import QuantizedLinear, dequantize
from quantize.rtn import QuantizedRows
from quantize.torch_model import load_model
from tests.checkpoints import GROUPED, edit_json, torch_logits, torch_vision, write_checkpoint
from tests.quantized_twin import linear_layers, rounding
from tests.test_engine import FLIPS, NO_FLIP, TWO, Case, Engine, difference
from tests.test_gptq import tiny, write_prompts
from tests.test_rtn import run_matmulnbits

__all__ = ["tiny"]


def random_linear(bits: int, size: int, groups: int, symmetric: bool, seed: int = 0) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    outputs, middle = 24, 2 ** (bits - 1)
    zeros = np.full((groups, outputs), middle) if symmetric else rng.integers(0, 2**bits, (groups, outputs))
    return QuantizedLinear(
        rng.integers(0, 2**bits, (outputs, groups * size), dtype=np.uint8),
        (rng.standard_normal((groups, outputs)) / 50).astype(np.float16),
        zeros.astype(np.uint8),
        (np.arange(groups * size) // size).astype(np.int32),
        bits,
    )


@hypothesis_settings(max_examples=40)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([(32, 3), (64, 2), (128, 1), (96, 2), (48, 3), (104, 1), (256, 2)]),
    st.booleans(),
    st.integers(0, 100),
)
def test_the_kernel_computes_with_the_same_weights(
    bits: int, groups: tuple[int, int], symmetric: bool, seed: int
) -> None:
    linear = random_linear(bits, *groups, symmetric, seed)
    blocks = to_blocks(linear, "layer")
    x = np.random.default_rng(seed).standard_normal((1, 3, linear.codes.shape[1])).astype(np.float32)
    bias = np.zeros(len(linear.codes), np.float32)
    rows = QuantizedRows(blocks.packed, np.ascontiguousarray(blocks.scales))
    found = run_matmulnbits(x, rows, bias, blocks.bits, blocks.block_size, 0, blocks.zeros)
    assert np.abs(found - x @ dequantize(linear).T).max() < 1e-3


def test_groups_without_a_kernel_are_refused() -> None:
    with pytest.raises(GemvgError, match=r"a.layer is stored in groups of 24, which has no kernel; quantise with"):
        to_blocks(random_linear(4, 24, 4, True), "a.layer")


def shuffled(linear: QuantizedLinear, seed: int = 0) -> QuantizedLinear:
    """The same codes in activation order."""
    return linear._replace(groups=np.random.default_rng(seed).permutation(linear.groups))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_inputs_in_activation_order_are_gathered(bits: int) -> None:
    linear = shuffled(random_linear(bits, 32, 4, True), bits)
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    expected = x @ dequantize(linear).T
    blocks = to_blocks(linear, "layer")
    assert blocks.order is not None
    rows = QuantizedRows(blocks.packed, np.ascontiguousarray(blocks.scales))
    bias = np.zeros(len(linear.codes), np.float32)
    found = run_matmulnbits(x[None, :, blocks.order], rows, bias, blocks.bits, blocks.block_size, 0, blocks.zeros)
    assert np.abs(found - expected).max() < 1e-3
    if bits == 8:
        return
    grid = to_grid(linear, "layer")
    assert grid.order is not None
    weight = grid.codes * np.repeat(grid.scales.astype(np.float32), grid.block_size, axis=0)  # (in, out)
    assert np.abs(x[:, grid.order] @ weight - expected).max() < 1e-3
    assert np.abs(x @ weight - expected).max() > 0.1, "in the inputs' own order it would be another layer"


@pytest.mark.parametrize("layout", [to_blocks, to_grid], ids=["blocks", "grid"])
def test_uneven_groups_are_refused(layout: Callable[[QuantizedLinear, str], Any]) -> None:
    linear = random_linear(4, 32, 4, True)
    uneven = linear._replace(groups=np.where(np.arange(128) < 40, 0, linear.groups).astype(np.int32))
    with pytest.raises(GemvgError, match=r"a.layer has groups of 24 to 40 inputs; quantise with even ones"):
        layout(uneven, "a.layer")


def test_a_grid_has_only_what_tensorrt_dequantises_inside_a_product() -> None:
    """4 bits with a scale an output are groups of it; 8 bits in groups, and 4 bits of 40 inputs, are refused."""
    channel = random_linear(4, 128, 1, True)
    grid = to_grid(channel, "layer")
    assert grid.block_size == 64, "a single group is no group to a compiler"
    scales = np.repeat(grid.scales.astype(np.float32), 64, axis=0)  # (in, out)
    assert np.array_equal((grid.codes * scales).T, dequantize(channel))
    assert to_grid(random_linear(4, 32 * 3, 1, True), "layer").block_size == 32
    assert to_grid(random_linear(8, 128, 1, True), "layer").block_size == 0
    said = "a.layer is stored in {}, which TensorRT writes out as floats at every step; quantise it to 4 bits in groups"
    with pytest.raises(GemvgError, match=said.format("groups of 32 of 8 bits")):
        to_grid(random_linear(8, 32, 4, True), "a.layer")
    with pytest.raises(GemvgError, match=said.format("4 bits with one scale for 40 inputs")):
        to_grid(random_linear(4, 40, 1, True), "a.layer")


def test_a_grid_has_no_zero_points() -> None:
    with pytest.raises(GemvgError, match=r"a.layer has zero-points, .*; quantise the float checkpoint with --sym"):
        to_grid(random_linear(4, 32, 4, False), "a.layer")


@pytest.fixture(scope="module")
def in_activation_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desc_act")
    write_checkpoint(folder / "checkpoint", GROUPED)
    write_prompts(folder)
    options: dict[str, Any] = {"records": folder / "records.jsonl", "samples": 2, "device": "cpu"}
    quantize(
        Settings(folder / "checkpoint", folder / "codes", group_size=32, desc_act=True, positive_scales=True, **options)
    )
    assert open_checkpoint(folder / "codes").quantized("model.layers.0.mlp.down_proj").group_size is None
    return folder / "codes"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_activation_order_runs_in_every_dialect(
    dialect: str, in_activation_order: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = ["--dialect", dialect, "--precision", "float32"]
    assert export([str(in_activation_order), str(tmp_path / "bundle"), *kind]) == 0
    capsys.readouterr()
    assert verify([str(tmp_path / "bundle"), "--against", str(in_activation_order)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(result["prefill"], result["decode"]) <= result["tolerance"] == TOLERANCES["float32"]
    assert result["weights"]["decoder"] == "int4-gptq-g32"


@pytest.mark.parametrize(
    "options",
    [
        {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
        {"vision_bits": 4, "head_bits": 4, "embedding_bits": 4, "sym": False},
        {"bits": 8},
    ],
    ids=str,
)
def test_a_bundle_is_its_dequantised_twin(tiny: tuple[Any, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """Equal but where a rounded activation falls the other way, as in tests/test_engine.py."""
    model, folder = tiny
    run = Settings(folder / "checkpoint", tmp_path / "codes", method="rtn", group_size=-1, device="cpu", **options)
    quantize(run)
    assert export([str(run.out), str(tmp_path / "bundle")]) == 0
    twin = load_model(run.out)
    cases = [Case.random(TWO, seed) for seed in range(5)]
    plain, coded = (torch_logits(m, cases[0].ids, cases[0].patches, cases[0].grids) for m in (model, twin))
    assert difference(plain, coded) > 0.05 * plain.std(), "a twin without quantisation would pass"
    written = open_checkpoint(run.out)
    for name, layer in linear_layers(twin):
        stored = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if written.is_quantized(stored):
            layer.register_forward_pre_hook(rounding(Scheme(8, 32)))
    engine = Engine.open(open_bundle(tmp_path / "bundle"))
    differences = []
    for case in cases:
        visual = torch_vision(twin, case.patches, case.grids)
        expected = torch_logits(twin, case.ids, case.patches, case.grids)[np.array(case.cuts[1:]) - 1]
        differences.append(difference(engine.logits(case, case.cuts, visual=visual), expected) / expected.std())
    assert min(differences) <= NO_FLIP
    assert max(differences) <= FLIPS
    stated = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["weights"]
    assert stated["decoder"] == f"int{run.bits}-gptq-channel"
    assert stated["vision"] == ("float32" if run.vision_bits == 16 else f"int{run.vision_bits}-gptq-channel")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_table_is_looked_up(tiny: tuple[Any, Path], tmp_path: Path, bits: Literal[4, 8]) -> None:
    _, folder = tiny
    out = tmp_path / "codes"
    quantize(Settings(folder / "checkpoint", out, method="rtn", group_size=-1, embedding_bits=bits, device="cpu"))
    assert export([str(out), str(tmp_path / "bundle")]) == 0
    table = np.load(tmp_path / "bundle" / EMBEDDING)
    plain = open_checkpoint(out).read("model.embed_tokens.weight")
    assert np.array_equal(dequantize_rows(table, plain.shape[1]), plain)
    bundle = open_bundle(tmp_path / "bundle")
    decoder = OnnxDecoder(bundle)
    assert np.array_equal(decoder.embed(np.array([5, 3, 5])), plain[[5, 3, 5]])
    np.save(tmp_path / "bundle" / EMBEDDING, table[:-1])
    with pytest.raises(GemvgError, match=r"embedding.npy has shape \(447,\)"):
        OnnxDecoder(bundle)


def test_parts_of_several_widths_are_refused(tiny: tuple[Any, Path], tmp_path: Path, capsys: Any) -> None:
    """GPTQModel's overrides may give queries other bits than keys; one kernel holds them side by side."""
    from safetensors.numpy import load_file, save_file

    from quantize.parts import pack_layers

    _, folder = tiny
    out = tmp_path / "codes"
    quantize(Settings(folder / "checkpoint", out, method="rtn", group_size=-1, device="cpu"))
    tensors = load_file(out / "model.safetensors")
    layer = "model.language_model.layers.0.self_attn.q_proj"
    eight = random_linear(8, 96, 1, True)._replace(
        codes=np.zeros((96, 96), np.uint8), scales=np.ones((1, 96), np.float16), zeros=np.full((1, 96), 128, np.uint8)
    )
    save_file(tensors | pack_layers({layer: eight}, "gptq"), out / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    edit_json(out / "config.json", quantization_config=stated | {"dynamic": {"+:.*q_proj": {"bits": 8}}})
    assert export([str(out), str(tmp_path / "bundle")]) == 2
    assert "the parts of model.layers.0.self_attn.qkv_proj have several bits or group sizes" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
