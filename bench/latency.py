"""Our latency beside other runtimes', on this machine, phase by phase: same shape, same pictures, same question.

    python -m bench.latency [--shape qwen2-vl-2b] [--images 2] [--pixels 448x448]
                            [--peers openvino-genai,llama-cpp,transformers] [--save bench/results/latency.json]

The first time it makes a checkpoint of the true shape (random weights, Qwen's tokenizer), installs each rival and
converts with its own tools: tens of minutes and about 25 GB, kept in --work. Each system is a process of its own; runs
are interleaved, and the others are stopped meanwhile. On a machine where somebody else computes it refuses, with exit
code 1. `--save` writes a plot beside the JSON. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.fit.roofline import Shape, shape_of
from bench.peers.checkpoint import SHAPES, TINY, own_checkpoint, random_checkpoint
from bench.peers.conversion import OURS, RIVALS, Prepared, prepare
from bench.results import machine, result_file, save_result
from bench.speed.noise import LIMIT, Noise, listen
from bench.speed.peaks import measure_peaks, middle
from bench.speed.report import bars, markdown, plot, ratios, slopes
from bench.speed.rounds import Measured, NoisyError, Plan, measure, warm_up
from bench.speed.work import DIGITS_BOX, add_boxes, operations, shares
from bench.speed.workers import Worker, open_worker
from gemvg_edge.command import command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import resized_sizes
from gemvg_edge.prompt import encode
from quantize.model_config import ModelConfig, read_config
from train.hub import checkpoint_folder

WORK = Path("~/.cache/gemvg-edge/bench")
LISTEN = 2.0  # seconds
TEXT_TOKENS = 512  # room beside the pictures, in each system's context
SLOW = ("transformers",)  # left out unless it is asked for
GIB = 2**30


def read_pixels(text: str) -> tuple[int, int]:
    """`448x448` -> (width, height)."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and 28 <= int(width) <= 4096 and 28 <= int(height) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give WIDTHxHEIGHT, each 28 to 4096, such as 448x448")
    return int(width), int(height)


def read_counts(text: str) -> list[int]:
    """`1,2,4,8` -> [1, 2, 4, 8]."""
    counts = [whole_number(part) for part in text.split(",")]
    if min(counts) < 1 or max(counts) > 9:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of pictures from 1 to 9, such as 1,2,4,8")
    return sorted(set(counts))


def read_names(text: str) -> list[str]:
    """Systems, separated by commas; none for an empty text."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in (*OURS, *RIVALS)]:
        raise argparse.ArgumentTypeError(f"no {unknown[0]!r} is known; give some of {', '.join((*OURS, *RIVALS))}")
    return names


def prepare_all(names: Sequence[str], checkpoint: Path, work: Path, failed: dict[str, str]) -> dict[str, Prepared]:
    """Those systems that can be had; of the others `failed` tells why."""
    ready = {}
    for name in names:
        print(f"{name}: installed and converted?", file=sys.stderr)
        try:
            ready[name] = prepare(name, checkpoint, work)
        except GemvgError as error:
            failed[name] = str(error)
            print(f"{name} cannot be prepared: {error}", file=sys.stderr)
    return ready


def row_of(
    prepared: Prepared, measured: Measured, peak: int, load: float, pictures: int, shape: Shape,
    picture_tokens: int, box_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """A system's line of the result."""
    phases = add_boxes(measured.medians(), box_tokens)
    work = operations(shape, picture_tokens, pictures, int(phases["prompt_tokens"]))
    # Against the peaks of its own moment: a virtual machine's processor is not always as fast.
    reached = [
        shares(one, work, prepared.token_bytes, middle(around))
        for one, around in zip(measured.runs, measured.peaks, strict=True)
    ]
    return {
        "system": prepared.name,
        "pictures": pictures,
        "load_s": load,
        **phases,
        "peak_gib": peak / GIB,
        "token_bytes": prepared.token_bytes,
        "shares": {key: median(share[key] for share in reached) for key in reached[0]},
        "first_token_runs_ms": [run["first_token_ms"] for run in measured.runs],
    }


Gathered = list[tuple[str, int, Measured, int]]  # system, pictures, its runs, its peak memory in bytes


def measure_all(
    prepared: dict[str, Prepared], counts: Sequence[int], plan: Plan, context: int, failed: dict[str, str]
) -> tuple[Gathered, dict[str, float]]:
    """All systems, side by side, for each number of pictures; and the seconds that each took to open."""
    gathered: Gathered = []
    workers: dict[str, Worker] = {}
    loads: dict[str, float] = {}
    with ExitStack() as stack:
        for name, one in prepared.items():
            try:
                log = plan.work / "logs" / f"{name}.log"
                workers[name], loads[name] = open_worker(one, log, plan.threads, context)
                stack.callback(workers[name].close)
                warm_up(workers[name], plan)
            except GemvgError as error:
                failed[name] = str(error)
                workers.pop(name, None)
        for count in counts:
            measured, memory = measure(workers, count, plan, failed)
            gathered += [(name, count, found, memory[name]) for name, found in measured.items()]
    return gathered, loads


def tokens_of_picture(config: ModelConfig, size: tuple[int, int]) -> int:
    """Visual tokens that a picture of this size takes."""
    numbers = config.settings.preprocessing
    ((width, height),) = resized_sizes([size], numbers)
    return width * height // (numbers.patch_size * numbers.merge_size) ** 2


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark but what is done with its result; NoisyError on a machine that is not quiet."""
    work: Path = args.work.expanduser()
    if args.checkpoint:
        folder = checkpoint_folder(args.checkpoint)
        checkpoint = own_checkpoint(folder, work / "checkpoints" / f"own-{folder.resolve().name}")
    else:
        checkpoint = random_checkpoint(args.shape, work)
    config = read_config(checkpoint)
    failed: dict[str, str] = {}
    prepared = prepare_all([*args.systems, *args.peers], checkpoint, work, failed)
    if not prepared:
        raise GemvgError("no system could be prepared; see above")
    loudest = heard = listen(LISTEN)
    if heard.share > LIMIT and not args.noisy:
        raise NoisyError(f"{heard.told()} before anything was measured")
    tokens = tokens_of_picture(config, args.pixels)
    context = tokens * max(args.images) + TEXT_TOKENS
    plan = Plan(
        work,
        args.pixels,
        args.runs,
        args.tokens,
        args.threads,
        args.noisy,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        peaks=lambda: measure_peaks(work, args.threads),
    )
    gathered, loads = measure_all(prepared, args.images, plan, context, failed)
    rows, shape = [], shape_of(config, args.shape)
    box_tokens = len(encode(config.settings.tokenizer, DIGITS_BOX))
    for name, count, found, used in gathered:
        loudest = max(loudest, found.noise, key=lambda noise: noise.share)
        rows.append(row_of(prepared[name], found, used, loads[name], count, shape, tokens, box_tokens))
    peaks = [one for _, _, found, _ in gathered for around in found.peaks for one in around]
    ratios(rows)
    return {
        "model": f"{checkpoint.name}, {'own' if args.checkpoint else 'random'} weights",
        "pixels": "{}x{}".format(*args.pixels),
        "picture_tokens": tokens,
        "runs": args.runs,
        "threads": args.threads,
        "peaks": middle(peaks or [measure_peaks(work, args.threads)]),
        "noise": noise_entry(loudest),
        "rows": rows,
        "slopes": slopes(rows),
        "goals": bars(rows) if rows else [],
        "failed": failed,
    }


def noise_entry(noise: Noise) -> dict[str, Any]:
    """The loudest other process of all that was measured, for the result."""
    told = noise.told() if noise.name else "no other process was heard"
    return {"told": told, "share": noise.share, "all": noise.all, "loud": noise.share > LIMIT}


@command("bench.latency")
def main() -> None:
    """Command line; see the module's first lines."""
    args = parse()
    try:
        result = run(args)
    except NoisyError as error:
        print(
            f"bench.latency: {error}, more than {100 * LIMIT:.0f} %; wait, or give --noisy, which the result tells",
            file=sys.stderr,
        )
        sys.exit(1)
    print(markdown(result))
    for goal in result["goals"]:
        limit = f"at most {goal['at_most']:.2f}" if "at_most" in goal else f"at least {goal['at_least']:.2f}"
        print(f"{goal['goal']}: {goal['reached']:.2f}, {limit}: {'met' if goal['met'] else 'not met'}")
    if args.save and result["rows"]:
        plot({**result, "machine": machine()}, args.save.with_suffix(".png"))
    save_result(result, args.save)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m bench.latency", description=__doc__, formatter_class=raw)
    shape = f"whose exact widths the weights have; {TINY} is for a try (default: %(default)s)"
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen2-vl-2b", help=shape)
    own = "a Qwen2-VL folder or hub id to measure instead, its weights real (default: random ones of --shape)"
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help=own)
    images = "how many pictures, or several numbers for a plot of how each phase grows (default: 2)"
    parser.add_argument("--images", type=read_counts, metavar="N,N", default=[2], help=images)
    pixels = "size of each picture (default: 448x448)"
    parser.add_argument("--pixels", type=read_pixels, metavar="WxH", default=(448, 448), help=pixels)
    peers = f"rivals, separated by commas, '' for none (default: {','.join(n for n in RIVALS if n not in SLOW)})"
    default = [name for name in RIVALS if name not in SLOW]
    parser.add_argument("--peers", type=read_names, metavar="NAMES", default=default, help=peers)
    systems = f"which of ours: {', '.join(OURS)}, that is the engine that the runtime picks, ONNX Runtime, and with "
    systems += f"three quarters of the visual tokens (default: {','.join(OURS[:2])})"
    parser.add_argument("--systems", type=read_names, metavar="NAMES", default=list(OURS[:2]), help=systems)
    runs = "interleaved runs of each system (default: %(default)s)"
    parser.add_argument("--runs", type=whole_number, metavar="N", default=3, help=runs)
    tokens = "decode steps that a token's time is taken from, in each run (default: %(default)s)"
    parser.add_argument("--tokens", type=whole_number, metavar="N", default=24, help=tokens)
    threads = "threads of every system (default: %(default)s)"
    parser.add_argument("--threads", type=whole_number, metavar="N", default=2, help=threads)
    place = "where checkpoints, tools and conversions are kept (default: %(default)s)"
    parser.add_argument("--work", type=Path, metavar="FOLDER", default=WORK, help=place)
    noisy = "measure although others compute; the result says so (default: refuse)"
    parser.add_argument("--noisy", action="store_true", help=noisy)
    saved = "keep the JSON here too, such as bench/results/latency.json, and a plot beside it (default: print it alone)"
    parser.add_argument("--save", type=result_file, metavar="FILE", help=saved)
    args = parser.parse_args()
    if min(args.runs, args.tokens, args.threads) < 1:
        parser.error("--runs, --tokens and --threads must be at least 1")
    return args


if __name__ == "__main__":
    main()
