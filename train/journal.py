"""Results that are saved one by one as they come: JSON Lines whose first line says what they were made with.

    {"format": "gemvg-edge-answers", "version": 1, "model": ..}
    {"id": "region/17", ..}

A kill loses the result in the making and no other; the next run finds the rest and goes on. Knows no result's meaning.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, is_folder, printable, unreadable, unwritable
from gemvg_edge.json_object import parse_json, short
from train.data.record import LONGEST_LINE, read_lines

Line = dict[str, Any]
_BEGIN = b'{"format": "gemvg-edge-'  # of every header, as it is written


@contextmanager
def open_journal(
    file: Path, header: Mapping[str, Any], fix: str, *, overwrite: bool = False, told: Container[str] = ()
) -> Iterator[tuple[dict[str, Line], Callable[[Line], None]]]:
    """The results that a file has by their `id`, and a function that appends one.

    The header is written with the first result, and only then does `overwrite` empty a file, so that a run that fails
    before it changes nothing. Fields of `told` may differ from an earlier run's. GemvgError where the file holds
    something else, or results of another header (`fix` says what to do then), and while another process writes it.
    """
    if is_folder(file):
        raise GemvgError(f"{printable(file)} is a folder; give the name of a .jsonl")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(file, "a+b", buffering=0)  # noqa: SIM115  (closed below)
    except (OSError, ValueError) as error:
        raise unwritable(file, error) from None
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise GemvgError(f"{printable(file)} is being written by another process; wait for it or stop it") from None
        done: dict[str, Line] = {}
        if _mend(file, stream) and not overwrite:
            there, lines = read_journal(file)
            done = {line["id"]: line for line in lines}
            keys = [key for key in {**there, **header} if key not in told]
            differing = [key for key in keys if there.get(key) != header.get(key)]
            if done and differing:
                raise GemvgError(
                    f"{printable(file)} was made with {differing[0]} {short(there.get(differing[0]))}, and this run "
                    f"has {short(header.get(differing[0]))}; {fix}"
                )
        begun = bool(done)

        def append(line: Line) -> None:
            nonlocal begun
            if not begun:
                os.ftruncate(stream.fileno(), 0)
                _append(file, stream, header)
                begun = True
            _append(file, stream, line)

        yield done, append
    finally:
        stream.close()  # an empty file stays: taking it away could take another run's


def read_journal(file: Path) -> tuple[Line, Iterator[Line]]:
    """The header and the results, one at a time; a torn last line is left out. GemvgError names a line that is none."""
    if not is_file(file):
        raise GemvgError(f"{printable(file)}: no such file")
    lines = read_lines(file)
    first = next(lines, None)
    header = _parse(file, *first) if first else {}
    if not isinstance(header.get("format"), str):
        raise GemvgError(f"{printable(file)} does not begin with the header of a file of results")
    return header, _results(file, lines)


def _results(file: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[Line]:
    seen: set[str] = set()
    for number, line in lines:
        if not line.endswith(b"\n") and len(line) <= LONGEST_LINE:
            return  # what a kill, or a writer that is at it, left unfinished
        result = _parse(file, number, line)
        if not isinstance(name := result.get("id"), str) or name in seen:
            fault = "has no id" if not isinstance(name, str) else f"has the id {short(name)} of an earlier line"
            raise GemvgError(f"{printable(file)}, line {number} {fault}; take the line out")
        seen.add(name)
        yield result


def _parse(file: Path, number: int, line: bytes) -> Line:
    fault = f"is longer than {LONGEST_LINE >> 20} MB"
    if len(line) <= LONGEST_LINE:
        fault = "is no JSON object"
        try:
            content = parse_json(line.decode("utf-8"))
            if isinstance(content, dict):
                return content
        except ValueError as error:
            fault = f"is no JSON object ({error})"
    raise GemvgError(f"{printable(file)}, line {number} {fault}; take the line out, or make the file again")


def _mend(file: Path, stream: IO[bytes]) -> bool:
    """Cut off a last line that was not finished; whether anything is left. GemvgError for a file that is not ours."""
    try:
        size = end = os.fstat(stream.fileno()).st_size
        begin = os.pread(stream.fileno(), len(_BEGIN), 0)
        if begin != _BEGIN[:size]:
            raise GemvgError(f"{printable(file)} exists and holds no results of ours; give another place to write to")
        while end:
            start = max(0, end - 4096)
            at = os.pread(stream.fileno(), end - start, start).rfind(b"\n")
            end = start + at + 1
            if at >= 0:
                break
        if end < size:
            os.ftruncate(stream.fileno(), end)
        return end > 0
    except OSError as error:
        raise unreadable(file, error) from None


def _append(file: Path, stream: IO[bytes], line: Mapping[str, Any]) -> None:
    """One line in one write, so that a kill leaves whole lines before it."""
    text = memoryview((json.dumps(line, allow_nan=False) + "\n").encode())
    try:
        while text:
            text = text[stream.write(text) :]
    except OSError as error:
        raise unwritable(file, error) from None
