"""Interleaved runs: every system is asked the same in turn, again and again; medians and what was going on beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.speed.noise import LIMIT, Noise, noise_between, processes
from bench.speed.pictures import picture
from bench.speed.workers import Worker
from gemvg_edge.errors import GemvgError

QUESTION = "the red mug that is in both views"
OTHERS = ("the object that was moved to the left", "every blue block that is large", "the ball behind the green box")
WARM_UP = 900  # the first picture that is not measured
CHANGED = 4  # pictures: of so many the last is changed


class NoisyError(Exception):
    """Somebody else computed while we measured."""


@dataclass
class Plan:
    """What is asked of each system."""

    work: Path
    size: tuple[int, int]  # pixels
    runs: int
    tokens: int  # of steady decoding
    threads: int
    noisy: bool  # go on in spite of others
    say: Callable[[str], None] = print
    peaks: Callable[[], dict[str, Any]] = dict  # measures the machine's


@dataclass
class Measured:
    """Of one system with so many pictures: every run, the peaks before and after each, the loudest other process."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    peaks: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    noise: Noise = field(default_factory=lambda: Noise("", 0.0, 0.0))

    def medians(self) -> dict[str, Any]:
        """Of each number over the runs; of texts and counts the last."""
        last = self.runs[-1]
        return {
            key: median(run[key] for run in self.runs) if isinstance(value, float) else value
            for key, value in last.items()
        }


def warm_up(worker: Worker, plan: Plan) -> None:
    """One small round that does not count."""
    with worker.awake():
        worker.ask("first", pictures=[picture(plan.work, plan.size, WARM_UP)], question=QUESTION, tokens=2)
        worker.ask("again", question=OTHERS[0])


def measure(
    workers: dict[str, Worker], pictures: int, plan: Plan, failed: dict[str, str]
) -> tuple[dict[str, Measured], dict[str, int]]:
    """(runs, peak memory in bytes) of each system; one that fails is moved to `failed` with its error."""
    measured = {name: Measured() for name in workers}
    own = {worker.process.pid for worker in workers.values()}
    peaks_before = plan.peaks()
    for run in range(plan.runs):
        # New pictures each time, or caches of pictures would answer.
        numbers = [100 * pictures + 10 * run + k for k in range(pictures)]
        for name, worker in list(workers.items()):
            before, started = processes(), time.perf_counter()
            try:
                reply = ask_all(worker, numbers, run, plan)
            except GemvgError as error:
                failed[name] = str(error)
                plan.say(f"{name} cannot go on: {error}")
                workers.pop(name).close()
                continue
            noise = noise_between(before, processes(), time.perf_counter() - started, own)
            if noise.share > LIMIT and not plan.noisy:
                raise NoisyError(f"{noise.told()} while {name} was measured")
            one = measured[name]
            one.runs.append(reply)
            one.peaks.append((peaks_before, peaks_before := plan.peaks()))
            one.noise = max(one.noise, noise, key=lambda heard: heard.share)
            plan.say(
                f"{pictures} pictures, run {run + 1}, {name}: first token {reply['first_token_ms']:.0f} ms, "
                f"a token {reply['token_ms']:.1f} ms, another question {reply['again_ms']:.0f} ms"
                + (f"; {noise.told()}" if noise.share > LIMIT else "")
            )
    memory = {}
    for name, worker in workers.items():
        with worker.awake():
            memory[name] = worker.ask("memory")["peak_bytes"]
    return {name: measured[name] for name in workers}, memory


def ask_all(worker: Worker, numbers: Sequence[int], run: int, plan: Plan) -> dict[str, Any]:
    """One run of one system: new pictures, another question, and of four pictures a changed last one."""
    with worker.awake():
        paths = [picture(plan.work, plan.size, number) for number in numbers]
        reply = worker.ask("first", pictures=paths, question=QUESTION, tokens=plan.tokens)
        other = worker.ask("again", question=OTHERS[run % len(OTHERS)])
        reply |= {("again_ms" if key == "first_token_ms" else key): value for key, value in other.items()}
        if len(numbers) == CHANGED:
            paths[-1] = picture(plan.work, plan.size, numbers[-1] + 1)
            changed = worker.ask("first", pictures=paths, question=QUESTION, tokens=1)
            reply["changed_ms"] = changed["first_token_ms"]
    return reply
