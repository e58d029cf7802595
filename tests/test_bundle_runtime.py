"""What BUNDLE.md says and no trace shows, held against our own code: the seal, sizes, questions, answers, batches."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from export.trace import main as trace
from export.trace_file import read_trace
from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.boxes import Size
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.bundle import seal as sealed
from gemvg_edge.engines.embedding import dequantize_rows
from gemvg_edge.errors import GemvgError
from gemvg_edge.grammar import answer_grammar
from gemvg_edge.images import Grid, Preprocessing, resize
from gemvg_edge.marks import localise
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import mrope_table, place_table
from gemvg_edge.prompt import token_id
from tests import bundle_runtime
from tests import bundle_runtime_pictures as pictures
from tests.bundle_runtime_answer import Grammar, most_steps, show, to_boxes
from tests.bundle_runtime_seal import seal, write
from tests.test_trace import TOLERANCE, check_reproduced, write_random
from tests.tokenizers_small import small_tokenizer

SHOWN = "the mug of <|box_start|>(120,45),(1000,678)<|box_end|>, or <|box_start|> ( 1 , 2 ) , (3,5) <|box_end|>"
RESIZED: list[Size] = [(112, 84), (112, 84), (308, 392)]
FORMATS = {
    "digits": AnswerFormat(),
    "json": AnswerFormat("json"),
    "pixels": AnswerFormat("pixels"),
    "locations": AnswerFormat("locations", 50),
    "bare": AnswerFormat("locations", 50, marks=False),
}


def test_a_bundle_s_seal_is_its_own(tmp_path: Path) -> None:
    for folder in (DEFAULT_BUNDLE, write_random(tmp_path, "qwen3 fused")):
        manifest = json.loads((folder / MANIFEST).read_text())
        assert seal(manifest) == manifest["sha256"] == sealed(manifest)
        manifest["model"]["vision"]["rope_theta"] += 1e-9
        assert seal(manifest) != manifest["sha256"]


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text("azAZ_09"), inner), max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_json_is_sealed_alike(value: Any) -> None:
    assert write(value) == json.dumps(value, sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-4, 9.999e-5, 1e16, 9999999999999998.0, 5e-324, 1.7e308, -2.5e-7, 1 / 255, '\x7f\x1fé😀"/']
)
def test_odd_values_are_sealed_alike(value: Any) -> None:
    assert write(value) == json.dumps(value)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (57, 203), (400, 30), (112, 84), (641, 479)])
def test_pictures_are_resized_as_the_page_says(width: int, height: int) -> None:
    picture = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    numbers = Preprocessing(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 40)
    w, h = pictures.new_size(width, height, numbers.to_config())
    theirs = resize(Image.fromarray(picture), numbers)
    assert theirs.shape == (h, w, 3)
    ours = pictures.resize(picture, w, h, int(PIL.__version__.split(".")[0]))
    np.testing.assert_array_equal(ours, theirs)


def test_tables_of_codes_are_as_the_page_says() -> None:
    rng, rows, hidden = np.random.default_rng(0), 5, 24
    for codes, bits in ((hidden, 8), (hidden // 2, 4)):
        table = np.zeros(rows, [("codes", "u1", (codes,)), ("scales", "<f2", (3,))])
        table["codes"] = rng.integers(0, 256, (rows, codes))
        table["scales"] = rng.normal(size=(rows, 3))
        ours = bundle_runtime.embedding_rows(table, hidden)
        np.testing.assert_array_equal(ours, dequantize_rows(table, hidden), str(bits))


@pytest.mark.parametrize("sections", [(24, 20, 20), (6, 5, 5), (2, 3, 3), (0, 2, 6), (8, 0, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_frequencies_follow_positions_as_the_page_says(sections: tuple[int, int, int], interleaved: bool) -> None:
    """Qwen3-VL's own sections among them: with these the last frequencies of height and width follow time."""
    positions, d = np.random.default_rng(0).integers(0, 3000, (3, 50)), 2 * sum(sections)
    model = {"head_dim": d, "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": interleaved}
    for ours, theirs in zip(
        bundle_runtime.token_rows(positions, model), mrope_table(positions, d, 5e6, sections, interleaved), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 5, 48])
@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 48, 48), (1, 6, 50), (1, 94, 4)])
def test_learned_places_are_as_the_page_says(grid: Grid, side: int) -> None:
    index, weight = pictures.learned_places(grid, 2, side)
    theirs = place_table(grid, 2, side)
    np.testing.assert_array_equal(index, theirs.rows)
    np.testing.assert_allclose(weight, theirs.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("question", [SHOWN, "the mug", "<|box_start|>(0,0),(999,501)<|box_end|>"])
def test_a_question_shows_boxes(name: str, question: str) -> None:
    form = FORMATS[name]
    assert show(question, form.to_config(), RESIZED[:2]) == localise(question, form, RESIZED[:2])


def test_a_shown_box_has_no_pixels_in_pictures_of_several_sizes() -> None:
    form = FORMATS["pixels"]
    with pytest.raises(GemvgError, match="several sizes"):
        localise(SHOWN, form, RESIZED)
    with pytest.raises(ValueError, match="several sizes"):
        show(SHOWN, form.to_config(), RESIZED)


@pytest.mark.parametrize("kind", ["fused", "qwen3 fused", "shipped"])
def test_a_trace_whose_question_shows_a_box_is_reproduced(kind: str, tmp_path: Path) -> None:
    bundle = DEFAULT_BUNDLE if kind == "shipped" else write_random(tmp_path, kind)
    assert trace([str(bundle), "--out", str(tmp_path / "trace.npz"), "--query", SHOWN, "--steps", "8"]) == 0
    check_reproduced(bundle, tmp_path / "trace.npz")


@pytest.mark.parametrize("unnamed", ["refuse", "each"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_the_same_tokens_are_legal(name: str, count: int, unnamed: Any) -> None:
    """Along random answers, in which boxes are opened often."""
    form = replace(FORMATS[name], unnamed=unnamed)
    if not form.marks and unnamed != "refuse":
        with pytest.raises(GemvgError, match="marks is false"):
            AnswerFormat.from_config(form.to_config())
        return
    tokenizer, answer = small_tokenizer(form.locations), form.to_config()
    vocab = tokenizer.get_vocab_size()
    stop, opened = (token_id(tokenizer, token) for token in ("<|im_end|>", "<|box_start|>"))
    manifest = {"answer": answer, "model": {"eos_token_ids": [stop], "vocab_size": vocab}}
    seen, rng = RESIZED[3 - count :], np.random.default_rng(count)
    theirs = Grammar(tokenizer, manifest, [most_steps(answer, size) for size in seen])
    walk = answer_grammar(tokenizer, form, seen, [stop])(False)
    legal, written = next(walk), list[int]()
    while len(written) < 40:
        may = set(range(vocab)) if legal is None else set(legal.tolist())
        assert theirs.legal(written) == may, tokenizer.decode(written, skip_special_tokens=False)
        more = sorted(may - {stop, opened}) or sorted(may - {stop})
        if not more:
            break
        written.append(opened if opened in may and rng.random() < 0.4 else int(rng.choice(more)))
        legal = walk.send(written[-1])


ANSWERS: dict[str, str] = {
    "in a fence": '```json\n[{"bbox_2d": [100, 200, 500, 1000], "label": "mug", "image": 2}]\n```',
    "two and another": '[{"image_id": 1, "bbox_2d": [1, 2, 30, 40]}, {"bbox_2d": [5, 6, 7, 8], "image_id": 3}]',
    "picture 0": '[{"bbox_2d": [5, 6, 7, 8], "image": 0}]',
    "named before": 'Image-2: [{"bbox_2d": [9, 8, 70, 60], "label": "Image-1: (1,2),(3,4)"}]',
    "no picture": '[{"bbox_2d": [9, 8, 70, 60]}]',
    "inside another": '{"boxes": [{"bbox_2d": [9, 8, 70, 60], "image": 1}]}',
    "another object": 'Image-1: {"from": "(1,2),(3,4)"} (5,6),(7,8)',
    "past the edge": '[{"bbox_2d": [-3, 8, 1050, 900.5], "image": 1}, {"bbox_2d": [3, 8, 1090, 9], "image": 1}]',
    "shares": '[{"bbox_2d": [0.1, 0.2, 0.5, 1], "image": 1}]',
    "no area": '[{"bbox_2d": [5, 6, 5, 8], "image": 1}]',
    "three numbers": '[{"bbox_2d": [5, 6, 7], "image": 1}]',
    "cut": '[{"bbox_2d": [5, 6, 7, 8], "image": 1}, {"bbox_2d": [5, 6, 7, 9], "im',
    "nothing": "[]",
    "lines": "Image-1: <|box_start|>(1,2),(30,40)<|box_end|>\nImage-2: <|box_start|>(10,20),(1000,1000)<|box_end|>",
    "unsorted": "Image-2: (1,2),(30,40)\nImage-1: (4,5),(6,7)(1,2),(30,40)",
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["digits", "json", "pixels"])
@pytest.mark.parametrize("case", ANSWERS)
def test_answers_are_read_alike(case: str, name: str, count: int) -> None:
    form, seen = FORMATS[name], [(1036, 1008), (504, 2016)][:count]
    sizes, steps = [(120, 90), (64, 200)][:count], [most_steps(form.to_config(), size) for size in seen]
    found = sorted(to_boxes(ANSWERS[case], sizes, steps, form.to_config()))
    theirs = read_answer(ANSWERS[case], sizes, form, seen).boxes
    assert found == [(box.image, *box) for box in theirs]


LOCATED = {
    "lines": "Image-1: {0}{1}\nImage-2: {1}",
    "cut in a box": "Image-2: {0}<loc_1><loc_2><loc_3>",
    "one too many": "Image-1: {0}{1}<loc_9>\nImage-2: {1}",
    "without an area": "Image-1: <loc_5><loc_6><loc_5><loc_8>{0}",
}


@pytest.mark.parametrize("name", ["locations", "bare"])
@pytest.mark.parametrize("case", LOCATED)
def test_answers_in_locations_are_read_alike(case: str, name: str) -> None:
    form, sizes = FORMATS[name], [(120, 90), (64, 200)]
    marked = ("<|box_start|>{}<|box_end|>" if form.marks else "{}").format
    text = LOCATED[case].format(marked("<loc_1><loc_2><loc_30><loc_40>"), marked("<loc_0><loc_3><loc_49><loc_4>"))
    found = sorted(to_boxes(text, sizes, [(49, 49)] * 2, form.to_config()))
    theirs = read_answer(text, sizes, form).boxes
    assert len(theirs) >= 1
    assert found == [(box.image, *box) for box in theirs]


@pytest.mark.parametrize("kind", ["standard", "plain", "qwen3 standard", "qwen3 plain"])
def test_scenes_are_run_as_one_batch(kind: str, tmp_path: Path) -> None:
    """Two that are never as long as each other until their end, where both are the trace's prompt."""
    bundle = write_random(tmp_path, kind)
    assert trace([str(bundle), "--out", str(tmp_path / "trace.npz"), "--steps", "1"]) == 0
    arrays, manifest = read_trace(tmp_path / "trace.npz"), json.loads((bundle / MANIFEST).read_text())
    rows = [arrays[name] for name in ("embeddings", "cos", "sin")]
    count = len(rows[0])
    cuts = [[0, 30, 31, 32, 37, count], [0, 17, 18, 22, 23, count]]

    def decode(scenes: list[list[int]]) -> np.ndarray:
        decoder = bundle_runtime.Decoder(bundle, manifest, count + 20, len(scenes))
        steps = zip(*([slice(*ends) for ends in pairwise(cut)] for cut in scenes), strict=True)
        return np.stack([decoder.run([(rows[0][k], rows[1][k], rows[2][k]) for k in step]) for step in steps])

    together, alone = decode(cuts), np.concatenate([decode([cut]) for cut in cuts], axis=1)  # (steps, scenes, vocab)
    assert np.abs(together - alone).max() <= TOLERANCE * alone.std()
    assert np.abs(together[-1] - arrays["free_logits"][0]).max() <= TOLERANCE * alone.std()
