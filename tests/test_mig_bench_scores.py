"""MIG-Bench as published: its published answers to the last digit, malformed ones, both versions, files of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.boxes import mig_bench
from bench.boxes.mig_bench import ITEMS, NO_BOX, OLD, REVISED, parse, published_iou, stretch
from bench.boxes.scores import score_file, score_published_mig_bench
from gemvg_edge.errors import GemvgError
from tests.answer_files import line, paint, write_answers

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "mig_bench"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="needs ../shared/fixtures/mig_bench, which is not part of the project"
)
# Acc@0.5 in percent of the summary that the files come with, in the order of mig_bench.TASKS.
PUBLISHED = {
    "migician": (70.08, 44.68, 72.15, 67.45, 58.68, 72.32, 75.76, 83.30, 52.58, 36.75),
    "qwen2_vl": (31.06, 35.11, 42.45, 14.36, 9.38, 14.88, 27.27, 63.92, 46.39, 15.38),
}


@needs_fixtures
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_answers_come_out_to_the_last_digit(model: str) -> None:
    result = score_published_mig_bench([FIXTURES / model], stretched=model == "migician")
    whole = sum(revised for _, revised in ITEMS.values())
    assert result["agreement"] == {"answers": whole, "boxes": whole, "ious": whole, "tasks": 10, "summaries": 10}
    assert result["incomplete"] is None
    summaries = {k: v for file in (FIXTURES / model).iterdir() for k, v in json.loads(file.read_text())[-1].items()}
    for task, percent in zip(mig_bench.TASKS, PUBLISHED[model], strict=True):
        told = result["tasks"][task]
        assert round(100 * told["acc@0.5"], 2) == percent
        assert told["acc@0.3"] >= told["acc@0.5"] >= told["acc@0.7"]
        summary = summaries[task]
        assert told["n"] == summary["TOTAL"]
        assert told["mean_iou"] == summary["AVE_IOU"] / summary["TOTAL"]
        assert all(told[f"acc@{t}"] == summary[f"IOU@{t}"] / summary["TOTAL"] for t in ("0.3", "0.5", "0.7"))
    assert result["macro"]["acc@0.5"] == pytest.approx(sum(PUBLISHED[model]) / 1000, abs=1e-4)


@needs_fixtures
def test_without_the_stretch_migicians_figures_are_others() -> None:
    agreement = score_published_mig_bench([FIXTURES / "migician"], stretched=False)["agreement"]
    assert agreement["boxes"] < 100
    assert agreement["summaries"] == 0


TRUTH = [100, 100, 500, 500]
# What the published scripts read in a text: (text, in the revised frame, in the old one).
MALFORMED: list[tuple[str, Any, Any]] = [
    ("", NO_BOX, NO_BOX),
    ("(100,100),(500,", NO_BOX, NO_BOX),
    ("(500,500),(100,100)", [500, 500, 100, 100], [0.5, 0.5, 0.1, 0.1]),
    ("(NaN,NaN),(NaN,NaN)", NO_BOX, NO_BOX),
    (f"({'9' * 10**6},1),(2,3)", NO_BOX, [float("inf"), 0.001, 0.002, 0.003]),
    (f"({'9' * 400},1),(2,3)", [int("9" * 400), 1, 2, 3], [float("inf"), 0.001, 0.002, 0.003]),
    ("[100,100,500,500]", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("The bounding box is [100, 100, 500, 500].", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("[0.1, 0.1, 0.5, 0.5]", NO_BOX, [0.1, 0.1, 0.5, 0.5]),
    ("(0.1,0.1),(0.5,0.5)", NO_BOX, [0.1, 0.1, 0.5, 0.5]),
    ("(0.1, 0.1), (0.5, 0.5)", NO_BOX, NO_BOX),  # its pattern has no space
    ("(0.1, 0.1, 0.5, 0.5)", NO_BOX, [0.1, 0.1, 0.5, 0.5]),
    ("<box>100 100 500 500</box>", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("<box>[[100,100,500,500]]</box>", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("[1,2,3,4] and (100,100),(500,500)", TRUTH, [0.1, 0.1, 0.5, 0.5]),  # the first pattern, not the first box
    ("<think>(1,2),(3,4)</think><answer>(100,100),(500,500)</answer>", [1, 2, 3, 4], [0.001, 0.002, 0.003, 0.004]),
    ("<answer><answer>(100,100),(500,500)</answer>", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("Image-99: <|box_start|>(100,100),(500,500)<|box_end|>", TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("(100,100),(500,500)" * 10_000, TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("(-5,100),(500,500)", NO_BOX, NO_BOX),
    ("(5,5),(5,5)", [5, 5, 5, 5], [0.005] * 4),
    ('{"bbox_2d": [100, 100, 500, 500]}', TRUTH, [0.1, 0.1, 0.5, 0.5]),
    ("((((" * 50_000, NO_BOX, NO_BOX),
]  # fmt: skip


@pytest.mark.parametrize(("text", "revised", "old"), MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_read_as_the_scripts_do(text: str, revised: Any, old: Any) -> None:
    assert parse(text, REVISED) == revised
    assert parse(text, OLD) == old
    for version, box, truth in ((REVISED, revised, TRUTH), (OLD, old, [0.1, 0.1, 0.5, 0.5])):
        assert 0 <= published_iou(truth, box) <= 1
        assert 0 <= published_iou(truth, stretch(box, version)) <= 1
    assert published_iou(TRUTH, parse(text, REVISED)) == (1.0 if revised == TRUTH else pytest.approx(0, abs=1e-4))


def test_malformed_answers_are_scored_in_a_file(tmp_path: Path) -> None:
    entries = [{"task": "region", "question": "where?", "answer": text, "groundtruth": TRUTH} for text, *_ in MALFORMED]
    (tmp_path / "published.json").write_text(json.dumps(entries))
    result = score_published_mig_bench([tmp_path / "published.json"], stretched=False)
    right = sum(revised == TRUTH for _, revised, _ in MALFORMED)
    assert result["tasks"]["region"]["acc@0.5"] == right / len(MALFORMED)
    assert result["incomplete"].startswith("not the whole revised benchmark (diff 0 of 528")
    assert result["macro"]["parts"] == 1
    lines = [line(k, "region", answer=text, extra={"corners": TRUTH}) for k, (text, *_) in enumerate(MALFORMED)]
    ours = score_file(write_answers(tmp_path / "ours.jsonl", "mig-bench", lines, benchmark=REVISED))
    assert ours["tasks"]["region"]["acc@0.5"] == right / len(MALFORMED)
    assert ours["tasks"]["region"]["acc@0.5_right_image"] is None  # nobody said which picture is


def test_the_right_image_is_asked_for_beside(tmp_path: Path) -> None:
    text = "Image-1: (100,100),(500,500)"
    lines = [
        line(
            k,
            "refer_grounding",
            [(1, 10, 10, 50, 50)],
            [(image, 10, 10, 50, 50)],
            answer=text,
            extra={"corners": TRUTH},
        )
        for k, image in enumerate((0, 1))
    ]
    told = score_file(write_answers(tmp_path / "a.jsonl", "mig-bench", lines, benchmark=REVISED))["macro"]
    assert (told["acc@0.5"], told["acc@0.5_right_image"]) == (1.0, 0.5)


def test_location_tokens_can_be_scored(tmp_path: Path) -> None:
    text = "<|box_start|><loc_10><loc_10><loc_50><loc_50><|box_end|>"
    lines = [line(0, "region", answer=text, extra={"corners": TRUTH})]
    for locations, wanted in ((101, 1.0), (0, 0.0)):
        file = write_answers(
            tmp_path / f"{locations}.jsonl", "mig-bench", lines, benchmark=REVISED, locations=locations
        )
        assert score_file(file)["macro"]["acc@0.7"] == wanted


def items(frame: int) -> list[dict[str, Any]]:
    """An item of each of three tasks."""
    corners = [0.25, 0.25, 0.75, 0.5] if frame == 1 else [250, 250, 750, 500]
    pictures = ["./MIG-Bench/images/x/a.png", "./MIG-Bench/images/x/b.png"]
    asked = {
        "region": ("Locate the 1th region picture in the source image. ", ""),
        "diff": ("Give me the coordinates of their difference. ", ""),
        "group_grounding": ("Find <|object_ref_start|>a mug<|object_ref_end|>.", "second image"),
    }
    return [
        {"task": task, "images": pictures, "question": question, "answer": corners, "additional_info": info,
         "need_format": True}
        for task, (question, info) in asked.items()
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark of three items."""
    for name, size in (("a", (64, 48)), ("b", (100, 40))):
        paint(tmp_path / "MIG-Bench" / "images" / "x" / f"{name}.png", size)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "frame", "version"), [("MIG_data.json", 1, OLD), ("revised_MIG_bench.json", 1000, REVISED)]
)
def test_questions_are_the_authors_own(folder: Path, name: str, frame: int, version: str) -> None:
    (folder / name).write_text(json.dumps(items(frame)))
    benchmark = mig_bench.load(folder)
    assert benchmark.version == version
    region, diff, group = benchmark.questions
    # Appended without a space to the item's own words, whose last one is kept.
    assert region.published == "Locate the 1th region picture in the source image. " + mig_bench.DIRECT
    assert region.query == "Locate the 1th region picture in the source image."
    assert group.published == "Find <|object_ref_start|>a mug<|object_ref_end|>." + mig_bench.DIRECT
    assert list(region.truth[0]) == [16, 12, 48, 24]
    assert region.truth[0].image == 0
    assert diff.truth == ()  # names no picture; its own score does not need one
    assert (group.truth[0].image, list(group.truth[0])) == (1, [25, 10, 75, 20])
    assert region.extra == {"corners": items(frame)[0]["answer"]}
    assert mig_bench.load(folder, think=True).questions[0].published == items(frame)[0]["question"] + mig_bench.THINK


def test_versions_are_not_mixed(folder: Path) -> None:
    (folder / "MIG_data.json").write_text(json.dumps([items(1)[0], items(1000)[1]]))
    with pytest.raises(GemvgError, match=r"mixes MIG-Bench's versions: item 0 has shares .* item 1 steps"):
        mig_bench.load(folder)
    for frame in (1, 1000):
        entry = {"task": "region", "question": "?", "answer": "x", "groundtruth": items(frame)[0]["answer"]}
        entry["task"] = "region" if frame == 1 else "diff"
        (folder / f"{frame}.json").write_text(json.dumps([entry]))
    with pytest.raises(GemvgError, match="are answers to two versions of MIG-Bench"):
        score_published_mig_bench([folder / "1.json", folder / "1000.json"], stretched=False)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"task": "other"}, "item 0 is none of MIG-Bench's ten tasks"),
        ({"answer": [1, 2, 3]}, r"item 0 has the box \[1, 2, 3\]"),
        ({"answer": [10, 10, 2000, 20]}, "in neither version's frame"),
        ({"answer": [0.5, 0.5, 1.5, 20]}, "in neither version's frame"),
        ({"images": ["../a.png"]}, "item 0 is not laid out as MIG-Bench"),
        ({"question": " "}, "item 0 is not laid out as MIG-Bench"),
        ({"images": ["MIG-Bench/images/x/none.png"]}, "none.png is a missing picture"),
    ],
)
def test_what_is_not_as_published_is_named(folder: Path, change: dict[str, Any], fault: str) -> None:
    (folder / "MIG_data.json").write_text(json.dumps([items(1000)[0] | change]))
    with pytest.raises(GemvgError, match=fault):
        mig_bench.load(folder)
