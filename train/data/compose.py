"""A mixture with the shares of MG-Data-240K, GeM-VG's grounding data, from the five data sets that it was made of.

    python -m train.data.compose --d3 D3 --coco COCO --ego-exo EGOEXO --mvtrack MVTRACK --star STAR \\
        --exclude-mc-bench MCBENCH --size 240000 --seed 0 --out records.jsonl

The shares are published, their data is not, nor which data set gave which share. So this is ours:

    referential    97K    D3, COCO                semantic    77K    COCO
    spatial        20K    Ego-Exo4D, MVTrack      temporal    46K    STAR, MVTrack

A kind with fewer records than its share stays smaller, and that is said; nothing is repeated. MC-Bench is made of
pictures of COCO and D3 among others; records that show one are left out where its folder is given (exclude.py).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from train.data.coco import read_coco
from train.data.d3 import read_d3
from train.data.ego_exo import read_ego_exo
from train.data.exclude import NOT_EXCLUDED, add_flags, leave_out, read_exclusion
from train.data.mvtrack import read_mvtrack
from train.data.record import Fault, Kind, Record, Tally, check_output, keep_good, write_records
from train.data.reservoir import Reservoir
from train.data.star import read_star

MG_DATA_SHARES: dict[Kind, int] = {"referential": 97_000, "semantic": 77_000, "spatial": 20_000, "temporal": 46_000}
TITLES = {
    "d3": "D3",
    "coco": "COCO",
    "ego_exo": "Ego-Exo4D",
    "mvtrack": "MVTrack",
    "star": "STAR",
}  # of Folders' fields
COCO_ROUNDS = 2  # one round of its 117K pictures may not give 77K semantic records


@dataclass(frozen=True)
class Folders:
    """Where the data sets lie; None leaves one out."""

    d3: Path | None = None
    coco: Path | None = None
    ego_exo: Path | None = None
    mvtrack: Path | None = None
    star: Path | None = None


def scale_shares(size: int) -> dict[Kind, int]:
    """How many records of each kind a mixture of `size` has; they add up to `size`."""
    total = sum(MG_DATA_SHARES.values())
    counts = {kind: share * size // total for kind, share in MG_DATA_SHARES.items()}
    by_remainder = sorted(MG_DATA_SHARES, key=lambda kind: MG_DATA_SHARES[kind] * size % total, reverse=True)
    for kind in by_remainder[: size - sum(counts.values())]:
        counts[kind] += 1
    return counts


def read_sources(folders: Folders, seed: int) -> Iterator[Record | Fault]:
    """All that the folders' training splits give, one data set after the other."""
    if folders.d3:
        yield from read_d3(folders.d3, seed)
    if folders.coco:
        yield from read_coco(folders.coco, seed=seed, rounds=COCO_ROUNDS)
    if folders.ego_exo:
        yield from read_ego_exo(folders.ego_exo, seed=seed)
    if folders.mvtrack:
        yield from read_mvtrack(folders.mvtrack, seed=seed)
    if folders.star:
        yield from read_star(folders.star, seed=seed)


def draw_mixture(records: Iterable[Record], size: int, seed: int) -> tuple[list[Record], dict[Kind, int]]:
    """(the mixture in random order, how many records of each kind there were to draw from)."""
    counts = scale_shares(size)
    pools = {kind: Reservoir[Record](counts[kind], np.random.default_rng([seed, k])) for k, kind in enumerate(counts)}
    for record in records:
        if record.kind in pools:
            pools[record.kind].offer(record)
    drawn = [record for pool in pools.values() for record in pool.items]
    order = np.random.default_rng([seed, len(pools)]).permutation(len(drawn))
    return [drawn[k] for k in order], {kind: pool.offered for kind, pool in pools.items()}


def report(mixture: list[Record], offered: dict[Kind, int], size: int) -> list[str]:
    """What a mixture is made of, and which kinds fell short of their share."""
    lines = []
    for kind, wanted in scale_shares(size).items():
        sources = Counter(record.source for record in mixture if record.kind == kind)
        parts = ", ".join(f"{source} {count}" for source, count in sources.most_common()) or "no data set"
        short = "" if sources.total() == wanted else f"; {wanted - sources.total()} FEWER than its share"
        lines.append(f"{kind}: {sources.total()} of {wanted}, drawn from {offered[kind]} ({parts}){short}")
    return lines


def compose(
    folders: Folders,
    mc_bench: Path | None,
    size: int,
    seed: int,
    out: Path,
    *,
    others: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Read, draw, write and say what came of it; the last line is one JSON object.

    The pictures of `mc_bench` and of `others` are left out.
    """
    if not any(vars(folders).values()):
        raise GemvgError("no data set was given; name at least one of --d3 --coco --ego-exo --mvtrack --star")
    if size < 1:
        raise GemvgError(f"--size is {size}; it must be at least 1")
    inputs = [folder for folder in (*vars(folders).values(), mc_bench, *others) if folder]
    check_output(out, inputs, overwrite=overwrite)
    exclusion = read_exclusion(mc_bench, others)
    tally = Tally()
    items = tqdm(leave_out(read_sources(folders, seed), exclusion), desc="reading", unit=" records", disable=None)
    mixture, offered = draw_mixture(keep_good(items, tally), size, seed)
    written = write_records(mixture, out, overwrite=overwrite)
    lines = [*tally.lines(), *report(mixture, offered, size), *(exclusion.lines() if exclusion else ())]
    print("\n".join(lines if mc_bench else [*lines, NOT_EXCLUDED]))
    kinds = Counter(record.kind for record in mixture)
    told = {"refused": tally.refused.total(), "excluded": exclusion.counts() if exclusion else None, "seed": seed}
    print(json.dumps({"records": written, "kinds": kinds, **told}))


@command("train.data.compose")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m train.data.compose", description="Compose a mixture with MG-Data-240K's shares."
    )
    for name, title in TITLES.items():
        folder = f"the folder that {title} lies in (default: without {title})"
        parser.add_argument("--" + name.replace("_", "-"), type=Path, metavar="FOLDER", help=folder)
    add_flags(parser)
    size = "how many records the mixture has (default: %(default)s)"
    parser.add_argument("--size", type=whole_number, metavar="N", default=sum(MG_DATA_SHARES.values()), help=size)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .jsonl to write (required)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    folders = Folders(**{name: getattr(args, name) for name in TITLES})
    about = args.exclude_mc_bench, args.size, args.seed, args.out
    compose(folders, *about, others=args.exclude, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
