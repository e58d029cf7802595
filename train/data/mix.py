"""Several record files -> one, each in full or as a random part of it: the mixture that a stage trains on.

    python -m train.data.mix runs/stage2.jsonl cot.jsonl mg240k.jsonl:100000 refcoco.jsonl:50000 [--seed 0]

Paths of pictures are written anew, so the files may lie in different folders. Bad records are counted and left out; so
are those that show a picture of a benchmark, where its folder is given (exclude.py). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, seed_number
from gemvg_edge.files import printable
from train.data.exclude import NOT_EXCLUDED, Exclusion, add_flags, leave_out, read_exclusion
from train.data.record import Record, Tally, check_output, keep_good, read_records, write_records
from train.data.reservoir import Reservoir


def mix(
    parts: Sequence[tuple[Path, int | None]], seed: int, tally: Tally, exclusion: Exclusion | None = None
) -> Iterator[Record]:
    """The records of every (file, how many; None for all), file after file; training shuffles them."""
    for number, (file, count) in enumerate(parts):
        good = keep_good(leave_out(read_records(file), exclusion), tally)
        if count is None:
            yield from good
        else:
            pool = Reservoir[Record](count, np.random.default_rng([seed, number]))
            for record in good:
                pool.offer(record)
            yield from pool.items


def read_part(text: str) -> tuple[Path, int | None]:
    """`file` or `file:count`."""
    name, colon, count = text.rpartition(":")
    if not colon:
        return Path(text), None
    if not count.isdigit() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text}: after the colon goes how many records to take, at least 1")
    return Path(name), int(count)


def _counted(records: Iterator[Record], counts: Counter[tuple[str, str]]) -> Iterator[Record]:
    """The records, each counted by its (kind, source)."""
    for record in records:
        counts[record.kind, record.source] += 1
        yield record


def report(counts: Counter[tuple[str, str]]) -> list[str]:
    """The share of each kind in a mixture, and the sources that it is from."""
    kinds, lines = _sums(counts, 0), []
    for kind, count in kinds.most_common():
        sources = Counter({source: n for (of, source), n in counts.items() if of == kind}).most_common()
        parts = ", ".join(f"{printable(source)} {n}" for source, n in sources)
        lines.append(f"{kind}: {count}, {count / kinds.total():.1%} ({parts})")
    return lines


def _sums(counts: Counter[tuple[str, str]], part: int) -> Counter[str]:
    """The counts by kind (0) or by source (1) alone."""
    sums = Counter[str]()
    for pair, count in counts.items():
        sums[pair[part]] += count
    return sums


@command("train.data.mix")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.data.mix", description="Mix record files.")
    parser.add_argument("out", type=Path, help="the .jsonl to write")
    parts = "a .jsonl of records, and how many of them are drawn (default: all)"
    parser.add_argument("parts", type=read_part, nargs="+", metavar="FILE[:COUNT]", help=parts)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    add_flags(parser)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    inputs = [file for file, _ in args.parts] + [f for f in (args.exclude_mc_bench, *args.exclude) if f]
    check_output(args.out, inputs, overwrite=args.overwrite)
    tally, counts, exclusion = Tally(), Counter[tuple[str, str]](), read_exclusion(args.exclude_mc_bench, args.exclude)
    mixed = tqdm(mix(args.parts, args.seed, tally, exclusion), unit="record", disable=None)
    written = write_records(_counted(iter(mixed), counts), args.out, inputs, overwrite=args.overwrite)
    lines = [*tally.lines(), *report(counts), *(exclusion.lines() if exclusion else ())]
    print(f"{args.out}: {written} records written;", *lines, sep="\n  ")
    if not args.exclude_mc_bench:
        print(f"  {NOT_EXCLUDED}, unless each file was made with --exclude-mc-bench")
    told = {"refused": tally.refused.total(), "excluded": exclusion.counts() if exclusion else None}
    print(json.dumps({"records": written, "kinds": _sums(counts, 0), "sources": _sums(counts, 1), **told}))


if __name__ == "__main__":
    main()
