"""Several record files -> one, each in full or as a random part of it: the mixture that a stage trains on.

    python -m train.data.mix runs/stage2.jsonl cot.jsonl mg240k.jsonl:100000 refcoco.jsonl:50000 [--seed 0]

Paths of pictures are written anew, so the files may lie in different folders. Bad records are counted and left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, seed_number
from train.data.record import Record, Tally, keep_good, read_records, write_records
from train.data.reservoir import Reservoir


def mix(parts: Sequence[tuple[Path, int | None]], seed: int, tally: Tally) -> Iterator[Record]:
    """The records of every (file, how many; None for all), file after file; training shuffles them."""
    for number, (file, count) in enumerate(parts):
        good = keep_good(read_records(file), tally)
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


@command("train.data.mix")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.data.mix", description="Mix record files.")
    parser.add_argument("out", type=Path, help="the .jsonl to write")
    parts = "a .jsonl of records, and how many of them are drawn (default: all)"
    parser.add_argument("parts", type=read_part, nargs="+", metavar="FILE[:COUNT]", help=parts)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    tally = Tally()
    inputs = [file for file, _ in args.parts]
    mixed = tqdm(mix(args.parts, args.seed, tally), unit="record", disable=None)
    count = write_records(mixed, args.out, inputs, overwrite=args.overwrite)
    print(f"{args.out}: {count} records written;", *tally.lines(), sep="\n  ")


if __name__ == "__main__":
    main()
