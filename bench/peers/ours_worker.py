"""gemvg-edge as a measured system. Runs in this Python; see serve.py."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from gemvg_edge import Grounder
from gemvg_edge.answer import AnswerFormat, write_box
from gemvg_edge.decoding import Writing, advance
from gemvg_edge.engines.protocol import Step
from gemvg_edge.grammar import Walk, answer_grammar
from gemvg_edge.positions import mrope_table, text_positions
from gemvg_edge.prompt import encode, encode_query
from gemvg_edge.scene import Scene

BOX = (123, 456, 789, 987)  # as `bench.speed.systems` counts it for the others
LOCATION_BOX = (15, 57, 99, 124)
FORMATS = {"digits": AnswerFormat("digits"), "locations": AnswerFormat("locations", 129)}
BOXES = 5  # the first and four further ones


@dataclass
class Ours:
    """An open model, and the scene that was looked at last."""

    grounder: Grounder
    keep: float | None  # the share of visual tokens that is kept
    scene: Scene | None = None


def open_system(settings: dict[str, Any]) -> Ours:
    """The bundle, on one engine or (None) on what the runtime picks by itself."""
    grounder = Grounder.open(settings["model"], engine=settings["engine"], threads=settings["threads"])
    return Ours(grounder, settings["keep"])


def processes(system: Ours) -> list[int]:
    """All in this one."""
    return [os.getpid()]


def first(system: Ours, request: dict[str, Any]) -> dict[str, Any]:
    """Look at pictures and ask: each phase to the first token, boxes of its answer, then steady decoding."""
    started = time.perf_counter()
    system.scene = None  # its cache is let go before the next is made
    system.scene = scene = system.grounder.look(request["pictures"], keep=system.keep)
    looked = time.perf_counter()
    prompt, ends = box_times(scene, request["question"], "digits")
    vision = scene.timings.preprocess_ms + scene.timings.vision_ms
    return {
        "first_token_ms": (looked - started) * 1e3 + ends[0],
        "vision_ms": vision,
        "prefill_ms": (looked - started) * 1e3 - vision + ends[0],
        "first_box_ms": (looked - started) * 1e3 + ends[1],
        "box_ms": (ends[-1] - ends[1]) / (BOXES - 1),
        "prompt_tokens": scene.timings.image_tokens + prompt,
        "token_ms": median(token_times(scene, request["tokens"])),
    }


def again(system: Ours, request: dict[str, Any]) -> dict[str, Any]:
    """Another question on the same pictures; and what a further box costs in location tokens."""
    assert system.scene is not None, "`first` comes first"
    _, ends = box_times(system.scene, request["question"], "digits")
    _, located = box_times(system.scene, request["question"], "locations")
    return {
        "first_token_ms": ends[0],
        "location_box_ms": (located[-1] - located[1]) / (BOXES - 1),
        "way": "the scene's keys and values",
    }


def box_times(scene: Scene, question: str, kind: str) -> tuple[int, list[float]]:
    """How many tokens the question has; milliseconds until the first token and until each of BOXES boxes stands.

    Random weights would say `None`, so the boxes are given; each step is the one that the grammar asks for.
    """
    model, seen = scene._model, scene._seen
    answer = FORMATS[kind]
    tokenizer = located(model.tokenizer, answer.locations)
    box = encode(tokenizer, write_box(BOX if kind == "digits" else LOCATION_BOX, answer))
    head = encode(tokenizer, "Image-1: ")
    started = time.perf_counter()
    grammar = answer_grammar(tokenizer, answer, scene.resized, model.manifest.model.eos_token_ids)
    ids = encode_query(model.tokenizer, model.manifest.prompt, answer, question, False, scene.resized)
    walk = scripted(grammar(False), [*head, *(box * (BOXES + 1))])
    writing = Writing(ids, seen.cache, seen.past, seen.position, (), model.limits.new_tokens, walk)
    _, decoder = model.engines()
    times: list[float] = []
    while len(times) <= BOXES:
        advance(decoder, model.rope, [writing])
        done = 1 + (len(writing.tokens) - len(head)) // len(box)
        times += [(time.perf_counter() - started) * 1e3] * (max(1, done) - len(times))
    return len(ids), times[: BOXES + 1]


def scripted(walk: Walk, script: Sequence[int]) -> Walk:
    """A grammar's walk that goes on as if the script were what was chosen, at the cost of what has to be chosen."""
    legal = next(walk)
    for token in script:
        yield legal
        legal = walk.send(token)
    yield legal


def located(tokenizer: Tokenizer, locations: int) -> Tokenizer:
    """The tokenizer with location tokens, where the format has any."""
    if not locations:
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_tokens([AddedToken(f"<loc_{k}>", special=False, normalized=False) for k in range(locations)])
    return copy


def token_times(scene: Scene, tokens: int) -> list[float]:
    """Milliseconds of decode steps of one token each, all of the vocabulary competing."""
    model, seen = scene._model, scene._seen
    _, decoder = model.engines()
    past, position, rope, taken = seen.past, seen.position, model.rope, []
    for k in range(tokens):
        started = time.perf_counter()
        table = mrope_table(text_positions(position + k, 1), rope.head_dim, rope.theta, rope.sections)
        (logits,) = decoder.forward([Step(decoder.embed(np.array([100 + k])), seen.cache, past + k, table)])
        logits[0].argmax()
        taken.append((time.perf_counter() - started) * 1e3)
    return taken
