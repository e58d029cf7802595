"""Records as training samples, and the order they are drawn in."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from quantize.calibration import _file_records
from train.checkpoint import read_settings
from train.collate import Turn, collate
from train.data.pictures import measure
from train.data.record import Record, write_records
from train.data.samples import grouped_order, read_all, read_short, record_sample, record_turn
from train.grpo import read_wanted
from train.small_model import write_small_model

BOXES = (Box(0, 10, 0, 50, 20), Box(1, 0, 5, 10, 10))


def record(folder: Path, **changes: object) -> Record:
    for name in "ab":
        Image.new("RGB", (100, 20)).save(folder / f"{name}.png")
    fields: dict = {
        "images": (folder / "a.png", folder / "b.png"), "sizes": ((100, 20), (100, 20)), "query": "the red mug",
        "boxes": BOXES, "kind": "referential", "source": "test",
    }  # fmt: skip
    return Record(**fields | changes)


def test_a_record_becomes_a_turn_of_its_mode(tmp_path: Path) -> None:
    direct, digits = record(tmp_path), AnswerFormat()
    text = "Image-1: <|box_start|>(100,0),(500,1000)<|box_end|>\nImage-2: <|box_start|>(0,250),(100,500)<|box_end|>"
    assert record_turn(direct, digits) == Turn("the red mug", text, False)
    cot = record(tmp_path, mode="cot", thinking="two mugs")
    wanted = f"<think>two mugs</think><answer>{text}</answer>"
    assert record_turn(cot, digits) == Turn("the red mug", wanted, True)
    words = record(tmp_path, kind="understanding", words="two", boxes=())
    assert record_turn(words, digits) == Turn("the red mug", "two", False)
    locations = record_turn(direct, AnswerFormat("locations", 11)).answer
    assert locations.startswith("Image-1: <|box_start|><loc_1><loc_0><loc_5><loc_10><|box_end|>")
    sample = record_sample(direct, digits)
    assert [image.size for image in sample.images] == [(100, 20), (100, 20)]


def test_bad_records_are_left_out_and_none_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, bad = record(tmp_path), record(tmp_path, boxes=(Box(2, 0, 0, 5, 5),))
    write_records([good, bad], tmp_path / "some.jsonl")
    assert read_all(tmp_path / "some.jsonl") == [good]
    assert "1 x a box in a picture that is not there" in capsys.readouterr().err
    write_records([bad], tmp_path / "none.jsonl")
    with pytest.raises(GemvgError, match=r"none\.jsonl has no record that can be used"):
        read_all(tmp_path / "none.jsonl")


def test_records_whose_pictures_are_others_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    measure.cache_clear()  # tests write pictures of one name
    good, wrong = record(tmp_path), record(tmp_path, sizes=((100, 20), (20, 100)), boxes=())
    gone = record(tmp_path, images=(tmp_path / "a.png", tmp_path / "c.png"))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (20, 100)).save(tmp_path / "t.jpg", exif=turned)
    either_way = [record(tmp_path, images=(tmp_path / "t.jpg",), sizes=(s,), boxes=()) for s in ((20, 100), (100, 20))]
    write_records([good, wrong, gone, *either_way], tmp_path / "some.jsonl")
    assert read_all(tmp_path / "some.jsonl") == [good]
    said = capsys.readouterr().err
    assert "1 x a picture of another size than its annotation says (first: " in said
    assert "1 x a missing picture" in said
    assert "2 x a picture turned by its EXIF data" in said
    wanted, left_out = read_wanted(tmp_path / "some.jsonl")
    assert wanted == [good]
    assert left_out[0] == "1 records kept, 4 refused"
    with pytest.raises(GemvgError, match=r"b\.png has 100 x 20 pixels and its record says 20 x 100"):
        record_sample(wrong, AnswerFormat())
    with pytest.raises(GemvgError, match=r"some\.jsonl, record 2: .*b\.png: a picture of another size"):
        _file_records(tmp_path / "some.jsonl", 2)


def test_draws_pass_over_all_records_in_groups_of_one_length() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 803).tolist()
    order = grouped_order(lengths, 8, draws=1606, seed=3)
    assert order == grouped_order(lengths, 8, draws=1606, seed=3) != grouped_order(lengths, 8, 1606, seed=4)
    assert order[:1000] == grouped_order(lengths, 8, draws=1000, seed=3), "a longer run begins alike"
    assert set(Counter(order[:800]).values()) == {1}
    counts = Counter(order[:1600])  # what fills no group joins the next pass
    assert sum(count == 2 for count in counts.values()) > 790
    spread = [np.ptp([lengths[k] for k in order[start : start + 8]]) for start in range(0, 1600, 8)]
    assert np.median(spread) < 40
    firsts = [lengths[order[start]] for start in range(0, 800, 8)]
    assert firsts != sorted(firsts, reverse=True), "groups themselves are shuffled"
    assert len(grouped_order([5, 6], 8, 20, seed=0)) == 20, "fewer records than a group"


def test_grouped_over_all_devices_little_of_a_step_is_waiting() -> None:
    """One to four pictures of 400 tokens, two records a device on eight: each waits for the one with the most."""
    lengths = (400 * np.random.default_rng(0).integers(1, 5, 20000) + 100).tolist()

    def useful(group: int) -> float:
        taken = np.asarray([lengths[k] for k in grouped_order(lengths, group, 16000, seed=0)]).reshape(-1, 16)
        return float(taken.sum() / (16 * taken.max(axis=1)).sum())

    assert useful(2) < 0.7
    assert useful(2 * 8) > 0.97


def test_lengths_are_those_of_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_small_model(tmp_path / "model", seed=0)
    settings = read_settings(tmp_path / "model")
    records = [record(tmp_path), record(tmp_path, images=(tmp_path / "a.png",), sizes=((100, 20),), boxes=BOXES[:1])]
    write_records(records, tmp_path / "some.jsonl")
    kept, lengths = read_short(tmp_path / "some.jsonl", settings, None)
    rows = [record_sample(one, settings.answer_format, settings.resized(one.sizes)) for one in kept]
    assert lengths == [collate([row], settings, pad_id=0)["input_ids"].shape[1] for row in rows]
    assert read_short(tmp_path / "some.jsonl", settings, min(lengths))[0] == [records[1]]
    assert f"1 of them left out: longer than {lengths[1]} tokens, the longest {lengths[0]}" in capsys.readouterr().err
    with pytest.raises(GemvgError, match="has no record of at most 9 tokens; raise --max-length"):
        read_short(tmp_path / "some.jsonl", settings, 9)
