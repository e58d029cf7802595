"""A checkpoint's vocabulary changes and its knowledge stays: other tokenizers, location tokens, digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from gemvg_edge.answer import AnswerFormat, read_answer, write_answer
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.marks import localise
from gemvg_edge.prompt import END_OF_TURN, IMAGE_TOKEN, encode
from tests.checkpoints import TINY, TOKENIZER, edit_json, write_checkpoint
from train.checkpoint import read_settings
from train.vocabulary import IMAGE_TAGS, add_locations, answer_in_digits, drop_marks, main, move_to_tokenizer

TEXT = "<|im_start|>user\nFind the red mug.<|im_end|>\n<|im_start|>assistant\nImage-1: <|box_start|>(12,"


def load(folder: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of a plain text."""
    with torch.no_grad():
        found: torch.Tensor = load(folder)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


def rows(folder: Path, name: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[name]


def shuffled(seed: int = 0) -> Tokenizer:
    """The tests' tokenizer with its tokens in another order, the special ones among themselves too."""
    content = json.loads(TOKENIZER.to_str())
    names = [*content["model"]["vocab"]]
    order = np.random.default_rng(seed).permutation(len(names))
    content["model"]["vocab"] = {names[k]: int(place) for place, k in enumerate(order)}
    added = content["added_tokens"]
    ids = sorted(token["id"] for token in added)
    for token, number in zip(reversed(added), ids, strict=True):
        token["id"] = number
    content["added_tokens"] = added[::-1]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "200KB"}])
def test_the_same_tokens_in_another_order(tmp_path: Path, tied: bool, shards: dict[str, Any]) -> None:
    sizes = {**TINY, "text_config": TINY["text_config"] | {"vocab_size": TOKENIZER.get_vocab_size()}}
    write_checkpoint(tmp_path / "old", sizes, tied=tied, bfloat16=tied, **shards)
    new = shuffled()
    (tmp_path / "tokenizer").mkdir()
    new.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    move_to_tokenizer(tmp_path / "old", tmp_path / "tokenizer", tmp_path / "new")

    before, after = encode(TOKENIZER, TEXT), encode(new, TEXT)
    assert before != after
    assert new.decode(after, skip_special_tokens=False) == TEXT
    moved = [new.token_to_id(str(TOKENIZER.id_to_token(k))) for k in range(TOKENIZER.get_vocab_size())]
    torch.testing.assert_close(logits(tmp_path / "new", after)[:, moved], logits(tmp_path / "old", before))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["image_token_id"] == new.token_to_id(IMAGE_TOKEN) != TOKENIZER.token_to_id(IMAGE_TOKEN)
    assert config["text_config"]["eos_token_id"] == new.token_to_id(END_OF_TURN)
    generation = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == new.token_to_id(END_OF_TURN)
    assert AutoTokenizer.from_pretrained(tmp_path / "new")(TEXT)["input_ids"] == after


def test_new_tokens_start_as_the_mean_of_their_pieces(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    content = json.loads(TOKENIZER.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    lost = len(vocab) - 1  # the last merge makes room; then "the mug", and two bytes of the euro sign
    del vocab[max(vocab, key=lambda token: int(vocab[token]))], merges[-1]
    vocab["âĤ"] = lost
    content["model"]["merges"].append(["â", "Ĥ"])
    new = Tokenizer.from_str(json.dumps(content))
    new.add_tokens([AddedToken("red mug", special=False, normalized=False)])
    (tmp_path / "tokenizer").mkdir()
    new.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    move_to_tokenizer(tmp_path / "old", tmp_path / "tokenizer", tmp_path / "new")

    for part in ("model.embed_tokens.weight", "lm_head.weight"):
        old_table, table = (rows(tmp_path / folder, part) for folder in ("old", "new"))
        assert len(table) == new.get_vocab_size()
        for token, pieces in (("red mug", encode(TOKENIZER, "red mug")), ("âĤ", encode(TOKENIZER, "€")[:2])):
            assert len(pieces) > 1
            torch.testing.assert_close(table[new.token_to_id(token)], old_table[pieces].mean(dim=0))
        assert torch.equal(table[new.token_to_id(IMAGE_TOKEN)], old_table[TOKENIZER.token_to_id(IMAGE_TOKEN)])


def test_what_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    with pytest.raises(GemvgError, match=r"empty.tokenizer\.json: no such file"):
        move_to_tokenizer(tmp_path / "old", tmp_path / "empty", tmp_path / "new")
    with pytest.raises(GemvgError, match="no such checkpoint folder"):
        move_to_tokenizer(tmp_path / "nothing", tmp_path / "old", tmp_path / "new")
    content = json.loads(TOKENIZER.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != END_OF_TURN]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(GemvgError, match=r"no token <\|im_end\|>, which the checkpoint's config names"):
        move_to_tokenizer(tmp_path / "old", tmp_path / "tokenizer", tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(GemvgError, match="file is a file; give a folder to write to"):
        move_to_tokenizer(tmp_path / "old", tmp_path / "old", tmp_path / "file")
    with pytest.raises(GemvgError, match="is the checkpoint itself"):
        move_to_tokenizer(tmp_path / "old", tmp_path / "old", tmp_path / "old")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("count", [20, 100])  # the first fits into the table's spare rows
def test_location_tokens_change_nothing_that_was_known(tmp_path: Path, tied: bool, count: int) -> None:
    write_checkpoint(tmp_path / "old", tied=tied)
    edit_json(tmp_path / "old" / "config.json", grounding={"prompt": {"number_images": True}})
    add_locations(tmp_path / "old", tmp_path / "new", count)

    ids = encode(TOKENIZER, "<|im_start|>user\nFind the red mug.<|im_end|>\n")
    known = TOKENIZER.get_vocab_size()
    assert torch.equal(logits(tmp_path / "new", ids)[:, :known], logits(tmp_path / "old", ids)[:, :known])
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == (448 if count == 20 else 512)
    settings = read_settings(tmp_path / "new")
    assert settings.answer_format == AnswerFormat("locations", count)
    assert settings.template.number_images
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "model.safetensors")) == (not tied)


def test_an_answer_in_location_tokens_is_short_and_reads_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    add_locations(tmp_path / "old", tmp_path / "new", 1000)
    settings = read_settings(tmp_path / "new")
    sizes = [(1998, 999), (999, 999)]
    boxes = (Box(0, 20.0, 30.0, 1998.0, 999.0), Box(1, 0.0, 1.0, 2.0, 3.0))
    text = write_answer(boxes, sizes, settings.answer_format)
    ids = encode(settings.tokenizer, text)
    assert len(ids) == 1 + 6 + 1 + 1 + 6  # "Image-1: ", a box, a line's end, "Image-2: ", a box
    assert settings.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert read_answer(text, sizes, settings.answer_format).boxes == boxes
    assert AutoTokenizer.from_pretrained(tmp_path / "new")(text)["input_ids"] == ids


@pytest.mark.parametrize("tag", IMAGE_TAGS)
def test_an_image_tag_is_one_token_and_the_same_text(tag: str) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in IMAGE_TAGS])
    for text in (f"{tag}<|box_start|>(1,2)", f"in {tag}the mug", f"\n{tag}", tag * 2):
        ids = encode(tokenizer, text)
        assert tokenizer.token_to_id(tag) in ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert encode(tokenizer, tag.rstrip()) == encode(TOKENIZER, tag.rstrip())


def test_near_locations_start_near_each_other_and_far_ones_do_not(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    add_locations(tmp_path / "old", tmp_path / "new", 1000)
    table = rows(tmp_path / "new", "model.embed_tokens.weight")
    first = read_settings(tmp_path / "new").tokenizer.token_to_id("<loc_0>")
    assert first is not None
    near = (table[first : first + 999] - table[first + 1 : first + 1000]).norm(dim=1)
    far = (table[first : first + 500] - table[first + 500 : first + 1000]).norm(dim=1)
    assert near.mean() < 0.8 * far.mean()
    assert (table[first + 123] - table[first + 321]).norm() > 0.5 * far.mean()
    old = rows(tmp_path / "old", "model.embed_tokens.weight")
    assert 0.5 < table[first : first + 1000].std() / old.std() < 2


def test_digits_and_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "old")
    add_locations(tmp_path / "old", tmp_path / "locations", 30)
    answer_in_digits(tmp_path / "locations", tmp_path / "digits")
    assert read_settings(tmp_path / "digits").answer_format == AnswerFormat()
    add_locations(tmp_path / "digits", tmp_path / "again", 30)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "locations" / name).read_bytes()
    with pytest.raises(GemvgError, match="has 30 location tokens; give --locations 30"):
        add_locations(tmp_path / "digits", tmp_path / "other", 40)


def test_marks_are_dropped_by_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "old")
    with pytest.raises(GemvgError, match="answers in digits; give it locations first, with --locations N"):
        drop_marks(tmp_path / "old", tmp_path / "bare")
    add_locations(tmp_path / "old", tmp_path / "locations", 30)
    monkeypatch.setattr("sys.argv", ["vocabulary", str(tmp_path / "locations"), str(tmp_path / "bare"), "--bare-boxes"])
    main()
    settings = read_settings(tmp_path / "bare")
    assert settings.answer_format == AnswerFormat("locations", 30, marks=False)
    assert (
        len(encode(settings.tokenizer, write_answer([Box(0, 1, 2, 30, 40)] * 3, [(50, 50)], settings.answer_format)))
        == 13
    )
    marked = localise("as <|box_start|>(0,0),(500,500)<|box_end|>", settings.answer_format)
    assert marked == "as <|box_start|><loc_0><loc_0><loc_14><loc_14><|box_end|>", "a question keeps its marks"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "locations" / name).read_bytes()
    add_locations(tmp_path / "bare", tmp_path / "again", 30)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "locations" / "config.json").read_bytes()


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "old")

    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["vocabulary", *arguments])
        with pytest.raises(SystemExit):
            main()
        return capsys.readouterr().err

    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert "needs at least 2" in command(old, new, "--locations", "1")
    assert "one of the arguments" in command(old, new)
    assert "no such checkpoint folder" in command(new, new, "--digits")
    monkeypatch.setattr("sys.argv", ["vocabulary", old, new, "--locations", "10"])
    main()
    assert read_settings(tmp_path / "new").answer_format.locations == 10
