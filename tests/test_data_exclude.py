"""Pictures of a benchmark: found under other names, encoded again and resized, through every reader; others kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from tests.test_data_compose import run, write_every_data_set
from train.data import compose, convert, exclude, mix
from train.data.exclude import BYTES, LOOK, NAME, Exclusion, coco_key, leave_out, look_at, read_exclusion
from train.data.pictures import measure
from train.data.record import Fault, Record, read_records, write_records

ROOT = Path(__file__).parents[1]
PACKAGES = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}  # where installed
FOLDERS = [
    Path(found.origin).parent / folder
    for name, folder in PACKAGES.items()
    if (found := find_spec(name)) and found.origin
]  # fmt: skip
PICTURES = sorted(p for folder in [*FOLDERS, ROOT / "examples" / "images"] for p in folder.glob("*.[jp][pn]g"))
TWINS = {"chessboard_GRAY.png"}  # of chessboard_RGB.png: truly the same


def texture(size: tuple[int, int], seed: int) -> Image.Image:
    """A picture that is like no other."""
    blobs = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)


def repaint(folder: Path) -> None:
    """Give every picture below a folder a look of its own, of the size that it has."""
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.suffix in (".jpg", ".png"))):
        with Image.open(path) as image:
            size = image.size
        texture(size, number).save(path)
    measure.cache_clear()


def bench_of(folder: Path, *pictures: Path) -> Path:
    """An MC-Bench whose pictures are copies under other names, of other sizes and encoded again."""
    for number, path in enumerate(pictures):
        copy = folder / "mc-bench_images" / "BLINK_val_multiview" / f"{number}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize((image.width * 3 // 2, image.height * 2)).save(copy, quality=80)
    return folder


def shown(file: Path) -> set[Path]:
    """The pictures that a record file shows, by their real places."""
    records = [record for record in read_records(file) if isinstance(record, Record)] if file.exists() else []
    return {path.resolve() for record in records for path in record.images}


def one(path: Path, **fields: Any) -> Record:
    """A record of one picture."""
    return replace(Record((path,), ((64, 48),), "mug", (Box(0, 2, 3, 9, 8),), "semantic", "us"), **fields)


def held_out(*folders: Any) -> Exclusion:
    """What read_exclusion makes of folders."""
    exclusion = read_exclusion(*folders)
    assert exclusion is not None
    return exclusion


def outcome(items: Iterable[Record | Fault]) -> list[str]:
    """What became of records: kept, or by what they were left out."""
    return ["kept" if isinstance(item, Record) else item.reason.rpartition(" by ")[2] for item in items]


def test_no_picture_of_mc_bench_comes_back_through_any_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One picture of each data set is MC-Bench's under another name: convert, mix and compose leave it out."""
    folders = write_every_data_set(tmp_path / "sets")
    repaint(tmp_path / "sets")
    bench = tmp_path / "MC-Bench"
    for name, folder in folders.items():
        whole = tmp_path / f"{name}.jsonl"
        run(convert, monkeypatch, name, folder, "--out", whole)
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["excluded"] is None
        bad = sorted(shown(whole))[0]
        bench_of(bench, bad)

        out = tmp_path / f"{name}.converted.jsonl"
        if shown(whole) - {bad}:
            with_bench = (name, folder, "--out", out, "--exclude-mc-bench", bench)
            try:
                run(convert, monkeypatch, *with_bench)
                told = capsys.readouterr().out
                assert "by its look" in told
                assert json.loads(told.splitlines()[-1])["excluded"]["pictures"] == 1
            except SystemExit:  # every record showed it
                assert "gave no record" in capsys.readouterr().err
        assert bad not in shown(out)

        out = tmp_path / f"{name}.mixed.jsonl"
        run(mix, monkeypatch, out, whole, "--exclude-mc-bench", bench)
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told["excluded"]["pictures"] == 1
        assert told["records"] + told["excluded"]["records"] == len(whole.read_text().splitlines())
        assert bad not in shown(out)

        if name in ("d3", "coco", "ego-exo", "mvtrack", "star"):
            out = tmp_path / f"{name}.composed.jsonl"
            given = (f"--{name}", folder, "--size", 240, "--out", out, "--exclude-mc-bench", bench)
            run(compose, monkeypatch, *given)
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["excluded"]["pictures"] == 1
            assert bad not in shown(out)


COPIES: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "encoded again": ((1, 1), {"format": "JPEG", "quality": 40}),
    "another format": ((1, 1), {"format": "WEBP", "quality": 50}),
    "half as large": ((0.5, 0.5), {"format": "JPEG", "quality": 75}),
    "squeezed": ((0.7, 0.45), {"format": "PNG"}),
    "larger": ((1.4, 1.4), {"format": "JPEG", "quality": 90}),
}


def test_copies_are_found_and_other_pictures_are_not(tmp_path: Path) -> None:
    """Photographs, drawings and rendered tables, each against all: every copy is found, no other is taken for one."""
    pictures = list[Path]()
    for path in PICTURES:
        if path.name in TWINS:
            continue
        with Image.open(path) as image:
            image.convert("RGB").resize((min(image.width, 480), min(image.height, 360))).save(
                to := tmp_path / f"{len(pictures)}.png"
            )
        pictures.append(to)
    assert len(pictures) > 12
    held, others = pictures[::2], pictures[1::2]
    (tmp_path / "held").mkdir()
    for path in held:
        os.link(path, tmp_path / "held" / f"other-{path.name}")
    exclusion = held_out(None, [tmp_path / "held"])
    assert [exclusion.find(path, "us") for path in held] == [BYTES] * len(held)
    assert [path.name for path in others if exclusion.find(path, "us")] == []
    for path in held:
        with Image.open(path) as image:
            for name, ((wide, high), save) in COPIES.items():
                image.resize((int(image.width * wide), int(image.height * high))).save(tmp_path / "copy", **save)
                os.utime(tmp_path / "copy", ns=(len(exclusion.met), hash((name, path)) % 10**15))
                assert exclusion.find(tmp_path / "copy", "us") == LOOK, (path.name, name)


def test_no_two_shipped_pictures_look_alike() -> None:
    looks = [look_at(path) for path in PICTURES if path.name not in TWINS]
    for a, b in combinations(looks, 2):
        bits, levels = (64 - a.signs @ b.signs) / 2, np.abs(a.thumbnail - b.thumbnail).mean()
        assert bits > exclude.HASH_BITS or levels > 1.5 * exclude.THUMBNAIL


def test_flat_pictures_are_not_all_the_same(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    bench.mkdir()
    for name, level in (("white", 255), ("grey", 90)):
        Image.new("RGB", (64, 48), (level,) * 3).save(bench / f"{name}.png")
    found = {}
    for level in (0, 86, 90, 94, 250, 255):
        Image.new("RGB", (90, 80), (level,) * 3).save(path := tmp_path / f"{level}.jpg", quality=70)
        exclusion = held_out(None, [bench])
        found[level] = exclusion.find(path, "us")
    assert found == {0: None, 86: None, 90: LOOK, 94: None, 250: None, 255: LOOK}
    texture((64, 48), 1).save(tmp_path / "a.png")  # beside flat ones in the folder
    assert exclusion.find(tmp_path / "a.png", "us") is None


def test_names_of_coco_and_d3(tmp_path: Path) -> None:
    """Where MC-Bench's files are not at hand its json tells names; which say nothing is told."""
    assert coco_key("COCO/COCO_val2014_000000000001.jpg") == "000000000001" == coco_key("000000000001.png")
    assert coco_key("00000001.jpg") is None
    assert coco_key("1_000000000001.jpg") is None
    bench = tmp_path / "bench"
    bench.mkdir()
    names = ["COCO/COCO_train2014_000000000003.jpg", "D3/0.jpg", "BLINK_val_multiview/2.jpg"]
    (bench / "mc-bench_v0.2_val.json").write_text(json.dumps({"images": [{"file_name": name} for name in names]}))
    exclusion = held_out(bench)
    records = [
        one(tmp_path / "train2017" / "000000000003.jpg", source="Objects365"),
        one(tmp_path / "0.jpg", source="D3"),
        one(tmp_path / "0.jpg", source="MVTrack"),  # a frame number
        one(tmp_path / "2.jpg"),
    ]
    assert outcome(leave_out(records, exclusion)) == [NAME, NAME, "kept", "kept"]
    told = "\n".join(exclusion.lines())
    assert told.startswith("2 records left out, which show pictures of ")
    assert "2 pictures (2 by its name)" in told
    assert "compared with 0 pictures by bytes and by look, and with 2 names of COCO and D3" in told
    assert "2 pictures are listed there without a file and were compared by name alone" in told
    assert "1 pictures are listed there without a file and were NOT compared" in told
    assert "2 pictures of records are missing or cannot be decoded and were compared by name alone" in told
    assert exclusion.counts() == {"records": 2, "pictures": 2, "not_compared": 3}


def test_one_such_picture_leaves_the_whole_record_out(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        texture((64, 48), seed).save(tmp_path / f"{name}.png")
    bench = bench_of(tmp_path / "bench", tmp_path / "b.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "to").symlink_to(bench)  # what lies behind a link is looked at, a circle is left
    (bench / "circle").symlink_to(bench)
    (bench / "broken.jpg").write_bytes(b"no picture")
    exclusion = held_out(None, [tmp_path / "links"])
    sizes = ((64, 48), (64, 48))
    both = one(tmp_path / "a.png", images=(tmp_path / "a.png", tmp_path / "b.png"), sizes=sizes)
    damaged = one(tmp_path / "damaged.png")
    damaged.images[0].write_bytes((tmp_path / "b.png").read_bytes()[:60])
    fault = Fault("there", "why")
    kept = list(leave_out([one(tmp_path / "a.png"), both, both, damaged, fault], exclusion))
    assert [kept[0], *kept[3:]] == [one(tmp_path / "a.png"), damaged, fault]
    assert kept[1] == kept[2] == Fault(str(tmp_path / "b.png"), "a picture of a benchmark, left out by its look")
    assert (exclusion.records, len(exclusion.met), exclusion.unseen, exclusion.unread) == (2, 1, 1, 1)


def test_a_picture_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texture((64, 48), 1).save(tmp_path / "a.png")
    texture((64, 48), 2).save(tmp_path / "b.png")
    exclusion = held_out(None, [bench_of(tmp_path / "bench", tmp_path / "b.png")])
    looked: list[Path] = []

    def looking(path: Path) -> exclude.Look:
        looked.append(path)
        return look_at(path)

    monkeypatch.setattr(exclude, "look_at", looking)
    for _ in range(3):
        assert exclusion.find(tmp_path / "a.png", "us") is None
    assert looked == [tmp_path / "a.png"]
    (tmp_path / "b.png").replace(tmp_path / "a.png")  # another picture under its name
    assert exclusion.find(tmp_path / "a.png", "us") == LOOK


def test_the_mix_says_what_was_left_out_and_its_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        texture((64, 48), seed).save(tmp_path / f"{name}.png")
    words = one(tmp_path / "a.png", boxes=(), kind="understanding", source="LLaVA", words="a mug")
    write_records([one(tmp_path / "a.png"), one(tmp_path / "b.png"), words], tmp_path / "all.jsonl")
    bench = bench_of(tmp_path / "bench", tmp_path / "b.png")
    run(mix, monkeypatch, tmp_path / "plain.jsonl", tmp_path / "all.jsonl")
    lines = capsys.readouterr().out.splitlines()
    assert any("MC-Bench's pictures were NOT left out" in line for line in lines)
    assert json.loads(lines[-1]) == {
        "records": 3, "kinds": {"semantic": 2, "understanding": 1}, "sources": {"us": 2, "LLaVA": 1},
        "refused": 0, "excluded": None,
    }  # fmt: skip
    for flag, warned in (("--exclude-mc-bench", False), ("--exclude", True)):
        run(mix, monkeypatch, tmp_path / "mixed.jsonl", tmp_path / "all.jsonl:3", flag, bench, "--overwrite")
        lines = capsys.readouterr().out.splitlines()
        assert any("MC-Bench's pictures were NOT left out" in line for line in lines) == warned
        assert "  understanding: 1, 50.0% (LLaVA 1)" in lines
        assert any(line.startswith("  1 records left out, which show pictures of ") for line in lines)
        told = json.loads(lines[-1])
        assert told["excluded"] == {"records": 1, "pictures": 1, "not_compared": 0}
        assert (told["records"], told["refused"]) == (2, 1)


def test_folders_without_pictures(tmp_path: Path) -> None:
    assert read_exclusion(None) is None
    with pytest.raises(GemvgError, match="gone: no such folder; give one of pictures to leave out"):
        read_exclusion(tmp_path / "gone")
    with pytest.raises(GemvgError, match=r"no pictures there and no mc-bench\*\.json that names some"):
        read_exclusion(tmp_path)
    with pytest.raises(GemvgError, match="no pictures there to leave out; give the folder that holds them"):
        read_exclusion(None, [tmp_path])
