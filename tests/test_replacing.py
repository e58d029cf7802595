"""Files that are written all or nothing: several writers at once, what a killed one left, permissions, odd systems."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import PARTIAL, replacing, write_text

WRITER = """
import sys
from pathlib import Path
from gemvg_edge.files import replacing
for k in range(60):
    with replacing(Path(sys.argv[1])) as partial:
        partial.write_bytes(bytes([65 + int(sys.argv[2])]) * 20_000)
"""


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(PARTIAL)]


def test_writers_at_once_never_show_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(target), str(k)]) for k in range(4)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if target.exists():
            content = target.read_bytes()
            seen.add((len(content), len(set(content))))
    assert [writer.wait() for writer in writers] == [0] * 4
    assert seen <= {(20_000, 1)}
    assert left(tmp_path) == []


def test_what_a_killed_writer_left_is_taken_away_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    hold = (
        "import sys, time; from pathlib import Path; from gemvg_edge.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as p: p.write_text('half'); print('there', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", hold, str(target)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "there\n"
    write_text(target, "mine")
    assert len(left(tmp_path)) == 1, "the other still writes"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    write_text(target, "mine again")
    assert left(tmp_path) == []
    assert target.read_text() == "mine again"


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_file_that_came_meanwhile_is_left_alone(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "out.txt"

    def write(meanwhile: str | None) -> None:
        with replacing(target, overwrite=False) as partial:
            partial.write_text("mine")
            if meanwhile:
                target.write_text(meanwhile)

    with pytest.raises(GemvgError, match="has come to be there meanwhile"):
        write("precious")
    assert target.read_text() == "precious"
    target.unlink()
    write(None)
    assert target.read_text() == "mine"
    assert left(tmp_path) == []


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o640])
def test_permissions_stay(mode: int, tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    target.chmod(mode)
    write_text(target, "new")
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_those_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "out.txt", "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.txt").stat().st_mode) == 0o640


def test_places_that_cannot_be_written_are_one_sentence(tmp_path: Path) -> None:
    for path, message in (
        (Path("/dev/null"), "^/dev/null cannot be written .it is a folder or a device.; give the name of a file$"),
        (tmp_path, "cannot be written .it is a folder"),
        (tmp_path / "a\0b", "cannot be written"),
        (tmp_path / "none" / "a.txt", "cannot be written .No such file or directory"),
    ):
        with pytest.raises(GemvgError, match=message):
            write_text(path, "x")
