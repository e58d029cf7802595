"""TensorRT as far as a CPU without it sees: graphs, shapes, copies, sentences; see also test_tensorrt_engines.py."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.build_peak import MIB
from export.bundle_folder import new_bundle_folder
from export.bundle_writer import Recipe, write_bundle, write_manifest
from export.engine_graphs import head_pieces, input_shapes, read_graph, split_head, weight_bytes
from export.tensorrt_build import (
    Range,
    _save_timing_cache,
    decoder_profiles,
    profile_shapes,
    vision_profiles,
    workspace_limit,
)
from export.to_tensorrt import Limits, check_device, engine_manifest, plan_jobs, read_devices, read_graphs
from export.to_tensorrt import main as to_tensorrt
from gemvg_edge.bundle import DECODER_ENGINE, DECODER_GRAPH, MANIFEST, EngineBuild, open_bundle
from gemvg_edge.engines.placement import ALIGNMENT, cache_copies, choose_profile, new_plane_bytes, offsets, whole_slots
from gemvg_edge.engines.tensorrt_library import check_build, check_dialect
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import GROUPED, TINY_2_5, TINY_3, write_checkpoint
from tests.test_engine import difference

DIALECTS = ("standard", "plain")


@pytest.fixture(scope="module")
def bundles(random_model: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny random model in every dialect and precision that an engine is built from, by `dialect-precision`."""
    folder, checkpoint = tmp_path_factory.mktemp("tensorrt"), open_checkpoint(random_model[1].parent / "checkpoint")
    for dialect in DIALECTS:
        for precision in ("float32", "float16"):
            write_bundle(checkpoint, folder / f"{dialect}-{precision}", Recipe(dialect, precision))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Qwen3-VL in both dialects."""
    folder = tmp_path_factory.mktemp("tensorrt_qwen3")
    write_checkpoint(folder / "checkpoint", TINY_3)
    for dialect in DIALECTS:
        write_bundle(open_checkpoint(folder / "checkpoint"), folder / dialect, Recipe(dialect))
    return {dialect: folder / dialect for dialect in DIALECTS}


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is here")
def test_without_the_library_it_says_what_to_install(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_tensorrt([str(bundles["plain-float32"]), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "TensorRT cannot be imported" in said
    assert "python3-libnvinfer" in said
    assert "tensorrt-cu12" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(GemvgError, match=r"(TensorRT|cuda-python) cannot be imported"):
        import gemvg_edge.engines.tensorrt  # noqa: F401


def test_a_bundle_for_another_runtime_is_refused_first(
    random_model: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert to_tensorrt([str(random_model[1]), str(tmp_path / "out")]) == 2
    assert "has the dialect fused, which only ONNX Runtime takes; export the checkpoint" in capsys.readouterr().err
    assert to_tensorrt([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no such bundle folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dialect", "version", "sentence"),
    [
        ("standard", "10.15.1", None),
        ("standard", "11.4.0.106", None),
        ("standard", None, None),
        ("plain", "10.3.0", None),
        ("plain", "11.0.0", None),
        ("standard", "10.14.1", "takes from 10.15 on, and this is 10.14.1; .* --dialect plain"),
        ("standard", "10.3.0", "--dialect plain"),
        ("plain", "8.6.1", "TensorRT 8.6.1 is too old; 10.3 or newer"),
        ("fused", None, "only ONNX Runtime takes"),
    ],
)
def test_which_dialect_which_version(dialect: str, version: str | None, sentence: str | None) -> None:
    if sentence is None:
        check_dialect(dialect, Path("bundle"), version)
    else:
        with pytest.raises(GemvgError, match=sentence):
            check_dialect(dialect, Path("bundle"), version)


BUILD = EngineBuild("10.3.0", "8.7", "Orin", "jetson-orin-nano-8gb", 4096, 1024, 1024, False)


def test_engines_of_another_machine_are_refused() -> None:
    check_build(BUILD, "10.3.0", "8.7", "Orin", Path("engines"))
    with pytest.raises(GemvgError, match=r"engines of TensorRT 10.3.0, and this is 10.16.1; build them here"):
        check_build(BUILD, "10.16.1", "8.7", "Orin", Path("engines"))
    with pytest.raises(GemvgError, match=r"for Orin \(compute capability 8.7\), and this GPU is RTX 4090 \(8.9\)"):
        check_build(BUILD, "10.3.0", "8.9", "RTX 4090", Path("engines"))


def test_the_table_of_devices() -> None:
    for row in read_devices().values():
        assert set(row) == {"title", "compute_capability", "memory_gib", "tensorrt"}
        assert [part.isdigit() for part in row["compute_capability"].split(".")] == [True, True]
        for version in row["tensorrt"].values():
            check_dialect("plain", Path("bundle"), version)
    check_device(None, "8.0", "A100")
    check_device("jetson-orin-nano-8gb", "8.7", "Orin")
    with pytest.raises(GemvgError, match=r"RTX 4090 with compute capability 8.9, .* --device rtx-4060 or rtx-4090"):
        check_device("jetson-orin-nano-8gb", "8.9", "RTX 4090")
    with pytest.raises(GemvgError, match=r"A100 .* for this one without --device"):
        check_device("jetson-agx-thor", "8.0", "A100")


def sizes_in(shape: tuple[int | str, ...], profile: dict[str, Range], end: int) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else profile[size][end] for size in shape)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_profiles_fit_the_graphs(dialect: str, bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles[f"{dialect}-float32"])
    limits = Limits.of(bundle.manifest, pictures=2, max_tokens=300, max_prefill=200, max_visual_tokens=50)
    assert (limits.max_tokens, limits.max_prefill, limits.max_visual_tokens) == (320, 200, 50)
    for job in plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, pieces=1):
        inputs = input_shapes(job.graph)
        opened = {size for shape in inputs.values() for size in shape if isinstance(size, str)}
        of_decoder = {"tokens", "slots"} if dialect == "standard" else {"tokens"}
        assert opened == (of_decoder if job.name == DECODER_ENGINE else {"patches"})
        for profile in job.profiles:
            for name, shapes in profile_shapes(inputs, profile).items():
                least, tuned, most = shapes
                assert all(a <= b <= c for a, b, c in zip(least, tuned, most, strict=True))
                for end, shape in enumerate(shapes):
                    assert shape == sizes_in(inputs[name], dict(profile), end)
    with pytest.raises(GemvgError, match="inputs_embeds has the unknown dimension 'tokens'"):
        profile_shapes(inputs, {"capacity": Range(1, 1, 1)})


def test_profiles_leave_no_gap() -> None:
    prefill, one, question = decoder_profiles(4096, 1024)
    assert (prefill["tokens"], one["tokens"], question["tokens"]) == ((1, 1024, 1024), (1, 1, 1), (1, 32, 128))
    assert len(decoder_profiles(64, 64)) == 2
    for most, step in [(1024, 4), (64, 4), (3, 4), (1, 4), (16, 256)]:
        ranges = [profile["patches"] for profile in vision_profiles(most, step)]
        assert ranges[0].least == step
        assert ranges[-1].most == most * step
        for smaller, larger in pairwise(ranges):
            assert larger.least <= smaller.most + step
        assert all(size % step == 0 for sizes in ranges for size in sizes)
    assert [choose_profile([1024, 1, 128], count) for count in (1, 2, 128, 129, 1024, 1025)] == [1, 2, 2, 0, 0, None]


def test_windows_are_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", TINY_2_5)
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", Recipe("plain"))
    bundle = open_bundle(tmp_path / "bundle")
    window = bundle.manifest.model.vision.window
    limits = Limits.of(bundle.manifest, 2, 64, 64, 3 * window**2 + 1)
    assert limits.max_visual_tokens == 4 * window**2
    vision = plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, 1)[0]
    shapes = [profile_shapes(input_shapes(vision.graph), profile) for profile in vision.profiles]
    assert {"patches", "cos", "sin", "valid"} == set(shapes[0])
    assert shapes[-1]["valid"][2] == (1, 4 * window**2 * 4)
    assert all(size[1] % (4 * window**2) == 0 for profile in shapes for size in profile["valid"])


def test_places_have_profiles(qwen3: dict[str, Path]) -> None:
    bundle = open_bundle(qwen3["plain"])
    limits = Limits.of(bundle.manifest, 2, 64, 64, 10)
    vision = plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, 1)[0]
    shapes = [profile_shapes(input_shapes(vision.graph), profile) for profile in vision.profiles]
    assert {"patches", "cos", "sin", "place_index", "place_weight"} == set(shapes[0])
    assert shapes[-1]["place_index"][2] == shapes[-1]["place_weight"][2] == (40, 4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_split_head_of_a_deepstack_model_is_the_whole(dialect: str, qwen3: dict[str, Path]) -> None:
    """The rows that the head reads are narrower than the decoder's input."""
    whole = read_graph(qwen3[dialect] / DECODER_GRAPH, {"batch": 1, "rows": 1, "capacity": 64})
    assert input_shapes(whole)["inputs_embeds"] == (1, "tokens", 288)
    body, head = split_head(whole, 2)
    assert input_shapes(head)["hidden"] == (1, 96)
    inputs = random_inputs(whole, 5, 0)
    first = run_graph(body, qwen3[dialect], inputs)
    second = run_graph(head, qwen3[dialect], {"hidden": first.pop("hidden")})
    expected = run_graph(whole, qwen3[dialect], inputs)
    assert all(np.array_equal(value, expected[name]) for name, value in (first | second).items())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_split_head_of_8_bits_is_the_whole(dialect: str, tmp_path: Path) -> None:
    """The row of zeros that its product gets, and what drops it again, are the head's own."""
    write_checkpoint(tmp_path / "checkpoint", GROUPED)
    codes = Settings(
        tmp_path / "checkpoint", tmp_path / "codes", group_size=32, head_bits=8, method="rtn", device="cpu"
    )
    quantize(codes)
    write_bundle(open_checkpoint(codes.out), tmp_path / "bundle", Recipe(dialect))
    whole = read_graph(tmp_path / "bundle" / DECODER_GRAPH, {"batch": 1, "rows": 1, "capacity": 64})
    assert head_pieces(whole, 2**40) == 1
    assert head_pieces(whole, 2**16) > 1
    body, head = split_head(whole, 2)
    assert input_shapes(head) == {"hidden": (1, 96)}
    inputs = random_inputs(whole, 5, 0)
    first = run_graph(body, tmp_path / "bundle", inputs)
    second = run_graph(head, tmp_path / "bundle", {"hidden": first.pop("hidden")})
    expected = run_graph(whole, tmp_path / "bundle", inputs)
    assert second["logits"].shape == expected["logits"].shape
    assert all(np.abs(value - expected[name]).max() < 1e-5 for name, value in (first | second).items())


def test_a_timing_cache_that_cannot_be_written_is_refused_first(
    bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cache in (tmp_path, tmp_path / "none" / "cache"):
        assert to_tensorrt([str(bundles["plain-float32"]), str(tmp_path / "out"), "--timing-cache", str(cache)]) == 2
        assert f"--timing-cache {cache} is a folder, or its own is not there" in capsys.readouterr().err


def test_measurements_that_cannot_be_kept_lose_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Config:  # TensorRT-RTX has no timing cache
        def get_timing_cache(self) -> Config:
            return self

        def serialize(self) -> bytes:
            return b"measured"

    _save_timing_cache(Config(), tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == b"measured"
    _save_timing_cache(Config(), tmp_path / "gone" / "cache")
    (tmp_path / "folder").mkdir()
    _save_timing_cache(Config(), tmp_path / "folder")
    said = capsys.readouterr().err.splitlines()
    assert "gone/cache cannot be written (No such file or directory); the engine is built all the same" in said[0]
    assert "folder cannot be written (Is a directory)" in said[1]
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "folder"}


def test_senseless_limits_are_refused(bundles: dict[str, Path]) -> None:
    manifest = open_bundle(bundles["plain-float32"]).manifest
    assert Limits.of(manifest, 2, 4096, 8192, None) == Limits(4096, 4096, 64)  # the tiny model's pictures have 64 cells
    assert Limits.of(manifest, 3, None, 1024, None) == Limits(448, 448, 64), "three pictures, and 256 tokens of words"
    for limits in [(0, None, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]:
        with pytest.raises(GemvgError, match="must be at least 1"):
            Limits.of(manifest, *limits)
    for limits in [(2, 2**31 - 1, 1, 1), (2**31 - 1, None, 1, 64), (1, 64, 1, 2**31 - 1)]:
        with pytest.raises(GemvgError, match="are past what TensorRT counts to"):
            Limits.of(manifest, *limits)


def run_graph(model: onnx.ModelProto, folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Through ONNX Runtime, which takes neither links to data nor the attribute that is for TensorRT's parser."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        kept = [attribute for attribute in node.attribute if not attribute.name.startswith("TRT_")]
        del node.attribute[:]
        node.attribute.extend(kept)
    onnx.load_external_data_for_model(plain, str(folder))
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    found = session.run(names, {name: value for name, value in inputs.items() if name in wanted})
    return dict(zip(names, found, strict=True))


def random_inputs(model: onnx.ModelProto, tokens: int, past: int) -> dict[str, np.ndarray]:
    """A pass of some tokens after `past` others, with numbers that mean nothing."""
    rng = np.random.default_rng(0)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    sizes = {"tokens": tokens, "capacity": 64, "slots": 64}
    shapes = {
        name: [sizes[size] if isinstance(size, str) else size for size in shape]
        for name, shape in input_shapes(model).items()
    }
    inputs = {
        name: (rng.standard_normal(shape) / 4).astype(onnx.helper.tensor_dtype_to_np_dtype(types[name]))
        for name, shape in shapes.items()
    }
    places = np.arange(past, past + tokens)
    return inputs | {"places": places[None], "slots": np.arange(64), "rows": np.array([tokens - 1])}


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_both_halves_of_a_split_head_are_the_whole(
    dialect: str, precision: str, pieces: int, bundles: dict[str, Path]
) -> None:
    folder = bundles[f"{dialect}-{precision}"]
    whole = read_graph(folder / DECODER_GRAPH, {"batch": 1, "rows": 1, "capacity": 64})
    body, head = split_head(whole, pieces)
    assert sum(node.op_type == "Gemm" for node in head.graph.node) == pieces
    assert abs(weight_bytes([body, head]) - weight_bytes([whole])) < 1000  # but for names
    assert weight_bytes([head]) < weight_bytes([body])
    for tokens, past in ((5, 0), (1, 9)):
        inputs = random_inputs(whole, tokens, past)
        expected = run_graph(whole, folder, inputs)
        first = run_graph(body, folder, inputs)
        second = run_graph(head, folder, {"hidden": first.pop("hidden")})
        assert first.keys() | second.keys() == expected.keys()
        # In float16 the cut is one rounding that ONNX Runtime leaves out inside a graph.
        tolerance = 0 if precision == "float32" else 2e-3
        for name, value in (first | second).items():
            assert difference(value.astype(np.float32), expected[name].astype(np.float32)) <= tolerance, name


def test_a_head_is_cut_where_it_would_not_fit() -> None:
    # Qwen3-VL-2B's head in float16 on an 8 GB Jetson, where it had to be cut in two, and on a 24 GB card.
    weight = onnx.TensorProto(name="w", dims=[151_936, 2_048], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="length", value=str(151_936 * 2_048 * 2))
    nodes = [onnx.helper.make_node("Gemm", ["hidden", "w"], ["y"]), onnx.helper.make_node("Cast", ["y"], ["logits"])]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "decoder", [], [], [weight]))
    assert [head_pieces(model, gib * 2**30) for gib in (2, 6, 24)] == [4, 2, 1]
    model.graph.node[0].op_type = "Conv"
    with pytest.raises(GemvgError, match="the logits come from Conv, not from a matrix product"):
        head_pieces(model, 2**33)


def test_workspace_is_what_the_weights_leave() -> None:
    assert workspace_limit(6000 * MIB, 2000 * MIB) == 2000 * MIB
    assert workspace_limit(2050 * MIB, 2000 * MIB) == 64 * MIB
    with pytest.raises(GemvgError, match="a build takes 2000 MiB of GPU memory and 1500 MiB are free; quantise"):
        workspace_limit(1500 * MIB, 2000 * MIB)


@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2, 8, 32]), st.integers(0, 60), st.integers(1, 9),
    st.sampled_from(["f2", "f4"]),
)  # fmt: skip
def test_the_copies_are_slices(layers: int, kv_heads: int, head_dim: int, past: int, tokens: int, dtype: str) -> None:
    planes, capacity, row = 2 * layers, 128, head_dim * int(dtype[1])
    rng = np.random.default_rng(past)
    new = rng.standard_normal((planes, kv_heads, tokens, head_dim)).astype(dtype)
    distance = new_plane_bytes(kv_heads, tokens, row)
    assert distance % ALIGNMENT == 0
    source = np.zeros(planes * distance, np.uint8)
    for plane, content in enumerate(new):
        source[plane * distance :][: content.nbytes] = content.reshape(-1).view(np.uint8)
    cache = rng.standard_normal((planes, kv_heads, capacity, head_dim)).astype(dtype)
    expected = cache.copy()
    expected[:, :, past : past + tokens] = new
    target = cache.reshape(-1).view(np.uint8)
    copies = cache_copies(planes, kv_heads, capacity, row, past, tokens)
    assert len(copies) == (1 if kv_heads * tokens * row % ALIGNMENT == 0 else planes)
    for copy in copies:
        assert copy.width <= min(copy.target_pitch, copy.source_pitch)
        for line in range(copy.height):
            start = copy.source + line * copy.source_pitch
            target[copy.target + line * copy.target_pitch :][: copy.width] = source[start : start + copy.width]
    assert np.array_equal(cache, expected)


def test_tensors_of_a_block_are_aligned_and_apart() -> None:
    sizes = [1, 256, 257, 8, 4096]
    starts, block = offsets(sizes)
    assert all(start % ALIGNMENT == 0 for start in starts)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert all(end <= following for end, following in zip(ends, [*starts[1:], block], strict=True))
    assert [whole_slots(tokens) for tokens in (1, 64, 65, 4096)] == [64, 64, 128, 4096]


def test_a_folder_is_replaced_whole_or_not_at_all(bundles: dict[str, Path], tmp_path: Path) -> None:
    target, files = tmp_path / "engines", ("vision.engine",)
    with pytest.raises(KeyboardInterrupt), new_bundle_folder(target, files):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for content in ("one", "two"):
        with new_bundle_folder(target, files, overwrite=content == "two") as work:
            (work / "vision.engine").write_text(content)
            shutil.copyfile(bundles["plain-float32"] / MANIFEST, work / MANIFEST)
        (target / "README.md").write_text("mine")
    assert (target / "vision.engine").read_text() == "two"
    with pytest.raises(OSError, match="disk"), new_bundle_folder(target, files, overwrite=True) as work:
        raise OSError("the disk is full")
    assert {path.name for path in target.iterdir()} == {"vision.engine", MANIFEST, "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    (target / "notes.txt").touch()
    with pytest.raises(GemvgError, match=r"holds notes.txt, no part of a bundle"), new_bundle_folder(target, files):
        pass


def test_the_manifest_of_engines_is_a_bundles(bundles: dict[str, Path], tmp_path: Path) -> None:
    source = bundles["plain-float16"]
    for name in ("vision.engine", "decoder.engine"):
        (tmp_path / name).write_bytes(name.encode())
    for name in ("embedding.npy", "tokenizer.json"):
        shutil.copyfile(source / name, tmp_path / name)
    write_manifest(tmp_path, engine_manifest(source, "engines", BUILD, tmp_path))
    bundle = open_bundle(tmp_path)
    assert (bundle.manifest.tensorrt, bundle.manifest.name) == (BUILD, "engines")
    assert bundle.manifest.model == open_bundle(source).manifest.model
