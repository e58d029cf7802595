"""A mixture with the shares of MG-Data-240K, GeM-VG's grounding data, from the five data sets that it was made of.

    python -m train.data.compose --d3 D3 --coco COCO --ego-exo EGOEXO --mvtrack MVTRACK --star STAR \\
        --exclude-mc-bench MCBENCH --size 240000 --seed 0 --out records.jsonl

The shares are published, their data is not, nor which data set gave which share. So this is ours:

    referential    97K    D3, COCO                semantic    77K    COCO
    spatial        20K    Ego-Exo4D, MVTrack      temporal    46K    STAR, MVTrack

A kind with fewer records than its share stays smaller, and that is said; nothing is repeated. MC-Bench is made of
pictures of COCO and D3 among others; those are left out, by file name, where its folder is given.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file
from train.data.annotations import as_object, entries, find_files, read_json
from train.data.coco import picture_key, read_coco
from train.data.d3 import read_d3
from train.data.ego_exo import read_ego_exo
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


def read_sources(folders: Folders, leave_out: frozenset[str], seed: int) -> Iterator[Record | Fault]:
    """All that the folders' training splits give, one data set after the other."""
    if folders.d3:
        yield from read_d3(folders.d3, seed, leave_out)
    if folders.coco:
        yield from read_coco(folders.coco, seed=seed, leave_out=leave_out, rounds=COCO_ROUNDS)
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


def mc_bench_pictures(folder: Path) -> frozenset[str]:
    """Keys of the pictures of COCO and D3 that MC-Bench shows, by its picture folders and its json."""
    files = (path for path in find_files(folder, "**/*") if path.suffix != ".json" and is_file(path))
    names = [str(path.relative_to(folder)) for path in files]
    for file in find_files(folder, "**/mc-bench*.json"):
        images = entries(read_json(file, dict, "download it again"), "images", file)
        names += [str(as_object(image).get("file_name")) for image in images]
    keys = {picture_key(name) for name in names if {"COCO", "D3"} & set(Path(name).parts[:-1])}
    if not keys:
        raise GemvgError(
            f"{folder}: no pictures below COCO/ or D3/ and no mc-bench*.json that names some; give MC-Bench"
        )
    return frozenset(keys)


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
    folders: Folders, mc_bench: Path | None, size: int, seed: int, out: Path, *, overwrite: bool = False
) -> None:
    """Read, draw, write and say what came of it; the last line is one JSON object."""
    if not any(vars(folders).values()):
        raise GemvgError("no data set was given; name at least one of --d3 --coco --ego-exo --mvtrack --star")
    if size < 1:
        raise GemvgError(f"--size is {size}; it must be at least 1")
    check_output(out, [folder for folder in (*vars(folders).values(), mc_bench) if folder], overwrite=overwrite)
    leave_out = mc_bench_pictures(mc_bench) if mc_bench else frozenset()
    tally = Tally()
    items = tqdm(read_sources(folders, leave_out, seed), desc="reading", unit=" records", disable=None)
    mixture, offered = draw_mixture(keep_good(items, tally), size, seed)
    written = write_records(mixture, out, overwrite=overwrite)
    left_out = tally.refused["a picture of a benchmark, left out"]
    lines = [*tally.lines(), *report(mixture, offered, size)]
    if mc_bench:
        lines.append(f"MC-Bench: {len(leave_out)} pictures of COCO and D3, of which {left_out} were here and left out")
    elif folders.d3 or folders.coco:
        lines.append("MC-Bench's pictures were NOT left out: do not report MC-Bench of what is trained on this")
    print("\n".join(lines))
    kinds = Counter(record.kind for record in mixture)
    print(json.dumps({"records": written, "kinds": kinds, "refused": tally.refused.total(), "seed": seed}))


@command("train.data.compose")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m train.data.compose", description="Compose a mixture with MG-Data-240K's shares."
    )
    for name, title in TITLES.items():
        folder = f"the folder that {title} lies in (default: without {title})"
        parser.add_argument("--" + name.replace("_", "-"), type=Path, metavar="FOLDER", help=folder)
    excluded = "MC-Bench's folder, whose pictures are left out (default: none are)"
    parser.add_argument("--exclude-mc-bench", type=Path, metavar="FOLDER", help=excluded)
    size = "how many records the mixture has (default: %(default)s)"
    parser.add_argument("--size", type=whole_number, metavar="N", default=sum(MG_DATA_SHARES.values()), help=size)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .jsonl to write (required)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    folders = Folders(**{name: getattr(args, name) for name in TITLES})
    compose(folders, args.exclude_mc_bench, args.size, args.seed, args.out, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
