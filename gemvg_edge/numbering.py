"""How texts name a picture: "Image-2" (ours, MGrounding-630k), "third image" (Migician), "2th image" (MIG-Bench).

Numbers count from 1 in a text and from 0 in the program. Knows no boxes.
"""

from __future__ import annotations

import re

MOST = 100  # a larger number is a year, or a name: "photo 2024"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# Nine digits are past every frame already, and int() refuses what a model that repeats itself may write (over 4,300).
NUMBER = r"\d{1,9}"
NAMED = (
    rf"image[-\s](?P<number>{NUMBER})|(?P<nth>{NUMBER})(?:st|nd|rd|th) image|(?P<ordinal>{'|'.join(ORDINALS)}) image"
)
# People name them in more ways than models do. "The source image" is MIG-Bench's word for the first. What stands
# beside a box that the query shows says where that box lies, not where to look.
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_KIND = r"(?:image|picture|photo)"
_IN_QUERY = re.compile(
    r"(?P<shown><\|box_end\|>\)?\s*(?:in|of|from|on)\s+(?:the\s+)?)?\b(?:"
    rf"{_KIND}(?:\s*[-#]\s*|\s+|\s+number\s+|)(?P<number>{NUMBER})"
    rf"|{_KIND}\s+(?P<word>{'|'.join(_WORDS)})"
    rf"|(?P<nth>{NUMBER})(?:st|nd|rd|th)\s+{_KIND}"
    rf"|(?P<ordinal>{'|'.join(ORDINALS)})\s+{_KIND}"
    rf"|(?P<source>source)\s+{_KIND})\b",
    re.IGNORECASE | re.ASCII,
)


def number_of(found: re.Match[str]) -> int:
    """The 0-based picture that a match of NAMED names."""
    if found["ordinal"]:
        return ORDINALS.index(found["ordinal"].lower())
    return int(found["number"] or found["nth"]) - 1


def pictures_in_query(query: str) -> list[int]:
    """The pictures (from 0) that a query names to look in, each once, the one named last at the end.

    A picture that is named only as the place of a box that the query shows does not count.
    """
    found = [_named_by(match) for match in _IN_QUERY.finditer(query) if match["shown"] is None]
    return list(dict.fromkeys(image for image in reversed(found) if image < MOST))[::-1]


def _named_by(found: re.Match[str]) -> int:
    if found["source"]:
        return 0
    return _WORDS.index(found["word"].lower()) if found["word"] else number_of(found)
