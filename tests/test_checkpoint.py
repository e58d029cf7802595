"""What a checkpoint folder says beside its weights, and one clear sentence for each way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from gemvg_edge.prompt import IMAGE_TOKEN, PromptTemplate
from tests.damage import Damage, remove, set_field, write
from tests.tokenizers_small import small_tokenizer
from train.checkpoint import read_json, read_settings, read_trainable

LOCATIONS = 9
TOKENIZER = small_tokenizer(LOCATIONS)
GROUNDING = {
    "prompt": {"system": "You find things.", "query": "Find {query}.", "number_images": True},
    "answer": {"coordinates": "locations", "locations": LOCATIONS},
}
CONFIG = {"model_type": "qwen2_vl", "image_token_id": TOKENIZER.token_to_id(IMAGE_TOKEN), "grounding": GROUNDING}
PREPROCESSOR = {"patch_size": 8, "size": {"longest_edge": 4096}, "image_processor_type": "Qwen2VLImageProcessor"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    TOKENIZER.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def test_settings_are_read(folder: Path) -> None:
    settings = read_settings(folder)
    assert settings.tokenizer.to_str() == TOKENIZER.to_str()
    assert settings.preprocessing == Preprocessing(patch_size=8, max_pixels=4096)
    assert settings.template == PromptTemplate("You find things.", "Find {query}.", number_images=True)
    assert settings.answer_format == AnswerFormat("locations", LOCATIONS)
    assert settings.image_token_id == CONFIG["image_token_id"]


@pytest.mark.parametrize("grounding", [{"prompt": {}}, {"prompt": None, "answer": {}}])
def test_settings_that_are_left_out_are_the_usual_ones(folder: Path, grounding: Any) -> None:
    set_field("config.json", "grounding", to=grounding)(folder)
    settings = read_settings(folder)
    assert (settings.template, settings.answer_format) == (PromptTemplate(), AnswerFormat())


@pytest.mark.parametrize("grounding", [{"prompt": {}}, {"answer": None}, {"answer": {}}])
def test_qwen2_5_answers_in_pixels_unless_it_says_otherwise(folder: Path, grounding: Any) -> None:
    set_field("config.json", "model_type", to="qwen2_5_vl")(folder)
    assert read_settings(folder).answer_format == AnswerFormat("locations", LOCATIONS)
    set_field("config.json", "grounding", to=grounding)(folder)
    settings = read_settings(folder)
    assert settings.answer_format == AnswerFormat("pixels")
    assert settings.resized([(81, 47)]) == [(80, 48)]
    set_field("config.json", "grounding", to={"answer": {"coordinates": "digits"}})(folder)
    assert read_settings(folder).answer_format == AnswerFormat()


def test_qwen2_5_is_not_trained(folder: Path) -> None:
    assert read_trainable(folder) is not None
    set_field("config.json", "model_type", to="qwen2_5_vl")(folder)
    with pytest.raises(GemvgError, match="is a qwen2_5_vl, which cannot be trained here; give a qwen2_vl checkpoint"):
        read_trainable(folder)


def test_json_is_a_plain_dict(folder: Path) -> None:
    assert read_json(folder / "config.json") == CONFIG


def use_tokenizer(locations: int) -> Damage:
    return lambda folder: small_tokenizer(locations).save(str(folder / "tokenizer.json"))


def prompt(field: str, to: Any) -> Damage:
    return set_field("config.json", "grounding", "prompt", field, to=to)


def answer(field: str, to: Any) -> Damage:
    return set_field("config.json", "grounding", "answer", field, to=to)


def pixels(field: str, to: Any) -> Damage:
    return set_field("preprocessor_config.json", field, to=to)


# Damage, and how the message starts after the folder.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "config.json: no such file; "),
    "no preprocessor": (remove("preprocessor_config.json"), "preprocessor_config.json: no such file; "),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: no such file; save the checkpoint's fast tokenizer"),
    "config cut": (write("config.json", b'{"a": '), "config.json is not JSON (Expecting value"),
    "config a list": (write("config.json", b"[1]"), "config.json is not a JSON object; mend it or download the"),
    "config binary": (write("config.json", b"\xff\x00"), "config.json is not JSON ("),
    "tokenizer cut": (write("tokenizer.json", b'{"version": '), "tokenizer.json is not a tokenizer ("),
    "tokenizer of no sense": (write("tokenizer.json", b"{}"), "tokenizer.json is not a tokenizer ("),
    "grounding": (
        set_field("config.json", "grounding", to="yes"),
        "config.json: grounding is 'yes', not of type object; mend it or",
    ),
    "prompt": (
        set_field("config.json", "grounding", "prompt", to=[]),
        "config.json: grounding.prompt is [], not of type object; m",
    ),
    "unknown in prompt": (
        prompt("tone", "rude"),
        "config.json: grounding.prompt has the unknown field 'tone'; this gemvg-edge knows system, query, think, n",
    ),
    "unknown in answer": (
        answer("digits", 3),
        "config.json: grounding.answer has the unknown field 'digits'; this gemvg-edge knows coordinates, locations",
    ),
    "query without a place": (
        prompt("query", "Find it."),
        "config.json: grounding.prompt cannot be read (grounding.prompt.query is 'Find it.'; it needs the place {",
    ),
    "query no text": (prompt("query", 5), "config.json: grounding.prompt cannot be read ("),
    "system no text": (prompt("system", 5), "config.json: grounding.prompt.system is 5, not like 'You are a helpful"),
    "coordinates": (answer("coordinates", "polar"), "config.json: grounding.answer cannot be read ("),
    "one location": (answer("locations", 1), "config.json: grounding.answer cannot be read ("),
    "half a location": (
        answer("locations", 8.5),
        "config.json: grounding.answer.locations is 8.5, not like 0; mend",
    ),
    "no image token": (
        set_field("config.json", "image_token_id", to=None),
        "config.json lacks the field image_token_id; mend it or",
    ),
    "image token no number": (
        set_field("config.json", "image_token_id", to="7"),
        "config.json: image_token_id is '7', not of type",
    ),
    "another image token": (
        set_field("config.json", "image_token_id", to=7),
        f"tokenizer.json: {IMAGE_TOKEN} is token {CONFIG['image_token_id']}, but config.json has image_token_id 7; t",
    ),
    "too few locations": (
        use_tokenizer(LOCATIONS - 1),
        "tokenizer.json has no token <loc_8>, but config.json has 9 of them in its answers; save the tokenizer",
    ),
    "size": (pixels("size", 5), "preprocessor_config.json cannot be read ("),
    "budget": (pixels("max_pixels", "many"), "preprocessor_config.json cannot be read ("),
    "patch": (pixels("patch_size", [8, 8]), "preprocessor_config.json: patch_size is [8, 8], not like 14; mend it or"),
    "grey": (pixels("image_mean", [0.5]), "preprocessor_config.json: image_mean is (0.5,), not like (0.4"),
    "colours": (pixels("image_std", "abc"), "preprocessor_config.json cannot be read ("),
    "no resize": (
        pixels("do_resize", False),
        "preprocessor_config.json cannot be read (do_resize is switched off, which",
    ),
}


@pytest.mark.parametrize("label", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_sentence(label: str, folder: Path) -> None:
    damage, expected = DAMAGES[label]
    damage(folder)
    with pytest.raises(GemvgError) as caught:
        read_settings(folder)
    assert str(caught.value).startswith(f"{folder}/{expected}")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match="nothing: no such checkpoint folder; give one with config"):
        read_settings(tmp_path / "nothing")
