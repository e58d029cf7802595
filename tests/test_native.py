"""Our own engine against its twins: products against numpy, networks against ONNX Runtime, one call against another."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from export.bundle_writer import Recipe
from export.to_onnx import export
from gemvg_edge import Grounder
from gemvg_edge.boxes import iou
from gemvg_edge.bundle import Bundle, open_bundle
from gemvg_edge.engines.native import (
    Engine,
    NativeDecoder,
    NativeVisionTower,
    _check_shapes,
    open_native,
)
from gemvg_edge.engines.native.compiling import FOLDER, INSTRUCTIONS, compile_all, library_name
from gemvg_edge.engines.native.library import Stored, find_library, open_library, suitable
from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower
from gemvg_edge.engines.protocol import Floats, Ids, Step
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import mrope_table, text_positions

BUILT = [FOLDER / library_name(platform.machine(), kind) for kind in suitable()]
BUILT = [path for path in BUILT if path.is_file()]

Coded = tuple[Stored, list[object], Floats]

pytestmark = pytest.mark.skipif(not BUILT, reason="the native library is not built: make native (it needs g++)")


@pytest.fixture(scope="module", params=BUILT, ids=lambda path: path.stem)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(2, request.param)


def random_codes(rng: np.random.Generator, n: int, k: int, bits: int, block: int) -> Coded:
    """A layer in MatMulNBits' blocks, what keeps its memory, and the weights (n, k) that it stands for."""
    blocks = -(-k // block)
    # Bell-shaped, as weights are; scales of either sign, as GPTQ's may be.
    spread = 2 ** (bits - 1)
    codes = np.clip(np.rint(rng.normal(size=(n, blocks, block)) * spread / 3), -spread, spread - 1)
    codes[:, :, 0] = -spread
    scales = rng.choice([-1, 1], (n, blocks)) * rng.uniform(0.5, 1, (n, blocks)) / spread
    scales = scales.astype(np.float16).astype(np.float32)
    packed = (codes + spread).astype(np.uint8)
    if bits == 4:
        packed = packed[:, :, ::2] | packed[:, :, 1::2] << 4
    packed = np.ascontiguousarray(packed)
    values = (codes * scales[:, :, None]).reshape(n, -1)[:, :k].astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32)
    stored = Stored(bits, n, k, block, packed.ctypes.data, scales.ctypes.data, None, bias.ctypes.data, None)
    return stored, [packed, scales, bias], values


def multiply(engine: Engine, stored: Stored, x: Floats, channels: bool = False) -> Floats:
    out = np.full((len(x), stored.n), np.nan, np.float32)
    x = np.ascontiguousarray(x, np.float32)
    library = engine.library
    problem = library.multiply(
        engine.handle, ctypes.byref(stored), int(channels), x.ctypes.data, len(x), out.ctypes.data
    )
    library.check(problem, "a product")
    return out


def bias_of(kept: list[object]) -> Floats:
    bias = kept[-1]
    assert isinstance(bias, np.ndarray)
    return bias


def off(found: npt.NDArray[np.floating[Any]], exact: npt.NDArray[np.float64]) -> float:
    """Root mean square of the error, in the exact values' own."""
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


SHAPES = [(32, 32), (96, 64), (100, 96), (7, 32), (200, 1536), (64, 8960)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 32), (8, 256)])
def test_few_rows_are_multiplied_with_the_codes_as_they_are(
    engine: Engine, n: int, k: int, bits: int, block: int
) -> None:
    rng = np.random.default_rng([n, k, bits])
    stored, kept, weights = random_codes(rng, n, k, bits, block)
    x = rng.normal(size=(16, k)).astype(np.float32)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64) + bias_of(kept)
    for m in (1, 2, 3, 5, 16):
        # Activations have 15 bits, a scale 11.
        assert off(multiply(engine, stored, x[:m]), exact[:m]) < 4e-4


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(
    ("bits", "block", "channels"), [(4, 32, False), (8, 32, False), (8, 32, True), (4, 128, False)]
)
def test_many_rows_have_8_bits_on_both_sides(
    engine: Engine, n: int, k: int, bits: int, block: int, channels: bool
) -> None:
    rng = np.random.default_rng([n, k, bits])
    stored, kept, weights = random_codes(rng, n, k, bits, block)
    x = rng.normal(size=(37, k)).astype(np.float32)
    exact = x.astype(np.float64) @ weights.T.astype(np.float64) + bias_of(kept)
    assert off(multiply(engine, stored, x, channels), exact) < 0.015
    # The same rounding in numpy: one scale a row, one an output.
    scale = np.abs(x).max(1, keepdims=True) / 127
    largest = np.abs(weights).max(1) if channels else np.abs(_scales(kept)).max(1) * 2.0 ** (bits - 1)
    channel = (largest / 127)[:, None]
    rounded_x = np.rint(x / scale) * scale
    rounded_w = np.rint(weights / channel) * channel
    twin = rounded_x.astype(np.float64) @ rounded_w.T.astype(np.float64) + bias_of(kept)
    # A code halfway between two may be rounded either way: with 4 bits one in 16 is.
    assert off(multiply(engine, stored, x, channels), twin) < 6e-3


def _scales(kept: list[object]) -> Floats:
    assert isinstance(kept[1], np.ndarray)
    return kept[1]


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("channels", [False, True])
def test_an_outlier_channel_costs_the_others_nothing(engine: Engine, rows: int, channels: bool) -> None:
    rng = np.random.default_rng(rows)
    stored, kept, _ = random_codes(rng, 96, 512, 8 if channels else 4, 32)
    # The weights as this product has them, which are rounded too where rows are many: what is left are activations.
    ones = np.split(np.eye(512, dtype=np.float32), 1 if rows > 16 else 32)
    weights = np.concatenate([multiply(engine, stored, one, channels) for one in ones]).T - bias_of(kept)[:, None]
    x = rng.normal(size=(rows, 512)).astype(np.float32)
    usual = off(multiply(engine, stored, x, channels), x.astype(np.float64) @ weights.T + bias_of(kept))
    for channel, size in ((5, 64), (300, 640)):
        large = x.copy()
        large[:, channel] *= size
        # What the outlier adds is known exactly, so what is left says how well the others were kept.
        exact = x.astype(np.float64) @ weights.T + bias_of(kept)
        added = (large - x)[:, channel : channel + 1].astype(np.float64) * weights[:, channel]
        left = multiply(engine, stored, large, channels) - added
        one_scale = np.abs(large).max() / 127
        naive = np.rint(large / one_scale) * one_scale @ weights.T + bias_of(kept) - added
        assert off(left, exact) < max(3 * usual, 2e-3)
        assert off(left, exact) < 0.2 * off(naive, exact)


def test_floats_are_multiplied_as_floats(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    weights, x = (rng.normal(size=shape).astype(np.float32) for shape in ((45, 70), (29, 70)))
    stored = Stored(0, 45, 70, 1, None, None, weights.ctypes.data, None, None)
    np.testing.assert_allclose(multiply(engine, stored, x), x @ weights.T, atol=2e-5)


def test_an_order_of_activations_is_kept(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    stored, kept, weights = random_codes(rng, 40, 64, 4, 32)
    order = rng.permutation(64)
    stored.order = order.ctypes.data
    for rows in (2, 30):
        x = rng.normal(size=(rows, 64)).astype(np.float32)
        assert off(multiply(engine, stored, x), x[:, order].astype(np.float64) @ weights.T + bias_of(kept)) < 0.015


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [2, 30])
def test_what_is_no_number_stays_none(engine: Engine, rows: int, value: float) -> None:
    rng = np.random.default_rng(1)
    for bits, channels in ((4, False), (8, True)):
        stored, kept, _ = random_codes(rng, 40, 64, bits, 32)
        x = rng.normal(size=(rows, 64)).astype(np.float32)
        x[1] = value
        found = multiply(engine, stored, x, channels)
        assert np.isfinite(found[0]).all()
        assert not np.isfinite(found[1]).any()
        assert kept


# Networks


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model's checkpoint in float32."""
    target = tmp_path_factory.mktemp("native") / "floats"
    export(Path("checkpoints/tabletop"), target)
    return open_bundle(target)


GRIDS = [(1, 16, 16), (1, 8, 12), (1, 16, 16), (1, 2, 2)]


def pictures(bundle: Bundle) -> list[Floats]:
    numbers = bundle.manifest.preprocessing
    width = 3 * numbers.temporal_patch_size * numbers.patch_size**2
    rng = np.random.default_rng(3)
    return [rng.normal(size=(h * w, width)).astype(np.float32) for _, h, w in GRIDS]


def step(
    decoder: NativeDecoder, cache: object, past: int, ids: npt.NDArray[np.int64], bundle: Bundle, **more: object
) -> Step:
    shape = bundle.manifest.model
    table = mrope_table(text_positions(past, len(ids)), shape.head_dim, shape.rope_theta, shape.mrope_section)
    return Step(decoder.embed(ids), cache, past, table, **more)  # type: ignore[arg-type]


def ids(count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, 500, count)


def test_the_vision_tower_is_that_of_onnx_runtime(engine: Engine, floats: Bundle) -> None:
    plain = OnnxVisionTower(floats, 1).encode(pictures(floats), GRIDS)
    ours = NativeVisionTower(floats, engine).encode(pictures(floats), GRIDS)
    # Attention is in bfloat16 where the processor has it, all else in float32.
    tolerance = 6e-3 if "bf16" in engine.library.path.name else 1e-5
    for a, b in zip(plain, ours, strict=True):
        assert off(b, a.astype(np.float64)) < tolerance


def test_the_decoder_is_that_of_onnx_runtime(engine: Engine, floats: Bundle) -> None:
    plain, ours = OnnxDecoder(floats, 1), NativeDecoder(floats, engine)
    caches = plain.new_cache(200), ours.new_cache(200)
    past = 0
    for count in (90, 1, 1, 20, 7, 3):
        a = plain.forward([step(plain, caches[0], past, ids(count, past), floats)])[0]  # type: ignore[arg-type]
        b = ours.forward([step(ours, caches[1], past, ids(count, past), floats)])[0]
        # Keys and values have 11 bits here.
        assert off(b, a.astype(np.float64)) < 3e-3
        assert a.argmax() == b.argmax()
        past += count


def test_rows_and_legal_ids_are_parts_of_all_logits(engine: Engine, floats: Bundle) -> None:
    decoder = NativeDecoder(floats, engine)
    cache, some = decoder.new_cache(64), np.array([3, 500, 17, 40])
    tokens = ids(9)
    single = [decoder.forward([step(decoder, cache, k, tokens[k : k + 1], floats)])[0][0] for k in range(9)]
    (together,) = decoder.forward([step(decoder, cache, 0, tokens, floats, rows=4)])
    np.testing.assert_allclose(together, single[-4:], rtol=0, atol=2e-4 * np.abs(single).max())
    (legal,) = decoder.forward([step(decoder, cache, 0, tokens, floats, rows=4, legal=some)])
    np.testing.assert_array_equal(legal, together[:, some])


def test_sequences_in_one_batch_are_as_alone(engine: Engine, floats: Bundle) -> None:
    decoder = NativeDecoder(floats, engine)
    lengths, alone, steps = (20, 3, 11), [], []
    for k, length in enumerate(lengths):
        caches = [decoder.new_cache(64), decoder.new_cache(64)]
        decoder.forward([step(decoder, caches[0], 0, ids(length, k), floats)])
        decoder.copy(caches[0], caches[1], length)
        alone.append(decoder.forward([step(decoder, caches[0], length, ids(2, k), floats)])[0])
        steps.append(step(decoder, caches[1], length, ids(2, k), floats))
    for a, b in zip(alone, decoder.forward(steps), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


def test_threads_of_the_engine_change_nothing(floats: Bundle) -> None:
    texts = []
    for threads in (1, 2, 5):
        decoder = NativeDecoder(floats, Engine(threads))
        texts.append(decoder.forward([step(decoder, decoder.new_cache(64), 0, ids(40), floats)])[0])
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])


def test_callers_from_several_threads_wait_for_each_other(floats: Bundle) -> None:
    decoder = NativeDecoder(floats, Engine(2))

    def run(seed: int) -> Floats:
        return decoder.forward([step(decoder, decoder.new_cache(64), 0, ids(30, seed), floats)])[0]

    plain, found = [run(seed) for seed in range(4)], {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: run(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        np.testing.assert_array_equal(found[seed], plain[seed])


FORKING = """
import os, sys
from gemvg_edge import Grounder
from PIL import Image
grounder = Grounder.open(engine="native", threads=2)
picture = Image.new("RGB", (96, 96), "red")
text = grounder.ground([picture], "the red mug").text
child = os.fork()
if not child:
    same = grounder.ground([picture], "the red mug").text == text
    os._exit(0 if same and len(os.listdir("/proc/self/task")) > 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_answers_too_with_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKING], timeout=60, check=False)
    assert done.returncode == 0


# Opening


def test_the_native_engine_is_taken_where_it_is_built() -> None:
    assert isinstance(Grounder.open().model.engines()[1], NativeDecoder)
    assert isinstance(Grounder.open(engine="onnx").model.engines()[1], OnnxDecoder)


def test_without_a_library_onnx_runtime_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemvg_edge.engines.native.library.find_library", lambda: None)
    assert isinstance(Grounder.open().model.engines()[1], OnnxDecoder)
    with pytest.raises(GemvgError, match=r"is not built; run `python -m gemvg_edge.engines.native.build`"):
        Grounder.open(engine="native")


def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.so").write_bytes(b"\x7fELF")
    with pytest.raises(GemvgError, match="cannot be loaded"):
        open_library(tmp_path / "torn.so")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    for source, why in (("int gemvg_version() { return 77; }", "it has version 77"), ("int x;", "gemvg_version")):
        (tmp_path / "other.cpp").write_text(f'extern "C" {{ {source} }}')
        path = tmp_path / f"{len(source)}.so"
        subprocess.run(["g++", "-shared", "-fPIC", "-o", path, tmp_path / "other.cpp"], check=True)
        with pytest.raises(GemvgError, match=why):
            open_library(path)


def test_every_kind_of_instructions_has_flags_and_options() -> None:
    for kinds in INSTRUCTIONS.values():
        assert all(kind.flags and kind.options for kind in kinds.values())
    found = find_library()
    assert found in BUILT
    assert found == BUILT[0]


def test_layers_of_other_widths_are_refused() -> None:
    from gemvg_edge.engines.graph_weights import decoder_operators, read_network

    bundle = open_bundle(DEFAULT_BUNDLE)
    network = read_network(bundle, "decoder.onnx", decoder_operators(bundle.manifest.model))
    wanted = [(layer.outputs, layer.inputs) for layer in network.layers]
    _check_shapes(Path("x"), network, wanted, 192)
    wanted[3] = (wanted[3][0] + 32, wanted[3][1])
    with pytest.raises(GemvgError, match="layers of other widths"):
        _check_shapes(Path("x"), network, wanted, 192)
    with pytest.raises(GemvgError, match="a norm of another width"):
        _check_shapes(Path("x"), network, [(layer.outputs, layer.inputs) for layer in network.layers], 128)


def test_answers_of_the_shipped_model_are_those_of_onnx_runtime() -> None:
    """Nearly all: each rounds activations in its own way, so a close call may go either way."""
    import json

    folder = Path(__file__).parent.parent / "examples" / "images"
    scenes = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    found = []
    for name in ("native", "onnx"):
        grounder = Grounder.open(engine=name, threads=1)
        found.append([grounder.ground([folder / i for i in scene["images"]], scene["query"]) for scene in scenes])
    for a, b in zip(*found, strict=True):
        assert [box.image for box in a] == [box.image for box in b]
        assert all(iou(x, y) > 0.8 for x, y in zip(a, b, strict=True))


def test_what_is_not_run_natively_is_said_and_runs_on_onnx_runtime(tmp_path: Path) -> None:
    export(Path("checkpoints/tabletop"), tmp_path / "plain", Recipe("plain"))
    bundle = open_bundle(tmp_path / "plain")
    with pytest.raises(GemvgError, match=r"the native engine runs fused in float32; export it so, or open it with"):
        open_native(bundle, 1)
    assert isinstance(Grounder.open(tmp_path / "plain").model.engines()[1], OnnxDecoder)


ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)} (apt-get install)")
def test_products_on_arm_are_those_of_x86(tmp_path: Path) -> None:
    """Under an emulator: that the arithmetic is right, not how fast it is."""
    libraries = compile_all(ARM[0], "aarch64", tmp_path)
    check = tmp_path / "check"
    source = Path(__file__).with_name("native_check.cpp")
    subprocess.run([ARM[0], "-O1", source, "-o", check, "-ldl"], check=True)
    rng, engine, count = np.random.default_rng(0), Engine(1), 0
    with (tmp_path / "cases").open("wb") as file:
        for bits, block, channels in ((4, 32, False), (4, 128, False), (8, 32, False), (8, 32, True)):
            for rows in (1, 3, 40):
                stored, kept, _ = random_codes(rng, 70, 100, bits, block)
                x = rng.normal(size=(rows, 100)).astype(np.float32)
                x[:, 5] *= 64
                np.array([bits, 70, 100, block, channels, rows], np.int32).tofile(file)
                for array in (*kept, x, multiply(engine, stored, x, channels)):
                    assert isinstance(array, np.ndarray)
                    array.tofile(file)
                count += 1
    for library in libraries:
        command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(check), str(library), str(tmp_path / "cases")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        errors = [float(line) for line in done.stdout.split()]
        assert len(errors) == count
        assert max(errors) < 1e-5
