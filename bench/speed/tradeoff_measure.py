"""What the settings of the trade-off score and cost on this machine.

Not the full product: pixels, pruning and free decoding are each varied alone, for each store of weights and engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from bench.boxes.scoring import Scores, count, score_counts
from bench.speed.tradeoff_bundles import make_bundles
from bench.speed.tradeoff_front import Point, Setting
from bench.speed.tradeoff_process import ask_process
from gemvg_edge.boxes import Box
from gemvg_edge.bundle import open_bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.grounder import Grounder
from train.data.record import Record
from train.hub import checkpoint_folder

TIMED = 20  # questions that a process is asked
MB_STEP = 5  # peaks of the same work differ by up to 4 MB from process to process
Bundles = Mapping[Setting, Path]


@dataclass(frozen=True)
class Grid:
    """What is varied."""

    bits: Sequence[str]
    engines: Sequence[str]
    shares: Sequence[float]  # of the bundle's own budget of pixels
    keep: Sequence[float]
    constrained: Sequence[bool]


def settings(checkpoints: Sequence[Path], grid: Grid, work: Path) -> dict[Setting, Path]:
    """All that is measured, with the bundle of each."""
    found: dict[Setting, Path] = {}
    for given in checkpoints:
        for bits, bundle in make_bundles(checkpoint_folder(given), grid.bits, work).items():
            manifest = open_bundle(bundle).manifest
            whole, answer = manifest.preprocessing.max_pixels, manifest.answer.coordinates
            for engine in grid.engines:
                first = Setting(str(given), answer, bits, engine, whole, 1.0, True)
                found |= dict.fromkeys(around(first, grid), bundle)
    if not found:
        raise GemvgError("no checkpoint has any of these --bits; a GPTQ checkpoint has gptq alone")
    return found


def around(first: Setting, grid: Grid) -> list[Setting]:
    """The whole pictures by the grammar, and each thing varied alone."""
    free = [replace(first, constrained=way) for way in grid.constrained]
    lower = [replace(first, pixels=round(share * first.pixels)) for share in grid.shares]
    fewer = [replace(first, keep=share) for share in grid.keep]
    varied = [one for one in (*lower, *fewer) if one != first]
    return [*free, *varied] if True in grid.constrained else free


def score_all(bundles: Bundles, records: Sequence[Record], threads: int) -> dict[Setting, Scores]:
    """The boxes of each setting; by the grammar and free, a question is asked about one look."""
    found: dict[Setting, Scores] = {}
    groups: dict[Setting, dict[Setting, list[Setting]]] = {}  # one Grounder, one look of each question
    for setting in bundles:
        look = replace(setting, constrained=True)
        groups.setdefault(replace(look, pixels=0, keep=1.0), {}).setdefault(look, []).append(setting)
    with tqdm(total=sum(map(len, groups.values())), desc="boxes", unit="look", delay=1) as bar:
        for looks in groups.values():
            first = next(iter(looks))
            try:
                grounder = Grounder.open(bundles[first], engine=first.engine, threads=threads, cache_bytes=0)
            except GemvgError as error:  # an engine that does not run this bundle leaves the others
                print(f"{first.model} {first.bits} on {first.engine} is left out: {error}", file=sys.stderr)
                bar.update(len(looks))
                continue
            with grounder:
                for look, ways in looks.items():
                    found |= _score(grounder, records, look, ways)
                    bar.update()
    if not found:
        raise GemvgError("no engine runs any of the bundles; see above")
    return found


def _score(
    grounder: Grounder, records: Sequence[Record], look: Setting, ways: Sequence[Setting]
) -> dict[Setting, Scores]:
    predicted: dict[Setting, list[Sequence[Box]]] = {way: [] for way in ways}
    for record in records:
        scene = grounder.look(record.images, max_pixels=look.pixels, keep=look.keep)
        for way in ways:
            predicted[way].append(scene.ground(record.query, constrained=way.constrained).boxes)
    truth = [record.boxes for record in records]
    return {way: score_counts(count(boxes, truth)) for way, boxes in predicted.items()}


def measure_all(
    bundles: Bundles, scores: Mapping[Setting, Scores], records: Sequence[Record], threads: int, rounds: int
) -> list[Point]:
    """Time and memory of each setting that was scored, in fresh processes, round by round.

    Rounds are interleaved. The median is over the questions, each in its fastest round, as what else a machine does
    only adds; of the peaks, the median round counts.
    """
    questions = [([str(path) for path in record.images], record.query) for record in records[:TIMED]]
    costs: dict[Setting, list[tuple[list[float], float]]] = {setting: [] for setting in scores}
    with tqdm(total=rounds * len(costs), desc="time and memory", unit="process", delay=1) as bar:
        for _ in range(rounds):
            for setting, found in costs.items():
                run = {"bundle": str(bundles[setting].resolve()), "engine": setting.engine, "threads": threads}
                look = {"max_pixels": setting.pixels, "keep": setting.keep, "constrained": setting.constrained}
                found.append(ask_process({**run, **look, "questions": questions}))
                bar.update()
    return [
        make_point(setting, _usual([ms for ms, _ in costs[setting]]), median(mb for _, mb in costs[setting]), score)
        for setting, score in scores.items()
    ]


def _usual(runs: Sequence[Sequence[float]]) -> float:
    fastest: list[float] = [min(times) for times in zip(*runs, strict=True)]
    return median(fastest)


def make_point(setting: Setting, ms: float, mb: float, scores: Scores) -> Point:
    """A point, rounded as it is shown."""
    low, high = scores.f1_interval
    mb = float(MB_STEP * round(mb / MB_STEP))
    return Point(setting, round(ms, 1), mb, round(scores.f1, 3), (round(low, 3), round(high, 3)))
