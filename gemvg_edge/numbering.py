"""How texts name a picture: "Image-2" (ours, MGrounding-630k), "third image" (Migician), "2th image" (MIG-Bench).

Numbers count from 1 in a text and from 0 in the program. Knows no boxes.
"""

from __future__ import annotations

import re

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# Nine digits are past every frame already, and int() refuses what a model that repeats itself may write (over 4,300).
NUMBER = r"\d{1,9}"
NAMED = (
    rf"image[-\s](?P<number>{NUMBER})|(?P<nth>{NUMBER})(?:st|nd|rd|th) image|(?P<ordinal>{'|'.join(ORDINALS)}) image"
)
# "The source image" is MIG-Bench's word for the first. What stands beside a box that the query shows says where that
# box lies, not where to look.
_IN_QUERY = re.compile(
    rf"(?P<shown><\|box_end\|>\)?\s*(?:in|of|from)\s+(?:the\s+)?)?(?:\b(?:{NAMED})\b|(?P<source>\bsource image\b))",
    re.IGNORECASE | re.ASCII,
)


def number_of(found: re.Match[str]) -> int:
    """The 0-based picture that a match of NAMED names."""
    if found["ordinal"]:
        return ORDINALS.index(found["ordinal"].lower())
    return int(found["number"] or found["nth"]) - 1


def pictures_in_query(query: str, count: int) -> list[int]:
    """The pictures (0-based, of `count`) that a query names to look in, in its order, each once, the last one last.

    A picture that is named only as the place of a box that the query shows does not count.
    """
    found = [
        0 if match["source"] else number_of(match) for match in _IN_QUERY.finditer(query) if match["shown"] is None
    ]
    inside = [image for image in found if 0 <= image < count]
    return list(dict.fromkeys(reversed(inside)))[::-1]
