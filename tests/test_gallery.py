"""The gallery in headless Chromium: what it shows, its filters, and that nothing an answer says can act there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import gallery
from bench.boxes.kinds import kinds_of, overlap_of
from gemvg_edge.boxes import Box
from tests.answer_files import line, paint, write_answers

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
A, B, C = Box(0, 10, 10, 30, 30), Box(1, 10, 10, 30, 30), Box(0, 60, 60, 80, 80)
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"><!--"


@pytest.mark.parametrize(
    ("boxes", "truth", "problem", "kinds", "overlap"),
    [
        ([A], [A], None, ["right"], 1.0),
        ([], [], None, ["right"], 1.0),
        ([], [A], None, ["missed"], 0.0),
        ([A, C], [A], None, ["extra"], 0.5),
        ([A], [], None, ["extra"], 0.0),
        ([B], [A], None, ["wrong image", "missed"], 0.0),
        ([Box(0, 20, 10, 40, 30)], [A], None, ["missed", "loose"], 1 / 3),
        ([A, B], [A], None, ["wrong image", "extra"], 0.5),
        ([], [A], "cut off", ["malformed", "missed"], 0.0),
        ([A], [A], "clipped", ["malformed"], 1.0),
        ([A] * 10_000, [A], None, ["extra"], 1 / 300),
    ],
)
def test_what_happened(
    boxes: list[Box], truth: list[Box], problem: str | None, kinds: list[str], overlap: float
) -> None:
    assert kinds_of(boxes, truth, problem) == kinds
    assert overlap_of(boxes, truth) == pytest.approx(overlap)


def write(folder: Path) -> Path:
    """Answers of two tasks: right, missed, in the wrong image, malformed and hostile; one picture is not there."""
    paint(folder / "data" / "a.png", (100, 100))
    paint(folder / "data" / "b.png", (100, 100))
    hit, other = (0, 10, 10, 30, 30), (1, 10, 10, 30, 30)
    lines = [
        line(0, "region", [hit], [(*hit, "cup", 0.75)], answer="found it"),
        line(1, "region", [hit], [], query="the missed mug"),
        line(2, "diff", [hit], [other]),
        line(3, "diff", [hit], [hit], query=EVIL, answer=EVIL, problem=EVIL),
        line(4, "diff", [hit], [hit], images=["none.png", "../a.png"]),
    ]
    return write_answers(folder / "a.jsonl", "mig-bench", lines, data=str(folder / "data"), model=EVIL)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    gallery.main()
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def test_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = write(tmp_path)
    told = run(monkeypatch, capsys, answers)
    assert told | {"bytes": 0} == {
        "page": str(tmp_path / "a.html"), "answers": 5, "of": 5, "missing": 2, "bytes": 0,
    }  # fmt: skip
    page = (tmp_path / "a.html").read_text()
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert page.count("</script>") == 2
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, answers)
    assert "is there already; add --overwrite" in capsys.readouterr().err
    few = run(monkeypatch, capsys, answers, "--out", tmp_path / "few.html", "--limit", 3)
    assert (few["answers"], few["of"]) == (3, 5)
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, answers, "--out", answers, "--overwrite")
    assert "which is read" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def test_in_a_browser(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, capsys, write(tmp_path))
    page, said, asked = browser.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "a.html").as_uri())
    assert page.title() == f"{EVIL}: mig-bench"  # as text
    assert page.locator("article").count() == 5
    assert page.locator("output").inner_text() == "5 of 5"
    # Both pictures of four answers, both missing of the fifth; true boxes and answered ones over them.
    assert page.locator("svg image").count() == 8
    assert page.locator("figcaption", has_text="not at hand").count() == 2
    right = page.locator("article", has_text="found it")
    assert right.locator("rect").count() == 2
    assert right.locator("text").text_content() == "1 (0.75)"
    assert right.locator("image").first.evaluate("image => image.getBBox().width") == 100

    page.select_option("#part", "diff")
    assert page.locator("article").count() == 3
    page.select_option("#kind", "wrong image")
    assert page.locator("article").count() == 1
    assert page.url.endswith("#part=diff&kind=wrong+image")
    page.select_option("#part", "")
    page.select_option("#kind", "malformed")
    assert page.locator("h2").all_inner_texts() == [EVIL]
    page.select_option("#kind", "")
    page.fill("#high", "0.5")
    assert page.locator("article").count() == 2
    page.fill("#high", "")
    page.fill("#words", "MISSED MUG")
    assert page.locator("h2").all_inner_texts() == ["the missed mug"]
    page.fill("#words", "nobody says this")
    assert page.locator("main").inner_text() == "No answer fits these filters."
    page.goto((tmp_path / "a.html").as_uri() + "#kind=right&part=region")
    page.reload()
    assert page.locator("article").count() == 1
    assert page.locator("#part").input_value() == "region"
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()
