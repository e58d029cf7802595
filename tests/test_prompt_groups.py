"""What GRPO asks is what the runtime asks: the same tokens, the same patches, and each group in one mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gemvg_edge.boxes import Box
from gemvg_edge.images import load_image, patchify, resize
from gemvg_edge.marks import mark
from gemvg_edge.prompt import PromptTemplate, encode_prefix, encode_query
from tests.checkpoints import write_checkpoint
from train.checkpoint import CheckpointSettings, read_settings
from train.data.record import MODES, Mode, Record
from train.prompt_groups import ask, draw_modes, draw_records, group_dataset, group_processor
from train.small_model import write_small_model

SIZES = ((130, 90), (64, 200))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = tuple(folder / f"{k}.png" for k in range(len(SIZES)))
    for path, (width, height) in zip(paths, SIZES, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    shown = Box(0, 13, 9, 65, 45)
    query = f"the café's mug like {mark(shown, SIZES[0])} {{query}}"
    return Record(paths, SIZES, query, (shown,), "referential", "test")


@pytest.fixture(scope="module", params=["plain", "small"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that answers in digits and one that numbers its pictures and answers in location tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    if request.param == "plain":
        write_checkpoint(folder)
    else:
        write_small_model(folder, seed=0)
    return folder


def processed(folder: Path, settings: CheckpointSettings, record: Record, mode: Mode) -> dict[str, Any]:
    """As GRPOTrainer does it."""
    message, pictures = ask(settings, record, mode), iter([load_image(path) for path in record.images])
    for part in message[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(pictures)
    processor = group_processor(folder, settings)
    inputs: dict[str, Any] = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    return inputs


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_patches_are_the_runtimes(checkpoint: Path, record: Record, mode: Mode) -> None:
    settings = read_settings(checkpoint)
    inputs = processed(checkpoint, settings, record, mode)
    pairs = [patchify(resize(load_image(path), settings.preprocessing), settings.preprocessing) for path in record.images]  # noqa: E501  # fmt: skip
    grids = [grid for _, grid in pairs]
    assert [tuple(grid) for grid in np.asarray(inputs["image_grid_thw"]).tolist()] == grids
    prefix = encode_prefix(settings.tokenizer, settings.template, grids, settings.preprocessing.merge_size)
    query = encode_query(
        settings.tokenizer, settings.template, settings.answer_format, record.query, think=mode == "cot"
    )
    assert inputs["input_ids"][0] == np.concatenate([prefix, query]).tolist()
    np.testing.assert_allclose(np.asarray(inputs["pixel_values"]), np.concatenate([p for p, _ in pairs]), atol=1e-6)


def test_the_modes_ask_differently(checkpoint: Path, record: Record) -> None:
    settings = read_settings(checkpoint)
    direct, cot = (str(ask(settings, record, mode)) for mode in MODES)
    assert "think" not in direct.lower()
    assert "think" in cot.lower()
    other = replace(settings, template=PromptTemplate(system="Other."))
    assert "Other." in str(ask(other, record, "direct"))


def test_each_group_has_one_mode_and_a_longer_run_starts_the_same() -> None:
    modes = draw_modes(400, 0.25, seed=3)
    assert 0.2 < modes.count("cot") / 400 < 0.3
    assert draw_modes(50, 0.25, seed=3) == modes[:50]
    assert draw_modes(400, 0.25, seed=4) != modes
    assert set(draw_modes(50, 0.0, seed=3)) == {"direct"}
    assert set(draw_modes(50, 1.0, seed=3)) == {"cot"}


def test_every_record_is_asked_once_before_any_is_asked_twice() -> None:
    numbers = draw_records(23, 10, seed=1)
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(10))
    assert numbers[:10] != numbers[10:20]
    assert draw_records(12, 10, seed=1) == numbers[:12]


def test_a_row_holds_no_picture_yet(checkpoint: Path, record: Record) -> None:
    gone = replace(record, images=(Path("gone.png"), Path("gone too.png")))
    rows = group_dataset([gone], read_settings(checkpoint), draws=3, cot_share=1.0, seed=0)
    assert rows[2]["record"] == gone
    assert rows[2]["mode"] == "cot"
    assert rows[2]["draw"] == 2


def test_a_picture_given_twice_is_cut_once(checkpoint: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (load_image(path) for path in record.images)
    shared = group_processor(checkpoint, read_settings(checkpoint)).image_processor
    plain = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    cut: list[int] = []
    whole = Qwen2VLImageProcessorPil.preprocess

    def counted(self: Qwen2VLImageProcessorPil, images: list[Any], **settings: Any) -> Any:
        cut.append(len(images))
        return whole(self, images, **settings)

    for kind in (None, "pt"):
        pictures = [[first, second], [first], [second, first]]
        wanted = plain(images=pictures, return_tensors=kind)
        with monkeypatch.context() as patch:
            patch.setattr(Qwen2VLImageProcessorPil, "preprocess", counted)
            found = shared(images=pictures, return_tensors=kind)
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
            assert type(found[name]) is type(values)
    assert cut == [2, 2]
