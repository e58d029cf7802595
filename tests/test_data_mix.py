"""Mixing record files: what comes out, and what is never lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from gemvg_edge.boxes import Box
from tests.killed import every_kill
from train.data.mix import mix
from train.data.record import Record, Tally, read_records, write_records


def test_files_from_several_folders_are_mixed(tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 50)):
        folder = tmp_path / name
        folder.mkdir()
        Image.new("RGB", (64, 48)).save(folder / "one.png")
        records = [
            Record((folder / "one.png",), ((64, 48),), f"{name} {k}", (Box(0, 2, 3, 9, 8),), "semantic", "us")
            for k in range(count)
        ]
        write_records(records, folder / "all.jsonl")
    command = [sys.executable, "-m", "train.data.mix"]
    out, parts = tmp_path / "mixed.jsonl", [str(tmp_path / "a" / "all.jsonl"), f"{tmp_path / 'b' / 'all.jsonl'}:10"]
    done = subprocess.run([*command, out, *parts], capture_output=True, text=True, check=True)
    assert "13 records written" in done.stdout
    mixed = [record for record in read_records(out) if isinstance(record, Record)]
    assert [record.query for record in mixed[:3]] == ["a 0", "a 1", "a 2"]
    assert len({record.query for record in mixed[3:]}) == 10
    assert all(image.is_file() for record in mixed for image in record.images)
    for part, message in ((f"{parts[0]}:0", "at least 1"), (tmp_path / "none.jsonl", "no such file")):
        wrong = subprocess.run([*command, tmp_path / "x.jsonl", part], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2
        assert message in wrong.stderr
        assert "Traceback" not in wrong.stderr
    assert not (tmp_path / "x.jsonl").exists()


def test_a_part_is_never_the_output(tmp_path: Path) -> None:
    record = Record((tmp_path / "a.png",), ((64, 48),), "mug", (), "semantic", "us")
    write_records([record], tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    command = [sys.executable, "-m", "train.data.mix", "b.jsonl", "a.jsonl:3"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "train.data.mix: b.jsonl is a.jsonl, which is read; give another place to write to\n"
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_a_mixing_is_killed(tmp_path: Path) -> None:
    """At each change of a name: the old file or the new one, and a rerun leaves nothing else."""
    old, new = (Record((tmp_path / "a.png",), ((64, 48),), query, (), "semantic", "us") for query in ("old", "new"))
    write_records([new], tmp_path / "part.jsonl")
    out, outcomes = tmp_path / "out.jsonl", []

    def work() -> None:
        write_records(
            mix([(tmp_path / "part.jsonl", None)], 0, Tally()), out, [tmp_path / "part.jsonl"], overwrite=True
        )

    for _ in every_kill(work, lambda: write_records([old], out, overwrite=True)):
        (found,) = read_records(out)
        assert found in (old, new)
        outcomes.append(found)
        work()
        assert list(read_records(out)) == [new]
        assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "part.jsonl"]
    assert outcomes
