"""Mixtures with MG-Data-240K's shares, and the conversion of one data set, as functions and as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests import test_data_coco, test_data_llava, test_data_mgrounding, test_data_single, test_data_views
from train.data import compose, convert
from train.data.compose import MG_DATA_SHARES, Folders, draw_mixture, report, scale_shares
from train.data.record import KINDS, Kind, Record, read_records
from train.data.reservoir import Reservoir

ONE = Record((Path("a.png"),), ((64, 48),), "0", (Box(0, 2, 3, 9, 8),), "semantic", "us")


def stream(**counts: int) -> Iterator[Record]:
    """As many different records of each kind."""
    for kind, count in counts.items():
        assert kind in KINDS
        yield from (replace(ONE, kind=kind, query=f"{kind} {k}") for k in range(count))


def write_sources(folder: Path) -> Folders:
    """All five data sets, tiny."""
    test_data_coco.write_d3(folder / "d3")
    test_data_coco.write_coco(folder / "coco")
    test_data_views.write_ego_exo(folder / "ego", packed=True)
    test_data_views.write_mvtrack(folder / "mv")
    test_data_views.write_star(folder / "star")
    return Folders(folder / "d3", folder / "coco", folder / "ego", folder / "mv", folder / "star")


def test_the_shares_are_the_published_ones() -> None:
    assert sum(MG_DATA_SHARES.values()) == 240_000
    assert scale_shares(240_000) == MG_DATA_SHARES
    assert scale_shares(240) == {"referential": 97, "semantic": 77, "spatial": 20, "temporal": 46}


@given(st.integers(1, 10**6))
def test_scaled_shares_add_up(size: int) -> None:
    counts = scale_shares(size)
    assert sum(counts.values()) == size
    assert all(abs(counts[kind] - share * size / 240_000) < 1 for kind, share in MG_DATA_SHARES.items())


def test_a_mixture_has_the_shares_and_repeats_nothing() -> None:
    mixture, offered = draw_mixture(stream(referential=300, semantic=200, spatial=30, temporal=60, reasoning=9), 240, 0)
    assert Counter(record.kind for record in mixture) == scale_shares(240)
    assert offered == {"referential": 300, "semantic": 200, "spatial": 30, "temporal": 60}
    assert len({record.query for record in mixture}) == 240
    assert [record.kind for record in mixture] != sorted(record.kind for record in mixture)
    assert draw_mixture(stream(referential=300, semantic=200, spatial=30, temporal=60), 240, 0)[0] == mixture
    assert draw_mixture(stream(referential=300, semantic=200, spatial=30, temporal=60), 240, 1)[0] != mixture


def test_a_kind_that_falls_short_is_told_and_not_repeated() -> None:
    mixture, offered = draw_mixture(stream(referential=300, semantic=200, spatial=3), 240, 0)
    assert Counter(record.kind for record in mixture) == {"referential": 97, "semantic": 77, "spatial": 3}
    lines = report(mixture, offered, 240)
    assert lines[0] == "referential: 97 of 97, drawn from 300 (us 97)"
    assert lines[2] == "spatial: 3 of 20, drawn from 3 (us 3); 17 FEWER than its share"
    assert lines[3] == "temporal: 0 of 46, drawn from 0 (no data set); 46 FEWER than its share"


def test_a_reservoir_draws_each_item_as_likely() -> None:
    drawn: Counter[int] = Counter()
    for seed in range(3000):
        reservoir = Reservoir[int](3, np.random.default_rng(seed))
        for item in range(10):
            reservoir.offer(item)
        drawn.update(reservoir.items)
        assert len(set(reservoir.items)) == 3
    assert all(abs(drawn[item] / 3000 - 0.3) < 0.04 for item in range(10))  # five standard deviations


def test_all_five_sources_are_composed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "records.jsonl"
    compose.compose(write_sources(tmp_path), None, 240, 0, out)
    records = [record for record in read_records(out) if isinstance(record, Record)]
    kinds: dict[str, set[Kind]] = {}
    for record in records:
        kinds.setdefault(record.source, set()).add(record.kind)
    assert kinds == {
        "D3": {"referential"},
        "COCO": {"referential", "semantic"},
        "Ego-Exo4D": {"spatial"},
        "MVTrack": {"spatial", "temporal"},
        "STAR": {"temporal"},
    }
    assert all(image.is_file() for record in records for image in record.images)
    printed = capsys.readouterr().out
    assert "MC-Bench's pictures were NOT left out" in printed
    assert "FEWER than its share" in printed
    assert json.loads(printed.splitlines()[-1])["records"] == len(records)


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A command's main with arguments."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def test_composing_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_data_views.write_star(tmp_path / "star")
    out = tmp_path / "records.jsonl"
    run(compose, monkeypatch, "--star", tmp_path / "star", "--size", 24, "--out", out)
    assert len(out.read_text().splitlines()) == 1
    with pytest.raises(SystemExit):
        run(compose, monkeypatch, "--star", tmp_path / "star", "--size", 24, "--out", out)
    assert "records.jsonl is there already; add --overwrite to replace it" in capsys.readouterr().err
    for arguments, message in (
        ((), "no data set was given; name at least one of --d3"),
        (("--star", tmp_path / "none"), "object_classes.txt: no such file"),
        (("--star", tmp_path / "star", "--size", 0), "--size is 0; it must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            run(compose, monkeypatch, *arguments, "--out", out, "--overwrite")
        assert message in capsys.readouterr().err


def write_every_data_set(tmp_path: Path) -> dict[str, Path]:
    """A tiny folder of each data set that can be converted, by its name."""
    write_sources(tmp_path)
    folders = {"d3": "d3", "coco": "coco", "ego-exo": "ego", "mvtrack": "mv", "star": "star"}
    folders |= {name: name for name in ("mgrounding", "mig-bench", "llava", "voc", "labelme")}
    folders |= {"refcoco": "refer/refcoco"}
    for name in ("mgrounding", "mig-bench", "llava", "voc", "labelme", "refer"):
        (tmp_path / name).mkdir()
    talk = test_data_mgrounding.talk(test_data_mgrounding.GROUP, "<image><image>a dog", "None")
    test_data_mgrounding.read(tmp_path / "mgrounding", talk)
    item = {"task": "diff", "images": ["a.png"], "question": "in the 1th image", "answer": [0, 0, 5, 5]}
    (tmp_path / "mig-bench" / "MIG_data.json").write_text(json.dumps([item]))
    test_data_coco.paint(tmp_path / "mig-bench" / "a.png")
    test_data_llava.read(tmp_path / "llava", test_data_llava.talk(["a.png", "b.png"], "<image><image>\nAlike?", "Yes."))
    test_data_single.write_voc(tmp_path / "voc", ("dog", 1, 1, 9, 9))
    test_data_single.write_labelme(tmp_path / "labelme", test_data_single.shape("dog", [[0, 0], [9, 9]]))
    test_data_single.write_refcoco(tmp_path / "refer", test_data_single.ref("a dog"))
    assert set(folders) == set(convert.NAMES)
    return {name: tmp_path / folder for name, folder in folders.items()}


def test_every_data_set_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder in write_every_data_set(tmp_path).items():
        out = tmp_path / f"{name}.jsonl"
        run(convert, monkeypatch, name, folder, "--out", out)
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        records = len(out.read_text().splitlines())
        assert last == {"records": records, "refused": 0, "excluded": None, "out": str(out)}
        assert last["records"] > 0


def test_conversions_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "records.jsonl"
    with pytest.raises(SystemExit):
        run(convert, monkeypatch, "coco", tmp_path, "--out", out)
    assert "instances_train2017.json: no such file; lay the folder out as" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(GemvgError, match="'imagenet' is no data set that can be read; use one of mgrounding,"):
        convert.read("imagenet", tmp_path, 0)


@pytest.mark.parametrize("name", ["annotations/instances_train2017.json", "train2017/000000000001.jpg", "", ".."])
def test_what_is_read_is_never_the_output(tmp_path: Path, name: str) -> None:
    coco = test_data_coco.write_coco(tmp_path / "coco")
    before = {path: path.read_bytes() for path in coco.rglob("*") if path.is_file()}
    out = coco / "sub" / ".." / name
    with pytest.raises(GemvgError, match=r"exists and holds no records|is .*, which is read|holds .*, which is read"):
        convert.convert("coco", coco, 0, out)
    with pytest.raises(GemvgError, match=r"exists and holds no records|is .*, which is read|holds .*, which is read"):
        compose.compose(Folders(coco=coco), None, 10, 0, out)
    assert {path: path.read_bytes() for path in coco.rglob("*") if path.is_file()} == before
    for _ in range(2):  # a result of an earlier run may be replaced, beside what is read too
        convert.convert("coco", coco, 0, coco / "records.jsonl", overwrite=True)
    assert len(list(read_records(coco / "records.jsonl"))) > 1


def test_reading_data_needs_no_torch() -> None:
    code = "import sys, train.data.compose, train.data.convert, train.data.inspect; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
