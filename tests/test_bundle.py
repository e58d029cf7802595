"""Opening a bundle: what is read, and one clear sentence for each way in which a folder can be wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from export.bundle_writer import write_manifest
from export.hashed_file import describe
from export.to_onnx import main as export
from gemvg_edge.answer import AnswerFormat
from gemvg_edge.bundle import (
    DECODER_DATA,
    DECODER_ENGINE,
    DECODER_GRAPH,
    ENGINE_FILES,
    FILES,
    HEAD_ENGINE,
    MANIFEST,
    VISION_DATA,
    VISION_ENGINE,
    VISION_GRAPH,
    EngineBuild,
    open_bundle,
)
from gemvg_edge.errors import GemvgError
from gemvg_edge.prompt import PromptTemplate
from tests.checkpoints import EOS_TOKEN_ID, IMAGE_TOKEN_ID, PREPROCESSING, write_checkpoint
from tests.damage import Damage, alter, remove, set_field, truncate, write


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    write_checkpoint(folder / "checkpoint")
    assert export([str(folder / "checkpoint"), str(folder / "tiny")]) == 0
    return folder / "tiny"


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(original, tmp_path / "tiny")


def test_the_manifest_is_read(original: Path) -> None:
    manifest = open_bundle(original).manifest
    assert manifest.name == "tiny"
    assert manifest.preprocessing == PREPROCESSING
    assert (manifest.answer, manifest.prompt) == (AnswerFormat(), PromptTemplate())
    assert (manifest.coordinate_frame, manifest.dialect) == ({"kind": "relative", "size": 1000}, "fused")
    assert manifest.weights == dict.fromkeys(("vision", "decoder", "head", "embedding"), "float32")
    assert set(manifest.files) == set(FILES)
    model = manifest.model
    assert (model.model_type, model.hidden_size, model.layers, model.vocab_size) == ("qwen2_vl", 96, 3, 448)
    assert (model.heads, model.kv_heads, model.head_dim) == (3, 1, 32)
    assert (model.rope_theta, model.mrope_section) == (20.0, (4, 6, 6))
    assert (model.image_token_id, model.eos_token_ids) == (IMAGE_TOKEN_ID, (EOS_TOKEN_ID,))
    vision = model.vision
    assert (vision.depth, vision.embed_dim, vision.heads, vision.head_dim, vision.rope_theta) == (2, 48, 3, 16, 100.0)


def edit(*keys: str, to: Any = None) -> Damage:
    """Set a field of the manifest, or take it away."""
    return set_field(MANIFEST, *keys, to=to)


def rewrite(content: bytes) -> Damage:
    return write(MANIFEST, content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "tiny: no such bundle folder; make one with"),
    "no manifest": (remove(MANIFEST), "manifest.json: no such file; write a bundle with"),
    "not JSON": (rewrite(b"{"), "manifest.json is not JSON"),
    "not text": (rewrite(b"\xff\xfe\x00"), "manifest.json is not JSON"),
    "nested without end": (rewrite(b"[" * 10**6), "manifest.json is not JSON"),
    "a list": (rewrite(b"[]"), "manifest.json is not a JSON object; export the bundle again"),
    "another format": (edit("format", to="other"), "manifest.json is not the manifest of a gemvg-edge-bundle"),
    "newer": (edit("format_version", to=8), "has format version 8, this gemvg-edge reads 6 and 7; update gemvg-edge"),
    "older": (edit("format_version", to=1), "has format version 1, .* reads 6 and 7; export the bundle again"),
    "version of no sense": (edit("format_version", to="1"), "format_version is '1', not of type int"),
    "version of no number": (edit("format_version", to=True), "format_version is True, not of type int"),
    "older than any": (edit("format_version", to=0), "has format version 0, this gemvg-edge reads 6"),
    "model type": (edit("model", "model_type", to="llava"), "unknown model type 'llava'; .* runs qwen2_vl"),
    "no heads": (edit("model", "heads"), "manifest.json lacks the field model.heads; export the bundle again"),
    "heads of no sense": (edit("model", "heads", to=True), "model.heads is True, not of type int"),
    "no vision depth": (edit("model", "vision", "depth"), "manifest.json lacks the field model.vision.depth"),
    "sections": (edit("model", "mrope_section", to=[8, 8]), r"mrope_section is \(8, 8\), not three .* with the sum 16"),
    "eos": (edit("model", "eos_token_ids", to=["x"]), r"model.eos_token_ids is \['x'\], not a list of whole numbers"),
    "no preprocessing": (edit("preprocessing"), "manifest.json lacks the field preprocessing"),
    "angles of no sense": (edit("model", "rope_theta", to=True), "model.rope_theta is True, not of type float"),
    "preprocessing of no sense": (edit("preprocessing", "size", to=3), "preprocessing has the unknown field 'size'"),
    "patch of no sense": (edit("preprocessing", "patch_size", to="8"), "preprocessing.patch_size is '8', not like 14"),
    "colours of no sense": (edit("preprocessing", "image_mean", to=[0.5]), "preprocessing.image_mean is .+, not like"),
    "unknown setting": (edit("prompt", "tone", to="rude"), "prompt has the unknown field 'tone'; .* system, query"),
    "setting of no sense": (edit("prompt", "number_images", to="no"), "prompt.number_images is 'no', not like False"),
    "prompt of no sense": (edit("prompt", "query", to="?"), "prompt cannot be read"),
    "answer of no sense": (edit("answer", "coordinates", to="polar"), "answer cannot be read"),
    "frame": (edit("coordinate_frame", "size", to=1), "unknown coordinate frame"),
    "dialect": (edit("dialect", to="qnn"), "unknown dialect 'qnn'; this gemvg-edge runs fused, standard, plain"),
    "dialect of no sense": (edit("dialect", to=3), "dialect is 3, not of type str"),
    "precision": (edit("precision", to="int7"), "unknown precision 'int7'; .* runs float32, float16, bfloat16"),
    "no precision": (edit("precision"), "manifest.json lacks the field precision; export the bundle again"),
    "a file of others": (write("notes.txt", b"mine"), "notes.txt is no file of this bundle; take it away or export"),
    "a folder of others": (lambda folder: (folder / "old").mkdir(), "old is no file of this bundle; take it away"),
    "no files": (edit("files"), "manifest.json lacks the field files"),
    "file not listed": (edit("files", "decoder.data"), "manifest.json lacks the field files.decoder.data"),
    "no size": (edit("files", "decoder.data", "bytes"), "manifest.json lacks the field files.decoder.data.bytes"),
    "record of no sense": (edit("files", "decoder.data", to=3), "files.decoder.data is 3, not of type object"),
    "parent": (edit("files", "../evil", to={"bytes": 0, "sha256": ""}), "names the file '../evil', outside the bundle"),
    "absolute": (edit("files", "/etc/passwd", to={"bytes": 0, "sha256": ""}), "names the file '/etc/passwd', outside"),
    "backslash": (edit("files", "..\\evil", to={"bytes": 0, "sha256": ""}), "outside the bundle folder"),
    **{f"no {name}": (remove(name), f"{name}: this file of the bundle is missing") for name in FILES},
    **{f"short {name}": (truncate(name), rf"{name} has \d+ bytes instead of \d+") for name in FILES},
    **{f"altered {name}": (alter(name), f"{name} was altered") for name in FILES},
}  # fmt: skip


@pytest.mark.parametrize("label", DAMAGES)
def test_a_damaged_bundle_is_one_clear_sentence(label: str, bundle: Path) -> None:
    damage, expected = DAMAGES[label]
    damage(bundle)
    with pytest.raises(GemvgError, match=expected) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    assert re.match(re.escape(str(bundle)), message), "the message starts with the file"


def test_a_card_may_lie_beside_it(bundle: Path) -> None:
    write("README.md", b"What it is good for.")(bundle)
    assert open_bundle(bundle).manifest.name == "tiny"


BUILD = EngineBuild("10.3.0", "8.7", "Orin", "jetson-orin-nano-8gb", 4096, 1024, 1024, False)


def engines(bundle: Path, build: EngineBuild) -> Path:
    """Turn a copy into what `export.to_tensorrt` writes; engines are only bytes here."""
    content = json.loads((bundle / MANIFEST).read_text())
    for name in (VISION_GRAPH, VISION_DATA, DECODER_GRAPH, DECODER_DATA):
        (bundle / name).unlink()
        del content["files"][name]
    for name in (VISION_ENGINE, DECODER_ENGINE, *[HEAD_ENGINE] * build.split_head):
        (bundle / name).write_bytes(name.encode())
        content["files"][name] = describe(bundle / name)
    write_manifest(bundle, content | {"tensorrt": asdict(build)})
    return bundle


@pytest.mark.parametrize("split_head", [False, True])
def test_a_folder_of_engines_is_read(bundle: Path, split_head: bool) -> None:
    build = replace(BUILD, split_head=split_head)
    manifest = open_bundle(engines(bundle, build)).manifest
    assert manifest.tensorrt == build
    assert set(manifest.files) == {*ENGINE_FILES, *[HEAD_ENGINE] * split_head}


ENGINE_DAMAGES: dict[str, tuple[Damage, str]] = {
    **{
        f"no {field.name}": (edit("tensorrt", field.name), f"manifest.json lacks the field tensorrt.{field.name}")
        for field in fields(EngineBuild)
    },
    "number of no sense": (edit("tensorrt", "capacity", to="9"), "tensorrt.capacity is '9', not of type int"),
    "truth of no sense": (edit("tensorrt", "split_head", to=1), "tensorrt.split_head is 1, not of type bool"),
    "no object": (edit("tensorrt", to=[]), r"tensorrt is \[\], not of type object"),
    "head not listed": (edit("tensorrt", "split_head", to=True), "manifest.json lacks the field files.head.engine"),
    "engine not listed": (edit("files", DECODER_ENGINE), "manifest.json lacks the field files.decoder.engine"),
    "engine missing": (remove(VISION_ENGINE), "vision.engine: this file of the bundle is missing"),
    "engine altered": (alter(DECODER_ENGINE), "decoder.engine was altered"),
    "a graph left there": (write(DECODER_GRAPH, b""), "decoder.onnx is no file of this bundle"),
    "graphs asked for": (edit("tensorrt"), "manifest.json lacks the field files.vision.onnx"),
}


@pytest.mark.parametrize("label", ENGINE_DAMAGES)
def test_a_damaged_folder_of_engines_is_one_clear_sentence(label: str, bundle: Path) -> None:
    damage, expected = ENGINE_DAMAGES[label]
    damage(engines(bundle, BUILD))
    with pytest.raises(GemvgError, match=expected) as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value)


def test_hashes_may_be_left_out(bundle: Path) -> None:
    alter("decoder.data")(bundle)
    assert open_bundle(bundle, check_hashes=False).folder == bundle
    truncate("decoder.data")(bundle)
    with pytest.raises(GemvgError, match=r"decoder.data has \d+ bytes"):
        open_bundle(bundle, check_hashes=False)
