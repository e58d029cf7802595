"""What earlier looks leave: never another text, never more bytes than allowed, no memory that grows."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemvg_edge import GemvgError, Grounder, Scene
from gemvg_edge.cache import SceneCache, picture_key
from gemvg_edge.decoding import embed_prompt, prefill
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.images import Preprocessing
from gemvg_edge.looking import encode, recall
from gemvg_edge.opened import Visual
from gemvg_edge.positions import text_positions
from gemvg_edge.stopping import Stopping
from tests.test_grounder import noise

EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
FILES = [EXAMPLES / f"scene{k}-{letter}.png" for k in range(1, 7) for letter in "ab"]
QUERIES = ("all balls", "all teddies", "what both images show", "the object that was moved", "the red mug in image 1")


@dataclass(frozen=True)
class Buffer:
    """Stands for an engine's cache."""

    bytes: int
    capacity: int = 1


ENGINES = ["onnx", pytest.param("native", marks=pytest.mark.skipif(find_library() is None, reason="not built"))]


def tokens(count: int) -> Any:
    return np.ones((count, 1), np.float32)


@pytest.fixture(scope="module")
def plain() -> Grounder:
    return Grounder.open(threads=1, cache_bytes=0)


@pytest.fixture
def caching() -> Grounder:
    return Grounder.open(threads=1)


def test_the_longest_start_is_found() -> None:
    cache = SceneCache(1000)
    cache.keep_prefix([b"a", b"b"], Buffer(10))
    cache.keep_prefix([b"a", b"c", b"d"], Buffer(20))
    cache.keep_prefix([b"b"], Buffer(40))
    found = {
        tuple(wanted.split()): cache.prefix([word.encode() for word in wanted.split()])
        for wanted in ("a b", "a b c", "a c", "a c e", "a c d e", "a", "b a", "c", "d a")
    }
    sizes = {wanted: None if one is None else (one.cache.bytes, one.pictures) for wanted, one in found.items()}
    assert sizes.pop(("a",)) in ((10, 1), (20, 1))
    assert sizes == {
        ("a", "b"): (10, 2), ("a", "b", "c"): (10, 2), ("a", "c"): (20, 2), ("a", "c", "e"): (20, 2),
        ("a", "c", "d", "e"): (20, 3), ("b", "a"): (40, 1), ("c",): None, ("d", "a"): None,
    }  # fmt: skip
    assert cache.bytes == 70


def test_a_longer_sequence_replaces_its_start() -> None:
    cache = SceneCache(100)
    cache.keep_prefix([b"a"], Buffer(10))
    cache.keep_prefix([b"a", b"b"], Buffer(20))
    assert cache.bytes == 20
    found = cache.prefix([b"a"])
    assert found is not None
    assert (found.cache.bytes, found.pictures) == (20, 1)


def test_the_least_recently_used_leaves_first() -> None:
    cache = SceneCache(100)
    for name in (b"a", b"b"):
        cache.keep_tokens(name, tokens(10))
    cache.keep_prefix([b"c"], Buffer(20))
    assert cache.bytes == 100
    assert cache.tokens(b"a") is not None
    assert cache.prefix([b"c"]) is not None
    cache.keep_tokens(b"d", tokens(10))  # b's room
    assert [cache.tokens(name) is not None for name in (b"a", b"b", b"d")] == [True, False, True]
    cache.keep_prefix([b"e"], Buffer(60))
    assert cache.prefix([b"c"]) is None
    assert cache.bytes == 100


def test_what_is_too_large_or_comes_too_late_is_not_kept() -> None:
    cache = SceneCache(100)
    cache.keep_tokens(b"a", tokens(26))
    cache.keep_prefix([b"a"], Buffer(101))
    assert cache.bytes == 0
    cache.keep_tokens(b"a", tokens(25))
    assert cache.bytes == 100
    cache.close()
    cache.keep_tokens(b"a", tokens(1))
    cache.keep_prefix([b"a"], Buffer(1))
    assert (cache.bytes, cache.tokens(b"a"), cache.prefix([b"a"])) == (0, None, None)


def test_a_picture_of_a_batch_is_kept_by_itself() -> None:
    cache, batch = SceneCache(100), tokens(50)
    cache.keep_tokens(b"a", batch[:10])
    kept = cache.tokens(b"a")
    assert kept is not None
    assert kept.base is None
    assert not kept.flags.writeable


@pytest.mark.parametrize("limit", [-1, 1.5, None, True, "1 GB", 2**60])
def test_refuses_limits(limit: Any) -> None:
    with pytest.raises(GemvgError, match=r"cache_bytes=.*; give a whole number of bytes, or 0 to keep nothing"):
        SceneCache(limit)


def test_random_use_keeps_the_bound() -> None:
    rng, cache = np.random.default_rng(0), SceneCache(3000)
    for _ in range(3000):
        names = [bytes([int(k)]) for k in rng.integers(0, 6, rng.integers(1, 5))]
        if rng.random() < 0.5:
            cache.keep_tokens(names[0], tokens(int(rng.integers(1, 300))))
        else:
            cache.keep_prefix(names, Buffer(int(rng.integers(1, 1500))))
        cache.prefix(names[::-1])
        assert cache.bytes == sum(size for _, size in cache._entries.values()) <= 3000
        assert cache._sequences == {key for key in cache._entries if isinstance(key, tuple)}


def test_a_picture_is_known_by_its_pixels_and_what_makes_patches_of_them() -> None:
    numbers = Preprocessing()
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    key = picture_key(pixels, numbers)
    assert key == picture_key(np.asfortranarray(pixels), replace(numbers, max_pixels=999_999))
    other = pixels.copy()
    other[3, 4, 1] ^= 1
    keys = [picture_key(other, numbers), picture_key(pixels.reshape(56, 28, 3), numbers)]
    for change in ({"image_mean": (0.0, 0.0, 0.0)}, {"patch_size": 7}, {"rescale_factor": 1.0}, {"merge_size": 1}):
        keys.append(picture_key(pixels, replace(numbers, **change)))
    assert len({key, *keys}) == 1 + len(keys)


def pixels_of(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_same_pixels_under_another_name_are_known(caching: Grounder, tmp_path: Path) -> None:
    caching.look(FILES[:2])
    Image.fromarray(pixels_of(FILES[0])).save(tmp_path / "other.bmp")
    again = caching.look([tmp_path / "other.bmp", pixels_of(FILES[1])])
    assert again._seen.cached == again.timings.image_tokens
    assert [picture.name for picture in again.pictures] == [str(tmp_path / "other.bmp"), "images[1]"]


def encoded_by(grounder: Grounder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each run of the vision tower is given, as it happens."""
    counts: list[int] = []
    vision = grounder.model.engines()[0]
    encode = vision.encode

    def counted(patches: Any, grids: Any) -> Any:
        counts.append(len(patches))
        return encode(patches, grids)

    monkeypatch.setattr(vision, "encode", counted)
    return counts


def test_equal_pictures_of_a_look_are_encoded_once(
    caching: Grounder, plain: Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for grounder in (caching, plain):
        counts = encoded_by(grounder, monkeypatch)
        grounder.look([FILES[0], FILES[1], FILES[0]])
        assert counts == [2]


def test_only_what_is_new_is_encoded_and_prefilled(caching: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = encoded_by(caching, monkeypatch)
    whole = caching.look(FILES[:4])
    last = caching.look([*FILES[:3], FILES[5]])
    turned = caching.look([FILES[5], *FILES[:3]])
    first = caching.look(FILES[:2])
    assert counts == [4, 1]
    assert whole._seen.cached == turned._seen.cached == 0
    assert first._seen.cached == first.timings.image_tokens
    assert caching.look(FILES[:3])._seen.cached == last._seen.cached
    assert 0 < last._seen.cached < last.timings.image_tokens


PROBE = np.arange(5)


def logits_after(scene: Scene) -> Any:
    """What the decoder says after some tokens that follow a scene's pictures: any key or value in it has a say."""
    model, seen = scene._model, scene._seen
    _, decoder = model.engines()
    places = text_positions(seen.position, len(PROBE))
    return prefill(decoder, model.rope, decoder.embed(PROBE), places, seen.cache, seen.past)


def looks(rng: np.random.Generator, count: int) -> list[list[Path]]:
    """Pictures of looks that follow each other: the same, the last or the first changed, turned, fewer, all new."""
    now, found = FILES[:2], []
    for _ in range(count):
        now = list(now)
        match rng.integers(6):
            case 0:
                now[-1] = FILES[rng.integers(12)]
            case 1:
                now[0] = FILES[rng.integers(12)]
            case 2:
                rng.shuffle(now)
            case 3:
                now = now[: 1 + rng.integers(len(now))]
            case 4:
                now = [FILES[k] for k in rng.integers(0, 12, 1 + rng.integers(4))]
        found.append(now)
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("limit", [2**28, 2_000_000, 300_000, 60_000])
def test_logits_and_texts_are_those_without(engine: str, limit: int) -> None:
    """Whatever was looked at before, and however little is kept of it: equal to the last bit."""
    grounder, plain = (Grounder.open(engine=engine, threads=1, cache_bytes=n) for n in (limit, 0))
    known = 0
    for k, pictures in enumerate(looks(np.random.default_rng(limit), 40)):
        budget = (None, None, 9000)[k % 3]
        ours, theirs = grounder.look(pictures, max_pixels=budget), plain.look(pictures, max_pixels=budget)
        assert grounder.model.cache.bytes <= limit
        known += ours._seen.cached
        assert np.array_equal(logits_after(ours), logits_after(theirs)), k
        if k % 4 == 0:
            query = QUERIES[k % len(QUERIES)]
            assert ours.ground(query).text == theirs.ground(query).text
    assert (known > 0) == (limit > 100_000)


def test_scenes_with_a_common_start_do_not_touch_each_other(caching: Grounder, plain: Grounder) -> None:
    """A question is written behind the pictures, and the next one over it."""
    groups = [[*FILES[:2]], [*FILES[:2], FILES[2]], [FILES[0], FILES[3]], [FILES[0]]]
    scenes = [caching.look(group) for group in groups]
    expected = [plain.look(group).ground(query).text for group in groups for query in QUERIES]
    for _ in range(2):
        assert [scene.ground(query).text for scene in scenes for query in QUERIES] == expected
        scenes = [caching.look(group) for group in groups]
    assert len(set(expected)) > 8


def test_prefilling_in_one_run_is_the_same_within_rounding(caching: Grounder) -> None:
    """A run a picture against one run of all, logits apart by less than 1e-4 of some tens."""
    model = caching.model
    vision, decoder = model.engines()
    for pictures in (FILES[:2], FILES[2:6], FILES[:1]):
        resized = caching._resize(pictures, None, False, None, Stopping())
        visual = encode(resized, recall(resized, SceneCache(0), False), SceneCache(0), vision)
        seen = model.prefill_pictures(decoder, visual, resized.grids)
        ids, positions, position, _ = model._prompt(visual, resized.grids)
        whole = decoder.new_cache(seen.cache.capacity)
        given = [one.tokens for one in visual if one.tokens is not None]
        embeddings = embed_prompt(decoder, ids, model.manifest.model.image_token_id, given)
        prefill(decoder, model.rope, embeddings, positions, whole, 0)
        after, places = decoder.embed(ids[-3:]), text_positions(position, 3)
        pieces, one = (prefill(decoder, model.rope, after, places, cache, len(ids)) for cache in (seen.cache, whole))
        assert np.abs(pieces - one).max() < 1e-4
        assert np.abs(one).max() > 1


def test_a_common_start_has_the_same_ids_and_positions(caching: Grounder) -> None:
    model, sizes = caching.model, [(8, 8), (4, 10), (12, 6), (8, 8), (2, 2)]
    visual, grids = [Visual(b"", None)] * len(sizes), [(1, h, w) for h, w in sizes]
    ids, positions, _, ends = model._prompt(visual, grids)
    assert ends[-1] == len(ids)
    for k in range(1, len(sizes)):
        start_ids, start_positions, position, start_ends = model._prompt(visual[:k], grids[:k])
        assert np.array_equal(start_ids, ids[: ends[k - 1]])
        assert np.array_equal(start_positions, positions[:, : ends[k - 1]])
        assert np.array_equal(start_ends, ends[:k])
        assert position == positions[:, ends[k - 1]].max()


def test_random_models_write_the_same(random_model: tuple[Any, Path]) -> None:
    """Another tokenizer and prompt, and pictures of many shapes."""
    ours, theirs = (Grounder.open(random_model[1], threads=1, max_new_tokens=8, cache_bytes=n) for n in (2**26, 0))
    rng = np.random.default_rng(0)
    pictures = [noise(int(w), int(h), k) for k, (w, h) in enumerate(rng.integers(30, 200, (5, 2)))]
    for _ in range(25):
        shown = [pictures[k] for k in rng.integers(0, 5, rng.integers(1, 4))]
        assert ours.ground(shown, "the red mug").text == theirs.ground(shown, "the red mug").text


def test_pictures_that_are_asked_alone_are_known_too(random_model: tuple[Any, Path]) -> None:
    folder = random_model[1]
    ours, theirs = (Grounder.open(folder, threads=1, max_new_tokens=8, cache_bytes=n) for n in (2**26, 0))
    for grounder in (ours, theirs):
        manifest = grounder.manifest
        grounder.model.manifest = replace(manifest, answer=replace(manifest.answer, unnamed="each"))
    pictures = [noise(60, 60, 1), noise(90, 60, 2), noise(60, 90, 3)]
    for shown in (pictures, pictures[:2], pictures[::-1], pictures):
        assert ours.ground(shown, "the red mug").text == theirs.ground(shown, "the red mug").text


def test_threads_get_the_texts_of_one(plain: Grounder) -> None:
    grounder = Grounder.open(threads=1, cache_bytes=3_000_000)
    asked = [(pictures, QUERIES[k % 5]) for k, pictures in enumerate(looks(np.random.default_rng(5), 48))]
    alone = [plain.ground(pictures, query).text for pictures, query in asked]
    with ThreadPoolExecutor(6) as threads:
        together = list(threads.map(lambda one: grounder.ground(*one).text, asked))
    assert together == alone
    assert 0 < grounder.model.cache.bytes <= 3_000_000


def test_an_engine_that_copies_nothing_is_asked_as_before(
    caching: Grounder, plain: Grounder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise GemvgError("this engine copies nothing")

    monkeypatch.setattr(caching.model.engines()[1], "copy", refuse)
    for _ in range(2):
        assert caching.ground(FILES[:2], QUERIES[0]).text == plain.ground(FILES[:2], QUERIES[0]).text
    assert not caching.model.cache._sequences
    assert caching.model.cache.bytes > 0  # visual tokens are kept all the same


def test_a_look_that_was_called_off_leaves_nothing_wrong(caching: Grounder, plain: Grounder) -> None:
    expected = plain.ground(FILES[:3], QUERIES[0]).text
    for timeout in (1e-6, 0.01, 0.02, 0.03, 0.05):
        with suppress(TimeoutError):
            caching.ground(FILES[:3], QUERIES[0], timeout=timeout)
        assert caching.ground(FILES[:3], QUERIES[0]).text == expected


def test_closing_lets_it_go_and_a_pickle_keeps_the_bound() -> None:
    grounder = Grounder.open(threads=1, cache_bytes=12_345_678)
    scene = grounder.look(FILES[:2])
    copy = pickle.loads(pickle.dumps(grounder))
    assert copy.model.cache.limit == 12_345_678
    assert copy.model.cache.bytes == 0
    assert grounder.model.cache.bytes > 0
    grounder.close()
    assert grounder.model.cache.bytes == 0
    with pytest.raises(GemvgError, match="closed"):
        scene.ground(QUERIES[0])


def test_a_look_that_ends_after_closing_keeps_nothing(caching: Grounder, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()
    vision = caching.model.engines()[0]
    encode: Callable[[Sequence[Any], Sequence[Any]], Any] = vision.encode

    def wait(patches: Any, grids: Any) -> Any:
        started.set()
        go_on.wait(30)
        return encode(patches, grids)

    monkeypatch.setattr(vision, "encode", wait)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(caching.look, FILES[:2])
        started.wait(30)
        caching.close()
        go_on.set()
        assert looking.result().timings.image_tokens > 0
    assert caching.model.cache.bytes == 0


MEMORY = """
import gc
import sys
import numpy as np
from gemvg_edge import Grounder

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

grounder = Grounder.open(engine=sys.argv[1], threads=1, cache_bytes=8_000_000, max_new_tokens=4, max_pixels=9000)
rng = np.random.default_rng(0)
seen = []
for k in range(500):
    sizes = rng.integers(40, 160, (rng.integers(1, 4), 2))
    grounder.ground([rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes], "all balls")
    assert grounder.model.cache.bytes <= 8_000_000
    if k % 50 == 49:
        seen.append(resident())
print(*seen)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_stays_flat_over_500_requests(engine: str) -> None:
    """After the first 150, which fill the cache and the allocator's pools, 350 more take less than 8 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY, engine], check=True, capture_output=True, text=True)
    sizes = [int(word) for word in done.stdout.split()]
    assert max(sizes[3:]) - sizes[2] < 8e6, sizes
