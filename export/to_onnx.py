"""Checkpoint folder -> bundle folder: the graphs are written op by op, the weights streamed. Imports no torch.

    python -m export.to_onnx CHECKPOINT BUNDLE [--dialect fused|standard|plain] [--precision float32|float16|bfloat16]
    python -m export.to_onnx CHECKPOINT BUNDLE --weights int4 [--vision-weights int8]     (fused: rounds on the way)
    python -m export.to_onnx ADAPTER BUNDLE [--base CHECKPOINT]                       (LoRA, merged on the way by torch)

Layers that the checkpoint has as GPTQ or AWQ codes keep them. Memory stays at a few times the largest piece read (64
MiB), whatever the size of the model; of an adapter, at the layer that is being merged.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from export.bundle_writer import FLOAT32, Recipe, count_tensors, write_bundle
from export.weights import Scheme
from gemvg_edge.bundle import DIALECTS, PRECISIONS
from gemvg_edge.command import OVERWRITE, run_command, whole_number
from gemvg_edge.images import EDGE_MAX_PIXELS
from quantize.checkpoint import open_checkpoint
from quantize.rtn import BLOCK_SIZES
from train.checkpoint import with_budget
from train.hub import checkpoint_folder
from train.profiles import NAMES

BITS = {"float": None, "int8": 8, "int4": 4}


def export(
    checkpoint: Path,
    target: Path,
    recipe: Recipe = FLOAT32,
    *,
    overwrite: bool = False,
    profile: str | None = None,
    max_pixels: int | None = None,
    base: Path | None = None,
) -> None:
    """Write the bundle, with a progress bar over the checkpoint's tensors.

    `profile` is one of train.profiles.NAMES, or guessed. `max_pixels` is the budget of a picture; left out, it is the
    checkpoint's, but no more than EDGE_MAX_PIXELS. Says on stderr what it chose.
    `base` is the checkpoint that an adapter belongs to; left out, it is the one that the adapter names.
    """
    recipe.check()
    opened = open_checkpoint(checkpoint, profile, base)
    stated = opened.config.settings.preprocessing.max_pixels
    settings = with_budget(opened.config.settings, max_pixels)
    opened = replace(opened, config=replace(opened.config, settings=settings))
    budget = settings.preprocessing.max_pixels
    other = f" (the checkpoint has {stated}; --max-pixels)" if budget != stated else ""
    with tqdm(total=count_tensors(opened), desc=target.name, unit="tensor", delay=1) as bar:
        write_bundle(opened, target, recipe, lambda name: bar.update() and None, overwrite=overwrite)
    merged = f"; {opened.adapter.folder} merged into {opened.folder}" if opened.adapter else ""
    print(f"{target.name}: profile {settings.profile}, max_pixels {budget}{other}{merged}", file=sys.stderr)


def read_recipe(given: argparse.Namespace) -> Recipe:
    """What the command line asks for."""
    # The vision tower reads each weight once a picture, so it gains little from 4 bits and loses more.
    vision = given.vision_weights or ("float" if given.weights == "float" else "int8")
    schemes = (Scheme(BITS[name], given.block_size) for name in (given.weights, vision))
    # TensorRT's fused attention in float16 sums in float16, which spoils long contexts (corrupted text was seen in
    # NVIDIA/TensorRT-Model-Connect, pull request 785); in bfloat16 it sums in float32. Read in its programs.
    usual = "float32" if given.dialect == "fused" else "bfloat16"
    return Recipe(given.dialect, given.precision or usual, *schemes)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    return run_command("export.to_onnx", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.to_onnx", description=__doc__, formatter_class=raw)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a Qwen2-VL folder (config.json, safetensors, tokenizer) or LoRA folder, or its hub id",
    )
    parser.add_argument("bundle", type=Path, help="the bundle folder to write")
    belongs = "of an adapter: the checkpoint that it belongs to, or its hub id (default: the one that it names)"
    parser.add_argument("--base", type=Path, metavar="CHECKPOINT", help=belongs)
    dialects = "ONNX Runtime's ops, those of opset 24, or those of TensorRT 10.3 (default: %(default)s)"
    parser.add_argument("--dialect", choices=DIALECTS, default="fused", help=dialects)
    precisions = "what the graphs compute in (default: float32 for fused, bfloat16 for TensorRT's dialects)"
    parser.add_argument("--precision", choices=PRECISIONS, help=precisions)
    decoder = "weights of decoder and head, where they are stored as floats (default: %(default)s)"
    parser.add_argument("--weights", choices=tuple(BITS), default="float", help=decoder)
    vision = "weights of the vision tower (default: float, or int8 where --weights rounds)"
    parser.add_argument("--vision-weights", choices=tuple(BITS), help=vision)
    block = "how many weights share a scale where --weights rounds (default: %(default)s)"
    parser.add_argument("--block-size", type=whole_number, choices=BLOCK_SIZES, default=32, help=block)
    words = "how the checkpoint is asked and answers (default: what its config says or points to; see train/profiles)"
    parser.add_argument("--profile", choices=NAMES, help=words)
    budget = f"pixels of a picture after resizing, at most (default: the checkpoint's, up to {EDGE_MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=whole_number, metavar="N", help=budget)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    given = parser.parse_args(arguments)
    chosen = {"profile": given.profile, "max_pixels": given.max_pixels, "overwrite": given.overwrite}
    chosen["base"] = given.base and checkpoint_folder(given.base)
    export(checkpoint_folder(given.checkpoint), given.bundle, read_recipe(given), **chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
