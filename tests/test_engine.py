"""Exported graphs through ONNX Runtime against transformers: vision, prefill, decoding, and every use of the cache."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.bundle_writer import Recipe, write_bundle
from export.weights import Scheme
from gemvg_edge.bundle import DIALECTS, EMBEDDING, VISION_GRAPH, Bundle, open_bundle
from gemvg_edge.decoding import Rope, embed_prompt, prefill
from gemvg_edge.engines.onnxruntime import OnnxCache, OnnxDecoder, OnnxVisionTower
from gemvg_edge.engines.protocol import Step
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Grid, Preprocessing
from gemvg_edge.positions import text_positions
from quantize.checkpoint import open_checkpoint
from tests import checkpoints as tiny
from tests.checkpoints import IMAGE_TOKEN_ID, PREPROCESSING, TINY, torch_logits, torch_vision, write_checkpoint
from tests.quantized_twin import quantize_like

TOLERANCE = 1e-3
STEPS = 5  # the last tokens of a prompt are taken as an answer and decoded one by one
LANDSCAPE, PORTRAIT, TINIEST = (1, 4, 14), (1, 10, 6), (1, 2, 2)
SCENES: dict[str, list[Grid]] = {
    "one picture": [LANDSCAPE],
    "two pictures": [PORTRAIT, LANDSCAPE],
    "four, two of one shape": [TINIEST, LANDSCAPE, PORTRAIT, LANDSCAPE],
}
ONE, TWO, FOUR = SCENES.values()


@dataclass(frozen=True)
class Engine:
    """A bundle opened in ONNX Runtime."""

    vision: OnnxVisionTower
    decoder: OnnxDecoder
    rope: Rope

    @staticmethod
    def open(bundle: Bundle) -> Engine:
        """Both graphs."""
        rope = Rope.of(bundle.manifest.model)
        return Engine(OnnxVisionTower(bundle), OnnxDecoder(bundle), rope)

    def logits(
        self,
        case: Case,
        cuts: Sequence[int],
        cache: OnnxCache | None = None,
        visual: list[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Logits (pieces, vocab) at the end of each piece of the sequence; with a cache, the first cut is its past."""
        cache = cache or self.decoder.new_cache(len(case.ids))
        visual = visual or self.vision.encode(case.patches, case.grids)
        embeddings = embed_prompt(self.decoder, case.ids, IMAGE_TOKEN_ID, visual)
        positions = tiny.prompt_positions(case.ids, case.grids)
        return np.stack(
            [
                prefill(self.decoder, self.rope, embeddings[start:stop], positions[:, start:stop], cache, start)
                for start, stop in pairwise(cuts)
            ]
        )


@dataclass(frozen=True)
class Case:
    """Pictures and a prompt about them."""

    grids: list[Grid]
    patches: list[np.ndarray]
    ids: np.ndarray

    @staticmethod
    def random(grids: list[Grid], seed: int = 0, numbers: Preprocessing = PREPROCESSING) -> Case:
        """Random pixels, random text."""
        return Case(grids, tiny.random_pictures(grids, seed, numbers), tiny.random_prompt(grids, seed))

    @property
    def cuts(self) -> list[int]:
        """A prefill, then single tokens."""
        return [0, *range(len(self.ids) - STEPS, len(self.ids) + 1)]


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max())


def check_parity(engine: Engine, model: Any, case: Case, tolerance: float) -> None:
    ours, theirs = engine.vision.encode(case.patches, case.grids), torch_vision(model, case.patches, case.grids)
    for visual, expected in zip(ours, theirs, strict=True):
        assert difference(visual, expected) <= tolerance
    expected = torch_logits(model, case.ids, case.patches, case.grids)
    assert difference(engine.logits(case, case.cuts), expected[np.array(case.cuts[1:]) - 1]) <= tolerance


def export_and_open(folder: Path, recipe: Recipe) -> Engine:
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", recipe)
    return Engine.open(open_bundle(folder / "bundle"))


VARIANTS: dict[str, dict[str, Any]] = {
    "own head": {},
    "tied head": {"tied": True},
    "bfloat16": {"bfloat16": True},
    "tied, bfloat16, shards": {"tied": True, "bfloat16": True, "max_shard_size": "100KB"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Any]:
    """A checkpoint's bundle and its model in transformers."""
    folder = tmp_path_factory.mktemp("engine")
    model = write_checkpoint(folder / "checkpoint", TINY, **VARIANTS[request.param])
    return export_and_open(folder, Recipe()), model


@pytest.mark.parametrize("scene", SCENES)
def test_float32_is_transformers(pair: tuple[Engine, Any], scene: str) -> None:
    check_parity(*pair, Case.random(SCENES[scene]), TOLERANCE)


# Both sides hold the same weights and round activations to 8 bits in blocks of 32. float32 sums in another order, and
# where an activation falls on the other side of a half it moves by a whole step (1/127 of its block's largest).
# So either nothing falls and the two agree as float32 does, or something does and they differ by a few such steps.
NO_FLIP, FLIPS = 1e-4, 0.1  # largest difference in units of the outputs' standard deviation


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("decoder_bits", "vision_bits"), [(4, 8), (4, 4)])
def test_int4_is_its_dequantised_twin(tmp_path: Path, decoder_bits: int, vision_bits: int, tied: bool) -> None:
    recipe = Recipe(decoder=Scheme(decoder_bits, 32), vision=Scheme(vision_bits, 32))
    model = write_checkpoint(tmp_path / "checkpoint", TINY, tied=tied)
    engine, cases = export_and_open(tmp_path, recipe), [Case.random(TWO, seed) for seed in range(5)]
    plain = torch_logits(model, cases[0].ids, cases[0].patches, cases[0].grids)
    quantize_like(model, recipe)
    quantised = torch_logits(model, cases[0].ids, cases[0].patches, cases[0].grids)
    assert difference(plain, quantised) > 5 * FLIPS * plain.std(), "a twin without quantisation would pass"
    visual_differences, logit_differences = [], []
    for case in cases:
        visual = torch_vision(model, case.patches, case.grids)
        expected = torch_logits(model, case.ids, case.patches, case.grids)[np.array(case.cuts[1:]) - 1]
        ours = np.concatenate(engine.vision.encode(case.patches, case.grids))
        visual_differences.append(difference(ours, np.concatenate(visual)) / ours.std())
        logit_differences.append(difference(engine.logits(case, case.cuts, visual=visual), expected) / expected.std())
    for differences in (visual_differences, logit_differences):
        assert min(differences) <= NO_FLIP
        assert max(differences) <= FLIPS


@pytest.fixture(scope="module", params=DIALECTS)
def engine(request: pytest.FixtureRequest, random_model: tuple[Any, Path], tmp_path_factory: Any) -> Engine:
    """The random model in each dialect: each finds its places in the cache in another way."""
    folder = tmp_path_factory.mktemp("dialect") / request.param
    write_bundle(open_checkpoint(random_model[1].parent / "checkpoint"), folder, Recipe(request.param))
    return Engine.open(open_bundle(folder))


def test_a_prefill_may_come_in_chunks(engine: Engine, random_model: tuple[Any, Path]) -> None:
    case = Case.random(FOUR)
    expected = torch_logits(random_model[0], case.ids, case.patches, case.grids)
    # Inside text, inside a picture, a single token, and the rest.
    cuts = [0, 3, 17, 18, 40, len(case.ids)]
    assert difference(engine.logits(case, cuts), expected[np.array(cuts[1:]) - 1]) <= TOLERANCE


def test_a_rewound_cache_is_a_fresh_one(engine: Engine) -> None:
    case = Case.random(TWO)
    prefix, total = len(case.ids) - 9, len(case.ids)
    other = Case(case.grids, case.patches, case.ids.copy())
    other.ids[prefix:] = (other.ids[prefix:] + 1) % 300
    cache = engine.decoder.new_cache(total + 20)
    first = engine.logits(case, [0, prefix, *range(prefix + 4, total + 1)], cache)
    second = engine.logits(other, [prefix, total], cache)
    again = engine.logits(case, [prefix, *range(prefix + 4, total + 1)], cache)
    fresh = engine.logits(other, [0, prefix, total], engine.decoder.new_cache(total + 20))
    assert np.array_equal(second[0], fresh[1])
    assert np.array_equal(first[1:], again)
    assert difference(first[-1], second[-1]) > TOLERANCE


def test_a_copied_cache_goes_on_as_the_first(engine: Engine) -> None:
    case = Case.random(TWO)
    prefix, total = len(case.ids) - STEPS, len(case.ids)
    cache, longer = engine.decoder.new_cache(total), engine.decoder.new_cache(total + 30)
    engine.logits(case, [0, prefix], cache)
    engine.decoder.copy(cache, longer, prefix)
    first = engine.logits(case, list(range(prefix, total + 1)), cache)
    assert difference(engine.logits(case, list(range(prefix, total + 1)), longer), first) <= 1e-5  # sums of more zeros
    with pytest.raises(GemvgError, match=f"{total + 1} tokens cannot be copied between caches of {total} and"):
        engine.decoder.copy(cache, longer, total + 1)


def test_legal_tokens_are_rows_of_the_logits(engine: Engine) -> None:
    decoder, legal = engine.decoder, np.array([3, 7, 9])
    cache, embeddings = decoder.new_cache(20), decoder.embed(np.arange(6))
    table = engine.rope.table(text_positions(0, 6))
    (whole,) = decoder.forward([Step(embeddings, cache, 0, table)])
    (few,) = decoder.forward([Step(embeddings, cache, 0, table, legal=legal)])
    assert whole.shape == (1, 448)
    assert np.array_equal(few, whole[:, legal])
    assert not decoder.batches
    with pytest.raises(GemvgError, match=r"rows=2, and this engine gives the last token's logits only"):
        decoder.forward([Step(embeddings, cache, 0, table, rows=2)])


def test_two_scenes_do_not_mix(engine: Engine) -> None:
    case, other = Case.random(ONE), Case.random(TWO, seed=1)
    start = len(case.ids) - STEPS
    alone = engine.logits(case, case.cuts)
    caches = [engine.decoder.new_cache(len(one.ids)) for one in (case, other)]
    engine.logits(case, [0, start], caches[0])
    engine.logits(other, other.cuts, caches[1])
    assert np.array_equal(engine.logits(case, case.cuts[1:], caches[0]), alone[1:])


def test_pictures_do_not_see_each_other(engine: Engine) -> None:
    patches = tiny.random_pictures(FOUR)
    together = engine.vision.encode(patches, FOUR)
    for picture, grid, tokens in zip(patches, FOUR, together, strict=True):
        assert difference(engine.vision.encode([picture], [grid])[0], tokens) <= 1e-5


def test_a_cache_is_as_large_as_asked_for(engine: Engine) -> None:
    cache = engine.decoder.new_cache(50)
    keys_values, rotary, logits = 2 * 3 * 50 * 32 * 4, 2 * 50 * 16 * 4, 448 * 4
    given_rows = 0 if cache.rotary is None else rotary  # only the fused dialect's table is of the whole cache
    assert (cache.capacity, cache.bytes) == (50, keys_values + given_rows + logits)
    case = Case.random(FOUR)
    engine.logits(case, [0, 30, 50], cache)
    with pytest.raises(GemvgError, match="51 tokens do not fit a cache of 50; give fewer or smaller pictures"):
        engine.logits(case, [50, 51], cache)


@pytest.fixture
def copied(random_model: tuple[Any, Path], tmp_path: Path) -> Path:
    return shutil.copytree(random_model[1], tmp_path / "bundle")


def test_an_embedding_that_is_none(copied: Path) -> None:
    bundle = open_bundle(copied)
    (copied / EMBEDDING).write_bytes(b"none")
    with pytest.raises(GemvgError, match=r"embedding.npy is not a numpy array .*; copy or export the bundle again"):
        OnnxDecoder(bundle)
    for table, found in ((np.zeros((3, 96), "f4"), r"\(3, 96\) of float32"), (np.zeros((448, 96), "i4"), "of int32")):
        np.save(copied / EMBEDDING, table)
        with pytest.raises(GemvgError, match=rf"embedding.npy has shape .*{found} instead of \(448, 96\)"):
            OnnxDecoder(bundle)


def test_a_graph_that_cannot_be_run(copied: Path) -> None:
    bundle = open_bundle(copied)
    (copied / VISION_GRAPH).write_bytes(b"none")
    with pytest.raises(GemvgError, match=r"vision.onnx is not an ONNX graph"):
        OnnxVisionTower(bundle)
