"""What TensorRT-RTX makes of our graphs, read in the engines that it compiles without a GPU: nothing is written out as
floats, attention is one kernel, no cache is copied. A graph made wrong on purpose is told.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.random_checkpoint import QWEN2_VL_2B, write_random_checkpoint
from export.build_memory import build_bytes, check_memory
from export.build_peak import BASE, MIB
from export.bundle_writer import Recipe, write_bundle
from export.engine_check import read_shortened
from export.engine_graphs import in_pieces, input_shapes, read_graph, weight_bytes, write_graph
from export.engine_program import BITS, read_engine, read_inspector
from export.engine_reading import Reading, describe, read_program
from export.op_lists import check_graph, read_op_list
from export.shortened import count_layers, shorten
from export.tensorrt_build import (
    BuildOptions,
    NoFusedAttentionError,
    Range,
    build_engine,
)
from export.to_tensorrt import Limits, plan_jobs, read_graphs, run_job
from gemvg_edge.bundle import DECODER_ENGINE, DECODER_GRAPH, VISION_ENGINE, VISION_GRAPH, Bundle, open_bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.system_memory import available_memory
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import TINY, write_checkpoint

# Layers of Qwen2-VL-2B's widths; what is fused depends on them. The vocabulary is cut: its rows are all alike.
CONFIG = QWEN2_VL_2B | {
    "num_hidden_layers": 2,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
    "vision_config": QWEN2_VL_2B["vision_config"] | {"depth": 2},
}
LAYERS = 2
CAPACITY = 1024  # of a scene: two pictures of 448 x 448 take 512 tokens
# What `quantize.gptq` is asked for. "recommended" is the recipe of README and of the planner.
RECIPES: dict[str, dict[str, Any]] = {
    "recommended": {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
    "int8": {"bits": 8, "group_size": -1, "head_bits": 8, "vision_bits": 8},
}


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX; pip install tensorrt-rtx-cu12 (x86)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "floats"
    write_random_checkpoint(folder, CONFIG, "float16")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Callable[[str, str, str], Bundle]:
    """A bundle by recipe, dialect and precision."""

    def export(recipe: str, dialect: str, precision: str) -> Bundle:
        source = checkpoint if recipe == "floats" else checkpoint.with_name(recipe.replace(" ", "-"))
        if not source.exists():
            options: dict[str, Any] = {"method": "rtn", "device": "cpu", "positive_scales": True, **RECIPES[recipe]}
            quantize(Settings(checkpoint, source, **options))
        target = source.with_name(f"{source.name}-{dialect}-{precision}")
        if not target.exists():
            write_bundle(open_checkpoint(source), target, Recipe(dialect, precision))
        return open_bundle(target)

    return export


def compile_bundle(rtx: Any, bundle: Bundle, folder: Path, capability: str | None = None) -> dict[str, list[Reading]]:
    """What the engines of a bundle do, by name of engine."""
    limits = Limits.of(bundle.manifest, 2, CAPACITY, 1024, 256)
    options = BuildOptions(1024 * MIB, capability=capability)
    jobs = plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, 1)
    return {job.name: run_job(rtx, job, bundle.folder, options, folder) for job in jobs}


@pytest.mark.parametrize(
    ("recipe", "precision", "capability"),
    [
        ("recommended", "bfloat16", "8.0"),
        ("recommended", "bfloat16", "8.9"),
        ("recommended", "bfloat16", "12.0"),
        ("recommended", "float16", "8.6"),
        ("int8", "bfloat16", "8.9"),
        ("floats", "bfloat16", "8.9"),
    ],
)
def test_every_weight_is_read_once_and_as_it_is_stored(
    recipe: str, precision: str, capability: str, rtx: Any, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    readings = compile_bundle(rtx, exported(recipe, "standard", precision), tmp_path, capability)
    for name, profiles in readings.items():
        assert not any(reading.faults(LAYERS) for reading in profiles), describe(profiles, name, "012", LAYERS)
        assert all(reading.attention == LAYERS for reading in profiles)
        assert all(reading.weights_moved <= 1.001 * reading.weights for reading in profiles)
    prefill, decode, _ = readings[DECODER_ENGINE]
    assert decode.cache_read == LAYERS * 2 * 2 * CAPACITY * 128 * 2, "keys and values of two heads, each once"
    assert decode.weights_moved + decode.cache_read <= 1.1 * decode.weights
    assert decode.taken_copied == 0
    assert decode.kernels <= 12 * LAYERS + 6
    # A prefill copies the places that are taken, of the few key/value heads, where it would write out all heads.
    assert prefill.taken_copied == LAYERS * 2 * 2 * 128 * 2


@pytest.mark.parametrize(("recipe", "precision"), [("recommended", "bfloat16"), ("int8", "float16")])
def test_what_is_known_of_the_plain_dialect(
    recipe: str, precision: str, rtx: Any, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    """No good form without a plug-in was found for TensorRT 10.3; docs/devices.md says so."""
    readings = compile_bundle(rtx, exported(recipe, "plain", precision), tmp_path)
    decode = readings[DECODER_ENGINE][1]
    assert (decode.attention, decode.written_out) == (0, ())
    assert decode.copied == ("past_key_0", "past_key_1"), "keys are transposed; values are read where they lie"
    assert decode.weights_moved <= 1.001 * decode.weights
    assert not any(reading.faults(LAYERS) for reading in readings[VISION_ENGINE])


def test_float32_has_no_fused_attention_and_says_so(
    rtx: Any, exported: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("floats", "standard", "float32")
    limits = Limits.of(bundle.manifest, 2, CAPACITY, 1024, 256)
    job = plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, 1)[1]
    graph = tmp_path / "decoder.onnx"
    write_graph(job.graph, graph, bundle.folder)
    target, options = tmp_path / "none.engine", BuildOptions(1024 * MIB)
    with pytest.raises(NoFusedAttentionError, match="Attention operation was not supported by a dedicated kernel"):
        build_engine(rtx, graph, input_shapes(job.graph), job.profiles, options, target)
    prefill, decode, _ = run_job(rtx, job, bundle.folder, options, tmp_path)
    assert "decoder.engine is built again, its attention of several kernels each: slower" in capsys.readouterr().err
    assert prefill.faults(LAYERS)[-1] == "2 of 2 attentions are several kernels"
    assert prefill.copied == ("present_key_0", "present_value_0", "present_key_1", "present_value_1"), "for every head"
    assert decode.faults(LAYERS) == []


INPUTS, OUTPUTS = 1536, 4096


def one_product(rtx: Any, bits: int, group: int, rows: int, folder: Path) -> Reading:
    """The program of a single weight-only product, on purpose without export's care."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-7, 8, (INPUTS, OUTPUTS)).astype(np.int8)
    shape = (INPUTS // group, OUTPUTS) if group else (OUTPUTS,)
    scales = numpy_helper.from_array((rng.random(shape) / 100 + 0.001).astype(np.float16), "scales")
    weight = numpy_helper.from_array(codes, "codes")
    if bits == 4:
        weight = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.reshape(-1).tolist())
    blocks: dict[str, Any] = {"axis": 0, "block_size": group} if group else {"axis": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], "DequantizeLinear_node_0", **blocks),
        helper.make_node("MatMul", ["x", "w"], ["y"], "MatMul_node_1"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [rows, INPUTS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, [rows, OUTPUTS])
    graph = helper.make_graph(nodes, "decoder", [x], [y], [weight, scales])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=12)
    onnx.save(model, folder / DECODER_GRAPH)
    build_engine(rtx, folder / DECODER_GRAPH, input_shapes(model), [], BuildOptions(256 * MIB), folder / "engine")
    (program,) = read_engine(folder / "engine")
    return read_program(program)


@pytest.mark.parametrize(
    ("bits", "group", "rows", "fused", "said"),
    [
        (4, 128, 1, True, None),
        (4, 32, 1, True, None),
        (4, 0, 1, False, "4 bits with one scale an output are written out as floats at every run"),
        (8, 0, 2, True, "8 bits are written out as floats where a product has a single row"),
        (8, 0, 1, False, "8 bits are written out as floats where a product has a single row"),
        (8, 128, 1, False, "8 bits in groups of 128 are written out as floats at every run"),
        (8, 128, 16, False, "8 bits in groups of 128 are written out as floats at every run"),
    ],
)
def test_a_weight_that_is_written_out_is_told(
    bits: int, group: int, rows: int, fused: bool, said: str | None, rtx: Any, tmp_path: Path
) -> None:
    """By the program and, before anything is compiled, by the rules of the op lists."""
    reading = one_product(rtx, bits, group, rows, tmp_path)
    assert (reading.faults(0) == []) == fused
    stored = INPUTS * OUTPUTS * bits // 8
    assert (reading.weights_moved < 1.2 * stored) == fused
    if not fused:
        assert reading.faults(0) == ["the weight of DequantizeLinear_node_0 is written out as floats at every run"]
        assert reading.weights_moved >= stored + 2 * 2 * INPUTS * OUTPUTS, "read, written and read again"
    problems = check_graph(tmp_path / DECODER_GRAPH, read_op_list("tensorrt_10_15"))
    assert [said in problem for problem in problems] == [True] if said else problems == []


def test_a_cache_that_is_copied_for_every_head_is_told(
    rtx: Any, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    """As it was before the attended places were cut off: prefill wrote keys and values out for all heads."""
    bundle = exported("recommended", "standard", "bfloat16")
    graph = read_graph(bundle.path(DECODER_GRAPH), {"batch": 1, "rows": 1, "capacity": CAPACITY})
    slices = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "Slice"}
    for node in graph.graph.node:
        if node.op_type == "Attention":
            node.input[1], node.input[2] = slices[node.input[1]], slices[node.input[2]]
    for value in graph.graph.input:
        if value.name == "slots":
            value.type.tensor_type.shape.dim[0].dim_value = CAPACITY
    write_graph(graph, tmp_path / "decoder.onnx", bundle.folder)
    profiles = [{"tokens": Range(1, 256, 256)}]
    engine = tmp_path / "engine"
    build_engine(rtx, tmp_path / "decoder.onnx", input_shapes(graph), profiles, BuildOptions(1024 * MIB), engine)
    (program,) = read_engine(engine)
    assert "present_key_0 is copied at every run, whole or for every head" in read_program(program).faults(LAYERS)


@pytest.mark.parametrize("dialect", ["standard", "plain", "fused"])
def test_a_shortened_graph_has_the_first_layers_and_the_last(dialect: str, tmp_path: Path) -> None:
    vision = {**TINY["vision_config"], "depth": 4}
    write_checkpoint(tmp_path / "checkpoint", {**TINY, "vision_config": vision})
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", Recipe(dialect))
    for name, prefix, layers in ((DECODER_GRAPH, "model.layers", (0, 2)), (VISION_GRAPH, "visual.blocks", (0, 3))):
        whole = read_graph(tmp_path / "bundle" / name, {})
        assert shorten(whole, count_layers(whole)) is whole
        short = shorten(whole, 2)
        assert {node.name.split("/")[0] for node in short.graph.node if "/" in node.name} == {
            f"{prefix}.{layer}" for layer in layers
        }
        assert count_layers(short) == 2
        write_graph(short, tmp_path / "bundle" / name, tmp_path / "bundle")
        session = onnxruntime.InferenceSession(str(tmp_path / "bundle" / name), providers=["CPUExecutionProvider"])
        assert len(session.get_outputs()) == (1 if name == VISION_GRAPH else 5)
        assert (in_pieces(whole) is not None) == (dialect == "standard")


def test_a_file_without_a_program_is_told(tmp_path: Path) -> None:
    (tmp_path / "engine").write_bytes(b"ftrt" + bytes(1000))
    with pytest.raises(GemvgError, match="engine holds no compiled program that can be read"):
        read_engine(tmp_path / "engine")


def test_what_cannot_be_compiled_or_read_ends_no_verification(
    random_model: tuple[Any, Path],
    rtx: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = open_checkpoint(random_model[1].parent / "checkpoint")
    write_bundle(checkpoint, tmp_path / "bundle", Recipe("standard", "bfloat16"))
    bundle = open_bundle(tmp_path / "bundle")
    assert set(read_shortened(bundle)) == {VISION_ENGINE, DECODER_ENGINE}
    monkeypatch.delitem(BITS, "bf16")
    assert read_shortened(bundle) == {}
    said = capsys.readouterr().out
    assert f"{DECODER_ENGINE} is not read: a compiled program has tensors of type 'bf16', not known here" in said
    monkeypatch.setattr("export.engine_program._START", b"header of the next version")
    assert read_shortened(bundle) == {}
    assert "holds no compiled program that can be read" in capsys.readouterr().out
    monkeypatch.setattr("export.engine_check.available_memory", lambda: 100 * MIB)
    assert read_shortened(bundle) == {}
    assert "not compiled: it takes about" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    assert read_shortened(bundle) == {}
    assert "not compiled: no TensorRT-RTX here" in capsys.readouterr().out


def test_the_inspector_of_tensorrt_is_read() -> None:
    """In the schema of its documentation; what TensorRT itself says has not been seen yet."""

    def layer(name: str, nodes: list[str], **more: Any) -> dict[str, Any]:
        tensors = {"Inputs": [{"Name": "a", "Dimensions": [1, 8]}], "Outputs": [{"Name": "b", "Dimensions": [1, -1]}]}
        metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
        return {"Name": name, "LayerType": "kgen", **tensors, "Metadata": metadata, **more}

    layers = [
        layer("__myl_Cast_myl0_0", ["model.layers.0/DequantizeLinear_node_3"]),
        layer("__myl_Fc_myl0_1", ["model.layers.0/DequantizeLinear_node_4", "model.layers.0/MatMul_node_5"]),
        layer("_gemm_mha_v2_myl0_2 [profile 1]", ["model.layers.0/Attention_node_9"], TacticName="fmha"),
    ]
    first, second = (read_program(program) for program in read_inspector(json.dumps({"Layers": layers})))
    assert (first.profile, first.kernels, first.written_out) == (0, 2, ("model.layers.0/DequantizeLinear_node_3",))
    assert (second.profile, second.kernels, second.attention) == (1, 1, 1)
    said = ["decoder, a token: 1 kernels, 1 of 1 attentions fused"]
    assert describe([second], "decoder", ("prefill", "a token"), 1) == said
    for broken in ("no JSON", '{"Layers": ["only a name"]}', "{}"):
        with pytest.raises(GemvgError, match="what TensorRT's inspector says cannot be read"):
            read_inspector(broken)


PROBE = """
import sys
from pathlib import Path
import tensorrt_rtx_bindings as rtx
from export.build_memory import build_bytes, return_freed_memory
from export.engine_graphs import input_shapes, read_graph, write_graph
from export.tensorrt_build import BuildOptions, build_engine, decoder_profiles
bundle, folder = map(Path, sys.argv[1:])
graph = read_graph(bundle / "decoder.onnx", {"batch": 1, "rows": 1, "capacity": 1024})
return_freed_memory()
write_graph(graph, folder / "decoder.onnx", bundle)
profiles = decoder_profiles(1024, 1024)
build_engine(rtx, folder / "decoder.onnx", input_shapes(graph), profiles, BuildOptions(2**30), folder / "engine")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print(build_bytes(graph), int(peak) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["recommended", "floats"])
def test_the_memory_of_a_build_is_known_beforehand(
    recipe: str, rtx: Any, exported: Callable[..., Bundle], tmp_path: Path
) -> None:
    """In a process of its own, as it is built; the whole 2B: `python -m bench.engines`."""
    bundle = exported(recipe, "standard", "bfloat16")
    command = [sys.executable, "-c", PROBE, str(bundle.folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    predicted, peak = map(int, done.stdout.split())
    assert abs(predicted / peak - 1) < 0.15, (predicted / MIB, peak / MIB)


def test_files_that_a_container_holds_in_memory_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemvg_edge.system_memory.CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{64 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{60 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {10 * MIB}\nactive_file {20 * MIB}\ninactive_file {30 * MIB}\n")
    assert available_memory() == 54 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    free = available_memory()
    assert free is not None
    assert free > 64 * MIB


def test_a_build_without_memory_is_refused(exported: Callable[..., Bundle]) -> None:
    graph = read_graph(exported("recommended", "standard", "bfloat16").path(DECODER_GRAPH), {})
    needed = build_bytes(graph)
    assert needed > BASE + 2 * weight_bytes([graph])
    assert check_memory([("decoder.engine", graph)], 0, needed) == needed
    with pytest.raises(GemvgError, match=r"building decoder.engine takes about 0.\d GiB of memory, and 0.1 are free"):
        check_memory([("decoder.engine", graph)], 0, 100 * MIB)
    with pytest.raises(GemvgError, match="close what else uses it, add swap, or quantise the checkpoint to fewer bits"):
        check_memory([("decoder.engine", graph)], 1, needed)
