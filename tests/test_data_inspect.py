"""What inspecting a record file prints and draws."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from train.data import inspect
from train.data.record import Record, read_records, write_records
from train.data.sheet import words_of, write_sheet

INK = (255, 0, 160)


def write_file(folder: Path) -> Path:
    """Four good records of three kinds and one bad one, with their pictures."""
    for name in ("a", "b"):
        Image.new("RGB", (100, 50), (60, 90, 60)).save(folder / f"{name}.png")
    base = Record((folder / "a.png", folder / "b.png"), ((100, 50), (100, 50)), "x < y & <b>", (), "semantic", "us")
    records = [
        replace(base, boxes=(Box(0, 0, 0, 50, 50), Box(1, 0, 0, 10, 5))),
        replace(base, boxes=tuple(Box(1, k, 0, k + 25, 10) for k in range(7)), mode="cot", thinking="hm"),
        base,
        replace(base, kind="understanding", words="two", images=base.images[:1], sizes=base.sizes[:1], source="them"),
        replace(base, boxes=(Box(0, 0, 0, 200, 10),)),
    ]
    write_records(records, folder / "records.jsonl")
    return folder / "records.jsonl"


def test_the_summary_counts_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.inspect(write_file(tmp_path), None, 24, 0)
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["records"] == 4
    assert summary["kind"] == {"semantic": 3, "understanding": 1}
    assert summary["mode"] == {"cot": 1, "direct": 3}
    assert summary["source"] == {"them": 1, "us": 3}
    assert summary["images"] == {"1": 1, "2": 3}
    assert summary["boxes"] == {"0": 2, "2": 1, "5 or more": 1}
    assert summary["no_target_share"] == round(1 / 3, 4)
    areas = [0.5, 0.01] + [0.05] * 7
    assert summary["area_share"] == {str(q): round(float(np.quantile(areas, q)), 5) for q in inspect.QUANTILES}
    assert summary["refused"] == {"a box outside its picture": 1}
    assert lines[0] == "4 records kept, 1 refused"
    assert "kind: semantic 3 (75.0%), understanding 1 (25.0%)" in lines
    assert "no target: 33.3% of the records that ask for boxes" in lines


def test_an_html_sheet_holds_its_pictures_and_escapes_words(tmp_path: Path) -> None:
    file, sheet = write_file(tmp_path), tmp_path / "out" / "sheet.html"
    inspect.inspect(file, sheet, 24, 0)
    page = sheet.read_text()
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 4 == page.count("<figure>")
    assert "<b>" not in page
    assert "x &lt; y &amp; &lt;b&gt;" in page
    assert "answer: two" in page
    assert "http" not in page
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("RGB")).astype(int)
    assert (np.abs(shown - INK).max(axis=2) < 60).any()


def test_a_png_sheet_draws_boxes_where_they_are(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    record = Record((tmp_path / "a.png",), ((100, 50),), "the mug " * 60, (Box(0, 25, 10, 75, 40),), "semantic", "us")
    write_sheet([record, record], tmp_path / "sheet.png")
    shown = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    rows, columns = np.nonzero((shown == INK).all(axis=2))
    # draw_sheet shows the picture 384 pixels high, 8 from the left and 34 from the top.
    assert abs(columns.min() - (8 + 25 * 7.68)) < 2
    assert abs(columns.max() - (8 + 75 * 7.68)) < 2
    assert abs(rows.min() - (34 + 10 * 7.68)) < 2
    second = rows[rows > shown.shape[0] // 2]
    assert abs(second.min() - (shown.shape[0] // 2 + 34 + 10 * 7.68)) < 2
    assert words_of(record).startswith("the mug the mug")


def test_a_picture_that_is_gone_is_said_on_the_sheet(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    (tmp_path / "b.png").unlink()
    inspect.inspect(file, tmp_path / "sheet.html", 24, 0)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("b.png: no such picture file") == 3
    assert page.count("<img") == 1
    inspect.inspect(file, tmp_path / "sheet.png", 24, 0)
    assert (tmp_path / "sheet.png").is_file()


def test_samples_follow_the_seed(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    pages = []
    for seed in (0, 0, 1, 2, 3, 4):
        inspect.inspect(file, tmp_path / "sheet.html", 1, seed, overwrite=True)
        pages.append((tmp_path / "sheet.html").read_text())
    assert pages[0] == pages[1]
    assert len(set(pages)) > 1


def test_inspecting_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        inspect.main()
    assert "none.jsonl: no such file" in capsys.readouterr().err
    with pytest.raises(GemvgError, match=r"sheet\.gif: a sheet is a \.html or a \.png"):
        inspect.inspect(write_file(tmp_path), tmp_path / "sheet.gif", 24, 0)
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.setattr(sys, "argv", ["inspect", str(tmp_path / "empty.jsonl"), "--sheet", str(tmp_path / "e.png")])
    inspect.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 0


def test_a_sheet_never_replaces_what_is_read(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")
    for sheet in (tmp_path / "sub/../a.png", tmp_path / "none/../a.png", tmp_path / "link.png"):
        with pytest.raises(GemvgError, match=r"--sheet .*png is .*png, which is read; give another place"):
            inspect.inspect(file, sheet, 24, 0, overwrite=True)
    (tmp_path / "page.html").symlink_to(file)
    with pytest.raises(GemvgError, match=r"--sheet .*page\.html is .*, which is read"):
        inspect.inspect(file, tmp_path / "page.html", 24, 0, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    (tmp_path / "holiday.png").write_bytes(b"mine")
    with pytest.raises(GemvgError, match=r"holiday\.png is there already; add --overwrite"):
        inspect.inspect(file, tmp_path / "holiday.png", 24, 0)


@pytest.mark.parametrize("name", ["sheet.png", "sheet.html"])
def test_a_full_disk_leaves_the_old_sheet(tmp_path: Path, name: str) -> None:
    records = [item for item in read_records(write_file(tmp_path)) if isinstance(item, Record)]
    sheet = tmp_path / "out" / name
    write_sheet(records, sheet)
    before, limits = sheet.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as if there were no more room
    try:
        with pytest.raises(GemvgError, match=rf"{name} cannot be written \(File too large\)"):
            write_sheet(records, sheet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sheet.read_bytes() == before
    assert os.listdir(sheet.parent) == [name]


def test_a_picture_of_another_size_is_said_on_the_sheet(tmp_path: Path) -> None:
    file = write_file(tmp_path)
    Image.new("RGB", (50, 50)).save(tmp_path / "b.png")
    inspect.inspect(file, tmp_path / "sheet.html", 24, 0)
    assert (tmp_path / "sheet.html").read_text().count("b.png has 50 x 50 pixels and its record says") == 3
