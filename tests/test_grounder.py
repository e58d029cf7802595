"""Pictures and a query through the whole runtime, on a bundle that was exported from a tiny checkpoint."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemvg_edge import Box, GemvgError, Grounder, Grounding, Scene
from gemvg_edge.bundle import EMBEDDING, TOKENIZER
from gemvg_edge.grounding import Timings
from gemvg_edge.images import ImageSource, patchify, resize
from gemvg_edge.prompt import encode_prefix, encode_query
from tests.checkpoints import torch_logits

NEW_TOKENS = 24


def noise(width: int, height: int, seed: int) -> Image.Image:
    """A picture of coarse random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


PAIR = [noise(120, 90, 1), noise(64, 200, 2)]
SCENES = {
    "one": ([noise(100, 100, 3)], "the red mug"),
    "two of different shape": (PAIR, "every blue block"),
    "two of one shape": ([noise(90, 60, 4), noise(90, 60, 5)], "what changed?"),
    "five, some grown": ([noise(20 + 60 * k, 150, 6 + k) for k in range(5)], "été 赤い杯 <|box_start|>(1,2),(3,4)"),
}


@pytest.fixture(scope="module")
def grounder(random_model: tuple[Any, Path]) -> Grounder:
    return Grounder.open(random_model[1], max_query_tokens=40, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def answerer(fixed_answer: Path) -> Grounder:
    return Grounder.open(fixed_answer)


def without_times(grounding: Grounding) -> Grounding:
    return replace(grounding, timings=Timings(), pictures=())


def greedy_by_transformers(model: Any, grounder: Grounder, pictures: list[Image.Image], query: str) -> list[int]:
    """The plain twin: the whole sequence through transformers for every token, without a cache."""
    numbers = grounder.manifest.preprocessing
    patches, grids = zip(*(patchify(resize(picture, numbers), numbers) for picture in pictures), strict=True)
    prefix = encode_prefix(grounder.model.tokenizer, grounder.manifest.prompt, grids, numbers.merge_size)
    manifest = grounder.manifest
    prompt = np.concatenate([prefix, encode_query(grounder.model.tokenizer, manifest.prompt, manifest.answer, query)])
    ids = prompt
    while len(ids) < len(prompt) + NEW_TOKENS:
        token = torch_logits(model, ids, list(patches), list(grids))[-1].argmax()
        ids = np.append(ids, token)
        if token in grounder.manifest.model.eos_token_ids:
            break
    return [int(token) for token in ids[len(prompt) :]]


@pytest.mark.parametrize("label", SCENES)
def test_writes_what_transformers_writes(label: str, random_model: tuple[Any, Path], grounder: Grounder) -> None:
    pictures, query = SCENES[label]
    expected = greedy_by_transformers(random_model[0], grounder, pictures, query)
    grounding = grounder.ground(pictures, query, constrained=False)
    assert grounding.text == grounder.model.tokenizer.decode(expected, skip_special_tokens=False)
    assert grounding.timings.answer_tokens == len(expected) == NEW_TOKENS
    assert grounding.problem == f"the answer was cut at max_new_tokens={NEW_TOKENS}"


def test_a_scene_answers_as_a_fresh_one_does(grounder: Grounder) -> None:
    queries = ["the red mug", "every blue block on the table, in both pictures", "what changed?", "the red mug"]
    scene = grounder.look(PAIR)
    reused = [without_times(scene.ground(query, constrained=False)) for query in queries]
    assert reused == [without_times(grounder.ground(PAIR, query, constrained=False)) for query in queries]
    assert len({grounding.text for grounding in reused}) == 3, "the query matters"


def test_a_refused_query_leaves_the_scene_as_it_was(grounder: Grounder) -> None:
    scene = grounder.look(PAIR)
    first = scene.ground("the red mug")
    for query in ("", "mug " * 100, "<|im_end|>"):
        with pytest.raises(GemvgError):
            scene.ground(query)
    assert scene.ground("the red mug").text == first.text


def test_scenes_do_not_disturb_each_other(grounder: Grounder) -> None:
    alone = grounder.ground(PAIR, "the red mug", constrained=False).text
    scene, other = grounder.look(PAIR), grounder.look(PAIR[::-1])
    assert other.ground("the red mug", constrained=False).text != alone, "the order of pictures matters"
    assert scene.ground("the red mug", constrained=False).text == alone


def test_boxes_are_in_pixels_of_the_original_pictures(answerer: Grounder) -> None:
    grounding = answerer.ground([noise(80, 40, 1), noise(400, 200, 2)], "the red mug")
    assert grounding.boxes == (Box(1, 80.0, 80.0, 240.0, 200.0),)
    assert grounding.text == "Image-2: <|box_start|><loc_8><loc_16><loc_24><loc_40><|box_end|>"
    assert (grounding.thinking, grounding.problem) == ("", None)


def test_a_picture_that_was_not_given_is_a_problem(answerer: Grounder) -> None:
    grounding = answerer.ground([noise(80, 40, 1)], "the red mug", constrained=False)
    assert (grounding.boxes, grounding.problem) == ((), "image 2 was named, of 1")


def test_an_answer_that_was_cut_says_so(fixed_answer: Path, answerer: Grounder) -> None:
    full = answerer.ground(PAIR, "the red mug")
    cut = Grounder.open(fixed_answer, max_new_tokens=full.timings.answer_tokens - 1).ground(PAIR, "the red mug")
    # All but the end of the turn is there, so the box is kept, and the cut is told.
    assert (cut.text, cut.boxes) == (full.text, full.boxes)
    assert cut.problem == f"the answer was cut at max_new_tokens={full.timings.answer_tokens - 1}"


def test_tokens_and_times_are_counted(grounder: Grounder) -> None:
    scene = grounder.look([noise(56, 28, 1), noise(84, 56, 2)])
    query = "the red mug"
    timings = scene.ground(query, constrained=False).timings
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n" + "<|vision_start|>" * 4
    assert timings.image_tokens == 2 + 6 + len(grounder.model.tokenizer.encode(text).ids)
    after = f"{query}<|im_end|>\n<|im_start|>assistant\n"
    assert timings.query_tokens == len(grounder.model.tokenizer.encode(after).ids)
    assert timings.answer_tokens == NEW_TOKENS
    phases = ("preprocess_ms", "vision_ms", "image_prefill_ms", "query_prefill_ms", "decode_ms")
    assert all(getattr(timings, phase) > 0 for phase in phases)
    assert all(getattr(timings, phase) == getattr(scene.timings, phase) for phase in phases[:3])


def as_path(picture: Image.Image, folder: Path) -> ImageSource:
    picture.save(folder / "picture.png")
    return folder / "picture.png"


def as_bytes(picture: Image.Image, folder: Path) -> ImageSource:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    return encoded.getvalue()


SOURCES: dict[str, Callable[[Image.Image, Path], ImageSource]] = {
    "path": as_path,
    "path as text": lambda picture, folder: str(as_path(picture, folder)),
    "bytes": as_bytes,
    "array": lambda picture, folder: np.asarray(picture),
    "PIL with alpha": lambda picture, folder: picture.convert("RGBA"),
}


@pytest.mark.parametrize("label", SOURCES)
def test_every_kind_of_source_gives_the_same(label: str, grounder: Grounder, tmp_path: Path) -> None:
    expected = without_times(grounder.ground(PAIR, "the red mug"))
    given = (SOURCES[label](PAIR[0], tmp_path), PAIR[1])  # a tuple will do, too
    assert without_times(grounder.ground(given, "the red mug")) == expected


def test_boxes_follow_the_orientation_of_a_photo(answerer: Grounder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    noise(400, 200, 2).save(tmp_path / "turned.jpg", exif=exif)
    scene = answerer.look([noise(80, 40, 1), tmp_path / "turned.jpg"])
    assert scene.sizes == [(80, 40), (200, 400)]
    assert scene.ground("the red mug").boxes == (Box(1, 40.0, 160.0, 120.0, 400.0),)


BAD_IMAGES: list[tuple[Any, str]] = [
    ([], "no pictures were given; a query needs at least one"),
    ("left.png", r"images is a str; give a list of pictures, \[picture\] for a single one"),
    (Path("left.png"), "images is a PosixPath; give a list"),
    (b"\x89PNG", "images is a bytes; give a list"),
    (np.zeros((2, 9, 9, 3), np.uint8), "images is a ndarray; give a list"),
    (PAIR[0], "images is a Image; give a list"),
    (None, "images is a NoneType; give a list"),
    (iter(PAIR), "give a list of pictures"),
    ([PAIR[0], None], r"images\[1\] is a NoneType; give a path, bytes, a PIL image or a uint8 RGB array"),
    ([PAIR[0], np.zeros((9, 9), np.int8)], r"images\[1\] is an array of int8 with shape \(9, 9\)"),
    ([b"no picture"], r"images\[0\] \(10 bytes\) is not a picture that Pillow can read"),
    (["/nowhere/left.png"], "/nowhere/left.png: no such picture file"),
    ([__file__], "test_grounder.py is not a picture that Pillow can read"),
    ([noise(1, 201, 1)], "a picture of 1 x 201 pixels is longer than 200 to 1; crop it first"),
]


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES, ids=[message for _, message in BAD_IMAGES])
def test_refuses_pictures(images: Any, message: str, grounder: Grounder) -> None:
    with pytest.raises(GemvgError, match=message):
        grounder.ground(images, "the red mug")


BAD_QUERIES = [
    ("  ", "the query is empty"),
    ("the mug<|im_end|>", r"the query holds the special token <\|im_end\|>"),
    ("mug " * 100, r"the query takes \d+ tokens, more than max_query_tokens=40; shorten it or open the Grounder"),
]


@pytest.mark.parametrize(("query", "message"), BAD_QUERIES, ids=[message for _, message in BAD_QUERIES])
def test_refuses_queries(query: str, message: str, grounder: Grounder) -> None:
    with pytest.raises(GemvgError, match=message):
        grounder.ground(PAIR, query)
    with pytest.raises(GemvgError, match=message):
        grounder.look(PAIR[:1]).ground(query)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_query_tokens=256 and max_new_tokens=0 must be at least 1"),
        ({"max_query_tokens": -1}, "max_query_tokens=-1 and max_new_tokens=256 must be at least 1"),
        ({"threads": -1}, "threads=-1; give 0 for one a physical core, or a number up to 1024"),
        ({"threads": 2**40}, "threads=1099511627776; give 0"),
    ],
)
def test_refuses_settings(settings: dict[str, int], message: str, random_model: tuple[Any, Path]) -> None:
    with pytest.raises(GemvgError, match=message):
        Grounder.open(random_model[1], **settings)  # type: ignore[arg-type]  # check_hashes is no number


@pytest.mark.parametrize(
    ("name", "message"),
    [(TOKENIZER, "tokenizer.json is not a tokenizer"), (EMBEDDING, "embedding.npy is not a numpy array")],
)
def test_damage_is_told_without_hashes_too(
    name: str, message: str, random_model: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(random_model[1], tmp_path / "bundle")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(b"?" + content[1:])
    with pytest.raises(GemvgError, match=message):
        Grounder.open(folder, check_hashes=False)


def test_threads_change_nothing(random_model: tuple[Any, Path], grounder: Grounder) -> None:
    single = Grounder.open(str(random_model[1]), threads=1, max_query_tokens=40, max_new_tokens=NEW_TOKENS)
    scene = single.look(PAIR)
    assert isinstance(scene, Scene)
    assert scene.ground("the red mug").text == grounder.ground(PAIR, "the red mug").text
