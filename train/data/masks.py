"""COCO's run-length masks -> boxes, without drawing the mask.

Runs of background and object take turns, down the columns, background first. Compressed, each run is a signed number
in characters of 5 bits (from "0" on, a sixth bit says that more follow), from the fourth run on as the difference to
the run two before. Format: cocodataset/cocoapi, common/maskApi.c. Ego-Exo4D packs that string once more, with lz-string
(github.com/pieroxy/lz-string) for web addresses: LZ78 whose codes grow by a bit as the dictionary fills.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-$"  # 6 bits each
_NEW_8, _NEW_16, _END = 0, 1, 2  # codes that are not in the dictionary
MOST = 2**24  # characters that a packed text may hold: it can stand for the square of its length
Corners = tuple[float, float, float, float]


def read_runs(text: str) -> list[int]:
    """The runs that a compressed string holds; ValueError if it is cut short."""
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is not in a compressed mask")
        value |= (bits & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("a run in a compressed mask is past every picture")
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("a compressed mask was cut short")
    return runs


def mask_box(counts: str | Sequence[int], height: int, width: int) -> Corners | None:
    """The box (x1, y1, x2, y2) around a mask of (height, width) pixels, None around an empty one."""
    listed = read_runs(counts) if isinstance(counts, str) else counts
    most = height * width
    # Each by itself first: a sum of larger ones may come round to the right one.
    if not isinstance(listed, list) or not all(type(run) is int and 0 <= run <= most for run in listed):
        raise ValueError("the runs of a mask are not whole numbers of its pixels")
    runs: npt.NDArray[np.int64] = np.asarray(listed, np.int64)
    if sum(listed) != most:
        raise ValueError(f"the runs of a mask do not fill {height} x {width} pixels")
    ends = np.cumsum(runs)[1::2]
    starts = ends - runs[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        return None
    first, last = starts // height, (ends - 1) // height
    # A run that goes on in the next column touches the top and the bottom.
    tops, bottoms = np.where(first < last, 0, starts % height), np.where(first < last, height, (ends - 1) % height + 1)
    return float(first.min()), float(tops.min()), float(last.max() + 1), float(bottoms.max())


def unpack(text: str) -> str:
    """A string packed by lz-string's compressToEncodedURIComponent; ValueError if it is not one."""
    bits = "".join(f"{_LETTERS.index(letter):06b}" for letter in text)
    at = 0

    def read(count: int) -> int:
        """The next bits, the lowest first."""
        nonlocal at
        at += count
        if at > len(bits):
            raise ValueError("a packed text was cut short")
        return int(bits[at - count : at][::-1], 2)

    words: list[str] = ["", "", ""]
    length = 0
    width, room = 2, 1  # of codes, and new words until they grow by a bit
    pieces: list[str] = []
    while (code := read(width)) != _END:
        if code in (_NEW_8, _NEW_16):
            words.append(chr(read(8 if code == _NEW_8 else 16)))
            code = len(words) - 1
            room -= 1
            if room == 0:
                room, width = 2**width, width + 1
        if code > len(words) or (code == len(words) and not pieces):
            raise ValueError("a packed text names a word that it has not")
        entry = words[code] if code < len(words) else pieces[-1] + pieces[-1][0]
        if pieces:
            words.append(pieces[-1] + entry[0])
            room -= 1
            if room == 0:
                room, width = 2**width, width + 1
        pieces.append(entry)
        if (length := length + len(entry)) > MOST:
            raise ValueError("a packed text is longer than any mask")
    return "".join(pieces)
