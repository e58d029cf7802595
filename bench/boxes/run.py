"""Ask a model a benchmark's questions and save every answer as it comes, here or over a Ray cluster.

A killed run goes on where it was: what is saved is not asked again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from bench.boxes import mig_bench, odinw_data, refcoco, tabletop
from bench.boxes.answers import FORMAT, VERSION, Benchmark, Question, spread, to_line
from bench.boxes.asking import Asking, Facts, Said, open_model
from bench.boxes.mc_bench_data import load as load_mc_bench
from bench.boxes.scores import read_task
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, refuse_inputs
from gemvg_edge.images import load_image
from gemvg_edge.json_object import short
from train.journal import Line, open_journal
from train.sharding import work_through

OTHER = "give another --out, or --overwrite to ask anew"


class Item(NamedTuple):
    """A question with its place in its benchmark."""

    number: int
    question: Question


def load(task: str, data: Path | None, own_words: bool, think: bool, limit: int | None) -> Benchmark:
    """A task's questions from its folder, as the model will be asked them; GemvgError names what is wrong there."""
    benchmark = _load(task, data, own_words, think, limit)
    ids = Counter(question.id for question in benchmark.questions)
    if not ids:
        raise GemvgError(f"{printable(benchmark.folder)} holds no question of {task}; see docs/howto/benchmarks.md")
    name, times = ids.most_common(1)[0]
    if times > 1:
        raise GemvgError(
            f"{printable(benchmark.folder)} has {times} questions with the id {short(name)}; mend the data"
        )
    return benchmark


def _load(task: str, data: Path | None, own_words: bool, think: bool, limit: int | None) -> Benchmark:
    name, part = read_task(task)
    if name == "tabletop":
        return tabletop.load(data, part or "held-out", limit)
    if data is None:
        raise GemvgError(f"--data is needed: the folder of {name}, laid out as its authors publish it")
    match name:
        case "mig-bench":
            return mig_bench.load(data, think)
        case "mc-bench":
            return load_mc_bench(data)
        case "odinw13":
            return odinw_data.load(data, own_words, [part] if part else odinw_data.PROTOCOLS)
    return refcoco.load(name, data, part)


def run(
    benchmark: Benchmark,
    facts: Facts,
    asking: Asking,
    file: Path,
    *,
    limit: int | None = None,
    ray: str | None = None,
    workers: int = 0,
    overwrite: bool = False,
) -> set[str]:
    """Answer the questions that the file lacks, of the first `limit` (the parts in turn), and append each; their ids.

    The file may hold further ones, of a run with a larger limit.
    """
    verbatim = not facts.own_words and any(question.published for question in benchmark.questions)
    asking = replace(asking, verbatim=verbatim, new_tokens=benchmark.new_tokens)
    if verbatim:
        shown = next(question.published for question in benchmark.questions if question.published)
        print(f"{facts.name} is asked in the protocol's own words, such as {shown!r}", file=sys.stderr)
    refuse_inputs(file, [facts.folder, benchmark.folder], "--out")
    header = _header(benchmark, facts, asking)
    with open_journal(file, header, OTHER, overwrite=overwrite, told=("data",)) as (done, append):
        chosen = spread(benchmark.questions, limit or len(benchmark.questions))
        items = [Item(k, benchmark.questions[k]) for k in chosen if benchmark.questions[k].id not in done]
        make = partial(answering, facts.folder, asking, benchmark.folder.resolve())
        bar = tqdm(total=len(chosen), initial=len(chosen) - len(items), desc=facts.name, unit=" answers", disable=None)
        with bar:
            for line in work_through(items, make, ray, workers):
                append(line)
                bar.update()
    return {benchmark.questions[k].id for k in chosen}


def answering(folder: Path, asking: Asking, root: Path) -> Callable[[Item], Line]:
    """Open a model; a function that answers one question, pictures from `root`, and gives the line to save.

    A question that the model cannot be asked is an answer with a problem, or one of thousands would end them all; what
    fails for another reason, such as memory, ends the run, and the next one asks again.
    """
    model = open_model(folder, asking)

    def answer(item: Item) -> Line:
        question = item.question
        images = [load_image(root / image) for image in question.images]
        for image, size, path in zip(images, question.sizes, question.images, strict=True):
            if image.size != size:
                raise GemvgError(f"{printable(root / path)} has {image.size} pixels, and its benchmark says {size}")
        asked = question.published if asking.verbatim and question.published else question.query
        refusal = model.refuses([image.size for image in images], asked)
        said = model.say(images, asked) if refusal is None else Said("", (), "", refusal, 0, 0.0)
        line = to_line(item.number, question, asked, said)
        if len(images) == 1:
            line["extra"]["frame"] = list(model.frame(images[0].size))
        return line

    return answer


def _header(benchmark: Benchmark, facts: Facts, asking: Asking) -> Line:
    """What answers depend on; a file of others is not gone on with."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": benchmark.task,
        "benchmark": benchmark.version,
        "questions": _digest(benchmark),
        "data": str(benchmark.folder.resolve()),
        "model": facts.name,
        "weights": facts.digest,
        "coordinates": facts.answer.coordinates,
        "locations": facts.answer.locations,
        "think": asking.think,
        "verbatim": asking.verbatim,
        "max_pixels": asking.max_pixels,
        "new_tokens": asking.new_tokens,
        "engine": asking.engine,
        "dtype": asking.dtype,
    }


def _digest(benchmark: Benchmark) -> str:
    """Of every question but its published words; of the simulated world, which grows with --limit, none is needed."""
    if benchmark.task.startswith("tabletop"):
        return "by seed"
    digest = hashlib.sha256()
    for question in benchmark.questions:
        truth = [(box.image, *box, box.label, box.score) for box in question.truth]
        images = [image.as_posix() for image in question.images]
        told = question.id, question.query, images, question.sizes, truth, dict(question.extra)
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()
