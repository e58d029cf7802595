"""Questions of the simulated world: each answer is worked out again from the scene's raw boxes, by other code."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gemvg_edge.answer import AnswerFormat, read_answer
from gemvg_edge.boxes import RELATIVE_STEPS, Box, from_steps
from train.data.record import check
from train.world import questions
from train.world.dense_head import LEFT, NOWHERE
from train.world.picture_sets import ROLES, PictureSet, choose_pictures, mirror
from train.world.questions import PHRASES, Question, ask, corpus
from train.world.render import render
from train.world.samples import (
    KIND_ROLES,
    KIND_SHARES,
    ROLE_SHARES,
    as_record,
    draw_sample,
    held_out_question,
    held_out_questions,
)
from train.world.scenes import Scene, read_scenes
from train.world.things import COLOURS, NAMES

LOCATIONS = AnswerFormat("locations", 129)
Asked = list[tuple[PictureSet, Question]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render(folder, first_seed=8_000, scenes=40, size=96, processes=2)
    return folder


@pytest.fixture(scope="module")
def scenes(folder: Path) -> dict[int, Scene]:
    return {scene.seed: scene for scene in read_scenes(folder)}


@pytest.fixture(scope="module")
def asked(scenes: dict[int, Scene]) -> Asked:
    """A few thousand questions of all kinds, half of them about mirrored pictures."""
    rng, found = np.random.default_rng(0), []
    for scene in scenes.values():
        for kind, roles in (*KIND_ROLES.items(), ("understanding", ROLES)):
            for role in roles:
                if role == "cameras" and not scene.has_more_cameras:
                    continue
                for _ in range(10):
                    pictures = choose_pictures(scene, scenes[scene.seed ^ 1], role, rng)
                    pictures = mirror(pictures) if rng.random() < 0.5 else pictures
                    question = ask(pictures, kind, rng)
                    if question:
                        found.append((pictures, question))
    return found


def raw(pictures: PictureSet, image: int) -> dict[int, Box]:
    """Thing number -> box in one picture."""
    boxes = pictures.views[image].boxes
    return {k: Box(image, *corners) for k, corners in enumerate(boxes) if corners}


def things(pictures: PictureSet, image: int) -> list[tuple[str, str, Box]]:
    scene = pictures.scenes[image]
    return [(*scene.things[k], box) for k, box in raw(pictures, image).items()]


def numbers(text: str) -> list[int]:
    """The 0-based images that a question names."""
    return [int(n) - 1 for n in re.findall(r"image (\d)", text)]


def shown(pictures: PictureSet, question: Question) -> tuple[int, int]:
    """(image, thing) of the box that the question shows: the one that lies best under it."""
    corners = [int(v) for v in re.findall(r"\d+", re.findall(r"<\|box_start\|>(.*?)<\|box_end\|>", question.text)[0])]
    best = (9.0, 0, 0)
    for image, size in enumerate(pictures.sizes):
        box = from_steps(image, corners, size, RELATIVE_STEPS)
        for k, true in raw(pictures, image).items():
            gap = abs(box.x1 - true.x1) + abs(box.y1 - true.y1) + abs(box.x2 - true.x2) + abs(box.y2 - true.y2)
            best = min(best, (gap, image, k))
    assert best[0] < 1, "the question shows no thing's box"
    return best[1], best[2]


def expected(pictures: PictureSet, question: Question) -> list[Box]:
    text, task, scene = question.text, question.task, pictures.scene
    words = re.findall(r"[a-z]+", text)
    images = numbers(text)
    if task in ("object", "colour", "name"):
        names = [n for n in (*NAMES,) if task != "colour" and (n in words or n + "s" in words)]
        colours = [c for c in COLOURS if c in words]
        where = images or range(pictures.count)
        return [
            box
            for i in where
            for name, colour, box in things(pictures, i)
            if (not names or name in names) and (not colours or colour in colours)
        ]
    if task in ("moved", "missing", "new"):
        wanted = {"moved": scene.moved, "missing": scene.removed, "new": scene.added}[task]
        return [box for i in (0, 1) for k, box in raw(pictures, i).items() if k in wanted]
    if task == "shared":
        kinds = [{(n, c) for n, c, _ in things(pictures, i)} for i in (0, 1)]
        return [box for i in (0, 1) for n, c, box in things(pictures, i) if (n, c) in kinds[0] & kinds[1]]
    if task == "only":
        i = images[0]
        if pictures.role == "views":
            return [box for k, box in raw(pictures, i).items() if k not in raw(pictures, 1 - i)]
        other = {(n, c) for n, c, _ in things(pictures, 1 - i)}
        return [box for n, c, box in things(pictures, i) if (n, c) not in other]
    if task in ("same", "track", "kind", "same colour"):
        i, k = shown(pictures, question)
        j, (name, colour) = 1 - i, pictures.scenes[i].things[k]
        if task in ("same", "track"):
            return [box for other, box in raw(pictures, j).items() if other == k]
        return [box for n, c, box in things(pictures, j) if (n == name if task == "kind" else c == colour)]
    row = sorted(things(pictures, images[0]), key=lambda thing: thing[2].x1 + thing[2].x2)
    if task == "ordinal":
        nth = next(k for k, word in enumerate(("first", "second", "third", "fourth")) if word in words)
        return [(row if "left" in words else row[::-1])[nth][2]]
    if task == "extreme":
        fit = [box for n, c, box in row if n in words or c in words]
        return [fit[0] if "leftmost" in words else fit[-1]]
    assert task == "not"
    return [box for _, colour, box in row if colour not in words]


def test_answers_follow_from_the_scene(asked: Asked) -> None:
    tasks: Counter[str] = Counter()
    for pictures, question in asked:
        tasks[question.task] += 1
        if question.task != "count":
            assert list(question.boxes) == sorted(expected(pictures, question)), question.text
    assert set(tasks) == set(PHRASES)
    assert min(tasks.values()) > 20, tasks


def test_counts_are_right(asked: Asked) -> None:
    for pictures, question in asked:
        if question.task == "count":
            colour = next(c for c in COLOURS if c in question.text)
            row = things(pictures, numbers(question.text)[0])
            assert question.words == str(sum(c == colour for _, c, _ in row))


def test_reasoning_lists_what_the_pictures_show_and_names_the_answer(asked: Asked) -> None:
    for pictures, question in asked:
        if not question.thinking:
            continue
        for image, text in re.findall(r"Image-(\d): (.*?)\. ", question.thinking):
            row = sorted(things(pictures, int(image) - 1), key=lambda thing: thing[2].x1 + thing[2].x2)
            assert sorted(text.split(", ")) == sorted([f"{c} {n}" for n, c, _ in row] or ["nothing"])
        boxes = re.findall(r"Image-(\d) |(<.box_start.>.*?<.box_end.>) ([a-z]+ [a-z]+)", question.conclusion)
        shown, image = [], 0
        for number, box, words in boxes:
            image = int(number or image)
            shown += [(image - 1, box, words)] if box else []
        answer = sorted(question.targets, key=lambda seen: seen.box)
        assert shown == [(seen.image, pictures.mark(seen), seen.words) for seen in answer]
        assert bool(shown) != question.conclusion.endswith(": nothing.")


def test_some_questions_have_no_target_and_some_have_several(asked: Asked) -> None:
    by_kind: dict[str, list[int]] = {}
    for _, question in asked:
        by_kind.setdefault(question.kind, []).append(len(question.boxes))
    for kind in ("referential", "semantic", "temporal"):  # a view seldom hides what another shows
        share = np.mean(np.asarray(by_kind[kind]) == 0)
        assert 0.03 < share < 0.5, (kind, share)
    assert max(by_kind["referential"]) > 2


def test_pictures_that_show_every_colour_and_name_have_nothing_absent(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking for an absent colour there once went on for ever."""
    pictures = max((pictures for pictures, _ in asked), key=lambda pictures: len(pictures.seen))
    monkeypatch.setattr(questions, "COLOURS", {seen.colour: COLOURS[seen.colour] for seen in pictures.seen})
    monkeypatch.setattr(questions, "NAMES", [seen.name for seen in pictures.seen])
    monkeypatch.setattr(questions, "NO_TARGET_SHARE", 1.0)
    rng = np.random.default_rng(0)
    found = [ask(pictures, "referential", rng) for _ in range(60)]
    assert {question.task for question in found if question} == {"object", "colour", "name"}


def test_the_tokenizer_s_corpus_has_every_word(asked: Asked) -> None:
    known = set(re.findall(r"[A-Za-z]+", " ".join(corpus()))) | set(re.findall(r"[a-z]+", "box start end"))
    for _, question in asked:
        assert set(re.findall(r"[A-Za-z]+", f"{question.text} {question.thinking}")) <= known


def test_mirroring_twice_changes_nothing(asked: Asked) -> None:
    for pictures, _ in asked[::50]:
        again = mirror(mirror(pictures))
        assert [view.boxes for view in again.views] == [view.boxes for view in pictures.views]
        assert mirror(pictures).views[0].boxes != pictures.views[0].boxes


def test_a_draw_is_fixed_by_its_number_and_its_answers_can_be_read(folder: Path, scenes: dict[int, Scene]) -> None:
    thinking = changes = 0
    for draw in range(30):
        samples = [draw_sample(scenes, folder, 4, 0.5, LOCATIONS, np.random.default_rng([5, draw])) for _ in range(2)]
        first, second = samples
        assert first.turns == second.turns
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first.images, second.images, strict=True))
        sizes = [image.size for image in first.images]
        for turn, truth in zip(first.turns, first.truths, strict=True):
            answer = read_answer(turn.answer, sizes, LOCATIONS)
            assert len(answer.boxes) == len(truth.wanted)
            assert answer.problem is None or turn.answer.isdigit()
            assert bool(answer.thinking) == turn.think
            thinking += turn.think
        assert len(first.seen) == 2 or not first.fates
        for fate in first.fates:
            before, after = ([seen.box for seen in picture] for picture in first.seen)
            assert fate.box in (before if fate.fate == LEFT else after)
            assert set(fate.firsts) <= set(before)
            assert bool(fate.firsts) == (fate.fate != NOWHERE)
        changes += any(fate.fate == LEFT for fate in first.fates)
    assert 30 < thinking < 90
    assert 2 < changes < 15
    assert sum(ROLE_SHARES.values()) == pytest.approx(1)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in KIND_SHARES.values())


def test_what_random_weights_learn_first_is_asked_of_one_picture(folder: Path) -> None:
    scenes = {scene.seed: scene for scene in read_scenes(folder)}
    for draw in range(20):
        rng = np.random.default_rng([9, draw])
        sample = draw_sample(scenes, folder, 4, 0.0, LOCATIONS, rng, one_picture=True)
        assert len(sample.images) == 1
        assert not any("<|box_start|>" in turn.query or "image 2" in turn.query for turn in sample.turns)
        assert not any(truth.marked for truth in sample.truths)


def test_brief_reasoning_is_the_conclusion_alone(folder: Path, scenes: dict[int, Scene]) -> None:
    whole, brief = (draw_sample(scenes, folder, 30, 1.0, LOCATIONS, np.random.default_rng(6), s) for s in (0.0, 1.0))
    thought = 0
    for sample, lists in ((whole, True), (brief, False)):
        for turn in sample.turns:
            if turn.think:
                thinking = read_answer(turn.answer, [image.size for image in sample.images], LOCATIONS).thinking
                assert ("Image-1:" in thinking or "Image-2:" in thinking) == lists
                assert re.search(r"(^|\. )[A-Z][a-z]+: (Image-[12] <.box_start.>.* [a-z]+|nothing)\.$", thinking)
                thought += 1
    assert thought > 30


def test_held_out_questions_are_fixed_and_come_in_turn(folder: Path, scenes: dict[int, Scene]) -> None:
    asked = held_out_questions(list(scenes.values()))
    records = [as_record(*question, folder, "tabletop") for question in asked]
    assert asked == held_out_questions(list(scenes.values()))
    assert all(check(record) is None for record in records)
    kinds = Counter(record.kind for record in records)
    assert set(kinds) == set(KIND_ROLES)
    assert len(records) >= 36
    assert min(kinds.values()) >= 5


def test_a_question_as_a_record_carries_its_reasoning(folder: Path, scenes: dict[int, Scene]) -> None:
    scene = scenes[8_000]
    asked = held_out_question(scene, scenes[8_001], "semantic")
    assert asked is not None
    brief = as_record(*asked, folder, "tabletop", cot=True, brief=True)
    assert brief.thinking == asked[1].conclusion
    record = as_record(*asked, folder, "tabletop", cot=True)
    assert record.mode == "cot"
    assert record.thinking == asked[1].thinking
    assert held_out_question(scene, None, "semantic") is None
