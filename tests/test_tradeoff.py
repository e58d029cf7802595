"""The trade-off: no point of the front is beaten, what is chosen fits, what cannot be had is said; a run for real."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import tradeoff
from bench.plan import RECIPES, find_device, find_shape, plan
from bench.readme import ROOT
from bench.speed.tradeoff_bundles import RECIPE_FLAGS, commands, device_commands
from bench.speed.tradeoff_device import device_points, room_mb
from bench.speed.tradeoff_front import (
    Limits,
    Point,
    Setting,
    choose,
    dominates,
    front,
    misses,
    point_of,
    refusal,
)
from bench.speed.tradeoff_measure import Grid, around
from bench.speed.tradeoff_process import peak_bytes
from bench.speed.tradeoff_report import front_table, plot, whole_table
from export.to_onnx import main as export
from export.to_tensorrt import read_devices

SETTING = Setting("checkpoints/tabletop", "locations", "int4", "onnx", 16384, 1.0, True)
RUN = ["--limit", "10", "--bits", "int8", "gptq", "--engines", "onnx", "--pixels", "1", "--keep", "1"]


def point(ms: float, mb: float, f1: float, **changes: Any) -> Point:
    return Point(replace(SETTING, **changes), ms, mb, f1, (max(0.0, f1 - 0.1), min(1.0, f1 + 0.1)))


# Few values, so that ties and equal points come up.
POINTS = st.lists(
    st.builds(
        point,
        st.integers(1, 6).map(float),
        st.integers(50, 54).map(float),
        st.integers(0, 5).map(lambda n: n / 5),
    ),
    max_size=25,
)


@given(POINTS)
def test_front_is_what_nobody_beats(points: list[Point]) -> None:
    best = front(points)
    assert bool(best) == bool(points)
    assert not any(dominates(a, b) for a in points for b in best)
    for other in points:
        assert other in best or any(dominates(one, other) for one in best)


@given(POINTS, st.integers(1, 6), st.integers(50, 54), st.integers(0, 5))
def test_the_chosen_fits_and_none_that_fits_has_a_better_f1(points: list[Point], ms: int, mb: int, f1: int) -> None:
    limits = Limits(ms, mb, f1 / 5)
    fitting = [p for p in points if p.ms <= ms and p.mb <= mb and p.f1 >= f1 / 5]
    chosen = choose(points, limits)
    if not fitting:
        assert chosen is None
        assert all(misses(p, limits) for p in points)
        return
    assert chosen in fitting
    assert chosen.f1 == max(p.f1 for p in fitting)
    assert chosen.ms == min(p.ms for p in fitting if p.f1 == chosen.f1)
    assert chosen in front(points)


def test_refusal_names_the_nearest_miss() -> None:
    points = [point(5, 60, 0.5), point(12, 60, 0.88, bits="int8"), point(40, 90, 0.9, bits="float")]
    assert refusal(points, Limits(10, None, 0.8)) == (
        "nothing has at most 10 ms and an F1 of at least 0.8; the nearest miss is tabletop int8 on onnx, 16384 pixels, "
        "all tokens, locations by the grammar: 12 ms (20.0 % too much), 60 MB, F1 0.880"
    )
    text = refusal(points, Limits(None, 80, 0.95))
    assert "int8" in text
    assert "F1 0.880 (7.4 % too low)" in text


def test_rows_are_points() -> None:
    one = point(5, 60, 0.5)
    assert point_of(json.loads(json.dumps(one.row()))) == one


def test_each_thing_is_varied_alone() -> None:
    grid = Grid(["int4"], ["onnx"], [1, 0.5], [1, 0.75], [True, False])
    expected = [
        SETTING,
        replace(SETTING, constrained=False),
        replace(SETTING, pixels=8192),
        replace(SETTING, keep=0.75),
    ]
    assert around(SETTING, grid) == expected


def test_peak_is_the_high_water_mark() -> None:
    assert peak_bytes("Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t   64 kB\nVmRSS:\t 60 kB\n") == 65536


def test_tables_and_plot(tmp_path: Path) -> None:
    points = [point(5, 60, 0.5), point(1200, 70, 0.4, keep=0.75, engine="native", constrained=False)]
    rows = [{**p.row(), "front": p in front(points)} for p in points]
    about = {"questions": 10, "rounds": 2, "threads": 1, "device": None, "room_mb": None}
    machine = {"processor": "a processor", "cores": 2, "python": "3.11"}
    result = {**about, "points": rows, "measured_on": machine}
    assert "| int4 | onnx | locations | by the grammar | 16384 | 1 | 5.0 | 60 | 0.500 [0.400, 0.600] |" in front_table(
        result
    )
    assert "1200" not in front_table(result)
    assert whole_table(result).count("**\\***") == 1
    assert "2 points, 1 of them in the front; 10 held-out questions." in front_table(result)
    plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_device_is_planned_and_its_boxes_are_marked(tmp_path: Path) -> None:
    assert set(RECIPE_FLAGS) == {recipe.name for recipe in RECIPES}
    device, shape = find_device("jetson-orin-nano-8gb"), find_shape("qwen2-vl-2b")
    small = [point(1, 1, f1, bits=bits, pixels=p) for f1, bits, p in ((0.9, "float", 16384), (0.8, "gptq", 8192))]
    planned = device_points(small, shape, device)
    assert [p.f1_of for p in planned] == ["tabletop float, 16384 pixels"] + 2 * ["tabletop gptq, 8192 pixels"]
    assert [p.setting.pixels for p in planned] == [401_408, 200_704, 200_704]
    row = plan(shape, device, 2, [512])["recipes"][0]["budgets"][0]
    assert planned[0].mb == round(1000 * row["needed_gb"])
    assert planned[0].ms == round(row["vision_ms"] + row["prefill_ms"] + 30 * row["decode_ms"])  # 5 boxes in locations
    digits = device_points([replace(p, setting=replace(p.setting, answer="digits")) for p in small], shape, device)
    assert digits[0].ms > planned[0].ms
    assert 7000 < room_mb(device) < 8000
    for one in planned:
        said = device_commands(one.setting, device.name)
        assert f"--max-pixels {one.setting.pixels}" in said
        assert ("quantize.gptq" in said) == (one.setting.bits != "float16")
    assert "to_tensorrt BUNDLE ENGINES --device jetson-orin-nano-8gb" in said
    assert "--device" not in device_commands(planned[0].setting, "jetson-orin-nano-8gb-super")
    assert "jetson-orin-nano-8gb-super" not in read_devices()


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.tradeoff", *arguments])
    try:
        tradeoff.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_run_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "tradeoff.json"
    given = [*RUN, "--answers", "grammar", "--rounds", "1", "--threads", "1", "--work", str(tmp_path / "work")]
    assert run([*given, "--save", str(file)], monkeypatch) == 0
    kept, told = json.loads(file.read_text()), json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kept == told
    assert [row["bits"] for row in kept["points"]] == ["int8", "gptq"]
    for row in kept["points"]:
        assert row["ms"] > 1
        assert 30 < row["mb"] < 500  # the runtime alone: torch would be more
        assert row["f1"] > 0.5
    assert file.with_suffix(".png").is_file()

    limits = ["--max-ms", str(max(row["ms"] for row in kept["points"]))]
    assert run(["--read", str(file), *limits], monkeypatch) == 0
    out = capsys.readouterr().out
    chosen = point_of(json.loads(out.splitlines()[-1])["chosen"])
    assert chosen == choose([point_of(row) for row in kept["points"]], Limits(float(limits[1])))
    assert commands(chosen.setting, 1) in out

    assert run(["--read", str(file), "--min-f1", "1.5"], monkeypatch) == 1
    said = capsys.readouterr()
    assert said.err.startswith("bench.tradeoff: nothing has an F1 of at least 1.5; the nearest miss is tabletop ")
    assert said.err.count("\n") == 1
    assert json.loads(said.out.splitlines()[-1])["chosen"] is None

    device = ["--device", "jetson-orin-nano-8gb", "--read", str(file), "--max-ms", "60000"]
    assert run(device, monkeypatch) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["engine"] for row in planned["points"]} == {"tensorrt"}
    assert planned["chosen"]["f1_of"] == "tabletop gptq, 16384 pixels"
    assert run(["--device", "jetson-orin-nano-8gb", "--shape", "no-shape", "--read", str(file)], monkeypatch) == 2
    assert "no-shape: neither a checkpoint folder nor a known shape" in capsys.readouterr().err


def test_what_is_no_result_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("[]", "{}", '{"points": [1]}', "nothing"):
        (tmp_path / "other.json").write_text(text)
        assert run(["--read", str(tmp_path / "other.json"), "--max-ms", "5"], monkeypatch) == 2
        assert re.fullmatch(r"bench.tradeoff: .*other.json.*\n", capsys.readouterr().err)


def test_printed_commands_make_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = replace(SETTING, model=str(ROOT / SETTING.model), bits="int8", pixels=14746, keep=0.75, constrained=False)
    monkeypatch.chdir(tmp_path)
    shell, python = re.findall(r"^```\w+\n(.*?)^```$", commands(setting, 1), re.MULTILINE | re.DOTALL)
    for name, source in (("left.png", "scene1-a.png"), ("right.png", "scene1-b.png")):
        (tmp_path / name).write_bytes((ROOT / "examples" / "images" / source).read_bytes())
    assert shlex.split(shell)[:3] == ["python", "-m", "export.to_onnx"]
    assert export(shlex.split(shell)[3:]) == 0
    names: dict[str, Any] = {}
    exec(python, names)
    assert "Box(" in capsys.readouterr().out
    assert max(w * h for w, h in names["scene"].resized) <= 14746
    assert names["grounder"].manifest.weights["decoder"].startswith("int8")
