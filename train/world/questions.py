"""Questions about tabletop pictures, their true answers and true reasoning, in GeM-VG's kinds of task.

    referential   the red mug; everything that is blue; every bowl; each also "... in image 2", some without a target
    semantic      what both pictures (of two places) show; everything of the marked thing's kind, or of its colour
    spatial       the marked thing in the picture of another camera
    temporal      what moved, what is missing, what is new; the marked thing after the change
    reasoning     the third from the left; the leftmost red one; everything that is not red; what only image 2 shows
    understanding how many red objects image 2 shows: answered in words, without boxes

Knows scenes and boxes, neither pixels nor tokens. The wordings are ours, as is which task belongs to which kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from gemvg_edge.boxes import Box
from train.data.record import Kind
from train.world.picture_sets import PictureSet, Seen
from train.world.scenes import Thing
from train.world.things import COLOURS, HELD_OUT_NAMES, NAMES

PHRASES = {
    "object": ("the {colour} {name}", "every {colour} {name}", "find the {colour} {name}", "{colour} {name}"),
    "colour": ("everything that is {colour}", "every {colour} object", "all {colour} things"),
    "name": ("every {name}", "all {name}s", "find each {name}"),
    "shared": ("what both images show", "everything that is in both images", "the objects that both images have"),
    "kind": ("everything in image {j} of the same kind as {mark} in image {i}", "in image {j}, each object like {mark} "
             "in image {i}"),
    "same colour": ("everything in image {j} of the same colour as {mark} in image {i}",),
    "same": ("the same object as {mark} in image {i}", "find {mark} of image {i} in image {j}"),
    "moved": ("what moved", "the object that was moved", "everything that changed its place"),
    "missing": ("what is missing in image 2", "what was taken away", "everything that is gone in image 2"),
    "new": ("what is new in image 2", "what was added", "everything that came to image 2"),
    "track": ("where {mark} of image 1 is in image 2", "follow {mark} from image 1 to image 2"),
    "ordinal": ("the {ordinal} object from the {side} in image {i}",),
    "extreme": ("the {side}most {which} in image {i}",),
    "not": ("everything in image {i} that is not {colour}", "all but the {colour} things in image {i}"),
    "count": ("how many {colour} objects are in image {i}?", "how many things are {colour} in image {i}?"),
    "only": ("what only image {i} shows", "everything in image {i} that is not in image {j}"),
}  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth")
REFERENTIAL = {"object": 0.5, "colour": 0.25, "name": 0.25}
ONE_IMAGE_SHARE = 0.2
NO_TARGET_SHARE = 0.15
CLEAR_GAP = 0.04  # of the picture's width: nearer centres are not asked to be put in order


class Listing(NamedTuple):
    """What pictures show, in words, and the things in the order of the words."""

    text: str = ""
    seen: tuple[Seen, ...] = ()

    @property
    def places(self) -> list[int]:
        """Where in the text each thing's words begin."""
        places, at = [], max(0, self.text.find("Image-"))
        for seen in self.seen:
            places.append(self.text.index(seen.words, at))
            at = places[-1] + len(seen.words)
        return places


@dataclass(frozen=True)
class Question:
    """A question, the things that answer it, and reasoning that leads there; boxes in pixels of the set's pictures."""

    text: str
    targets: tuple[Seen, ...]
    kind: Kind
    task: str
    listing: Listing  # what the pictures show
    conclusion: str  # what answers, its boxes shown as a query shows one (gemvg_edge.marks)
    marked: Seen | None = None
    words: str = ""  # the answer, where it is no boxes

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The answer."""
        return tuple(sorted(seen.box for seen in self.targets))

    @property
    def thinking(self) -> str:
        """The whole reasoning."""
        return self.listing.text + self.conclusion


Task = Callable[[PictureSet, np.random.Generator], Question | None]


def ask(pictures: PictureSet, kind: Kind, rng: np.random.Generator) -> Question | None:
    """One random question of a kind, or None if these pictures do not allow any."""
    tasks: dict[Kind, list[Task]] = {
        "referential": [_referential],
        "semantic": [_shared, _kind, _same_colour, _only] if pictures.role == "relatives" else [],
        "spatial": [_same] if pictures.role in ("views", "cameras") else [],
        "temporal": [_moved, _missing, _new, _track] if pictures.role == "time" else [],
        "understanding": [_count],
        "reasoning": [_ordinal, _extreme, _not, *([_only] if pictures.role == "views" else [])],
    }
    allowed = tasks[kind]
    tries = (allowed[k](pictures, rng) for k in rng.permutation(len(allowed)))
    return next((question for question in tries if question), None)


def _referential(pictures: PictureSet, rng: np.random.Generator) -> Question:
    task = str(rng.choice(list(REFERENTIAL), p=list(REFERENTIAL.values())))
    name, colour = _subject(pictures, task, rng)
    text = str(rng.choice(PHRASES[task])).format(colour=colour, name=name)
    images = list(range(pictures.count))
    if pictures.count > 1 and rng.random() < ONE_IMAGE_SHARE:
        images = [int(rng.choice(images))]
        text += f" in image {images[0] + 1}"
    found = [seen for seen in pictures.seen if seen.image in images and _fits(task, seen.thing, name, colour)]
    return Question(
        text, tuple(found), "referential", task, _listing(pictures, images), _conclusion(pictures, "Found", found)
    )


def _subject(pictures: PictureSet, task: str, rng: np.random.Generator) -> tuple[str, str]:
    """(name, colour) to ask for: mostly something in the pictures, sometimes something that is not."""
    things = sorted({(seen.name, seen.colour) for seen in pictures.seen})
    near = things[rng.integers(len(things))]
    if rng.random() >= NO_TARGET_SHARE:
        return near

    def absent(name: str, colour: str) -> bool:
        return not any(_fits(task, thing, name, colour) for thing in things)

    if not any(absent(name, colour) for name in NAMES for colour in COLOURS):
        return near
    while True:
        name, colour = str(rng.choice(NAMES)), str(rng.choice(list(COLOURS)))
        if rng.random() < 0.7:  # a hard negative: half of it is there
            name, colour = (near[0], colour) if rng.random() < 0.5 else (name, near[1])
        if absent(name, colour):
            return name, colour


def _fits(task: str, thing: Thing, name: str, colour: str) -> bool:
    """Whether a thing (name, colour) answers a referential task about this name and colour."""
    return (task == "colour" or thing[0] == name) and (task == "name" or thing[1] == colour)


def _shared(pictures: PictureSet, rng: np.random.Generator) -> Question:
    kinds = [{seen.thing for seen in pictures.in_image(i)} for i in range(pictures.count)]
    both = set.intersection(*kinds)
    found = [seen for seen in pictures.seen if seen.thing in both]
    listing = _listing(pictures, range(pictures.count))
    return Question(
        _phrase("shared", rng), tuple(found), "semantic", "shared", listing, _conclusion(pictures, "Both", found)
    )


def _kind(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _like(pictures, rng, "kind")


def _same_colour(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _like(pictures, rng, "same colour")


def _like(pictures: PictureSet, rng: np.random.Generator, task: str) -> Question | None:
    """What in another picture has the marked thing's name, or its colour."""
    i, j = (int(k) for k in rng.permutation(pictures.count)[:2])
    candidates = pictures.in_image(i)

    def of(marked: Seen) -> list[Seen]:
        others = pictures.in_image(j)
        return [s for s in others if (s.name == marked.name if task == "kind" else s.colour == marked.colour)]

    some = [seen for seen in candidates if of(seen)]
    if some and rng.random() >= NO_TARGET_SHARE:  # left to chance most marks would have no counterpart
        candidates = some
    marked = _choose(candidates, rng)
    if marked is None:
        return None
    found = of(marked)
    listing = _listing(pictures, [j], marked)
    text = _phrase(task, rng, mark=pictures.mark(marked), i=i + 1, j=j + 1)
    return Question(text, tuple(found), "semantic", task, listing, _conclusion(pictures, "Alike", found), marked)


def _same(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    i, j = (int(k) for k in rng.permutation(pictures.count)[:2])
    return _elsewhere(pictures, rng, i, j, "spatial", "same")


def _track(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _elsewhere(pictures, rng, 0, 1, "temporal", "track")


def _elsewhere(
    pictures: PictureSet, rng: np.random.Generator, i: int, j: int, kind: Kind, task: str
) -> Question | None:
    """The very thing that is marked in picture i, in picture j."""
    marked = _choose(pictures.in_image(i), rng)
    if marked is None:
        return None
    found = [seen for seen in pictures.in_image(j) if seen.identity == marked.identity]
    listing = _listing(pictures, [j], marked)
    text = _phrase(task, rng, mark=pictures.mark(marked), i=i + 1, j=j + 1)
    return Question(text, tuple(found), kind, task, listing, _conclusion(pictures, "Same", found), marked)


def _moved(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _changed(pictures, rng, "moved", pictures.scene.moved)


def _missing(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _changed(pictures, rng, "missing", pictures.scene.removed)


def _new(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    return _changed(pictures, rng, "new", pictures.scene.added)


def _changed(pictures: PictureSet, rng: np.random.Generator, task: str, things: Sequence[int]) -> Question | None:
    scene, shown = pictures.scene, [{s.identity[1] for s in pictures.in_image(i)} for i in (0, 1)]
    if (shown[0] ^ shown[1]) - {*scene.removed, *scene.added}:
        return None  # something else is hidden in one of the pictures, and could as well have been taken away
    found = [seen for seen in pictures.seen if seen.identity[1] in things]
    if not found and rng.random() >= NO_TARGET_SHARE:
        return None  # left to chance most answers would be "None", and a model learns to say just that
    conclusion = _conclusion(pictures, task.capitalize(), found)
    return Question(_phrase(task, rng), tuple(found), "temporal", task, _listing(pictures, (0, 1)), conclusion)


def _ordinal(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(pictures.count))
    row = pictures.in_image(i)
    if len(row) < 2 or _too_close(pictures, i, row):
        return None
    nth = int(rng.integers(min(len(row), len(ORDINALS))))
    side = str(rng.choice(["left", "right"]))
    target = row[nth] if side == "left" else row[-1 - nth]
    text = _phrase("ordinal", rng, ordinal=ORDINALS[nth], side=side, i=i + 1)
    conclusion = _conclusion(pictures, ORDINALS[nth].capitalize(), [target])
    return Question(text, (target,), "reasoning", "ordinal", _listing(pictures, [i]), conclusion)


def _extreme(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(pictures.count))
    row = pictures.in_image(i)
    alike = [[s for s in row if s.colour == seen.colour] for seen in row]
    alike += [[s for s in row if s.name == seen.name] for seen in row]
    alike = [group for group in alike if len(group) > 1 and not _too_close(pictures, i, group)]
    if not alike:
        return None
    group = alike[rng.integers(len(alike))]
    which = group[0].name if all(s.name == group[0].name for s in group) else f"{group[0].colour} object"
    side = str(rng.choice(["left", "right"]))
    target = group[0] if side == "left" else group[-1]
    text = _phrase("extreme", rng, side=side, which=which, i=i + 1)
    conclusion = _conclusion(pictures, side.capitalize(), [target])
    return Question(text, (target,), "reasoning", "extreme", _listing(pictures, [i]), conclusion)


def _not(pictures: PictureSet, rng: np.random.Generator) -> Question | None:
    i = int(rng.integers(pictures.count))
    row = pictures.in_image(i)
    if not row:
        return None
    colour = row[rng.integers(len(row))].colour
    found = [seen for seen in row if seen.colour != colour]
    text = _phrase("not", rng, colour=colour, i=i + 1)
    return Question(
        text, tuple(found), "reasoning", "not", _listing(pictures, [i]), _conclusion(pictures, "Others", found)
    )


def _count(pictures: PictureSet, rng: np.random.Generator) -> Question:
    i, colour = int(rng.integers(pictures.count)), str(rng.choice(list(COLOURS)))
    if rng.random() < 0.7:
        colour = pictures.seen[rng.integers(len(pictures.seen))].colour
    number = sum(seen.colour == colour for seen in pictures.in_image(i))
    text = _phrase("count", rng, colour=colour, i=i + 1)
    return Question(text, (), "understanding", "count", Listing(), "", words=str(number))


def _only(pictures: PictureSet, rng: np.random.Generator) -> Question:
    """What one of two pictures shows and the other does not: of one place the very things, of two their kinds."""
    i, j = (int(k) for k in rng.permutation(2))
    views = pictures.role == "views"
    there = {seen.identity if views else seen.thing for seen in pictures.in_image(j)}
    found = [seen for seen in pictures.in_image(i) if (seen.identity if views else seen.thing) not in there]
    text = _phrase("only", rng, i=i + 1, j=j + 1)
    kind: Kind = "reasoning" if views else "semantic"
    return Question(text, tuple(found), kind, "only", _listing(pictures, (0, 1)), _conclusion(pictures, "Only", found))


def _phrase(task: str, rng: np.random.Generator, **words: object) -> str:
    return str(rng.choice(PHRASES[task])).format(**words)


def _choose(candidates: Sequence[Seen], rng: np.random.Generator) -> Seen | None:
    return candidates[int(rng.integers(len(candidates)))] if candidates else None


def _too_close(pictures: PictureSet, i: int, row: Sequence[Seen]) -> bool:
    """Whether two neighbours of a row (from left to right) are hard to put in order."""
    centres = [(seen.box.x1 + seen.box.x2) / 2 for seen in row]
    gap = CLEAR_GAP * pictures.sizes[i][0]
    return any(right - left < gap for left, right in pairwise(centres))


def _listing(pictures: PictureSet, images: Sequence[int], marked: Seen | None = None) -> Listing:
    """`Image-1: red mug, blue ball. ` from left to right, of each picture; before it what the question marks."""
    text = f"Marked: {marked.words}. " if marked else ""
    for i in images:
        words = ", ".join(seen.words for seen in pictures.in_image(i))
        text += f"Image-{i + 1}: {words or 'nothing'}. "
    return Listing(text, tuple(seen for i in images for seen in pictures.in_image(i)))


def _conclusion(pictures: PictureSet, label: str, found: Sequence[Seen]) -> str:
    """`Missing: Image-1 (a box) red mug, (a box) blue ball; Image-2 (a box) red mug.`, in the order of the answer.

    A box comes before its name: pointing at what answers is learned sooner than naming it, and the name can then be
    read off the place.
    """
    parts = []
    for image, things in groupby(sorted(found, key=lambda seen: seen.box), key=lambda seen: seen.image):
        shown = ", ".join(f"{pictures.mark(seen)} {seen.words}" for seen in things)
        parts.append(f"Image-{image + 1} {shown}")
    return f"{label}: {'; '.join(parts) or 'nothing'}."


def corpus() -> list[str]:
    """Texts that hold every word of questions and reasoning, for training a tokenizer."""
    words = {"mark": "it", "ordinal": "first", "side": "left", "i": "1", "j": "2", "which": "mug"}
    texts = []
    for phrases in PHRASES.values():
        for phrase in phrases:
            texts += [
                phrase.format(name=name, colour=colour, **words)
                for name in (*NAMES, *HELD_OUT_NAMES)
                for colour in COLOURS
            ]
    for ordinal in ORDINALS:
        texts += [f"the {ordinal} object from the {side} in image 1" for side in ("left", "right")] * 20
    texts += [f"the {side}most {colour} object in image 1" for side in ("left", "right") for colour in COLOURS]
    things = [f"{colour} {name}, {colour} {name}. " for name in (*NAMES, *HELD_OUT_NAMES) for colour in COLOURS]
    labels = ["Found", "Both", "Alike", "Same", "Moved", "Missing", "New", "Others", "Only", "Left", "Right", "Marked"]
    labels += [ordinal.capitalize() for ordinal in ORDINALS]
    ends = [f"{label}: {thing}" for label in labels for thing in (*things[::9], *["nothing. "] * 3)]
    texts += [f"how many {colour} objects are in image 1?" for colour in COLOURS]
    return texts + [f"Image-{n}: {thing}" for thing in things for n in (1, 2)] + ends
