"""Rendered scenes -> training samples and evaluation questions: which pictures, which questions, mirrored or not.

A run is one list of draws, and draw k is fixed by (seed, k): the same pictures and questions come whether or not the
run was interrupted. Held-out questions are fixed by their scene's seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from gemvg_edge.answer import AnswerFormat, write_answer
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import load_image
from gemvg_edge.marks import localise
from train.collate import Sample, Turn
from train.data.record import Kind, Record
from train.world.dense_head import ELSEWHERE, LEFT, NOWHERE, STAYED, UNNAMED, Fate, SeenObject, Truth
from train.world.exposure import expose
from train.world.picture_sets import ROLES, PictureSet, Role, Seen, choose_pictures, mirror, relative
from train.world.questions import Question, ask
from train.world.scenes import FURNISHED_SEED, MORE_CAMERAS_SEED, Corners, Scene, View
from train.world.things import COLOURS, HELD_OUT_NAMES, NAMES

TRIES = 1000  # questions that are drawn in vain before the search ends
ROLE_SHARES: dict[Role, float] = {"single": 0.05, "views": 0.25, "time": 0.33, "relatives": 0.27, "cameras": 0.1}
# Of each role's questions; what a role does not allow falls to referential ones, which are learned first.
KIND_SHARES: dict[Role, dict[Kind, float]] = {
    "single": {"referential": 0.5, "reasoning": 0.45, "understanding": 0.05},
    "views": {"referential": 0.15, "spatial": 0.45, "reasoning": 0.35, "understanding": 0.05},
    "time": {"referential": 0.1, "temporal": 0.75, "reasoning": 0.1, "understanding": 0.05},
    "relatives": {"referential": 0.1, "semantic": 0.75, "reasoning": 0.1, "understanding": 0.05},
    "cameras": {"referential": 0.3, "spatial": 0.35, "reasoning": 0.3, "understanding": 0.05},
}
KIND_ROLES: dict[Kind, tuple[Role, ...]] = {
    "referential": ("views", "time", "relatives"),
    "semantic": ("relatives",),
    "spatial": ("views",),
    "temporal": ("time",),
    "reasoning": ("views", "time", "relatives"),
}
# Held-out scenes of four cameras are asked about three or four pictures.
CAMERAS_ROLES: dict[Kind, tuple[Role, ...]] = dict.fromkeys(("referential", "spatial", "reasoning"), ("cameras",))
SEEN_NAMES = {name: k for k, name in enumerate((*NAMES, *HELD_OUT_NAMES))}
SEEN_COLOURS = {colour: k for k, colour in enumerate(COLOURS)}


@dataclass(frozen=True)
class WorldSample(Sample):
    """A sample that also knows all that its pictures show, for the dense head."""

    seen: tuple[tuple[SeenObject, ...], ...]
    truths: tuple[Truth, ...]  # of each question
    fates: tuple[Fate, ...]  # of places of the second picture, against the first


def draw_sample(
    scenes: Mapping[int, Scene],
    folder: Path,
    questions: int,
    cot_share: float,
    answer_format: AnswerFormat,
    rng: np.random.Generator,
    brief_share: float = 0.0,
    one_picture: bool = False,
) -> WorldSample:
    """One set of pictures with several questions, `cot_share` of which ask for reasoning; `brief_share` of that is the
    conclusion alone. With `one_picture` there is one, asked about by names and colours.
    """
    seeds = list(scenes)
    scene = scenes[seeds[rng.integers(len(seeds))]]
    role = ROLES[rng.choice(len(ROLES), p=[ROLE_SHARES[role] for role in ROLES])]
    partner = relative(scene, scenes)
    if one_picture:
        role = "single"
    if (role == "relatives" and partner is None) or (role == "cameras" and not scene.has_more_cameras):
        role = "views"
    pictures = choose_pictures(scene, partner, role, rng)
    if rng.random() < 0.5:
        pictures = mirror(pictures)
    shares: dict[Kind, float] = {"referential": 1.0} if one_picture else KIND_SHARES[role]
    asked: list[Question] = []
    for tries in count():
        if len(asked) == questions:
            break
        if tries > TRIES + 10 * questions:
            raise GemvgError(f"scene {scene.seed} in {folder} shows too little to ask about; render the folder again")
        kind = list(shares)[rng.choice(len(shares), p=list(shares.values()))]
        question = ask(pictures, kind, rng) or ask(pictures, "referential", rng)
        if question is not None and all(question.text != other.text for other in asked[-3:]):
            asked.append(question)
    turns, truths = [], []
    order = {seen: k for k, seen in enumerate(pictures.seen)}
    for question in asked:
        thinking = question.thinking if question.thinking and rng.random() < cot_share else None
        brief = bool(thinking and brief_share and rng.random() < brief_share)
        turns.append(_turn(pictures, question, question.conclusion if brief else thinking, answer_format))
        names: tuple[tuple[int, int], ...] = ()
        if thinking and not brief:
            first = turns[-1].answer.index(question.listing.text)
            listing = zip(question.listing.places, question.listing.seen, strict=True)
            names = tuple((first + place, order[seen]) for place, seen in listing)
        wanted = tuple(order[seen] for seen in sorted(question.targets, key=lambda seen: seen.box))
        truths.append(Truth(wanted, (order[question.marked],) if question.marked else (), names))
    images = [expose(image, rng) for image in open_pictures(pictures, folder)]
    return WorldSample(images, turns, _seen_objects(pictures), tuple(truths), _fates(pictures))


def _turn(pictures: PictureSet, question: Question, thinking: str | None, answer_format: AnswerFormat) -> Turn:
    """A question with its answer, reasoned or not."""
    said = localise(thinking, answer_format) if thinking else None
    answer = question.words or write_answer(question.boxes, pictures.sizes, answer_format, said)
    return Turn(question.text, answer, thinking is not None)


def open_pictures(pictures: PictureSet, folder: Path) -> list[Image.Image]:
    """The set's pictures, mirrored if the set is."""
    images = [_open_view(view, folder) for view in pictures.views]
    return [ImageOps.mirror(image) for image in images] if pictures.mirrored else images


def _open_view(view: View, folder: Path) -> Image.Image:
    image = load_image(folder / view.file)
    if image.size != view.size:
        raise GemvgError(f"{folder / view.file} is not the picture that its scene describes; render the folder again")
    return image


def held_out_question(scene: Scene, partner: Scene | None, kind: Kind) -> tuple[PictureSet, Question] | None:
    """The question of a kind that evaluation asks of a held-out scene: fixed by the scene's seed."""
    rng = np.random.default_rng([scene.seed, 3])
    tries = (ask_about(scene, partner, kind, rng) for _ in range(20))
    return next((asked for asked in tries if asked), None)


def draw_question(
    scenes: Mapping[int, Scene], folder: Path, kind: Kind, rng: np.random.Generator
) -> tuple[PictureSet, Question]:
    """A question of a kind about a random scene; GemvgError where there are too few scenes for one."""
    seeds = list(scenes)
    for _ in range(TRIES):
        scene = scenes[seeds[rng.integers(len(seeds))]]
        if asked := ask_about(scene, relative(scene, scenes), kind, rng):
            return asked
    raise GemvgError(f"the scenes in {folder} give no {kind} question; render more of them")


def roles_of(scene: Scene) -> dict[Kind, tuple[Role, ...]]:
    """The sets of pictures that a scene is asked about when it is not trained on, by kind of question."""
    return CAMERAS_ROLES if MORE_CAMERAS_SEED <= scene.seed < FURNISHED_SEED else KIND_ROLES


def ask_about(
    scene: Scene, partner: Scene | None, kind: Kind, rng: np.random.Generator
) -> tuple[PictureSet, Question] | None:
    """Random pictures around a scene and a question of a kind, or None if the dice chose pictures without one."""
    roles = roles_of(scene).get(kind, ())
    if not roles:
        return None
    role = roles[rng.integers(len(roles))]
    if role == "relatives" and partner is None:
        return None
    pictures = choose_pictures(scene, partner, role, rng)
    question = ask(pictures, kind, rng)
    return (pictures, question) if question else None


def held_out_questions(scenes: Sequence[Scene]) -> list[tuple[PictureSet, Question]]:
    """One question a scene, kinds in turn; scenes that do not allow theirs are left out."""
    by_seed = {scene.seed: scene for scene in scenes}
    kinds = [list(roles_of(scene)) for scene in scenes]
    asked = (held_out_question(s, relative(s, by_seed), kinds[k][k % len(kinds[k])]) for k, s in enumerate(scenes))
    return [question for question in asked if question is not None]


def as_record(
    pictures: PictureSet, question: Question, folder: Path, source: str, cot: bool = False, brief: bool = False
) -> Record:
    """A question about a set that is not mirrored, as a record; `brief` reasoning is the conclusion alone."""
    thinking = question.conclusion if brief else question.thinking
    return Record(
        images=tuple(folder / view.file for view in pictures.views),
        sizes=tuple(pictures.sizes),
        query=question.text,
        boxes=question.boxes,
        kind=question.kind,
        source=f"{source}:{question.task}",
        mode="cot" if cot else "direct",
        thinking=thinking if cot else "",
        words=question.words,
    )


def _fates(pictures: PictureSet) -> tuple[Fate, ...]:
    """What each thing of the second picture has to do with the first, and from which places of it things left.

    Of one place a thing is looked for itself, of two places its like.
    """
    if pictures.count != 2:
        return ()
    by_thing, one_camera, scene = pictures.role == "relatives", pictures.one_camera, pictures.scene
    before, after = pictures.in_image(0), pictures.in_image(1)
    fates = []
    for seen in before:
        if one_camera and seen.identity[1] in (*scene.moved, *scene.removed):
            box = _shares(seen.box, pictures.sizes[0])
            fates.append(Fate(LEFT, box, (box,), one_camera))
    for seen in after:
        alike = [o for o in before if (o.thing == seen.thing if by_thing else o.identity == seen.identity)]
        firsts = tuple(_shares(other.box, pictures.sizes[0]) for other in alike)
        stayed = one_camera and seen.identity[1] not in scene.moved
        fate = NOWHERE if not alike else STAYED if stayed else ELSEWHERE
        fates.append(Fate(fate, _shares(seen.box, pictures.sizes[1]), firsts, one_camera))
    return tuple(fates)


def _seen_objects(pictures: PictureSet) -> tuple[tuple[SeenObject, ...], ...]:
    def told(seen: Seen) -> SeenObject:
        shares = _shares(seen.box, pictures.sizes[seen.image])
        return SeenObject(SEEN_NAMES.get(seen.name, UNNAMED), SEEN_COLOURS[seen.colour], shares)

    return tuple(tuple(told(seen) for seen in pictures.in_image(image)) for image in range(pictures.count))


def _shares(box: Box, size: tuple[int, int]) -> Corners:
    """A box as shares 0..1 of a picture of (width, height)."""
    width, height = size
    return box.x1 / width, box.y1 / height, box.x2 / width, box.y2 / height
