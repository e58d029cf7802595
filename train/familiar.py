"""Tell a checkpoint what its training pictures look like, so that the runtime can say that others are unlike them.

    python -m train.familiar checkpoints/tabletop runs/told --data data/world/train --pictures 2

Writes the ranges of gemvg_edge.familiar's numbers over the pictures of a folder to `grounding.familiar` of config.json.
Ends with one JSON line: the ranges, and the share of `--against` (other pictures) that lies outside of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import OVERWRITE, command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.familiar import STATISTICS, Familiar, statistics, unfamiliar
from gemvg_edge.files import is_folder
from gemvg_edge.images import load_image
from train.checkpoint import CONFIG, read_json, read_settings
from train.hub import checkpoint_folder
from train.rewrite import keep_record, rewrite_weights, write_json, writing

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
MARGIN = 0.25  # of a range, added on both sides: pictures of the kind that were not among those measured


def measure(pictures: Iterable[Path], most: int) -> Familiar:
    """What all of these pictures have in common, with a margin; `most` of them come in one question."""
    rows = np.array([list(statistics(load_image(path)).values()) for path in pictures])
    low, high = rows.min(axis=0), rows.max(axis=0)
    margin = MARGIN * (high - low)
    low, high = np.maximum(low - margin, 0).round(4), np.minimum(high + margin, 1).round(4)
    ranges = {name: (float(low[k]), float(high[k])) for k, name in enumerate(STATISTICS)}
    return Familiar(most, **ranges)


def find_pictures(folder: Path, count: int) -> list[Path]:
    """Up to `count` picture files of a folder, spread evenly over them."""
    if not is_folder(folder):
        raise GemvgError(f"{folder}: no such folder of pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        raise GemvgError(f"{folder} holds no pictures ({', '.join(ENDINGS)}); give the folder that was trained on")
    return found[:: max(1, len(found) // count)][:count]


def outside(pictures: Iterable[Path], known: Familiar) -> float:
    """The share of pictures that are not like those."""
    return float(np.mean([unfamiliar([load_image(path)], known) is not None for path in pictures]))


@command("train.familiar")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(
        "python -m train.familiar", description="Tell a checkpoint what its training pictures look like."
    )
    parser.add_argument("checkpoint", type=Path, help="the checkpoint folder to read")
    parser.add_argument("out", type=Path, help="the checkpoint folder to write")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder of pictures that it was trained on (required)"
    )
    parser.add_argument(
        "--pictures",
        type=whole_number,
        metavar="N",
        required=True,
        help="the most pictures of a question in training (required)",
    )
    parser.add_argument(
        "--count", type=whole_number, metavar="N", default=2000, help="pictures to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="other pictures, of which to say how many are told apart (default: none)",
    )
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    args = parser.parse_args()
    if args.pictures < 1 or args.count < 1:
        parser.error("--pictures and --count must be at least 1")
    checkpoint = checkpoint_folder(args.checkpoint)
    read_settings(checkpoint)
    known = measure(tqdm(find_pictures(args.data, args.count), desc="pictures", delay=1), args.pictures)
    shares = {str(folder): round(outside(find_pictures(folder, args.count), known), 4) for folder in args.against}
    config = read_json(checkpoint / CONFIG)
    config["grounding"] = {**(config.get("grounding") or {}), "familiar": known.to_config()}
    with writing(checkpoint, args.out, overwrite=args.overwrite) as folder:
        write_json(folder / CONFIG, config)
        rewrite_weights(checkpoint, folder, lambda name, tensor: (name, tensor))
        keep_record(checkpoint, folder)
    print(json.dumps({"out": str(args.out), **known.to_config(), "outside": shares}))


if __name__ == "__main__":
    main()
