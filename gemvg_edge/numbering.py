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
# People name a picture in more ways than models do: "in the second photo", "of picture 3". "The source image" is
# MIG-Bench's word for the first. Without such a word before it a picture is a thing to find: "the third picture here".
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_KIND = r"(?:image|picture|photo)"
_BEFORE = r"(?P<box><\|box_end\|>\)?\s*)?\b(?:in|of|from|on|within|inside)\s+(?:the\s+)?"
# Measures, ranges and what is made of pictures: "photo 3 by 4", "the first picture frame".
_NO_PLACE = r"(?!\s*[-:x/]\s*\w|\s+(?:by|x|cm|mm|inch(?:es)?|frames?|albums?|books?|viewers?|stabili[sz]ers?)\b)"
_IN_QUERY = re.compile(
    rf"{_BEFORE}(?:"
    rf"{_KIND}(?:\s*[-#]\s*|\s+|\s+number\s+|)(?P<number>{NUMBER})"
    rf"|{_KIND}\s+(?P<word>{'|'.join(_WORDS)})"
    rf"|(?P<nth>{NUMBER})(?:st|nd|rd|th)\s+{_KIND}"
    rf"|(?P<ordinal>{'|'.join(ORDINALS)})\s+{_KIND}"
    rf"|(?P<source>source)\s+{_KIND})\b{_NO_PLACE}(?P<after>[\s,(:]*<\|box_start\|>)?",
    re.IGNORECASE | re.ASCII,
)
# "image 1 and 2", "the first image or the third": no one picture is meant.
_SEVERAL = re.compile(
    rf"\b(?:{_KIND}\s*(?:[-#]\s*)?{NUMBER}|(?:{'|'.join(ORDINALS)}|{NUMBER}(?:st|nd|rd|th))(?:\s+{_KIND})?)"
    rf"\s*(?:,|(?:,\s*)?(?:and|or|&)\s+(?:(?:in|of|from|on)\s+)?)\s*(?:the\s+)?"
    rf"(?:{_KIND}\s*(?:[-#]\s*)?{NUMBER}|{NUMBER}\b|(?:{'|'.join(ORDINALS)}|{NUMBER}(?:st|nd|rd|th))\s+{_KIND})",
    re.IGNORECASE | re.ASCII,
)
_QUOTED = re.compile('"[^"]*"|\u201c[^\u201c\u201d]*\u201d')


def number_of(found: re.Match[str]) -> int:
    """The 0-based picture that a match of NAMED names."""
    if found["ordinal"]:
        return ORDINALS.index(found["ordinal"].lower())
    return int(found["number"] or found["nth"]) - 1


def pictures_in_query(query: str) -> list[int]:
    """The pictures (from 0) that a query names to look in, each once, the one named last at the end.

    None where it names several together, and none of those that are only the place of a box that the query shows.
    """
    said = _QUOTED.sub(" ", query)
    if _SEVERAL.search(said):
        return []
    found = [_named_by(match) for match in _IN_QUERY.finditer(said) if not match["box"] and not match["after"]]
    return list(dict.fromkeys(image for image in reversed(found) if image < MOST))[::-1]


def _named_by(found: re.Match[str]) -> int:
    if found["source"]:
        return 0
    return _WORDS.index(found["word"].lower()) if found["word"] else number_of(found)
