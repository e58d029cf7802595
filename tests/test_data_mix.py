"""Mixing record files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from gemvg_edge.boxes import Box
from train.data.record import Record, read_records, write_records


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
