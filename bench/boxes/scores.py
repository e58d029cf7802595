"""The figures of a file of answers, whichever benchmark it is of; pure functions, apart from running models."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from bench.boxes import mc_bench, mig_bench, mig_bench_published, odinw, refcoco, tabletop
from bench.boxes.answers import Answered, read_answers
from bench.boxes.held_out import SPLITS
from bench.boxes.odinw_data import PROTOCOLS
from bench.boxes.rated import Rated
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable
from gemvg_edge.json_object import short
from train.journal import Line

# What --task takes; the last column says what of it may follow a colon.
TASKS: dict[str, tuple[str, ...]] = {
    "tabletop": tuple(SPLITS),
    "mig-bench": (),
    "mc-bench": (),
    "odinw13": PROTOCOLS,
    **refcoco.SPLITS,
}
RECORDS = "records"


def read_task(text: str, what: str = "--task") -> tuple[str, str]:
    """`refcoco:testA` -> its two halves; GemvgError for a task or a half that is not known."""
    name, _, part = text.partition(":")
    if name not in TASKS or (":" in text and part not in TASKS[name]):
        known = ", ".join(
            name + (f" (or {', '.join(f'{name}:{part}' for part in parts)})" if parts else "")
            for name, parts in TASKS.items()
        )
        raise GemvgError(f"{what} {short(text)} is not known; give {known}")
    return name, part


def score_file(file: Path, stretched: bool = False, only: Container[str] | None = None) -> dict[str, Any]:
    """The figures of answers that bench.accuracy saved, of all or of some ids; GemvgError names a line that is none."""
    header, answers = read_answers(file)
    family(header)
    if only is not None:
        answers = (answer for answer in answers if answer.id in only)
    if (first := next(answers, None)) is None:
        raise GemvgError(f"{printable(file)} holds no answers yet; the same run of bench.accuracy goes on with it")
    answers = chain([first], answers)
    try:
        return {"task": header["task"], "model": str(header.get("model")), **score(header, answers, stretched)}
    except GemvgError as error:
        fault = str(error)
        raise GemvgError(fault if printable(file) in fault else f"{printable(file)}: {fault}") from None


def score(header: Line, answers: Iterable[Answered], stretched: bool = False) -> dict[str, Any]:
    """`tasks`: the figures by part, `macro`: over parts; what else there is, by benchmark."""
    name = family(header)
    match name:
        case "mig-bench":
            return mig_bench.score(_rate_mig_bench(header, answers, stretched), header["benchmark"])
        case "mc-bench":
            return mc_bench.score(mc_bench.read_samples(answers))
        case "odinw13":
            return odinw.score(odinw.gather(answers, bool(header.get("verbatim"))))
        case "tabletop" | "records":
            return tabletop.score(tabletop.count_answers(answers))
        case _:
            return refcoco.score(refcoco.rate(answers), header["task"])


def rate(header: Line, answers: Iterable[Answered]) -> Rated:
    """Every answer's own values; those of average precision have none."""
    match family(header):
        case "mig-bench":
            return _rate_mig_bench(header, answers, stretched=False)
        case "mc-bench":
            return mc_bench.rate(mc_bench.read_samples(answers))
        case "odinw13":
            return odinw.rate(answers)
        case "tabletop" | "records":
            return tabletop.rate(tabletop.count_answers(answers))
        case _:
            return refcoco.rate(answers)


def family(header: Line) -> str:
    """Which benchmark answers are of; GemvgError for one that is not known."""
    task: str = header["task"]
    return RECORDS if task == RECORDS else read_task(task, "the answers' task")[0]


def _rate_mig_bench(header: Line, answers: Iterable[Answered], stretched: bool) -> Rated:
    version, locations = header.get("benchmark"), header.get("locations", 0)
    if version not in (mig_bench.REVISED, mig_bench.OLD) or type(locations) is not int:
        raise GemvgError(f"the answers are to the MIG-Bench {short(version)}, which is neither revised nor old")
    return mig_bench.rate(answers, version, locations, stretched)


def score_published_mig_bench(paths: list[Path], stretched: bool) -> dict[str, Any]:
    """The figures of published answers to MIG-Bench, and how much of what their files say comes out the same."""
    version, answers, summaries = mig_bench_published.read_published(paths)
    figures = mig_bench.score(mig_bench.rate(answers, version, stretched=stretched), version)
    agreement = mig_bench_published.agreement(answers, summaries, version, stretched)
    return {"task": "mig-bench", **figures, "agreement": agreement}
