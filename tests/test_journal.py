"""Results that are saved one by one: what a kill leaves, and what is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemvg_edge.errors import GemvgError
from train.journal import open_journal, read_journal

HEADER = {"format": "gemvg-edge-answers", "version": 1, "model": "a"}


def write(file: Path, *names: str, header: dict[str, object] = HEADER) -> list[str]:
    """Append a line a name; the ids that were there before."""
    with open_journal(file, header, "give another") as (done, append):
        for name in names:
            append({"id": name, "text": "\n\u2028 é"})
        return list(done)


def test_what_is_there_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.jsonl"
    assert write(file, "1", "2") == []
    assert write(file, "3") == ["1", "2"]
    header, lines = read_journal(file)
    assert header == HEADER
    assert [line["id"] for line in lines] == ["1", "2", "3"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_line_is_written_again(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "a.jsonl"
    write(file, "1", "2")
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert [line["id"] for line in read_journal(file)[1]] == ["1"]
    assert write(file, "2") == ["1"]
    assert file.read_bytes() == whole


def test_every_length_that_a_kill_may_leave(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write(file, "1")
    whole = file.read_bytes()
    for length in range(1, len(whole)):
        file.write_bytes(whole[:length])
        assert write(file, "1") == []
        assert file.read_bytes() == whole


@pytest.mark.parametrize("content", ["mine", '{"id": 1}\n{"id": 2}', '{"format": "coco"}\n', "\n" * 9000])
def test_somebody_elses_file_stays(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(GemvgError, match="holds no results of ours"):
        write(file, "1")
    assert file.read_text() == content


def test_other_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    write(file, "1")
    for header in ({**HEADER, "model": "b"}, {**HEADER, "think": True}):
        with pytest.raises(GemvgError, match=r"was made with .*, and this run has .*; give another"):
            write(file, "2", header=header)
    assert write(file) == ["1"]


def test_a_run_that_fails_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert write(file) == []
    assert file.read_bytes() == b""
    write(file, "1")
    before = file.read_bytes()
    with open_journal(file, {**HEADER, "model": "b"}, "", overwrite=True) as (done, append):
        assert (done, file.read_bytes()) == ({}, before)
        append({"id": "x"})
        assert [line["id"] for line in read_journal(file)[1]] == ["x"]
    assert read_journal(file)[0]["model"] == "b"
    # A header alone says nothing that another run would have to respect.
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    assert write(file, "2") == []
    assert read_journal(file)[0] == HEADER
    file.write_text("mine")
    with (
        pytest.raises(GemvgError, match="holds no results of ours"),
        open_journal(file, HEADER, "", overwrite=True),
    ):
        pass
    assert file.read_text() == "mine"


def test_two_writers_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with (
        open_journal(file, HEADER, ""),
        pytest.raises(GemvgError, match="is being written by another process"),
        open_journal(file, HEADER, ""),
    ):
        pass


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[1]", "line 2 is no JSON object"),
        ('{"id": "x", "a": NaN}', "NaN is no number"),
        ('{"text": 1}', "line 2 has no id"),
        ('{"id": "1"}\n{"id": "1"}', "line 3 has the id '1' of an earlier line"),
        ('{"id": "' + "9" * 2**24 + '"}', "line 2 is longer than 16 MB"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, fault: str) -> None:
    file = tmp_path / "a.jsonl"
    write(file, "0")
    file.write_text(file.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(GemvgError, match=fault):
        list(read_journal(file)[1])


def test_no_header_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(GemvgError, match="does not begin with the header"):
        read_journal(tmp_path / "empty.jsonl")
    with pytest.raises(GemvgError, match="no such file"):
        read_journal(tmp_path / "none.jsonl")
    with pytest.raises(GemvgError, match="is a folder"):
        write(tmp_path, "1")
