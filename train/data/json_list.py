"""The items of a list in JSON, one at a time: an instruction set has gigabytes, and one of its items a few kilobytes.

As strict about each item as `parse_json`, of strangers' files too. Knows no data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, unreadable
from gemvg_edge.json_object import parse_json
from train.data.record import LONGEST_LINE

STEP = 2**20  # characters that are read at a time
AFTER = tuple(", ]\t\r\n")  # what may follow an item; 1 is the half of 1.5
_NOT_SPACE = re.compile(r"[^ \t\r\n]")


def stream_files(files: Sequence[Path], layout: str) -> Iterator[tuple[Any, str]]:
    """Each item of several such files, and where it stands."""
    for file in files:
        for number, item in enumerate(stream_json(file, layout)):
            yield item, f"{file}, item {number}"


def stream_json(path: Path, layout: str) -> Iterator[Any]:
    """The items of the list that a JSON file holds, one at a time: a file of gigabytes takes its largest item's memory.

    GemvgError, once the items before are given, where the file is cut short or is no JSON from there on.
    """
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: no such file; {layout}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _stream_items(file)
    except GemvgError:
        raise
    except ValueError as error:
        raise GemvgError(f"{printable(path)} is not JSON that holds a list ({error}); download it again") from None
    except RecursionError:
        raise GemvgError(
            f"{printable(path)} is not JSON that holds a list (it is nested too deeply); download it again"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _stream_items(file: TextIO) -> Iterator[Any]:
    """The items of the list that a text is; ValueError where it is none."""
    find_end, text, at = json.JSONDecoder().raw_decode, "", 0

    def next_mark(at: int) -> tuple[str, int]:
        """The first character from `at` on that is no space, none at the file's end, and its place in `text`."""
        nonlocal text
        while True:
            found = _NOT_SPACE.search(text, at)
            if found:
                return found[0], found.start()
            text, at = file.read(STEP), 0
            if not text:
                return "", 0

    mark, at = next_mark(at)
    if mark != "[":
        raise ValueError("it does not begin with [")
    mark, at = next_mark(at + 1)
    while mark != "]":
        while True:  # an item may go on past what is read, and a number that ends there may be the half of one
            try:
                _, end = find_end(text, at)
                if text[end : end + 1] in AFTER:
                    break
                complaint = ValueError("it ends within the list")
            except ValueError as error:
                complaint = error
            if len(text) - at > LONGEST_LINE:
                raise ValueError(f"an item of more than {LONGEST_LINE >> 20} MB, or no item")
            if not (more := file.read(STEP)):
                raise complaint
            text, at = text[at:] + more, 0
        yield parse_json(text[at:end])
        mark, at = next_mark(end)
        if mark == ",":
            mark, at = next_mark(at + 1)
            if mark == "]":
                raise ValueError("a comma after the last item")
        elif mark != "]":
            raise ValueError("no comma after an item")
    if next_mark(at + 1)[0]:
        raise ValueError("something follows the list")
