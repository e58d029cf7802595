"""Held-out questions about the simulated world: rendered the first time, by seed, so every machine asks the same."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gemvg_edge.command import whole_number
from train.data.record import Record
from train.world.furniture import LIBRARY
from train.world.render import render
from train.world.samples import as_record, held_out_questions
from train.world.scenes import (
    CHECKERS_SEED,
    FURNISHED_SEED,
    HELD_OUT_SEED,
    MORE_CAMERAS_SEED,
    NEW_LIGHT_SEED,
    NEW_NAMES_SEED,
    NEW_STYLE_SEED,
    PHOTOGRAPHS_SEED,
    read_scenes,
)
from train.world.things import HELD_OUT_NAMES, NAMES

SPLITS = {
    "held-out": HELD_OUT_SEED,
    "new-names": NEW_NAMES_SEED,
    "new-style": NEW_STYLE_SEED,  # the next two together
    "new-light": NEW_LIGHT_SEED,
    "checkers": CHECKERS_SEED,
    "photographs": PHOTOGRAPHS_SEED,
    "more-cameras": MORE_CAMERAS_SEED,
    "furnished": FURNISHED_SEED,  # needs Debian's sweethome3d-furniture
}
HELD_OUT = Path("data/world")
SIZE = 144


def held_out(folder: Path, limit: int, split: str = "held-out") -> list[Record]:
    """The first `limit` held-out questions of a split; renders the scenes that are missing."""
    return [record for record, _ in held_out_named(folder, limit, split)]


def held_out_named(folder: Path, limit: int, split: str) -> list[tuple[Record, list[str]]]:
    """The same, each with where a name stands that training never shows: in its "text", in a "target", or nowhere."""
    # A few scenes do not allow the question that would be asked of them, and relatives come in twos.
    scenes = -(-(limit + limit // 20 + 2) // 10) * 10
    library = LIBRARY if split == "furnished" else None
    render(folder / split, SPLITS[split], scenes, SIZE, os.cpu_count() or 1, library)
    asked = held_out_questions(read_scenes(folder / split)[:scenes])
    named = []
    for pictures, question in asked[:limit]:
        unknown = {*HELD_OUT_NAMES, *(seen.name for seen in pictures.seen if seen.name not in NAMES)}
        where = ["text"] if any(name in question.text for name in unknown) else []
        where += ["target"] if any(target.name in unknown for target in question.targets) else []
        named.append((as_record(pictures, question, folder / split, "tabletop"), where))
    return named


def held_out_arguments(parser: argparse.ArgumentParser, limit: int, *, split: bool = False) -> None:
    """The arguments that `held_out` takes: --limit and its default, --data and, where one is chosen, --split."""
    many = "how many held-out questions are asked (default: %(default)s)"
    parser.add_argument("--limit", type=whole_number, metavar="N", default=limit, help=many)
    if split:
        which = "which scenes are asked about (default: %(default)s)"
        parser.add_argument("--split", choices=list(SPLITS), default="held-out", help=which)
    place = "the folder where the scenes are, or are rendered to (default: %(default)s)"
    parser.add_argument("--data", type=Path, metavar="FOLDER", default=HELD_OUT, help=place)
