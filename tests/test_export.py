"""Writing a bundle: equal bytes each time, all or nothing, in bounded memory, and as files that onnx itself accepts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from export import bundle_writer, pieces
from export.bundle_writer import Recipe, count_tensors, write_bundle
from export.pieces import PieceReader
from export.to_onnx import main as export
from export.weights import PAGE, Scheme
from gemvg_edge.bundle import DECODER_DATA, DECODER_GRAPH, FILES, MANIFEST, VISION_DATA, VISION_GRAPH, open_bundle
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import TINY, write_checkpoint
from tests.damage import alter, remove, write
from train.checkpoint import SINGLE

INT4 = Recipe(decoder=Scheme(4, 32), vision=Scheme(8, 32))
GRAPHS = {VISION_GRAPH: VISION_DATA, DECODER_GRAPH: DECODER_DATA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `checkpoint`, its bundles in `float32` and `int4`."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "checkpoint")
    assert export([str(folder / "checkpoint"), str(folder / "float32")]) == 0
    assert export([str(folder / "checkpoint"), str(folder / "int4"), "--weights", "int4"]) == 0
    return folder


@pytest.fixture
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder / "checkpoint")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_a_bundle_is_its_files_and_nothing_else(folder: Path) -> None:
    for name in ("float32", "int4"):
        assert {path.name for path in (folder / name).iterdir()} == {MANIFEST, *FILES}
        assert open_bundle(folder / name).manifest.name == name
        assert (folder / name).stat().st_mode & 0o777 == 0o755


def test_the_manifest_says_what_was_done(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert open_bundle(folder / "int4").manifest.weights == {
        "vision": "int8-rtn-g32", "decoder": "int4-rtn-g32", "head": "int4-rtn-g32", "embedding": "float16",
    }  # fmt: skip
    options = ["--weights", "int4", "--vision-weights", "int4", "--block-size", "128"]
    assert export([str(checkpoint.folder), str(tmp_path / "g128"), *options]) == 0
    manifest = open_bundle(tmp_path / "g128").manifest
    assert (manifest.weights["vision"], manifest.weights["decoder"]) == ("int4-rtn-g128", "int4-rtn-g128")


@pytest.mark.parametrize(("name", "recipe"), [("float32", Recipe()), ("int4", INT4)])
def test_exported_twice_gives_equal_bytes(folder: Path, tmp_path: Path, name: str, recipe: Recipe) -> None:
    write_bundle(open_checkpoint(folder / "checkpoint"), tmp_path / name, recipe)
    assert digests(tmp_path / name) == digests(folder / name)


def save_in_shards(folder: Path) -> None:
    write_checkpoint(folder, TINY, max_shard_size="100KB")


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        assert any(name.startswith(old) for name in tensors)
        save_file({name.replace(old, new, 1): tensor for name, tensor in tensors.items()}, folder / SINGLE)

    return change


def flatten_config(folder: Path) -> None:
    """As the configs on the hub are: the decoder's fields at the top, the old name of the rotary ones."""
    config = json.loads((folder / "config.json").read_text())
    config |= config.pop("text_config") | {"model_type": "qwen2_vl"}
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (folder / "config.json").write_text(json.dumps(config))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "shards": save_in_shards,
    "decoder under language_model": rename("model.layers.", "model.language_model.layers."),
    "vision under model": rename("visual.", "model.visual."),
    "flat config": flatten_config,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_checkpoint_gives_the_same_bundle(folder: Path, tmp_path: Path, layout: str) -> None:
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    if layout == "shards":
        remove(SINGLE)(tmp_path / "checkpoint")
    LAYOUTS[layout](tmp_path / "checkpoint")
    assert export([str(tmp_path / "checkpoint"), str(tmp_path / "float32")]) == 0
    assert digests(tmp_path / "float32") == digests(folder / "float32")


def test_a_stored_head_is_used_whatever_the_config_says(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert not open_checkpoint(tmp_path / "checkpoint").config.tied_head


@pytest.mark.parametrize("tied", [False, True])
def test_progress_ends_at_its_total(tmp_path: Path, tied: bool) -> None:
    write_checkpoint(tmp_path / "checkpoint", tied=tied)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    seen: list[str] = []
    write_bundle(checkpoint, tmp_path / "bundle", Recipe(), on_tensor=seen.append)
    assert len(seen) == count_tensors(checkpoint)


def kill_at(count: int) -> Callable[[str], None]:
    """Stands for Ctrl-C after some tensors."""
    seen: list[str] = []

    def on_tensor(name: str) -> None:
        seen.append(name)
        if len(seen) == count:
            raise KeyboardInterrupt

    return on_tensor


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1])
def test_a_kill_in_the_middle_leaves_what_was_there(checkpoint: Checkpoint, tmp_path: Path, share: float) -> None:
    target, count = tmp_path / "bundle", max(1, int(share * count_tensors(checkpoint)))
    with pytest.raises(KeyboardInterrupt):
        write_bundle(checkpoint, target, Recipe(), kill_at(count))
    assert list(tmp_path.iterdir()) == []
    write_bundle(checkpoint, target, INT4)
    before = digests(target)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(checkpoint, target, Recipe(), kill_at(count), overwrite=True)
    assert list(tmp_path.iterdir()) == [target]
    assert digests(target) == before


@pytest.mark.parametrize("failing", [DECODER_DATA, MANIFEST])
def test_a_failing_rename_brings_the_old_bundle_back(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "bundle"
    write_bundle(checkpoint, target, INT4)
    before, renaming = digests(target), os.replace

    def replace(source: Path, goal: Path) -> None:
        if Path(goal) == target / failing:
            monkeypatch.undo()  # the way back is free
            raise OSError("no more room")
        renaming(source, goal)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no more room"):
        write_bundle(checkpoint, target, Recipe(), overwrite=True)
    assert list(tmp_path.iterdir()) == [target]
    assert digests(target) == before


def test_an_old_or_damaged_bundle_is_replaced(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "float32"
    write_bundle(checkpoint, target, INT4)
    alter(DECODER_DATA)(target)
    remove(VISION_GRAPH)(target)
    write_bundle(checkpoint, target, Recipe(), overwrite=True)
    assert digests(target) == digests(folder / "float32")


def test_a_bundles_card_is_kept(folder: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = shutil.copytree(folder / "int4", tmp_path / "bundle")
    write("README.md", b"What it is good for.")(target)
    write_bundle(checkpoint, target, Recipe(), overwrite=True)
    assert {path.name for path in target.iterdir()} == {MANIFEST, *FILES, "README.md"}
    assert (target / "README.md").read_text() == "What it is good for."


def test_a_bundle_may_go_into_an_empty_folder_or_where_one_stands(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_bundle(checkpoint, Path(), Recipe())
    assert open_bundle(tmp_path / "here").manifest.name == "here"


def test_memory_is_bounded_by_pieces(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 4 * 3 * 2 * 14 * 14  # bytes of a row of the patch embedding; the largest matrix has 166 kB
    sizes: list[int] = []
    reading = PieceReader.rows

    def watched(reader: PieceReader, name: str, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
        for piece in reading(reader, name, dtype):
            sizes.append(piece.nbytes)
            yield piece

    monkeypatch.setattr(PieceReader, "rows", watched)
    for limit, largest in ((4 * longest, 4 * longest), (1, longest)):  # less than a row is never asked for
        sizes.clear()
        monkeypatch.setattr(pieces, "PIECE_BYTES", limit)
        for name, recipe in (("float32", Recipe()), ("int4", INT4)):
            write_bundle(checkpoint, tmp_path / name, recipe, overwrite=True)
            assert digests(tmp_path / name) == digests(folder / name)
        assert len(sizes) > 200
        assert max(sizes) <= largest


@pytest.mark.parametrize("bundle", ["float32", "int4"])
def test_weights_lie_in_the_folder_side_by_side(folder: Path, bundle: str) -> None:
    for graph, data in GRAPHS.items():
        model = onnx.load(folder / bundle / graph, load_external_data=False)
        end = 0
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT64:  # a shape, written into the graph itself
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == data
            offset, length = int(place["offset"]), int(place["length"])
            assert end <= offset < end + PAGE
            assert length < PAGE or offset % PAGE == 0, "a large tensor can be mapped on its own"
            end = offset + length
        assert end == (folder / bundle / data).stat().st_size


@pytest.mark.parametrize("bundle", ["float32", "int4"])
def test_onnx_accepts_the_graphs(folder: Path, bundle: str, tmp_path: Path) -> None:
    shutil.copytree(folder / bundle, tmp_path / "copy")
    for graph in GRAPHS:
        model = onnx.load(folder / bundle / graph)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21, "com.microsoft": 1}
        for node in model.graph.node:
            assert not node.metadata_props
            if node.op_type == "SimplifiedLayerNormalization":  # ONNX Runtime's own, though in the standard's domain
                node.domain = "com.microsoft"
        onnx.save(model, tmp_path / "copy" / graph)
        onnx.checker.check_model(tmp_path / "copy" / graph, full_check=True)


NOT_BUNDLES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another file": (write("notes.txt", b"mine"), r"target holds notes.txt, no part of a bundle, so it is left alone"),
    "no manifest": (remove(MANIFEST), r"manifest.json: no such file; the folder is left alone, give another one"),
    "a manifest of others": (write(MANIFEST, b'{"name": "an app"}'), "manifest.json is not the manifest of a bundle; "),
    "a manifest of no sense": (write(MANIFEST, b"{"), r"manifest.json is not JSON \(.*; the folder is left alone"),
}


@pytest.mark.parametrize("label", NOT_BUNDLES)
def test_what_is_no_bundle_is_left_alone(folder: Path, checkpoint: Checkpoint, tmp_path: Path, label: str) -> None:
    damage, expected = NOT_BUNDLES[label]
    target = shutil.copytree(folder / "int4", tmp_path / "target")
    damage(target)
    before = digests(target)
    with pytest.raises(GemvgError, match=expected):
        write_bundle(checkpoint, target, Recipe())
    assert digests(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_an_unknown_dialect_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match="unknown dialect 'qnn'; use 'fused', 'standard' or 'plain'"):
        write_bundle(checkpoint, tmp_path / "bundle", Recipe(dialect="qnn"))
    assert list(tmp_path.iterdir()) == []
    assert bundle_writer.Recipe().dialect == "fused"
