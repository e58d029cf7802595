"""What a record file holds: shares, boxes, refused records, and a sheet of samples to look at.

    python -m train.data.inspect records.jsonl --sheet sheet.html --samples 24 --seed 0

The sheet is a .html that holds its pictures itself, or a .png. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gemvg_edge.command import command, seed_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import refuse_inputs, refuse_present
from train.data.record import Record, Tally, keep_good, read_records
from train.data.reservoir import Reservoir
from train.data.sheet import write_sheet

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MANY = 5  # boxes that are counted together with more


@dataclass
class Census:
    """Counts over records, and the share of its picture that each box covers."""

    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("kind", "mode", "source", "images", "boxes")}
    )
    areas: list[float] = field(default_factory=list)
    grounding: int = 0  # records that ask for boxes
    without_target: int = 0  # of those

    def add(self, record: Record) -> None:
        """Count one record."""
        boxes = str(len(record.boxes)) if len(record.boxes) < MANY else f"{MANY} or more"
        values = (record.kind, record.mode, record.source, str(len(record.images)), boxes)
        for counter, value in zip(self.counts.values(), values, strict=True):
            counter[value] += 1
        if record.kind != "understanding":
            self.grounding += 1
            self.without_target += not record.boxes
        for box in record.boxes:
            width, height = record.sizes[box.image]
            self.areas.append(box.area / (width * height))


def summarise(census: Census, tally: Tally) -> dict[str, Any]:
    """The census as JSON: quantiles are of a box's share of its picture's area."""
    quantiles = np.quantile(census.areas, QUANTILES).tolist() if census.areas else []
    return {
        "records": tally.kept,
        **{name: dict(sorted(counter.items())) for name, counter in census.counts.items()},
        "no_target_share": round(census.without_target / max(1, census.grounding), 4),
        "area_share": {str(q): round(value, 5) for q, value in zip(QUANTILES, quantiles, strict=False)},
        "refused": dict(tally.refused),
    }


def table(summary: dict[str, Any]) -> list[str]:
    """The summary for people."""
    total, lines = max(1, summary["records"]), []
    for name, title in (
        ("kind", "kind"),
        ("mode", "mode"),
        ("source", "source"),
        ("images", "images a record"),
        ("boxes", "boxes a record"),
    ):
        parts = (f"{value} {count} ({count / total:.1%})" for value, count in summary[name].items())
        lines.append(f"{title}: {', '.join(parts)}")
    lines.append(f"no target: {summary['no_target_share']:.1%} of the records that ask for boxes")
    areas = (f"{float(q):.0%} {value:.2%}" for q, value in summary["area_share"].items())
    return [*lines, f"box area as a share of its picture, quantiles: {', '.join(areas)}"]


def take_census(records: Iterable[Record], samples: Reservoir[Record], sheet: Path | None = None) -> Census:
    """Count all records and draw some; GemvgError where a sheet that is there already is a picture of theirs."""
    census = Census()
    for record in records:
        if sheet:
            refuse_inputs(sheet, record.images, "--sheet")
        census.add(record)
        samples.offer(record)
    return census


def inspect(file: Path, sheet: Path | None, samples: int, seed: int, overwrite: bool = False) -> None:
    """Print what the file holds and draw the sheet."""
    if sheet and sheet.suffix.lower() not in (".html", ".png"):
        raise GemvgError(f"{sheet}: a sheet is a .html or a .png")
    if sheet:
        refuse_inputs(sheet, [file], "--sheet")
        if not overwrite:
            refuse_present(sheet, "--sheet")
    tally, drawn = Tally(), Reservoir[Record](samples, np.random.default_rng(seed))
    replaced = sheet if sheet and os.path.exists(os.path.realpath(sheet)) else None  # else there is nothing to destroy
    items = tqdm(read_records(file), desc="reading", unit=" records", disable=None)
    summary = summarise(take_census(keep_good(items, tally), drawn, replaced), tally)
    print("\n".join([*tally.lines(), *table(summary)]))
    if sheet:
        write_sheet(drawn.items, sheet)
        print(f"{len(drawn.items)} samples are drawn in {sheet}")
    print(json.dumps(summary))


@command("train.data.inspect")
def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser("python -m train.data.inspect", description="Say what a record file holds.")
    parser.add_argument("file", type=Path, help="the .jsonl of records to read")
    sheet = "where to draw samples, a .html or a .png (default: nowhere)"
    parser.add_argument("--sheet", type=Path, metavar="FILE", help=sheet)
    parser.add_argument(
        "--overwrite", action="store_true", help="let --sheet replace a file that is there (default: say so and stop)"
    )
    samples = "how many records are drawn (default: %(default)s)"
    parser.add_argument("--samples", type=whole_number, metavar="N", default=24, help=samples)
    seed = "what the choice of them starts from (default: %(default)s)"
    parser.add_argument("--seed", type=seed_number, metavar="N", default=0, help=seed)
    args = parser.parse_args()
    inspect(args.file, args.sheet, args.samples, args.seed, args.overwrite)


if __name__ == "__main__":
    main()
