"""One data set -> records, as training reads them.

    python -m train.data.convert mgrounding data/MGrounding-630k --out data/mgrounding.jsonl

Which folder a data set needs, and what it maps to, stands at the top of its reader. Malformed records are counted,
named and left out; so are those that show a picture of a benchmark, where its folder is given (exclude.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, seed_number
from gemvg_edge.errors import GemvgError
from train.data.coco import read_coco
from train.data.d3 import read_d3
from train.data.ego_exo import read_ego_exo
from train.data.exclude import add_flags, leave_out, read_exclusion
from train.data.llava import read_llava
from train.data.mgrounding import read_mgrounding
from train.data.mig_bench import read_mig_bench
from train.data.mvtrack import read_mvtrack
from train.data.record import Fault, Record, Tally, check_output, keep_good, write_records
from train.data.refcoco import read_refcoco
from train.data.star import read_star
from train.data.voc_labelme import read_labelme, read_voc

NAMES = ("mgrounding", "mig-bench", "d3", "coco", "refcoco", "ego-exo", "mvtrack", "star", "llava", "voc", "labelme")


def read(name: str, folder: Path, seed: int) -> Iterator[Record | Fault]:
    """The training split of a data set, all of one that has no splits."""
    match name:
        case "mgrounding":
            return read_mgrounding(folder)
        case "mig-bench":
            return read_mig_bench(folder)
        case "d3":
            return read_d3(folder, seed)
        case "coco":
            return read_coco(folder, seed=seed)
        case "refcoco":
            return read_refcoco(folder)
        case "ego-exo":
            return read_ego_exo(folder, seed=seed)
        case "mvtrack":
            return read_mvtrack(folder, seed=seed)
        case "star":
            return read_star(folder, seed=seed)
        case "llava":
            return read_llava(folder)
        case "voc":
            return read_voc(folder)
        case "labelme":
            return read_labelme(folder)
    raise GemvgError(f"{name!r} is no data set that can be read; use one of {', '.join(NAMES)}")


def convert(
    name: str,
    folder: Path,
    seed: int,
    out: Path,
    *,
    mc_bench: Path | None = None,
    others: Sequence[Path] = (),
    overwrite: bool = False,
) -> None:
    """Read, write and say what came of it; the last line is one JSON object.

    The pictures of `mc_bench` and of `others` are left out.
    """
    inputs = [folder, *([mc_bench] if mc_bench else []), *others]
    check_output(out, inputs, overwrite=overwrite)
    tally, exclusion = Tally(), read_exclusion(mc_bench, others)
    items = tqdm(leave_out(read(name, folder, seed), exclusion), desc=name, unit=" records", disable=None)
    written = write_records(_some(keep_good(items, tally), folder, tally), out, inputs, overwrite=overwrite)
    print("\n".join([*tally.lines(), *(exclusion.lines() if exclusion else ())]))
    told = {"refused": tally.refused.total(), "excluded": exclusion.counts() if exclusion else None}
    print(json.dumps({"records": written, **told, "out": str(out)}))


def _some(records: Iterable[Record], folder: Path, tally: Tally) -> Iterator[Record]:
    """The records; GemvgError where there are none, while an older file is still in its place."""
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007  (counted for the check below)
        yield record
    if not count:
        raise GemvgError(f"{folder} gave no record ({tally.refused.total()} were refused); {'; '.join(tally.lines())}")


@command("train.data.convert")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.data.convert", description="Convert one data set to records.")
    parser.add_argument("name", choices=NAMES, help="which data set it is")
    parser.add_argument("folder", type=Path, help="the folder that the data set lies in")
    seed = "what chance starts from, for data sets whose records are composed (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    add_flags(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .jsonl to write (required)")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    excluded = {"mc_bench": args.exclude_mc_bench, "others": args.exclude}
    convert(args.name, args.folder, args.seed, args.out, **excluded, overwrite=args.overwrite)


if __name__ == "__main__":
    main()
