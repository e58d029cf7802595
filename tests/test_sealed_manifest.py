"""A manifest vouches for itself, its numbers have ranges, and the graphs are held against it before they are run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.to_onnx import main as export
from export.verify import main as verify
from gemvg_edge import Grounder
from gemvg_edge.bundle import (
    DECODER_GRAPH,
    EMBEDDING,
    MANIFEST,
    TOKENIZER,
    VISION_GRAPH,
    open_bundle,
    read_manifest,
)
from gemvg_edge.cli import main as gemvg
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import sha256
from gemvg_edge.models import DEFAULT_BUNDLE
from tests.checkpoints import write_checkpoint
from tests.damage import edit_manifest, set_field

CASES = Path(__file__).parents[2] / "shared" / "cases" / "manifests"


def test_every_flipped_bit_is_refused_or_without_effect(tmp_path: Path) -> None:
    """17,976 of them; at one time 136 gave other boxes."""
    content, original = (DEFAULT_BUNDLE / MANIFEST).read_bytes(), read_manifest(DEFAULT_BUNDLE / MANIFEST)
    file = tmp_path / MANIFEST
    file.write_bytes(content)
    with file.open("r+b", buffering=0) as writing:  # truncating the file anew would take most of the time
        for bit in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            writing.seek(0)
            writing.write(flipped)
            try:
                read = read_manifest(file)
            except GemvgError:
                continue
            assert read == original, bit


@pytest.mark.parametrize("order", [False, True], ids=["compact", "in another order"])
def test_what_says_the_same_is_the_same(order: bool, tmp_path: Path) -> None:
    content = json.loads((DEFAULT_BUNDLE / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(dict(reversed(content.items())) if order else content))
    assert read_manifest(tmp_path / MANIFEST) == read_manifest(DEFAULT_BUNDLE / MANIFEST)


@pytest.mark.parametrize(
    "name", ["locations-329.json", "manifest-OverflowError-48.json", "manifest-OverflowError-51.json"]
)
def test_manifests_that_once_went_wrong(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not CASES.is_dir():
        pytest.skip("../shared is missing")
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    shutil.copyfile(CASES / name, bundle / MANIFEST)
    assert gemvg(["inspect", str(bundle)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_inspect_does_not_vouch_for_an_altered_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    set_field(MANIFEST, "answer", "locations", to=329)(bundle)
    assert gemvg(["inspect", str(bundle)]) == 2
    output = capsys.readouterr()
    assert "manifest.json was altered (its sha256 is not its own); copy or export the bundle again" in output.err
    assert output.out == ""


def changed(bundle: Path, *keys: str, to: Any) -> None:
    """Set a field at any depth and seal the manifest again."""
    set_field(MANIFEST, *keys, to=to)(bundle)
    edit_manifest(bundle)


RANGES: dict[str, tuple[tuple[str, ...], Any]] = {
    "a billion layers": (("model", "layers"), 10**9),
    "no layers": (("model", "layers"), 0),
    "a huge table": (("model", "vocab_size"), 10**12),
    "a huge number": (("model", "rope_theta"), 1e300),
    "a number below zero": (("model", "rope_theta"), -1.0),
    "a stop past the table": (("model", "eos_token_ids"), [664]),
    "no stop": (("model", "eos_token_ids"), []),
    "a picture token past the table": (("model", "image_token_id"), 664),
    "heads of another width": (("model", "heads"), 12),
    "key heads that do not divide": (("model", "kv_heads"), 4),
    "sections below zero": (("model", "mrope_section"), [-2, 8, 10]),
    "a vision width": (("model", "vision", "embed_dim"), 2**40),
    "patches of nothing": (("preprocessing", "patch_size"), 0),
    "patches of a planet": (("preprocessing", "patch_size"), 10**9),
    "no colour's spread": (("preprocessing", "image_std"), [0.0, 0.0, 0.0]),
    "pictures without end": (("preprocessing", "max_pixels"), 10**18),
    "a billion locations": (("answer", "locations"), 10**9),
    "a file below zero": (("files", "vision.data", "bytes"), -1),
    "no digest": (("files", "vision.data", "sha256"), "x"),
    "a field of nobody": (("model", "depth"), 3),
    "a part of nobody": (("weights", "tail"), "int4"),
    "a top field of nobody": (("note",), "hello"),
}


@pytest.mark.parametrize("case", RANGES)
def test_numbers_of_no_sense_are_refused_though_sealed(case: str, tmp_path: Path) -> None:
    keys, value = RANGES[case]
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    changed(bundle, *keys, to=value)
    with pytest.raises(GemvgError, match=r"manifest\.json") as caught:
        Grounder.open(bundle)
    assert "altered" not in str(caught.value)


CONTRADICTED: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "layers": (("model", "layers"), 9, r"decoder.onnx has the input 'past_key_9', unlike what the manifest says"),
    "more layers": (("model", "layers"), 11, r"decoder.onnx lacks the input 'past_key_10', unlike what"),
    "key heads": (
        ("model", "kv_heads"),
        3,
        r"decoder.onnx: the input 'past_key_0' is .*, by the manifest .* \[None, 3",
    ),
    "the table": (("model", "vocab_size"), 665, r"decoder.onnx: the output 'logits' is .*664.*, by the manifest .*665"),
    "patches": (("preprocessing", "patch_size"), 16, r"vision.onnx: the input 'patches' is .*, by the manifest"),
    "precision": (("precision",), "float16", r"decoder.onnx: the input 'past_key_0' is tensor\(float\)"),
    "dialect": (("dialect",), "plain", r"decoder.onnx lacks the input 'places', unlike"),
    "locations": (("answer", "locations"), 65, r"tokenizer.json has 129 location tokens, but manifest.json states 65"),
    "the picture's token": (
        ("model", "image_token_id"),
        3,
        r"tokenizer.json: <\|image_pad\|> is token 524, but manifest",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTED)
def test_graphs_and_tokens_are_held_against_it(case: str, tmp_path: Path) -> None:
    keys, value, said = CONTRADICTED[case]
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    changed(bundle, *keys, to=value)
    with pytest.raises(GemvgError, match=said):
        Grounder.open(bundle, engine="onnx")
    for engine in ("native", None):
        with pytest.raises(GemvgError, match="; ") as caught:
            Grounder.open(bundle, engine=engine)
        assert "\n" not in str(caught.value)


def save_archive(file: Path) -> None:
    with file.open("wb") as archive:
        np.savez(archive, a=np.zeros(3))


TABLES: dict[str, Callable[[Path], object]] = {
    "a scalar for codes": lambda file: np.save(file, np.zeros(664, [("codes", "u1"), ("scales", "<f2", (6,))])),
    "other fields": lambda file: np.save(file, np.zeros(664, [("codes", "<f4", (192,)), ("scales", "<f2", (6,))])),
    "no scales": lambda file: np.save(file, np.zeros(664, [("codes", "u1", (192,)), ("scales", "<f2", (0,))])),
    "objects": lambda file: np.save(file, np.array([{}] * 664), allow_pickle=True),
    "another byte order": lambda file: np.save(file, np.zeros((664, 192), ">f4")),
    "an archive": save_archive,
    "a header without end": lambda file: file.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 70000),
    "more rows than bytes": lambda file: file.write_bytes(
        file.read_bytes()[:128].replace(b"(664,)", b"(10**9,)").ljust(128)
    ),
    "nothing": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_of_no_sense_is_one_sentence(case: str, tmp_path: Path) -> None:
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    TABLES[case](bundle / EMBEDDING)
    record(bundle, EMBEDDING)
    with pytest.raises(GemvgError, match=r"embedding\.npy (is not a numpy array|has shape)"):
        Grounder.open(bundle)


def record(bundle: Path, name: str) -> None:
    """Put a file's size and digest into the manifest, and seal it."""
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    described = {"bytes": (bundle / name).stat().st_size, "sha256": sha256(bundle / name)}
    edit_manifest(bundle, files=files | {name: described})


@pytest.mark.parametrize("dialect", ["fused", "standard", "plain"])
@pytest.mark.parametrize("where", ["vision", "decoder"])
def test_numbers_past_every_range_end_an_answer(dialect: str, where: str, tmp_path: Path) -> None:
    """Weights are finite and their products are not, as in a float16 that overflows."""
    model = write_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        part = (
            model.model.visual.merger.mlp[2] if where == "vision" else model.model.language_model.layers[1].mlp.up_proj
        )
        part.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    assert export([str(tmp_path / "checkpoint"), str(bundle), "--dialect", dialect, "--precision", "float32"]) == 0
    grounder = Grounder.open(bundle, max_new_tokens=8)
    picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    graph, what = (VISION_GRAPH, "a picture's tokens") if where == "vision" else (DECODER_GRAPH, "the logits")
    with pytest.raises(GemvgError, match=rf"{graph}: {what} are not finite \(NaN or infinity, in float32\)"):
        grounder.ground([picture], "the mug")


def test_a_run_that_finds_no_memory_is_one_sentence(tmp_path: Path) -> None:
    """A graph that asks for more than there is stands for attention over a picture of 12 megapixels."""
    write_checkpoint(tmp_path / "checkpoint")
    bundle = tmp_path / "bundle"
    assert export([str(tmp_path / "checkpoint"), str(bundle), "--dialect", "plain", "--precision", "float32"]) == 0
    model = onnx.load(bundle / VISION_GRAPH, load_external_data=False)
    huge = onnx.helper.make_tensor("huge", onnx.TensorProto.INT64, [1], [2**45])
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.FLOAT, [1], [0.0])
    model.graph.node.append(onnx.helper.make_node("Expand", ["zero", "huge"], ["filled"], name="fill"))
    model.graph.node.append(onnx.helper.make_node("ReduceMean", ["filled"], ["most"], name="most", keepdims=1))
    model.graph.node.append(onnx.helper.make_node("Add", ["tokens_before", "most"], ["tokens"], name="add"))
    model.graph.initializer.extend([huge, zero])
    for node in model.graph.node[:-1]:
        for k, output in enumerate(node.output):
            node.output[k] = "tokens_before" if output == "tokens" else output
    onnx.save(model, bundle / VISION_GRAPH)
    record(bundle, VISION_GRAPH)
    with pytest.raises(GemvgError, match=r"vision.onnx cannot be (run|run on 1 picture)"):
        Grounder.open(bundle).look([np.zeros((56, 56, 3), np.uint8)])


VERIFIED: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "pixels": (("preprocessing", "min_pixels"), 28 * 28 * 3, "bundle has preprocessing.min_pixels 2352"),
    "colours": (("preprocessing", "image_mean"), [0.5, 0.5, 0.5], "bundle has preprocessing.image_mean"),
    "the system's words": (
        ("prompt", "system"),
        "You are a rude assistant.",
        "bundle has prompt.system You are a rude",
    ),
    "numbered pictures": (("prompt", "number_images"), True, "bundle has prompt.number_images True"),
    "the rotary base": (("model", "rope_theta"), 21.0, "bundle has rope_theta 21.0"),
    "a stop": (("model", "eos_token_ids"), [1], "bundle has eos_token_ids"),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_verify_compares_all_that_a_manifest_says(
    case: str, random_model: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, value, said = VERIFIED[case]
    bundle = shutil.copytree(random_model[1], tmp_path / "bundle")
    changed(bundle, *keys, to=value)
    assert verify([str(bundle), "--against", str(random_model[1].parent / "checkpoint")]) == 2
    assert said in capsys.readouterr().err


def test_verify_compares_tokenizers(
    random_model: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(random_model[1], tmp_path / "bundle")
    content = json.loads((bundle / TOKENIZER).read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (bundle / TOKENIZER).write_text(json.dumps(content))
    record(bundle, TOKENIZER)
    assert verify([str(bundle), "--against", str(random_model[1].parent / "checkpoint")]) == 2
    assert "tokenizer.json is not the tokenizer of" in capsys.readouterr().err


BESIDE = (".git/config", ".gitattributes", ".cache/x", ".DS_Store", ".nfs0001", "lost+found/1", "LICENSE", "README.md")


def test_a_bundle_is_opened_as_people_have_it(tmp_path: Path) -> None:
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    for name in BESIDE:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("theirs")
    assert open_bundle(bundle).manifest.name == "tabletop"


def test_a_bundle_of_links_is_opened_and_grounds(tmp_path: Path) -> None:
    """As a hub's cache has it: every file a link into a folder of blobs, the snapshot itself reached through one."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in DEFAULT_BUNDLE.iterdir():
        if file.is_file():
            blob = blobs / sha256(file)
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs", blob.name))
    (tmp_path / "main").symlink_to(snapshot)
    images = [DEFAULT_BUNDLE.parents[2] / "examples" / "images" / f"scene1-{letter}.png" for letter in "ab"]
    expected = Grounder.open().ground(images, "all balls")
    assert Grounder.open(tmp_path / "main").ground(images, "all balls").boxes == expected.boxes != ()
