"""The device planner: counts against real tensor shapes and sums by hand, the roofline, the held-out bar, its words."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from bench.fit.roofline import (
    WEIGHT_BITS,
    DecoderShape,
    Device,
    Efficiency,
    Point,
    Precision,
    Shape,
    VisionShape,
    Work,
    activation_bytes,
    building_bytes,
    decode_work,
    fit,
    held_out_error,
    prefill_work,
    relative_error,
    shape_of,
    vision_work,
    weight_bytes,
)
from bench.plan import (
    DEVICES,
    PUBLISHED,
    RECIPES,
    RUNTIME,
    SHAPES,
    check,
    find_device,
    find_shape,
    main,
    plan,
    read_devices,
    read_measured,
    read_shapes,
)
from bench.random_checkpoint import QWEN2_VL_2B, write_settings
from bench.tables.plan import plan as check_table
from bench.tables.plan import plan_7b as plan_table
from quantize.model_config import read_config
from quantize.tensors import expected_tensors
from tests.checkpoints import (
    TINY_2_5,
    TINY_3,
    TRUE_3_2B_WIDTHS,
    TRUE_3_8B_WIDTHS,
    TRUE_7B_WIDTHS,
    write_checkpoint,
)

FLOAT16, INT4, INT4_INT8 = RECIPES
RESULTS = Path(__file__).parent.parent / "bench" / "results"
# Two layers, width 4, two heads of 2, one of them for keys and values; two blocks of width 2 for pictures.
SMALL = Shape(
    "small",
    DecoderShape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=2, inner=8, vocab=10),
    VisionShape(2, 2, 3, mlp_matrices=2, channels=1, patch=2, temporal=1, merge=2, mergers=1, window=0, full_layers=2),
    max_visual_tokens=100,
)
DEVICE = Device("slow", usable=10e9, system=1e9, bandwidth=100.0, peak={"float16": 1000.0, "nvfp4": 4000.0})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "tiny"
    write_checkpoint(folder)
    return folder


def part_of(name: str) -> str:
    if "visual" in name:
        return "vision"
    return "embedding" if "embed_tokens" in name else "head" if name.startswith("lm_head") else "decoder"


def test_weights_are_those_of_the_checkpoint(checkpoint: Path) -> None:
    check_counts(checkpoint)


def check_counts(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    counted = dict.fromkeys(("decoder", "embedding", "head", "vision"), 0)
    for name, shape in expected_tensors(config):
        counted[part_of(name)] += 2 * prod(shape)
    assert weight_bytes(shape_of(config, "tiny"), FLOAT16) == counted


def test_weights_of_a_qwen3_vl_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", TINY_3)
    check_counts(tmp_path / "tiny")
    shape = shape_of(read_config(tmp_path / "tiny"), "tiny")
    assert (shape.vision.mergers, shape.vision.places, shape.decoder.head_norms) == (3, 25, True)
    # A prompt's embeddings come with two features more.
    plain = replace(shape, vision=replace(shape.vision, mergers=1))
    assert activation_bytes(shape, 10, 1) - activation_bytes(plain, 10, 1) == 2 * 10 * 2 * 96


def test_windows_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", TINY_2_5)
    vision = shape_of(read_config(tmp_path / "tiny"), "tiny").vision
    assert (vision.mlp_matrices, vision.window, vision.full_layers, vision.depth) == (3, 16, 1, 3)


@pytest.mark.parametrize(("name", "sizes"), [("qwen3-vl-2b", TRUE_3_2B_WIDTHS), ("qwen3-vl-8b", TRUE_3_8B_WIDTHS)])
def test_qwen3_vl_has_the_widths_that_other_tests_use(name: str, sizes: dict[str, Any]) -> None:
    shape, text, vision = find_shape(name), sizes["text_config"], sizes["vision_config"]
    decoder = shape.decoder
    widths = decoder.hidden, decoder.inner, decoder.heads, decoder.kv_heads, decoder.head_dim
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert widths == tuple(text[name] for name in names)
    tower = shape.vision
    assert (tower.width, tower.inner, tower.places, tower.patch) == tuple(
        vision[name] for name in ("hidden_size", "intermediate_size", "num_position_embeddings", "patch_size")
    )


def test_weights_of_the_2b_are_those_of_its_published_shapes(tmp_path: Path) -> None:
    shape = find_shape("qwen2-vl-2b")
    counted = dict.fromkeys(("decoder", "embedding", "vision"), 0)
    write_settings(tmp_path, QWEN2_VL_2B)
    for name, sizes in expected_tensors(read_config(tmp_path)):
        counted[part_of(name)] += 2 * prod(sizes)
    assert weight_bytes(shape, FLOAT16) == {**counted, "head": counted["embedding"]}  # tied, but in memory twice


def test_the_7b_has_the_widths_that_other_tests_use() -> None:
    shape, text = find_shape("qwen2-vl-7b"), TRUE_7B_WIDTHS["text_config"]
    widths = shape.decoder.hidden, shape.decoder.inner, shape.decoder.heads, shape.decoder.kv_heads
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert widths == tuple(text[name] for name in names)
    assert shape.vision.width == TRUE_7B_WIDTHS["vision_config"]["embed_dim"]


def test_the_7b_in_int4_by_hand() -> None:
    shape = find_shape("qwen2-vl-7b")
    layer = 3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944  # q, o, k, v and the three of the MLP
    norms_and_biases = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584
    assert shape.decoder.matrices == 28 * layer
    # Four bits and a float16 scale for every 128 weights.
    assert weight_bytes(shape, INT4)["decoder"] == 28 * layer * 0.515625 + 2 * norms_and_biases
    assert weight_bytes(shape, INT4)["head"] == 2 * 152064 * 3584
    assert weight_bytes(shape, INT4_INT8)["head"] == 152064 * 3584, "a scale an output is next to nothing"
    assert shape.decoder.cache_bytes == 57344  # 28 layers x (key, value) x 4 heads x 128 x 2 bytes


def test_prefill_by_hand() -> None:
    work = prefill_work(SMALL, FLOAT16, tokens=3)
    matrices = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8)
    pairs = 1 + 2 + 3  # of a query and the keys that it may see
    attention = 2 * 2 * 2 * pairs * (2 + 2)  # layers x heads x head width x pairs x (scores, sums)
    assert work.flops == {"float16": 2 * 3 * matrices + attention + 2 * 40}
    weights = weight_bytes(SMALL, FLOAT16)
    assert work.bytes == weights["decoder"] + weights["head"] + 3 * SMALL.decoder.cache_bytes
    assert SMALL.decoder.cache_bytes == 2 * 2 * 1 * 2 * 2


def test_nvfp4_computes_in_nvfp4_but_attention_in_float16() -> None:
    work = prefill_work(SMALL, Precision("", "nvfp4", head="nvfp4"), tokens=3)
    assert work.flops == {"nvfp4": 2 * 3 * SMALL.decoder.matrices, "float16": 2 * 2 * 2 * 6 * 4 + 2 * 40}
    assert work.compute_seconds(DEVICE) == work.flops["nvfp4"] / 4000 + work.flops["float16"] / 1000


def test_decoding_reads_every_weight_and_the_cache() -> None:
    weights = weight_bytes(SMALL, FLOAT16)
    work = decode_work(SMALL, FLOAT16, past=5)
    assert work.bytes == weights["decoder"] + weights["head"] + 5 * SMALL.decoder.cache_bytes
    assert work.flops == {"float16": 2 * (SMALL.decoder.matrices + 40) + 4 * 2 * 2 * 2 * 5}


def test_vision_by_hand() -> None:
    block, patch, merger = 4 * 2 * 2 + 2 * 2 * 3, 2 * 1 * 1 * 4, 8 * 8 + 8 * 4
    patches = 3 * 4
    flops = 2 * patches * (2 * block + patch) + 2 * 3 * merger + 2 * 4 * 2 * patches * patches
    assert vision_work(SMALL, FLOAT16, visual_tokens=3).flops == {"float16": flops}
    two = vision_work(SMALL, FLOAT16, visual_tokens=3, pictures=2)
    assert two.flops == {"float16": 2 * flops}, "attention stays inside a picture"


def test_windows_save_attention() -> None:
    shapes = read_shapes()
    full, windowed = (vision_work(shapes[f"qwen2{v}-vl-7b"], FLOAT16, 1024) for v in ("", ".5"))
    assert windowed.flops["float16"] < full.flops["float16"]
    attention = 4 * 1280 * 4096 * (4 * 4096 + 28 * 64)
    vision = shapes["qwen2.5-vl-7b"].vision
    linear = 2 * 4096 * (vision.blocks + vision.patch_embedding) + 2 * 1024 * shapes["qwen2.5-vl-7b"].merger
    assert windowed.flops["float16"] == linear + attention


def test_activations_grow_with_the_prompt() -> None:
    assert activation_bytes(SMALL, 1, 1) < activation_bytes(SMALL, 100, 1)
    width = 2 * 4 + 2 * (2 + 2 * 1) + 2 * 8
    assert activation_bytes(SMALL, 100, 1) == 2 * (100 * width + 100 * 4)


def test_the_roofline_is_the_slower_of_both() -> None:
    efficiency = Efficiency(compute=0.5, bandwidth=0.25)
    assert Work({"float16": 1000.0}, 1.0).seconds(DEVICE, efficiency) == 2
    assert Work({"float16": 1.0}, 100.0).seconds(DEVICE, efficiency) == 4


def test_fit_finds_the_efficiencies_and_sees_no_held_out_point() -> None:
    truth = Efficiency(0.4, 0.7)
    works = [Work({"float16": 1e3 * k}, 1.0) for k in (1, 2, 3)] + [Work({"float16": 1.0}, 1e3 * k) for k in (1, 2, 3)]
    points = [Point(work, DEVICE, work.seconds(DEVICE, truth)) for work in works]
    wrong = [Point(work, DEVICE, 10 * work.seconds(DEVICE, truth), fitted=False) for work in works]
    found = fit(points + wrong)
    assert (found.compute, found.bandwidth) == pytest.approx((truth.compute, truth.bandwidth))
    assert held_out_error(points + wrong) == pytest.approx(0.9)
    assert relative_error(points[0], Efficiency(0.8, 0.7)) == pytest.approx(-0.5)


def test_a_fit_does_not_hang_on_the_order_of_the_rows() -> None:
    points = [m.point for m in read_measured()]
    assert fit(points) == fit(points[::-1])
    two = [Point(Work({"float16": 0.0}, 1.0), DEVICE, seconds) for seconds in (0.05, 0.02)]  # bandwidth of 0.2 and 0.5
    assert fit(two).bandwidth == pytest.approx(0.35)


def test_every_number_of_a_device_has_a_source() -> None:
    data = json.loads(DEVICES.read_text())
    for name, entry in data["devices"].items():
        numbers = [value for value in entry.values() if isinstance(value, dict) and "value" in value]
        assert len(numbers) >= 5, name
        for number in [*numbers, *entry["peak"].values()]:
            assert number["source"] in data["sources"], f"{name}: {number}"
    shapes = json.loads(SHAPES.read_text())
    assert {entry["source"] for entry in shapes["shapes"].values()} <= set(shapes["sources"])


def test_what_is_left_out_has_a_reason() -> None:
    published = json.loads(PUBLISHED.read_text())
    assert {reason for row in published["rows"] for reason in row["left_out"].values()} == set(published["reasons"])


def test_halves_alternate_row_by_row() -> None:
    rows: list[tuple[Any, bool]] = []
    for m in read_measured():
        if not rows or rows[-1][0] is not m.row:
            rows.append((m.row, m.point.fitted))
        assert rows[-1][1] == m.point.fitted, "a row's phases are all in one half"
    assert [fitted for _, fitted in rows] == [k % 2 == 0 for k in range(len(rows))]


def test_held_out_times_are_within_a_quarter() -> None:
    saved = json.loads((RESULTS / "plan.json").read_text())
    fresh = check()
    assert saved["median_error"] == pytest.approx(fresh["median_error"], abs=1e-5), "run bench.plan --check --save"
    assert fresh["median_error"] <= 0.25
    assert fresh["median_error_halves_swapped"] <= 0.25
    assert fresh["held_out"] == sum(not row["fitted"] for row in fresh["rows"]) >= 20
    assert all(abs(row["error"]) < 0.15 for row in fresh["memory"]), "planned memory covers what was published"
    assert all(row["error"] > 0 for row in fresh["memory"])


def test_qwen2_vl_7b_on_an_orin_nano() -> None:
    result = plan(find_shape("qwen2-vl-7b"), find_device("jetson-orin-nano-8gb"))
    verdicts = {recipe["name"]: [b["verdict"] for b in recipe["budgets"]] for recipe in result["recipes"]}
    assert verdicts[FLOAT16.name] == verdicts[INT4.name] == ["does not fit"] * 4
    assert verdicts[INT4_INT8.name] == ["tight", *["does not fit"] * 3]
    assert {"jetson-orin-nx-16gb", "rtx-4060"} <= set(result["changes"]["devices"])
    assert result["changes"]["models"] == ["qwen2-vl-2b", "qwen3-vl-2b", "qwen3-vl-4b"]
    further = [step["spare_gb"] for step in result["changes"]["further"]]
    assert further == sorted(further)
    assert further[0] > 0.25, "a head of 4 bits makes room"
    for recipe in result["recipes"]:
        for budget in recipe["budgets"]:
            parts = sum(recipe["weights_gb"].values()) + budget["cache_gb"] + budget["activations_gb"] + RUNTIME / 1e9
            assert budget["needed_gb"] == pytest.approx(parts)
            assert budget["spare_gb"] == pytest.approx(result["usable_gb"] - result["system_gb"] - parts)
    saved = json.loads((RESULTS / "plan_qwen2_vl_7b_orin_nano.json").read_text())
    assert plan_table(saved) == plan_table(result), "run bench.plan --model ... --save"


def test_more_pixels_take_longer_and_int4_decodes_faster() -> None:
    result = plan(find_shape("qwen2-vl-2b"), find_device("jetson-agx-orin-64gb"))
    for name in ("vision_ms", "prefill_ms", "decode_ms"):
        times = [budget[name] for budget in result["recipes"][0]["budgets"]]
        assert times == sorted(times)
    first = [recipe["budgets"][0]["decode_ms"] for recipe in result["recipes"]]
    assert first == sorted(first, reverse=True)
    assert "changes" not in result, "it fits, so nothing needs changing"


def test_budgets_stop_at_the_checkpoints_own(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", str(checkpoint), "--device", "rtx-4060", "--pictures", "3"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["model"] == "tiny"
    assert [b["visual_tokens"] for b in result["recipes"][0]["budgets"]] == [64]  # of PREPROCESSING in checkpoints.py
    assert result["recipes"][0]["budgets"][0]["prompt_tokens"] == 3 * 64 + 100
    assert "3 pictures" in printed
    assert re.search(r"\| int4 decoder, int8 rest \| 64 \|.*\| fits \|", printed)


def test_check_prints_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--check", "--save", str(tmp_path / "plan.json")])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "plan.json").read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert check_table(result) in printed
    assert printed.count("| held out |") == result["held_out"]
    assert "Left out:" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "qwen2-vl-7b", "--device", "toaster"], r"no device 'toaster' .* jetson-orin-nano-8gb, "),
        (["--model", "no-such", "--device", "rtx-4060"], "neither a checkpoint folder nor a known shape .qwen2-vl-2b"),
        (["--model", "EMPTY", "--device", "rtx-4060"], "config.json: no such file"),
        (["--model", "qwen2-vl-2b", "--device", "rtx-4060", "--pictures", "0"], "at least one"),
        (["--model", "qwen2-vl-2b", "--device", "rtx-4060", "--tokens", "0"], "at least one"),
        (["--model", "qwen2-vl-2b"], "--model and --device, or --check"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path) if argument == "EMPTY" else argument for argument in arguments])
    assert stopped.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.replace("\n", " "))


def test_known_devices_and_precisions_are_whole() -> None:
    for device in read_devices().values():
        assert device.usable > device.system >= 0
        assert device.peak["float16"] > 1e12
    assert {kind for recipe in RECIPES for kind in (recipe.decoder, recipe.head)} <= set(WEIGHT_BITS)


def test_what_is_predicted_is_what_a_compiled_engine_moves() -> None:
    """Of bench.engines' last run: bytes of weights a token, and of the cache; 2 % are scales and what lines them up."""
    rows = json.loads((RESULTS / "engines.json").read_text())["rows"]
    (engine,) = (
        row
        for row in rows
        if (row["model"], row["dialect"], row["precision"], row["engine"])
        == ("Qwen2-VL-2B", "standard", "bfloat16", "decoder.engine")
    )
    shape = find_shape("qwen2-vl-2b")
    token = next(profile for profile in engine["profiles"] if profile["phase"] == "a token")
    weights = weight_bytes(shape, RECIPES[-1])
    assert token["weights_moved"] == pytest.approx(weights["decoder"] + weights["head"], rel=0.02)
    assert token["cache_read"] == engine["capacity"] * shape.decoder.cache_bytes
    assert building_bytes(shape, RECIPES[-1]) / 2**30 == pytest.approx(engine["peak_gib"], rel=0.15)
