"""What can be had for what: bits, pixels, pruning, answers and engines over time, memory and F1; the best are marked.

    python -m bench.tradeoff [--checkpoint FOLDER ...] [--limit N] [--save bench/results/tradeoff.json]
    python -m bench.tradeoff --max-ms 20 --max-mb 80 --min-f1 0.85 [--read bench/results/tradeoff.json]
    python -m bench.tradeoff --device jetson-orin-nano-8gb --shape qwen2-vl-2b

Bundles are exported once into --work. Every point answers the same held-out questions; time and memory are those of
fresh processes. Digits or locations is a checkpoint's own: give several. Limits pick the point with the best F1 and
print the commands that make it, or exit with 1. On a device memory and time are planned and F1 is the small model's.
`--save` also writes a plot beside the JSON, which is the last line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.boxes.held_out import held_out, held_out_arguments
from bench.plan import find_device, find_shape, read_shapes
from bench.results import machine, result_file, save_result
from bench.speed.tradeoff_bundles import BITS, ENGINES, commands, device_commands, engines_here
from bench.speed.tradeoff_device import device_points, room_mb
from bench.speed.tradeoff_front import Limits, Point, choose, front, point_of, refusal
from bench.speed.tradeoff_measure import Grid, make_point, measure_all, score_all, settings
from bench.speed.tradeoff_report import plot, whole_table
from gemvg_edge.command import command, finite_number, positive_number, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import printable, read_text
from gemvg_edge.json_object import parse_json

QUESTIONS, ROUNDS = 200, 3
CHECKPOINT = Path("checkpoints/tabletop")
WORK = Path("runs/tradeoff")
# Pixels and tokens each as a share of all; the small model was trained at one size and loses its boxes far below it.
PIXELS, KEEP = (1.0, 0.9, 0.75), (1.0, 0.75, 0.5)
KEPT = ("questions", "threads", "rounds", "measured_on", "device", "room_mb")  # of an earlier result
ANSWERS = {"grammar": True, "free": False}


def share(text: str) -> float:
    """A number above 0 and at most 1, for argparse's `type`."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share; give one above 0 and at most 1")
    return value


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Everything but what is asked of the points; of a device's, boxes alone are measured here."""
    engines, missing = engines_here(args.engines)
    if missing:
        print(missing, file=sys.stderr)
    if not engines:
        raise GemvgError(f"no engine is left to measure with; give --engines {ENGINES[-1]}")
    grid = Grid(args.bits, engines, args.pixels, args.keep, [ANSWERS[name] for name in args.answers])
    if args.device:  # it has one engine, which prunes and decodes as the small model's do
        grid = Grid(args.bits, engines[:1], args.pixels, [], [True])
    bundles, records = settings(args.checkpoint, grid, args.work), held_out(args.data, args.limit)
    scores = score_all(bundles, records, args.threads)
    if args.device:
        points = [make_point(setting, 0.0, 0.0, found) for setting, found in scores.items()]
    else:
        points = measure_all(bundles, scores, records, args.threads, args.rounds)
    about = {"questions": len(records), "threads": args.threads, "rounds": args.rounds, "measured_on": machine()}
    return {**about, "device": None, "room_mb": None, "points": points}


def read_result(file: Path) -> dict[str, Any]:
    """An earlier result, its points made from their rows; GemvgError for a file that is none."""
    try:
        found: dict[str, Any] = dict(parse_json(read_text(file)))
        points = [point_of(row) for row in found["points"]]
        return {**{key: found[key] for key in KEPT}, "points": points}
    except (KeyError, TypeError, ValueError) as error:
        raise GemvgError(f"{printable(file)} is no result of bench.tradeoff ({error}); make one with --save") from None


def on_device(result: dict[str, Any], device: str, shape: str) -> dict[str, Any]:
    """The result with the planned points of a device instead."""
    if result["device"]:
        raise GemvgError(
            f"the result was planned for {result['device']}; read one that was measured, or leave out --device"
        )
    there = find_device(device)
    points = device_points(result["points"], find_shape(shape), there)
    return {**result, "device": device, "room_mb": room_mb(there), "points": points}


@command("bench.tradeoff")
def main() -> None:
    """Command line; see the module's first lines."""
    args = parse()
    result = read_result(args.read) if args.read else measured(args)
    if args.device:
        result = on_device(result, args.device, args.shape)
    points: list[Point] = result["points"]
    room = result["room_mb"]
    best = front([point for point in points if room is None or point.mb <= room])
    result["points"] = [{**point.row(), "front": point in best} for point in points]
    print(whole_table(result))
    if args.save:
        plot(result, args.save.with_suffix(".png"))
    asked = any(limit is not None for limit in (args.max_ms, args.max_mb, args.min_f1))
    limits = Limits(args.max_ms, min(filter(None, (args.max_mb, room)), default=None), args.min_f1)
    chosen = choose(points, limits) if asked else None
    if chosen:
        print(f"\n{limits}: {chosen.setting}; {chosen.ms:g} ms, {chosen.mb:g} MB, F1 {chosen.f1:.3f}\n")
        setting = chosen.setting
        print(device_commands(setting, result["device"]) if result["device"] else commands(setting, result["threads"]))
    save_result({**result, "chosen": chosen and chosen.row()}, args.save)
    if asked and not chosen:
        print(f"bench.tradeoff: {refusal(points, limits)}", file=sys.stderr)
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.tradeoff", description=__doc__, formatter_class=raw)
    folders = f"checkpoint folders or hub ids, one or more (default: {CHECKPOINT})"
    parser.add_argument("--checkpoint", type=Path, nargs="+", metavar="FOLDER", default=[CHECKPOINT], help=folders)
    most = "pick the best F1 of those that take at most so many milliseconds for a look and a question (default: any)"
    parser.add_argument("--max-ms", type=positive_number, metavar="MS", help=most)
    memory = "and whose process takes at most so many MB, of 10^6 bytes (default: any)"
    parser.add_argument("--max-mb", type=positive_number, metavar="MB", help=memory)
    least = "and whose F1@0.5 is at least this (default: any)"
    parser.add_argument("--min-f1", type=finite_number, metavar="F1", help=least)
    parser.add_argument("--read", type=Path, metavar="FILE", help="take an earlier result's points (default: measure)")
    there = "a name from bench/fit/devices.json whose memory and time are planned instead (default: this machine)"
    parser.add_argument("--device", metavar="NAME", help=there)
    shape = f"what runs on the device: {', '.join(read_shapes())} or a checkpoint folder (default: %(default)s)"
    parser.add_argument("--shape", metavar="SHAPE", default="qwen2-vl-2b", help=shape)
    held_out_arguments(parser, QUESTIONS)
    rounds = "fresh processes that time each point (default: %(default)s)"
    parser.add_argument("--rounds", type=whole_number, metavar="N", default=ROUNDS, help=rounds)
    threads = "CPU threads, 0 for one a physical core (default: %(default)s)"
    parser.add_argument("--threads", type=whole_number, metavar="N", default=0, help=threads)
    bits = "how weights are stored; gptq is the shipped bundle or the checkpoint's own (default: all)"
    parser.add_argument("--bits", choices=BITS, nargs="+", default=BITS, help=bits)
    engines = "what runs the bundles (default: all)"
    parser.add_argument("--engines", choices=ENGINES, nargs="+", default=ENGINES, help=engines)
    pixels = f"budgets of a picture, shares of the bundle's own (default: {_listed(PIXELS)})"
    parser.add_argument("--pixels", type=share, nargs="+", metavar="SHARE", default=PIXELS, help=pixels)
    keep = f"shares of the visual tokens that are kept (default: {_listed(KEEP)})"
    parser.add_argument("--keep", type=share, nargs="+", metavar="SHARE", default=KEEP, help=keep)
    answers = "decoding by the grammar of an answer, or with every token free (default: both)"
    parser.add_argument("--answers", choices=tuple(ANSWERS), nargs="+", default=tuple(ANSWERS), help=answers)
    work = "the folder where exported bundles are kept (default: %(default)s)"
    parser.add_argument("--work", type=Path, metavar="FOLDER", default=WORK, help=work)
    saved = "keep the JSON here too, and a plot of the same name in PNG (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if args.limit < 1 or args.rounds < 1 or args.threads < 0:
        parser.error("--limit and --rounds must be at least 1, --threads at least 0")
    return args


def _listed(shares: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in shares)


if __name__ == "__main__":
    main()
