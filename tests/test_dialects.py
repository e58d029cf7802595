"""Every dialect and precision against transformers through `export.verify`, and what each of them refuses."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.to_onnx import main as export
from export.verify import TOLERANCES
from export.verify import main as verify
from gemvg_edge import GemvgError, Grounder
from gemvg_edge.bundle import (
    DECODER_DATA,
    DECODER_ENGINE,
    DECODER_GRAPH,
    DIALECTS,
    EMBEDDING,
    VISION_ENGINE,
    open_bundle,
)
from gemvg_edge.engines.onnxruntime import OnnxDecoder
from quantize.gptq import Settings, quantize
from tests.checkpoints import GROUPED, GROUPED_2_5, GROUPED_3, write_checkpoint
from tests.test_export import digests

Capture = pytest.CaptureFixture[str]
SIZES = {"qwen2_vl": GROUPED, "qwen2_5_vl": GROUPED_2_5, "qwen3_vl": GROUPED_3}
EVERYTHING: dict[str, Any] = {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8, "method": "rtn", "device": "cpu"}
CODES: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32, "positive_scales": True},
    "int4 a row": {"bits": 4, "group_size": -1, "positive_scales": True},
    "int8": {"bits": 8, "group_size": -1, "positive_scales": True},
    "signed": {"bits": 4, "group_size": 32},
    "zero-points": {"bits": 4, "group_size": 32, "sym": False},
}
FLOAT_RECIPES = [
    *((dialect, "float32") for dialect in DIALECTS),
    *((dialect, "float16") for dialect in DIALECTS),
    ("standard", "bfloat16"),
    ("plain", "bfloat16"),
]


@pytest.fixture(scope="module", params=SIZES)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `floats` and of each of CODES, of one family."""
    folder = tmp_path_factory.mktemp("dialects")
    write_checkpoint(folder / "floats", SIZES[request.param])
    for name, options in CODES.items():
        quantize(Settings(folder / "floats", folder / name, **EVERYTHING, **options))
    return folder


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("floats") / "checkpoint"
    write_checkpoint(folder, GROUPED)
    return folder


def export_as(checkpoint: Path, target: Path, dialect: str, precision: str = "float32", *more: str) -> int:
    return export([str(checkpoint), str(target), "--dialect", dialect, "--precision", precision, *more])


def run_verify(bundle: Path, checkpoint: Path, capsys: Capture) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = verify([str(bundle), "--against", str(checkpoint)])
    said = capsys.readouterr()
    assert code in (0, 1), said.err
    return code, json.loads(said.out.splitlines()[-1])


@pytest.mark.parametrize(("dialect", "precision"), FLOAT_RECIPES)
def test_floats_are_transformers(
    dialect: str, precision: str, checkpoints: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert export_as(checkpoints / "floats", tmp_path / "bundle", dialect, precision) == 0
    code, result = run_verify(tmp_path / "bundle", checkpoints / "floats", capsys)
    kinds = {"vision", "prefill", "decode", *["batch"] * (dialect != "fused")}
    assert (code, result["passed"], result["unparsed"]) == (0, True, [])
    assert {kind for kind in ("vision", "prefill", "decode", "batch") if kind in result} == kinds
    assert all(0 < result[kind] <= result["tolerance"] == TOLERANCES[precision] for kind in kinds)
    if precision != "float32":
        assert max(result[kind] for kind in kinds) > TOLERANCES[precision] / 300, "these are float32's digits"
    assert (result["dialect"], result["precision"]) == (dialect, precision)
    compiled = find_spec("tensorrt_rtx_bindings") and dialect != "fused" and precision != "float32"
    assert set(result["engines"]) == ({VISION_ENGINE, DECODER_ENGINE} if compiled else set())
    assert not any(profile["written_out"] for profiles in result["engines"].values() for profile in profiles)


TIED = [(dialect, precision) for dialect, precision in FLOAT_RECIPES if precision != "bfloat16"]


@pytest.mark.parametrize(("dialect", "precision"), TIED)
def test_a_tied_head_is_the_table(dialect: str, precision: str, tmp_path: Path, capsys: Capture) -> None:
    """It is stored once, and the graph reads it where the runtime looks its tokens up."""
    write_checkpoint(tmp_path / "checkpoint", GROUPED, tied=True)
    assert export_as(tmp_path / "checkpoint", tmp_path / "bundle", dialect, precision) == 0
    table = np.load(tmp_path / "bundle" / EMBEDDING)
    assert ("embedding.npy", table.shape, table.dtype) == head_place(tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle" / DECODER_GRAPH).graph
    (head,) = (tensor for tensor in graph.initializer if tensor.name == "lm_head.weight")
    assert np.array_equal(onnx.numpy_helper.to_array(head), table)
    assert run_verify(tmp_path / "bundle", tmp_path / "checkpoint", capsys)[0] == 0


@pytest.mark.parametrize(("precision", "options"), [("bfloat16", []), ("float16", ["--weights", "int8"])])
def test_a_tied_head_of_another_type_is_stored_for_itself(precision: str, options: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", GROUPED, tied=True)
    dialect = "fused" if options else "standard"
    assert export_as(tmp_path / "checkpoint", tmp_path / "bundle", dialect, precision, *options) == 0
    assert head_place(tmp_path / "bundle")[0] == DECODER_DATA


def head_place(bundle: Path) -> tuple[str, tuple[int, ...], np.dtype[Any]]:
    """The file that a decoder has its head in, the head's shape and its type."""
    graph = onnx.load(bundle / DECODER_GRAPH, load_external_data=False).graph
    (head,) = (tensor for tensor in graph.initializer if tensor.name in ("lm_head.weight", "lm_head.packed"))
    (file,) = (entry.value for entry in head.external_data if entry.key == "location")
    return file, tuple(head.dims), onnx.helper.tensor_dtype_to_np_dtype(head.data_type)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("codes", "precision"),
    [("int4", "float32"), ("int4", "float16"), ("int4 a row", "float32"), ("int8", "float32"), ("int8", "float16")],
)
def test_codes_are_transformers(
    dialect: str, codes: str, precision: str, checkpoints: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert export_as(checkpoints / codes, tmp_path / "bundle", dialect, precision) == 0
    code, result = run_verify(tmp_path / "bundle", checkpoints / codes, capsys)
    assert (code, result["tolerance"], result["unparsed"]) == (0, TOLERANCES[precision], [])
    assert result["weights"]["decoder"] == ("int4-gptq-g32" if codes == "int4" else f"{codes[:4]}-gptq-channel")
    emulated = precision == "float16" and dialect != "fused"  # as TensorRT's kernels, which round no activations
    assert set(result.get("with_8_bit_activations", {})) == (set() if emulated else {"vision", "prefill", "decode"})


@pytest.mark.parametrize("dialect", ["standard", "plain"])
def test_negative_scales_are_named(dialect: str, checkpoints: Path, tmp_path: Path, capsys: Capture) -> None:
    assert export_as(checkpoints / "signed", tmp_path / "bundle", dialect) == 0
    code, result = run_verify(tmp_path / "bundle", checkpoints / "signed", capsys)
    assert (code, result["passed"]) == (1, False)
    assert max(result[kind] for kind in ("vision", "prefill", "decode")) <= TOLERANCES["float32"]
    fix = "quantise with `python -m quantize.gptq --positive-scales`"
    assert all("(DequantizeLinear): all scales" in said and said.endswith(fix) for said in result["unparsed"])
    assert any("decoder.onnx: node 'model.layers.1/DequantizeLinear" in said for said in result["unparsed"])


def test_negative_scales_do_where_kernels_take_them(checkpoints: Path, tmp_path: Path, capsys: Capture) -> None:
    for codes in ("signed", "zero-points"):
        assert export_as(checkpoints / codes, tmp_path / codes, "fused") == 0
        assert run_verify(tmp_path / codes, checkpoints / codes, capsys)[0] == 0


@pytest.mark.parametrize("dialect", ["standard", "plain"])
def test_zero_points_are_refused(dialect: str, checkpoints: Path, tmp_path: Path, capsys: Capture) -> None:
    assert export_as(checkpoints / "zero-points", tmp_path / "bundle", dialect) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.0.self_attn.q_proj has zero-points, which TensorRT does not take; quantise" in said
    assert not list(tmp_path.iterdir())


REFUSED = {
    "rounding for plain": (("plain", "float32", "--weights", "int4"), "the plain dialect takes quantised layers as"),
    "rounding for standard": (("standard", "float16", "--vision-weights", "int8"), "run `python -m quantize.gptq`"),
    "bfloat16 for fused": (("fused", "bfloat16"), "the fused dialect has no bfloat16; it computes in float32, float16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_dialect_cannot_hold(case: str, floats: Path, tmp_path: Path, capsys: Capture) -> None:
    given, said = REFUSED[case]
    assert export_as(floats, tmp_path / "bundle", *given) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_numbers_past_float16_are_refused(dialect: str, tmp_path: Path, capsys: Capture) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", GROUPED)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "checkpoint")
    assert export_as(tmp_path / "checkpoint", tmp_path / "bundle", dialect, "float16") == 2
    said = "model.layers.1.mlp.up_proj.weight holds numbers past float16's 65504; export with --precision bfloat16 or"
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("dialect", "precision"), FLOAT_RECIPES)
@pytest.mark.parametrize("stored", ["floats", "int4"])
def test_exported_twice_gives_equal_bytes(
    dialect: str, precision: str, stored: str, checkpoints: Path, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        assert export_as(checkpoints / stored, tmp_path / folder / "bundle", dialect, precision) == 0
    assert digests(tmp_path / "one" / "bundle") == digests(tmp_path / "two" / "bundle")


@pytest.fixture(scope="module")
def bundles(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    for dialect in DIALECTS:
        assert export_as(floats, folder / dialect, dialect) == 0
    return folder


ENGINES = {
    "unknown": ("fused", "cuda", r"engine='cuda'; give one of native, onnx, onnx-cuda, tensorrt \(for what `python -m"),
    "CUDA": ("fused", "onnx-cuda", r"fused has the fused dialect in float32, .*; export with --precision float16"),
    "CUDA, standard": (
        "standard",
        "onnx-cuda",
        r"needs ONNX Runtime's CUDAExecutionProvider, .*'onnxruntime-gpu",
    ),
    "its TensorRT": ("standard", "onnx-tensorrt", r"engine='onnx-tensorrt'; give one of .* export.to_tensorrt` built"),
    "engines": ("plain", "tensorrt", r"plain holds ONNX graphs, .*engine='tensorrt' does not run; build engines with"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_an_engine_that_cannot_be(case: str, bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dialect, engine, said = ENGINES[case]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(GemvgError, match=said) as caught:
        Grounder.open(bundles / dialect, engine=engine)
    assert "\n" not in str(caught.value)


def test_a_plain_cache_is_the_cpus(bundles: Path) -> None:
    opened = partial(OnnxDecoder, open_bundle(bundles / "plain"), engine="onnx-cuda")
    with pytest.raises(GemvgError, match=r"plain has the plain dialect, whose cache .* --dialect fused or standard"):
        opened()


def test_the_engine_of_graphs_is_onnx(bundles: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    opened = [Grounder.open(bundles / dialect, max_new_tokens=24) for dialect in DIALECTS]
    opened.append(Grounder.open(bundles / "fused", engine="onnx", max_new_tokens=24))
    texts = [grounder.ground([pixels, pixels[:28]], "the red mug").text for grounder in opened]
    assert len(texts[0]) > 0
    assert len(set(texts)) == 1
