"""A tokenizer.json as transformers leaves it behind: the same text is always the same tokens, and answers stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemvg_edge import Grounder
from gemvg_edge.bundle import MANIFEST
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import sha256
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.tokenizer import LAST_ID, open_tokenizer

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "tabletop"
FIX = "export the bundle again"


def edited(edit: Callable[[dict[str, Any]], object], folder: Path) -> Path:
    """The shipped tokenizer with its JSON edited."""
    content = json.loads((DEFAULT_BUNDLE / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def padded(content: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_padding(pad_id=3, pad_token="<|endoftext|>", length=64, direction="left")
    content["padding"] = json.loads(tokenizer.to_str())["padding"]


def truncated(content: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_truncation(max_length=6)
    content["truncation"] = json.loads(tokenizer.to_str())["truncation"]


HARMFUL: dict[str, Callable[[dict[str, Any]], object]] = {
    "padding": padded,
    "truncation": truncated,
    "dropout": lambda content: content["model"].update(dropout=0.9),
    "all": lambda content: (padded(content), truncated(content), content["model"].update(dropout=0.5)),  # type: ignore[func-returns-value]
}
TEXTS = ("the red mug", "Image-2: <|box_start|><loc_3>", "every object that is in both of the pictures, the café's too")


@pytest.mark.parametrize("case", HARMFUL)
def test_a_text_becomes_the_same_tokens(case: str, tmp_path: Path) -> None:
    plain = open_tokenizer(DEFAULT_BUNDLE / "tokenizer.json", FIX)
    changed = open_tokenizer(edited(HARMFUL[case], tmp_path), FIX)
    for text in TEXTS * 3:
        assert changed.encode(text, add_special_tokens=False).ids == plain.encode(text, add_special_tokens=False).ids


def test_boxes_stay_the_same(tmp_path: Path) -> None:
    """Through the runtime, and through the settings that training, calibration and benchmarks take a tokenizer from."""
    from bench.boxes.torch_grounder import TorchGrounder
    from export.bundle_writer import write_manifest
    from train.checkpoint import read_settings

    images = [ROOT / "examples" / "images" / f"scene1-{letter}.png" for letter in "ab"]
    query = json.loads((ROOT / "examples" / "images" / "scenes.json").read_text())[0]["query"]
    bundle = shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle")
    file = edited(HARMFUL["all"], bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"]["tokenizer.json"] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_manifest(bundle, manifest)
    expected = Grounder.open().ground(images, query)
    assert expected.boxes
    assert Grounder.open(bundle).ground(images, query).text == expected.text

    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    edited(HARMFUL["all"], checkpoint)
    ours, theirs = read_settings(checkpoint).tokenizer, read_settings(CHECKPOINT).tokenizer
    assert all(ours.encode(text).ids == theirs.encode(text).ids for text in TEXTS)
    assert TorchGrounder.open(checkpoint).settings.tokenizer.encode(TEXTS[0]).ids == theirs.encode(TEXTS[0]).ids


def add_token(number: Any) -> Callable[[dict[str, Any]], object]:
    def edit(content: dict[str, Any]) -> None:
        content["added_tokens"][-1]["id"] = number

    return edit


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "an id past every table": add_token(LAST_ID + 1),
    "an id below zero": add_token(-1),
    "an id that is text": add_token("7"),
    "a huge id in the vocabulary": lambda content: content["model"]["vocab"].update(x=10**9),
    "rules that double a text": lambda content: content.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
        }
    ),
    "a pattern that never ends": lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(
        pattern={"Regex": r"(.+.+)+\d"}
    ),
    "no splitting": lambda content: content.update(pre_tokenizer=None),
    "affixes": lambda content: content["model"].update(continuing_subword_prefix="é"),
    "words": lambda content: content.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}),
    "another decoder": lambda content: content.update(decoder={"type": "Fuse"}),
    "two tokens with one id": add_token(5),
    "two words with one id": lambda content: content["model"]["vocab"].update(nobody=5),
    "a token with two ids": lambda content: content["added_tokens"].append({**content["added_tokens"][0], "id": 9999}),
    "another kind of model": lambda content: content.update(model={"type": "Nothing"}),
    "no model": lambda content: content.pop("model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"tokenizer\.json is not a tokenizer \(.*\); export the bundle again"):
        open_tokenizer(edited(BROKEN[case], tmp_path), FIX)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match="no such file; export"):
        open_tokenizer(tmp_path / "tokenizer.json", FIX)
    with pytest.raises(GemvgError, match="cannot be read"):
        open_tokenizer(tmp_path / ("x" * 300), FIX)
