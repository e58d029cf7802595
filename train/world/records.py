"""Rendered scenes -> records, for the stages that read records: GRPO, train.data.inspect, bench.accuracy --records.

    python -m train.world.records data/world/train runs/rl.jsonl --count 4000 [--cot-share 0.5] [--brief-share 0.5]

One question a record; kinds come in equal shares. Pictures stay where they are, so the file holds paths.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, finite_number, seed_number, whole_number
from train.data.record import Record, write_records
from train.world.samples import KIND_ROLES, as_record, draw_question
from train.world.scenes import read_scenes


def world_records(folder: Path, count: int, cot_share: float, seed: int, brief_share: float = 0.0) -> Iterator[Record]:
    """`count` records, fixed by the seed; `brief_share` of those with reasoning carry its conclusion alone."""
    scenes = {scene.seed: scene for scene in read_scenes(folder)}
    kinds = list(KIND_ROLES)
    for number in range(count):
        rng, kind = np.random.default_rng([seed, 4, number]), kinds[number % len(kinds)]
        asked = draw_question(scenes, folder, kind, rng)
        cot, brief = rng.random() < cot_share, rng.random() < brief_share
        yield as_record(*asked, folder, "tabletop", cot, brief)


@command("train.world.records")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.world.records", description="Write records from rendered scenes.")
    parser.add_argument("scenes", type=Path, help="the folder that train.world.render wrote")
    parser.add_argument("out", type=Path, help="the .jsonl to write")
    count = "how many records, a question each (default: %(default)s)"
    parser.add_argument("--count", type=whole_number, metavar="N", default=4000, help=count)
    share = "share of the records that carry reasoning, 0 to 1 (default: %(default)s)"
    parser.add_argument("--cot-share", type=finite_number, metavar="SHARE", default=0.0, help=share)
    brief = "share of that reasoning which is the conclusion alone, 0 to 1 (default: %(default)s)"
    parser.add_argument("--brief-share", type=finite_number, metavar="SHARE", default=0.0, help=brief)
    seed = "what drawing starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    for name in ("cot_share", "brief_share"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be between 0 and 1")
    records = world_records(args.scenes, args.count, args.cot_share, args.seed, args.brief_share)
    bar = tqdm(records, total=args.count, unit="record", disable=None)
    write_records(bar, args.out, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
