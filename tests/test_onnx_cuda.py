"""ONNX Runtime on CUDA: what is refused and why, on the CPU's build; with a GPU (marked `gpu`) answers as the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from export.bundle_writer import Recipe, write_bundle
from export.weights import Scheme
from gemvg_edge.bundle import DECODER_GRAPH, VISION_GRAPH, open_bundle
from gemvg_edge.decoding import Rope
from gemvg_edge.engines import onnx_providers as providers
from gemvg_edge.engines.graph_ops import adds_bias_to_codes
from gemvg_edge.engines.onnxruntime import OnnxCache, OnnxDecoder, OnnxVisionTower, open_graph
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from tests.test_engine import ONE, STEPS, TWO, Case, Engine, difference

RECIPES = {
    "fused float16": Recipe("fused", "float16"),
    "fused int4": Recipe("fused", "float16", decoder=Scheme(4, 32), vision=Scheme(8, 32)),
    "standard float32": Recipe("standard", "float32"),
    "standard float16": Recipe("standard", "float16"),
    "standard bfloat16": Recipe("standard", "bfloat16"),
}
HAS_CUDA = providers.CUDA in onnxruntime.get_available_providers() and torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device, or an onnxruntime without CUDA")
without_cuda = pytest.mark.skipif(HAS_CUDA, reason="CUDA is here")


@pytest.fixture(scope="module")
def bundles(random_model: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny random model in what CUDA may run, by the names of RECIPES."""
    folder, checkpoint = tmp_path_factory.mktemp("cuda"), open_checkpoint(random_model[1].parent / "checkpoint")
    for name, recipe in RECIPES.items():
        write_bundle(checkpoint, folder / name, recipe)
    return {name: folder / name for name in RECIPES}


@pytest.mark.parametrize(
    ("version", "engine", "dialect", "precision", "biased", "said"),
    [
        ("1.23.2", "onnx", "fused", "float32", True, None),
        ("1.23.2", "onnx", "plain", "float32", False, None),
        ("1.24.4", "onnx", "standard", "float32", False, r"standard dialect, which needs ONNX Runtime 1\.25 or newer"),
        ("1.25.0", "onnx", "standard", "float32", False, None),
        ("1.23.2", "onnx-cuda", "fused", "float16", False, None),
        ("1.28.0", "onnx-cuda", "fused", "bfloat16", False, None),
        ("1.31.1", "onnx-cuda", "fused", "float32", False, r"in float32, .*; export with --precision float16"),
        ("1.27.0", "onnx-cuda", "fused", "float16", True, r"quantised .* bias, .* from 1\.28 on \(this is 1\.27\.0\)"),
        ("1.28.0", "onnx-cuda", "fused", "float16", True, None),
        ("1.33.0.dev20261101", "onnx-cuda", "fused", "float16", True, None),
        ("1.24.4", "onnx-cuda", "standard", "float16", False, r"1\.25 or newer \(this is 1\.24\.4\)"),
        ("1.25.0", "onnx-cuda", "standard", "float32", False, None),
        ("1.31.1", "onnx-cuda", "plain", "float16", False, r"plain dialect, whose cache ONNX Runtime keeps on the CPU"),
    ],
)
def test_what_runs_where(
    version: str, engine: str, dialect: str, precision: str, biased: bool, said: str | None
) -> None:
    found = providers.refusal(version, engine, dialect, precision, biased)
    if said is None:
        assert found is None
    else:
        with pytest.raises(GemvgError, match=said):
            raise GemvgError(found)


def test_a_bias_of_quantised_layers_is_found(bundles: dict[str, Path], tmp_path: Path) -> None:
    for graph in (VISION_GRAPH, DECODER_GRAPH):
        assert adds_bias_to_codes(bundles["fused int4"] / graph)
        assert not adds_bias_to_codes(bundles["fused float16"] / graph)
        assert not adds_bias_to_codes(bundles["standard float16"] / graph)
    model = onnx.load(bundles["fused int4"] / DECODER_GRAPH, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and len(node.input) > 5:
            node.input[5] = ""
    onnx.save(model, tmp_path / "none.onnx")
    assert not adds_bias_to_codes(tmp_path / "none.onnx")


def test_the_old_kernel_is_refused_a_bias(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    with pytest.raises(GemvgError, match=r"fused int4 has quantised layers with a bias, .*'onnxruntime-gpu.*>=1\.28"):
        OnnxVisionTower(open_bundle(bundles["fused int4"]), engine="onnx-cuda")


@without_cuda
@pytest.mark.parametrize("name", ["fused float16", "standard bfloat16"])
def test_without_cuda_it_says_what_to_install(name: str, bundles: dict[str, Path]) -> None:
    """Either the build has no such provider, or it has one that cannot start."""
    with pytest.raises(GemvgError, match=r"(?s)(CUDAExecutionProvider|CUDA's libraries).*>=1\.28,<2.*<1\.27.*CUDA 12"):
        OnnxDecoder(open_bundle(bundles[name]), engine="onnx-cuda")


def test_a_session_that_fell_back_is_refused(bundles: dict[str, Path]) -> None:
    session = open_graph(bundles["fused float16"] / DECODER_GRAPH)
    providers.check_started(onnxruntime, session, "onnx", "")
    with pytest.raises(GemvgError, match=r"without its CUDAExecutionProvider .* the CPU \(its log says why\)"):
        providers.check_started(onnxruntime, session, "onnx-cuda", "")
    with pytest.raises(GemvgError, match=r"on the CPU \(libcudart\.so\.13: cannot open\); run `pip install"):
        providers.check_started(onnxruntime, session, "onnx-cuda", "libcudart.so.13: cannot open")


# What onnxruntime-gpu 1.26.0 raises with CUDA's libraries and without a driver.
CUDA_FAILURE = (
    "/onnxruntime_src/cuda_call.cc:122 [with ERRTYPE = cudaError; bool THRW = true]\nCUDA failure {}: {} ; GPU=-1 ; "
    "hostname=vm ; file=cuda_execution_provider.cc ; line=336 ; expr=cudaSetDevice(info_.device_id); \n\n"
)


def test_why_a_session_was_not_opened() -> None:
    old = RuntimeError(CUDA_FAILURE.format(35, "CUDA driver version is insufficient for CUDA runtime version"))
    said = "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version; run `pip install"
    assert providers.why_not_opened(old, "").startswith(said)
    full = RuntimeError(CUDA_FAILURE.format(2, "out of memory"))
    assert providers.why_not_opened(full, "") == "CUDA failure 2: out of memory; close what else uses the GPU"
    none = RuntimeError(CUDA_FAILURE.format(100, "no CUDA-capable device is detected"))
    assert "is detected; see with `nvidia-smi` whether there is one" in providers.why_not_opened(none, "libx")
    assert providers.why_not_opened(ValueError("no\nkernel"), "") == "no kernel"
    assert "no kernel; first, CUDA's libraries: libx" in providers.why_not_opened(ValueError("no kernel"), "libx")


def test_loading_cudas_libraries_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    providers.load_cuda(onnxruntime)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("fused int4", "GroupQueryAttention, MatMulNBits, .*"),
        ("standard float32", "Attention, .*TensorScatter, Transpose"),
    ],
)
def test_keys_and_values_on_the_cpu_are_refused(name: str, kinds: str, bundles: dict[str, Path]) -> None:
    path = bundles[name] / DECODER_GRAPH
    session = open_graph(path, entries=providers.RECORD)
    assert providers.reads_on_cpu(session, ["past_key_0", "present_value_0"]) == ["past_key_0", "present_value_0"]
    with pytest.raises(
        GemvgError, match=rf"decoder\.onnx: .* present_key_0 on the CPU, since .* kernel for {kinds}, and"
    ):
        providers.check_cache_placement(path, session, ["present_key_0", "past_key_0"])
    providers.check_cache_placement(path, session, [])


def test_what_the_cpu_computes_for_cuda_is_a_warning(
    bundles: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = bundles["fused int4"] / DECODER_GRAPH
    providers.warn_of_cpu(path, open_graph(path, entries=providers.RECORD))
    assert "computes GroupQueryAttention, MatMulNBits, " in caplog.text


def test_a_bfloat16_cache_has_the_graphs_type(bundles: dict[str, Path]) -> None:
    """In a graph that only copies keys, which the CPU has kernels for."""
    manifest = open_bundle(bundles["standard bfloat16"]).manifest
    manifest = replace(manifest, model=replace(manifest.model, layers=1))
    shape, capacity = manifest.model, 6
    dims = [1, shape.kv_heads, capacity, shape.head_dim]
    tensor = helper.make_tensor_value_info
    inputs = [tensor(f"past_{part}_0", TensorProto.BFLOAT16, dims) for part in ("key", "value")]
    inputs.append(tensor("slots", TensorProto.INT64, [capacity]))
    outputs = [tensor(f"present_{part}_0", TensorProto.BFLOAT16, dims) for part in ("key", "value")]
    outputs += [tensor("logits", TensorProto.FLOAT, [1, shape.vocab_size])]
    size = onnx.numpy_helper.from_array(np.array([1, shape.vocab_size]))
    nodes = [
        helper.make_node("Identity", ["past_key_0"], ["present_value_0"]),
        helper.make_node("Identity", ["past_key_0"], ["present_key_0"]),
        helper.make_node("Constant", [], ["size"], value=size),
        helper.make_node("ReduceMax", ["slots"], ["last"], keepdims=1),
        helper.make_node("Cast", ["last"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Expand", ["number", "size"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "copies", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[providers.CPU])
    cache = OnnxCache(session, manifest, capacity, "cpu")
    cache.keys_values["key_0"][...] = 0x3F80  # one
    cache.look_at(capacity)
    session.run_with_iobinding(cache.binding)
    assert (cache.logits == capacity - 1).all()
    assert (cache.keys_values["value_0"] == 0x3F80).all()
    assert cache.keys_values["value_0"].dtype == np.uint16


def test_a_rotary_table_is_bound_once(bundles: dict[str, Path]) -> None:
    """What is written later is what the graph reads, and rows that are there already change nothing."""
    case = Case.random(ONE)
    engine = Engine.open(open_bundle(bundles["fused float16"]))
    cache = engine.decoder.new_cache(len(case.ids))
    first = engine.logits(case, case.cuts, cache)
    assert cache.rotary is not None
    kept = cache.rotary.copy()
    assert np.array_equal(engine.logits(case, case.cuts, cache), first)
    cache.write_rotary(0, *kept[:, :3])
    assert np.array_equal(cache.rotary, kept)
    cache.write_rotary(0, -kept[0], -kept[1])
    assert np.array_equal(cache.rotary, -kept)
    assert difference(engine.logits(case, case.cuts, cache), first) == 0  # each step writes its own rows


def on_cuda(folder: Path) -> Engine:
    """A bundle opened on the GPU."""
    bundle = open_bundle(folder)
    shape = bundle.manifest.model
    rope = Rope(shape.head_dim, shape.rope_theta, shape.mrope_section)
    return Engine(OnnxVisionTower(bundle, engine="onnx-cuda"), OnnxDecoder(bundle, engine="onnx-cuda"), rope)


# Largest difference from float32 on the CPU, in standard deviations.
CUDA_DIFFERENCES = {"float32": 1e-2, "float16": 3e-2, "bfloat16": 0.2}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", RECIPES)
def test_cuda_answers_as_the_cpu(name: str, bundles: dict[str, Path], random_model: tuple[Any, Path]) -> None:
    ours, case = on_cuda(bundles[name]), Case.random(TWO)
    twin = "fused int4" if name == "fused int4" else "standard float32"
    theirs = Engine.open(open_bundle(bundles[twin]))
    tolerance = CUDA_DIFFERENCES[RECIPES[name].precision]
    expected = theirs.logits(case, case.cuts)
    assert difference(ours.logits(case, case.cuts), expected) <= tolerance * expected.std()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["fused float16", "standard float16", "standard bfloat16"])
def test_cuda_keeps_scenes_apart_and_copies_them(name: str, bundles: dict[str, Path]) -> None:
    engine = on_cuda(bundles[name])
    case, other = Case.random(ONE), Case.random(TWO, seed=1)
    start, total = len(case.ids) - STEPS, len(case.ids)
    alone = engine.logits(case, case.cuts)
    cache, second, longer = (engine.decoder.new_cache(size) for size in (total, len(other.ids), total + 30))
    assert len(cache.on_device) == 2 * engine.decoder._manifest.model.layers + 2 * name.startswith("fused")
    assert not cache.keys_values
    held = sum(value.tensor_size_in_bytes() for value in cache.on_device.values()) + cache.logits.nbytes
    assert cache.bytes == held + (0 if cache.rotary is None else cache.rotary.nbytes)
    engine.logits(case, [0, start], cache)
    engine.decoder.copy(cache, longer, start)
    engine.logits(other, other.cuts, second)
    assert difference(engine.logits(case, case.cuts[1:], cache), alone[1:]) <= 1e-3
    assert difference(engine.logits(case, case.cuts[1:], longer), alone[1:]) <= CUDA_DIFFERENCES["bfloat16"]
