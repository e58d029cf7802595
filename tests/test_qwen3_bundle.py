"""Qwen3-VL from checkpoint to answer: bundles of every dialect against transformers, and what a manifest may say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.boxes.torch_grounder import TorchGrounder
from export.bundle_writer import Recipe, write_bundle
from export.verify import verify
from export.weights import Scheme
from gemvg_edge import Box, GemvgError, Grounder
from gemvg_edge.bundle import DECODER_GRAPH, DIALECTS, EMBEDDING, MANIFEST, VISION_GRAPH, open_bundle
from gemvg_edge.cli import main as inspect
from gemvg_edge.engines.embedding import EmbeddingTable
from gemvg_edge.engines.graph_weights import Unsupported
from gemvg_edge.engines.native import open_native
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.engines.onnxruntime import OnnxDecoder
from gemvg_edge.positions import mrope_positions
from gemvg_edge.pruning import METHODS, Pruning, prune
from quantize.checkpoint import open_checkpoint
from quantize.gptq import Settings, quantize
from tests.checkpoints import (
    CHAT_TEMPLATE,
    GROUPED_3,
    IMAGE_TOKEN_ID,
    PREPROCESSING_3,
    TINY_3,
    edit_json,
    torch_logits,
    torch_vision,
    write_checkpoint,
    write_json,
)
from tests.damage import Damage, edit_manifest, set_field
from tests.test_engine import FOUR, SCENES, TOLERANCE, TWO, Case, Engine, check_parity, difference
from train.data.record import Record, write_records

NEW_TOKENS = 24


def noise(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [noise(120, 90, 1), noise(64, 200, 2), noise(90, 60, 3), noise(120, 90, 4)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A tiny random checkpoint's model in transformers, and the folder with it and its bundles."""
    folder = tmp_path_factory.mktemp("qwen3_bundle")
    model = write_checkpoint(folder / "checkpoint", TINY_3)
    for dialect in DIALECTS:
        write_bundle(open_checkpoint(folder / "checkpoint"), folder / dialect, Recipe(dialect))
    return model, folder


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_is_transformers(dialect: str, scene: str, pair: tuple[Any, Path]) -> None:
    """Visual tokens with their deepstack features, a prefill, and single tokens after it."""
    model, folder = pair
    engine = Engine.open(open_bundle(folder / dialect))
    check_parity(engine, model, Case.random(SCENES[scene], 0, PREPROCESSING_3), TOLERANCE)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_prefill_may_end_inside_a_picture(dialect: str, pair: tuple[Any, Path]) -> None:
    model, folder = pair
    case = Case.random(FOUR, 0, PREPROCESSING_3)
    expected = torch_logits(model, case.ids, case.patches, case.grids)
    cuts = [0, 3, 17, 18, 40, len(case.ids)]
    ours = Engine.open(open_bundle(folder / dialect)).logits(case, cuts)
    assert difference(ours, expected[np.array(cuts[1:]) - 1]) <= TOLERANCE


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as many deepstack features as layers": ({}, {"deepstack_visual_indexes": [0, 1, 3]}),
    "the last block among them": ({}, {"deepstack_visual_indexes": [3]}),
    "no deepstack": ({}, {"deepstack_visual_indexes": []}),
    "heads narrower than a token": ({"num_attention_heads": 2}, {}),
    "pictures of the table's own size": ({}, {"num_position_embeddings": 100}),
    "one place": ({}, {"num_position_embeddings": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_shapes_are_transformers(variant: str, dialect: str, tmp_path: Path) -> None:
    text, vision = (TINY_3[f"{part}_config"] | VARIANTS[variant][k] for k, part in enumerate(("text", "vision")))
    model = write_checkpoint(tmp_path / "checkpoint", TINY_3 | {"text_config": text, "vision_config": vision})
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", Recipe(dialect))
    engine, case = Engine.open(open_bundle(tmp_path / "bundle")), Case.random(TWO, 0, PREPROCESSING_3)
    check_parity(engine, model, case, TOLERANCE)
    # All features are the last picture token's too, where the last layer sees only that.
    expected = torch_logits(model, case.ids, case.patches, case.grids)
    assert difference(engine.logits(case, [0, 12])[0], expected[11]) <= TOLERANCE


def test_tied_and_in_bfloat16(tmp_path: Path) -> None:
    """As the hub has the 2B and the 4B."""
    model = write_checkpoint(tmp_path / "checkpoint", TINY_3, tied=True, bfloat16=True)
    write_bundle(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle", Recipe())
    check_parity(Engine.open(open_bundle(tmp_path / "bundle")), model, Case.random(FOUR, 0, PREPROCESSING_3), TOLERANCE)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_verify_passes(dialect: str, precision: str, pair: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = pair[1] / "checkpoint"
    write_bundle(open_checkpoint(checkpoint), tmp_path / "bundle", Recipe(dialect, precision))
    result = verify(open_bundle(tmp_path / "bundle"), checkpoint)
    assert (result["passed"], result["unparsed"]) == (True, [])
    assert ("batch" in result) == (dialect != "fused")


@pytest.mark.parametrize("bits", [4, 8])
def test_verify_passes_where_export_rounds(bits: int, pair: tuple[Any, Path], tmp_path: Path) -> None:
    checkpoint = pair[1] / "checkpoint"
    write_bundle(open_checkpoint(checkpoint), tmp_path / "bundle", Recipe(decoder=Scheme(bits), vision=Scheme(8)))
    result = verify(open_bundle(tmp_path / "bundle"), checkpoint)
    assert result["passed"]
    assert result["weights"]["decoder"] == f"int{bits}-rtn-g32"


CODES: dict[str, dict[str, Any]] = {
    "gptq": {"vision_bits": 8, "head_bits": 8, "embedding_bits": 8},
    "rtn": {"method": "rtn", "vision_bits": 8},
    "gptq, 8 bits": {"bits": 8, "group_size": -1, "head_bits": 8},
}


def records(folder: Path) -> Iterator[Record]:
    for k, picture in enumerate(PICTURES):
        picture.save(folder / f"{k}.png")
        yield Record((folder / f"{k}.png",), (picture.size,), "a thing", (Box(0, 2, 3, 40, 30),), "referential", "test")


@pytest.mark.parametrize("kind", CODES)
def test_codes_are_kept_in_every_dialect(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "floats", GROUPED_3)
    write_records(list(records(tmp_path)), tmp_path / "records.jsonl")
    given: dict[str, Any] = {"records": tmp_path / "records.jsonl", "group_size": 32, "positive_scales": True}
    quantize(Settings(tmp_path / "floats", tmp_path / "codes", device="cpu", **(given | CODES[kind])))
    checkpoint = open_checkpoint(tmp_path / "codes")
    for dialect in DIALECTS:
        write_bundle(checkpoint, tmp_path / dialect, Recipe(dialect))
        result = verify(open_bundle(tmp_path / dialect), tmp_path / "codes")
        assert result["passed"], (dialect, result)
        assert result["weights"]["decoder"] == ("int8-gptq-channel" if "8 bits" in kind else "int4-gptq-g32")
        assert result["weights"]["vision"] == ("int8-gptq-channel" if "vision_bits" in CODES[kind] else "float32")


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_it_writes_what_transformers_generates(count: int, dialect: str, pair: tuple[Any, Path]) -> None:
    pictures, query = PICTURES[:count], "every blue block"
    text, *_ = TorchGrounder.open(pair[1] / "checkpoint").ground(pictures, query, NEW_TOKENS)
    grounder = Grounder.open(pair[1] / dialect, max_new_tokens=NEW_TOKENS, engine="onnx")
    assert grounder.ground(pictures, query, constrained=False).text == text


@torch.inference_mode()
def generate_pruned(grounder: TorchGrounder, pictures: list[Image.Image], query: str, pruning: Pruning) -> str:
    """Transformers' greedy answer where each picture has the tokens that pruning leaves, at their places."""
    model: Any = grounder.model
    ids, patches, grids = grounder.prompt(pictures, query)
    counts = [int(h * w) for _, h, w in grids]
    features = torch_vision(model, [part.numpy() for part in torch.split(patches, counts)], grids.tolist())
    shapes = [(int(h) // 2, int(w) // 2) for _, h, w in grids]
    pruned = [prune(tokens, shape, pruning) for tokens, shape in zip(features, shapes, strict=True)]
    visual = ids == IMAGE_TOKEN_ID
    stays = ~visual
    starts = np.cumsum([0, *(len(tokens) for tokens in features)])
    kept = np.concatenate([start + which for start, (_, which) in zip(starts, pruned, strict=False)])
    stays[torch.from_numpy(np.flatnonzero(visual.numpy())[kept])] = True
    positions = torch.from_numpy(mrope_positions(ids.numpy(), IMAGE_TOKEN_ID, [tuple(g) for g in grids.tolist()], 2))
    following = int(positions.max()) + 1
    positions, visual, tokens = positions[:, stays], visual[stays], ids[stays]
    main, *deep = torch.from_numpy(np.concatenate([rows for rows, _ in pruned])).split(96, dim=1)
    answer: list[int] = []
    while len(answer) < NEW_TOKENS and (not answer or answer[-1] not in grounder.stop_ids):
        embeddings = model.get_input_embeddings()(torch.cat([tokens, torch.tensor(answer, dtype=torch.long)]))
        embeddings[: len(tokens)][visual] = main
        places = torch.cat([positions, (following + torch.arange(len(answer))).expand(3, -1)], dim=1)
        mask = torch.cat([visual, torch.zeros(len(answer), dtype=torch.bool)])
        hidden = model.model.language_model(
            inputs_embeds=embeddings[None], position_ids=places[:, None], visual_pos_masks=mask[None],
            deepstack_visual_embeds=deep, use_cache=False,
        )  # fmt: skip
        answer.append(int(model.lm_head(hidden.last_hidden_state[0, -1]).argmax()))
    return grounder.settings.tokenizer.decode(
        answer[:-1] if answer[-1] in grounder.stop_ids else answer, skip_special_tokens=False
    )


@pytest.mark.parametrize("method", METHODS)
def test_pruned_tokens_keep_their_features_and_places(method: str, pair: tuple[Any, Path]) -> None:
    query, pruning = "every blue block", Pruning(0.5, method)
    text = generate_pruned(TorchGrounder.open(pair[1] / "checkpoint"), PICTURES[:2], query, pruning)
    grounder = Grounder.open(pair[1] / "fused", max_new_tokens=NEW_TOKENS, engine="onnx")
    assert grounder.look(PICTURES[:2], keep=0.5, pruning=method).ground(query, constrained=False).text == text
    assert grounder.ground(PICTURES[:2], query, constrained=False).text != text


def test_a_text_token_s_features_are_zeros(pair: tuple[Any, Path]) -> None:
    bundle = open_bundle(pair[1] / "fused")
    rows = EmbeddingTable.open(bundle).rows(np.array([3, 5]))
    assert rows.shape == (2, 288)
    assert np.array_equal(rows[:, :96], np.load(bundle.path(EMBEDDING))[[3, 5]])
    assert not rows[:, 96:].any()


def test_boxes_are_pixels_of_the_original_picture(pair: tuple[Any, Path]) -> None:
    grounder = TorchGrounder.open(pair[1] / "checkpoint")
    text = '```json\n[{"bbox_2d": [100, 200, 500, 1000], "label": "mug", "image": 2}]\n```'
    (box,) = grounder.read(text, [(120, 90), (64, 200)]).boxes
    assert (box, box.label) == (Box(1, 6.4, 40.0, 32.0, 200.0), "mug")
    assert grounder.read("[]", [(120, 90)]).problem is None


@pytest.fixture(scope="module")
def stock(pair: tuple[Any, Path]) -> Path:
    """The same checkpoint without words of its own, as the hub's."""
    folder = pair[1] / "Qwen3-VL-2B-Instruct"
    shutil.copytree(pair[1] / "checkpoint", folder)
    edit_json(folder / "config.json", grounding=None)
    return folder


def test_a_stock_checkpoint_is_asked_and_read_in_its_own_words(stock: Path, tmp_path: Path) -> None:
    write_bundle(open_checkpoint(stock), tmp_path / "bundle", Recipe())
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.profile, manifest.answer.unnamed, manifest.prompt.system_turn) == ("qwen3-vl", "each", False)
    assert manifest.coordinate_frame == {"kind": "relative", "size": 1000}
    grounder = Grounder.open(tmp_path / "bundle", max_new_tokens=NEW_TOKENS)
    one = grounder.ground(PICTURES[:1], "the red mug", constrained=False)
    text, *_ = TorchGrounder.open(stock).ground(PICTURES[:1], "the red mug", NEW_TOKENS)
    assert one.text == text


def test_another_template_is_refused(stock: Path, tmp_path: Path) -> None:
    shutil.copytree(stock, tmp_path / "other")
    write_json(tmp_path / "other" / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    with pytest.raises(GemvgError, match=r"the chat template writes .*system.*, gemvg-edge .*user"):
        write_bundle(open_checkpoint(tmp_path / "other"), tmp_path / "bundle", Recipe())


def test_it_is_not_run_natively(pair: tuple[Any, Path], caplog: pytest.LogCaptureFixture) -> None:
    if find_library() is None:
        pytest.skip("the native library is not built: make native (it needs g++)")
    with pytest.raises(Unsupported, match="is a qwen3_vl, which is not built natively; open it with engine='onnx'"):
        open_native(open_bundle(pair[1] / "fused"))
    with caplog.at_level("INFO", logger="gemvg_edge"):
        grounder = Grounder.open(pair[1] / "fused", max_new_tokens=2)
    assert "ONNX Runtime runs it" in caplog.text
    assert grounder.ground(PICTURES[:1], "the red mug").timings.answer_tokens > 0


def test_inspect_says_so(pair: tuple[Any, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["inspect", str(pair[1] / "fused")]) == 0
    assert "answers: JSON, 0..1000 of each picture's width and height; profile own" in capsys.readouterr().out


def edit(*keys: str, to: Any) -> Damage:
    return set_field(MANIFEST, *keys, to=to)


DAMAGES = {
    "no table of places": (edit("model", "vision", "place_side", to=0), "place_side is 0, not that of a qwen3"),
    "a table of Qwen2-VL": (edit("model", "model_type", to="qwen2_vl"), "which do not make up the width 96"),
    "not interleaved": (edit("model", "mrope_interleaved", to=False), "mrope_interleaved is False, not that of"),
    "interleaved in words": (edit("model", "mrope_interleaved", to="yes"), "mrope_interleaved is 'yes', not of"),
    "more deepstack than layers": (edit("model", "deepstack", to=4), "model.deepstack is 4, not 0 to 3"),
    "less than none": (edit("model", "deepstack", to=-1), "model.deepstack is -1, not 0 to 3"),
    "a huge table": (edit("model", "vision", "place_side", to=10**6), "place_side is 1000000, not 0 to 4096"),
    "wide heads": (edit("model", "head_dim", to=2**16), "heads x head_dim is 262144, not 1 to 65536"),
    "another answer": (edit("answer", "coordinates", to="pixels"), "does not fit answer.coordinates 'pixels'"),
}  # fmt: skip


@pytest.mark.parametrize("label", DAMAGES)
def test_a_manifest_that_contradicts_itself_is_refused(label: str, pair: tuple[Any, Path], tmp_path: Path) -> None:
    damage, said = DAMAGES[label]
    bundle = shutil.copytree(pair[1] / "fused", tmp_path / "bundle")
    damage(bundle)
    with pytest.raises(GemvgError, match=said):
        open_bundle(bundle)


def test_graphs_of_another_width_are_refused(pair: tuple[Any, Path], tmp_path: Path) -> None:
    bundle = shutil.copytree(pair[1] / "fused", tmp_path / "bundle")
    model = json.loads((bundle / MANIFEST).read_text())["model"]
    edit_manifest(bundle, model=model | {"deepstack": 1})
    with pytest.raises(GemvgError, match=r"inputs_embeds' is tensor\(float\) .*288.*by the manifest .*192"):
        OnnxDecoder(open_bundle(bundle))


@pytest.mark.parametrize("graph", [VISION_GRAPH, DECODER_GRAPH])
def test_the_graphs_do_not_depend_on_the_run(graph: str, pair: tuple[Any, Path], tmp_path: Path) -> None:
    write_bundle(open_checkpoint(pair[1] / "checkpoint"), tmp_path / "again", Recipe())
    assert (tmp_path / "again" / graph).read_bytes() == (pair[1] / "fused" / graph).read_bytes()
