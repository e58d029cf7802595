"""TensorRT itself: where TensorRT-RTX is installed, which compiles without a GPU, its parser and builder; with TensorRT
and a GPU the engines against ONNX Runtime (marked `gpu`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.build_peak import MIB
from export.bundle_writer import Recipe, write_bundle
from export.engine_graphs import read_graph, write_graph
from export.tensorrt_build import (
    BuildOptions,
    build_engine,
)
from export.to_tensorrt import Limits, plan_jobs, read_graphs, run_job
from export.to_tensorrt import main as to_tensorrt
from gemvg_edge.bundle import DECODER_GRAPH, EMBEDDING, open_bundle
from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import GROUPED, TINY_2_5, TINY_3, write_checkpoint
from tests.test_engine import FOUR, ONE, STEPS, TWO, Case, Engine, difference
from tests.test_tensorrt import DIALECTS, bundles

__all__ = ["bundles"]


@pytest.fixture(scope="module")
def rtx() -> Any:
    """TensorRT for RTX: the same parser and builder API, and it compiles for a GPU that is not there."""
    return pytest.importorskip("tensorrt_rtx_bindings", reason="no TensorRT-RTX; pip install tensorrt-rtx-cu12 (x86)")


def compile_checkpoint(
    rtx: Any, checkpoint: Path, dialect: str, target: Path, pieces: int = 1, jobs: slice = slice(None)
) -> None:
    """Engines in `target` from a checkpoint, by way of a float16 bundle in its folder `dialect`."""
    write_bundle(open_checkpoint(checkpoint), target / dialect, Recipe(dialect, "float16"))
    source = open_bundle(target / dialect)
    limits = Limits.of(source.manifest, 2, 64, 64, 64)
    for job in plan_jobs(*read_graphs(source, limits), limits, source.manifest, pieces)[jobs]:
        run_job(rtx, job, source.folder, BuildOptions(256 * MIB), target)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_graph_compiles(
    dialect: str, precision: str, pieces: int, rtx: Any, bundles: dict[str, Path], tmp_path: Path
) -> None:
    source = open_bundle(bundles[f"{dialect}-{precision}"])
    limits = Limits.of(source.manifest, 2, 256, 192, None)
    options = BuildOptions(256 * MIB, exact=precision == "float32")
    for job in plan_jobs(*read_graphs(source, limits), limits, source.manifest, pieces):
        run_job(rtx, job, source.folder, options, tmp_path)
        assert (tmp_path / job.name).stat().st_size > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"vision.engine", "decoder.engine"} | (
        {"head.engine"} if pieces > 1 else set()
    )


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tied_head_compiles(dialect: str, pieces: int, rtx: Any, tmp_path: Path) -> None:
    """Its weight is in the embedding's table."""
    write_checkpoint(tmp_path / "checkpoint", GROUPED, tied=True)
    compile_checkpoint(rtx, tmp_path / "checkpoint", dialect, tmp_path, pieces, slice(1, None))
    engine = tmp_path / ("head.engine" if pieces > 1 else "decoder.engine")
    assert engine.stat().st_size > (tmp_path / dialect / EMBEDDING).stat().st_size


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_codes_compile(dialect: str, bits: int, pieces: int, rtx: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", GROUPED)
    grid: dict[str, Any] = {"bits": bits, "group_size": 32 if bits == 4 else -1, "vision_bits": 8, "head_bits": bits}
    quantize(
        Settings(tmp_path / "checkpoint", tmp_path / "codes", method="rtn", device="cpu", positive_scales=True, **grid)
    )
    compile_checkpoint(rtx, tmp_path / "codes", dialect, tmp_path, pieces)


def test_windows_compile(rtx: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", TINY_2_5)
    for dialect in DIALECTS:
        compile_checkpoint(rtx, tmp_path / "checkpoint", dialect, tmp_path, jobs=slice(1))


def test_a_qwen3_vl_compiles(rtx: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", TINY_3)
    for dialect in DIALECTS:
        compile_checkpoint(rtx, tmp_path / "checkpoint", dialect, tmp_path)


def test_what_the_parser_refuses_is_named(rtx: Any, random_model: tuple[Any, Path], tmp_path: Path) -> None:
    graph = read_graph(random_model[1] / DECODER_GRAPH, {})
    write_graph(graph, tmp_path / "decoder.onnx", random_model[1])
    with pytest.raises(GemvgError, match=r"does not take the node \S+ \(\w+\) of decoder.onnx: .*; quantise or export"):
        build_engine(rtx, tmp_path / "decoder.onnx", {}, [], BuildOptions(64 * MIB), tmp_path / "out.engine")
    (tmp_path / "none.onnx").write_bytes(b"none")
    with pytest.raises(GemvgError, match=r"none.onnx"):
        build_engine(rtx, tmp_path / "none.onnx", {}, [], BuildOptions(64 * MIB), tmp_path / "out.engine")


def test_a_full_disk_is_named(rtx: Any, bundles: dict[str, Path], tmp_path: Path) -> None:
    """TensorRT itself gives no reason where a file takes no more."""
    source = open_bundle(bundles["standard-float16"])
    limits = Limits.of(source.manifest, 2, 64, 64, 64)
    vision, _ = plan_jobs(*read_graphs(source, limits), limits, source.manifest, 1)
    (tmp_path / vision.name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        run_job(rtx, vision, source.folder, BuildOptions(256 * MIB), tmp_path)


needs_gpu = pytest.mark.skipif(
    find_spec("tensorrt") is None or not torch.cuda.is_available(), reason="no TensorRT, or no CUDA device"
)


@pytest.fixture(scope="module", params=["standard-float32", "plain-float32", "plain-float32-split"])
def pair(
    request: pytest.FixtureRequest, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Engine]:
    """The tiny model in TensorRT, built here and now, and in ONNX Runtime."""
    from gemvg_edge.engines.tensorrt import open_engines

    name, target = request.param.removesuffix("-split"), tmp_path_factory.mktemp("engines") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        if request.param.endswith("split"):
            patch.setattr("export.to_tensorrt.head_pieces", lambda *_: 2)
        arguments = [str(bundles[name]), str(target), "--max-tokens", "256", "--max-prefill", "33"]
        assert to_tensorrt([*arguments, "--timing-cache", str(target.parent / "timing.cache")]) == 0
    assert (target.parent / "timing.cache").stat().st_size
    theirs = open_bundle(bundles[name])
    rope = Engine.open(theirs).rope
    return Engine(*open_engines(open_bundle(target)), rope), Engine(  # type: ignore[arg-type]  # another engine's classes
        OnnxVisionTower(theirs), OnnxDecoder(theirs), rope
    )


TOLERANCE = 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("grids", [ONE, TWO, FOUR])
def test_engines_are_onnx_runtime(pair: tuple[Engine, Engine], grids: list[Grid]) -> None:
    ours, theirs = pair
    case = Case.random(grids)
    for visual, expected in zip(*(engine.vision.encode(case.patches, case.grids) for engine in pair), strict=True):
        assert difference(visual, expected) <= TOLERANCE
    cuts = [0, 3, 17, 18, len(case.ids) - STEPS, *range(len(case.ids) - STEPS + 1, len(case.ids) + 1)]
    assert difference(ours.logits(case, cuts), theirs.logits(case, cuts)) <= TOLERANCE
    assert difference(ours.logits(case, case.cuts), theirs.logits(case, case.cuts)) <= TOLERANCE


@pytest.mark.gpu
@needs_gpu
def test_engines_rewind_and_keep_scenes_apart(pair: tuple[Engine, Engine]) -> None:
    engine, _ = pair
    case, other = Case.random(ONE), Case.random(TWO, seed=1)
    caches = [engine.decoder.new_cache(len(one.ids)) for one in (case, other)]
    first = engine.logits(case, case.cuts, caches[0])
    alone = engine.logits(other, other.cuts, caches[1])
    assert np.array_equal(engine.logits(case, case.cuts[1:], caches[0]), first[1:])
    assert np.array_equal(engine.logits(other, other.cuts, engine.decoder.new_cache(len(other.ids))), alone)
    with pytest.raises(GemvgError, match=r"257 tokens do not fit .*engine, which holds 256; .* --max-tokens 320"):
        engine.decoder.new_cache(257)


@pytest.mark.gpu
@needs_gpu
def test_a_profile_that_is_none(pair: tuple[Engine, Engine]) -> None:
    from gemvg_edge.engines.tensorrt_execution import Execution

    decoder: Any = pair[0].decoder
    with pytest.raises(GemvgError, match=r"TensorRT could not switch to profile 99: .*; build the engines again"):
        Execution(decoder._engine, decoder._path, decoder._shared, 99)


@pytest.mark.gpu
@needs_gpu
def test_legal_tokens_are_rows_of_the_logits_and_a_copy_goes_on_alike(pair: tuple[Engine, Engine]) -> None:
    from gemvg_edge.decoding import embed_prompt
    from gemvg_edge.engines.protocol import Step
    from gemvg_edge.positions import mrope_table, text_positions

    decoder, rope = pair[0].decoder, pair[0].rope
    caches = [decoder.new_cache(64), decoder.new_cache(200)]
    legal = np.array([3, 7, 9])
    for past, ids in ((0, np.arange(40)), (40, np.array([7])), (41, np.array([9, 2]))):
        table = mrope_table(text_positions(past, len(ids)), rope.head_dim, rope.theta, rope.sections)
        embeddings = embed_prompt(decoder, ids, -1, [])
        decoder.copy(caches[0], caches[1], past)
        whole, again = decoder.forward([Step(embeddings, cache, past, table) for cache in caches])
        (few,) = decoder.forward([Step(embeddings, caches[0], past, table, legal=legal)])
        assert np.array_equal(whole, again)
        assert np.array_equal(few, whole[:, legal])
    with pytest.raises(GemvgError, match=r"rows=2, and this engine gives the last token's logits only"):
        decoder.forward([Step(embeddings, caches[0], 41, table, rows=2)])
    with pytest.raises(GemvgError, match="65 tokens cannot be copied between caches of 64 and 200"):
        decoder.copy(caches[0], caches[1], 65)


@pytest.mark.gpu
@needs_gpu
def test_what_was_built_is_read(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By TensorRT's own inspector, whose words have not been seen yet."""
    assert to_tensorrt([str(bundles["standard-float16"]), str(tmp_path / "engines"), "--max-tokens", "256"]) == 0
    said = capsys.readouterr()
    assert "decoder.engine, a token: " in said.out
    assert "not read" not in said.err
    assert "GiB of memory for building" in said.err
