"""A hub id where a folder is expected: found in a cache laid out as the hub's own, or one sentence."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import huggingface_hub
import pytest

from export.to_onnx import main as export
from gemvg_edge import GemvgError
from gemvg_edge.bundle import open_bundle
from tests.checkpoints import edit_json, write_checkpoint
from train.hub import checkpoint_folder

ID = Path("Qwen/Qwen2-VL-2B-Instruct")
COMMIT = "895c3a49bc3fa70a340399125c650a463535e71c"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out: blobs by their hash, a snapshot of links to them, and a ref."""
    write_checkpoint(tmp_path / "checkpoint")
    edit_json(tmp_path / "checkpoint" / "config.json", grounding=None)
    repository = tmp_path / "hub" / "models--Qwen--Qwen2-VL-2B-Instruct"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for file in (tmp_path / "checkpoint").iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_an_id_is_found_in_the_cache_and_exported(cache: Path, tmp_path: Path) -> None:
    assert checkpoint_folder(ID) == cache
    assert export([str(ID), "bundle"]) == 0
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.name, manifest.profile) == ("bundle", "qwen2-vl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint", "hub"]


def test_a_folder_comes_before_an_id(cache: Path, tmp_path: Path) -> None:
    (tmp_path / ID).mkdir(parents=True)
    assert checkpoint_folder(ID) == ID


@pytest.mark.parametrize(
    "given", ["checkpoints/none", "runs/mine", "nowhere", "/a/b", "../x/y", "a/b/c", "runs/../x", ".git/x"]
)
def test_paths_are_no_ids(given: str, cache: Path, tmp_path: Path) -> None:
    assert checkpoint_folder(Path(given)) == Path(given)


def test_an_id_that_is_not_there_is_one_sentence(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(["Qwen/Qwen2-VL-3B", "bundle"]) == 2
    said = capsys.readouterr().err
    said, asked = said.splitlines()[1], said.splitlines()[0]
    assert asked == "Qwen/Qwen2-VL-3B is no folder here; asking the hub for it"
    assert (
        "Qwen/Qwen2-VL-3B is no folder here, and the hub does not give it (LocalEntryNotFoundError: no connection"
        in said
    )
    assert "hf download Qwen/Qwen2-VL-3B --include '*.safetensors' '*.json' 'chat_template.jinja' --local-dir" in said


def test_without_the_package_the_sentence_says_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        GemvgError, match="run `pip install huggingface_hub` and `hf download Qwen/Qwen2-VL-2B-Instruct"
    ):
        checkpoint_folder(ID)


def test_only_weights_and_texts_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint_folder(ID)
    assert asked == {str(ID): ["*.safetensors", "*.json", "chat_template.jinja"]}
