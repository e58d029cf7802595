"""Two files of answers side by side: gains by hand, McNemar's test, what cannot be compared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import compare as command
from bench.boxes.differences import compare, mcnemar
from gemvg_edge.errors import GemvgError
from tests.answer_files import line, write_answers

TRUE, OFF = (0, 10, 10, 30, 30), (0, 60, 60, 80, 80)


def files(tmp_path: Path, task: str, a: list[Any], b: list[Any], **header: Any) -> tuple[Path, Path]:
    """Two files of lines."""
    return write_answers(tmp_path / "a.jsonl", task, a, **header), write_answers(
        tmp_path / "b.jsonl", task, b, **header
    )


def tabletop_lines(right: list[bool]) -> list[Any]:
    """One true box a question, found or not."""
    return [line(k, "moved", [TRUE], [TRUE if hit else OFF], answer=str(hit)) for k, hit in enumerate(right)]


def test_gains_by_hand(tmp_path: Path) -> None:
    before = [True] * 12 + [False] * 8
    after = [False] * 2 + [True] * 10 + [True] * 5 + [False] * 3
    a, b = files(tmp_path, "tabletop", tabletop_lines(before), tabletop_lines(after))
    told = compare(a, b)
    exact = told["values"]["exact"]
    assert (exact["a"], exact["b"], exact["gain"]) == (pytest.approx(0.6), pytest.approx(0.75), pytest.approx(0.15))
    assert (exact["lost"], exact["gained"]) == (2, 5)
    assert exact["p"] == pytest.approx(2 * (1 + 7 + 21) / 2**7)  # of 7 that changed, as far from the middle as 5
    low, high = exact["interval"]
    assert low < 0.15 < high
    assert told["values"]["f1"]["gain"] == pytest.approx(0.15)
    assert told["lost"] == ["moved/0", "moved/1"]
    assert told["gained"] == [f"moved/{k}" for k in range(12, 17)]
    assert (told["n"], told["same_text"], told["only_a"]) == (20, 13, 0)
    back = compare(b, a)["values"]["exact"]
    assert back["gain"] == pytest.approx(-0.15)
    assert back["interval"] == (pytest.approx(-high), pytest.approx(-low))


def test_nothing_changed(tmp_path: Path) -> None:
    lines = tabletop_lines([True, False, True])
    exact = compare(*files(tmp_path, "tabletop", lines, lines))["values"]["exact"]
    assert (exact["gain"], exact["interval"], exact["p"], exact["lost"], exact["gained"]) == (0, (0, 0), 1.0, 0, 0)


def test_mcnemar_is_the_binomial_test() -> None:
    a, b = np.array([True] * 10 + [False] * 3), np.array([False] * 10 + [True] * 3)
    tail = sum([1, 13, 78, 286]) / 2**13  # 0 to 3 of 13
    assert mcnemar(a, b) == {"lost": 10, "gained": 3, "p": pytest.approx(2 * tail)}


def test_parts_of_a_benchmark_count_alike(tmp_path: Path) -> None:
    """Nine questions of one task and one of another: MIG-Bench's mean is over tasks."""

    def lines(right: str) -> list[Any]:
        text = {"1": "(100,100),(300,300)", "0": "none"}
        return [
            line(k, "region" if k else "diff", [TRUE], [], answer=text[c], extra={"corners": [100, 100, 300, 300]})
            for k, c in enumerate(right)
        ]

    files_of = files(tmp_path, "mig-bench", lines("0" + "1" * 9), lines("1" * 10), benchmark="revised")
    told = compare(*files_of)
    assert told["values"]["acc@0.5"]["a"] == pytest.approx(0.5)
    assert told["values"]["acc@0.5"]["gain"] == pytest.approx(0.5)
    assert told["tasks"]["diff"]["gain"] == 1.0
    assert told["tasks"]["region"]["gain"] == 0.0
    assert "p" not in told["values"]["mean_iou"]


def test_average_precision_is_paired(tmp_path: Path) -> None:
    place = (10, 10, 30, 30)

    def lines(good: int) -> list[Any]:
        rows = []
        for k in range(12):
            found = [(0, *place, "pothole", 0.5)] if k < good else []
            extra = {"picture": k, "asked_for": "pothole", "frame": [1000, 1000]}
            row = line(k, "present-classes/pothole", [(0, *place, "pothole")], found, extra=extra)
            rows.append(row | {"images": ["a"], "sizes": [[99, 99]]})
        return rows

    told = compare(*files(tmp_path, "odinw13", lines(6), lines(9)))["values"]["ap, present-classes"]
    assert told["gain"] == pytest.approx(0.25, abs=0.01)
    low, high = told["interval"]
    assert 0 <= low < told["gain"] < high < 0.6

    def samples(hits: int) -> list[Any]:
        rows = []
        for k in range(10):
            found = [(0, *place, "group 1", 0.5)] if k < hits else []
            pair = [2 * k, 2 * k + 1]
            extra = {"image_ids": pair, "places": pair}
            rows.append(line(k, "referring", [(0, *place, "group 1")], found, extra=extra))
        return rows

    values = compare(*files(tmp_path, "mc-bench", samples(10), samples(5)))["values"]
    assert values["acc"]["lost"] == 5
    assert values["ap50_corrected"]["gain"] == pytest.approx(-0.5, abs=0.02)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    lines = tabletop_lines([True, False])
    a = write_answers(tmp_path / "a.jsonl", "tabletop", lines)
    for header, fault in (({"questions": "r"}, "has questions q"), ({"benchmark": "old"}, "has benchmark ")):
        other = write_answers(tmp_path / "b.jsonl", "tabletop", lines, **header)
        with pytest.raises(GemvgError, match=f"{fault}.* no answers to the same questions"):
            compare(a, other)
    with pytest.raises(GemvgError, match="no question in common"):
        compare(a, write_answers(tmp_path / "b.jsonl", "tabletop", [line(9, "moved", [TRUE])]))
    relabelled = [lines[0], lines[1] | {"truth": [lines[1]["truth"][0] | {"label": "cat"}]}]
    with pytest.raises(GemvgError, match="question 'moved/1' is another one"):
        compare(a, write_answers(tmp_path / "b.jsonl", "tabletop", relabelled))
    lines[1] = lines[1] | {"query": "another"}
    with pytest.raises(GemvgError, match="question 'moved/1' is another one"):
        compare(a, write_answers(tmp_path / "b.jsonl", "tabletop", lines))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = files(tmp_path, "tabletop", tabletop_lines([True] * 3), tabletop_lines([True, False]))
    monkeypatch.setattr(sys, "argv", ["x", str(a), str(b)])
    command.main()
    printed = capsys.readouterr().out
    assert "2 questions of tabletop in both, 1 of A's and 0 of B's left out" in printed
    assert "right in A alone, exact: 1\n  moved/1  'thing 1'\n    A 'True'\n    B 'False'" in printed
    assert json.loads(printed.splitlines()[-1])["lost"] == ["moved/1"]
