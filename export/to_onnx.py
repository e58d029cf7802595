"""Checkpoint folder -> bundle folder: the graphs are written op by op, the weights streamed. Imports no torch.

    python -m export.to_onnx CHECKPOINT BUNDLE [--dialect fused|standard|plain] [--precision float32|float16|bfloat16]
    python -m export.to_onnx CHECKPOINT BUNDLE --weights int4 [--vision-weights int8]     (fused: rounds on the way)

Layers that the checkpoint has as GPTQ codes keep them. Memory stays at a few times the largest piece read (64 MiB),
whatever the size of the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from export.bundle_writer import FLOAT32, Recipe, count_tensors, write_bundle
from export.weights import Scheme
from gemvg_edge.bundle import DIALECTS, PRECISIONS
from gemvg_edge.command import run_command, whole_number
from quantize.checkpoint import open_checkpoint
from quantize.rtn import BLOCK_SIZES

BITS = {"float": None, "int8": 8, "int4": 4}


def export(checkpoint: Path, target: Path, recipe: Recipe = FLOAT32) -> None:
    """Write the bundle, with a progress bar over the checkpoint's tensors."""
    recipe.check()
    opened = open_checkpoint(checkpoint)
    with tqdm(total=count_tensors(opened), desc=target.name, unit="tensor", delay=1) as bar:
        write_bundle(opened, target, recipe, on_tensor=lambda name: bar.update() and None)


def read_recipe(given: argparse.Namespace) -> Recipe:
    """What the command line asks for."""
    # The vision tower reads each weight once a picture, so it gains little from 4 bits and loses more.
    vision = given.vision_weights or ("float" if given.weights == "float" else "int8")
    schemes = (Scheme(BITS[name], given.block_size) for name in (given.weights, vision))
    return Recipe(given.dialect, given.precision, *schemes)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    return run_command("export.to_onnx", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Qwen2-VL folder: config.json, safetensors, tokenizer")
    parser.add_argument("bundle", type=Path, help="the folder to write; an existing bundle is replaced")
    dialects = "ONNX Runtime's ops, those of opset 24, or those of TensorRT 10.3"
    parser.add_argument("--dialect", choices=DIALECTS, default="fused", help=dialects)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="what the graphs compute in")
    decoder = "of decoder and head, where they are stored as floats"
    parser.add_argument("--weights", choices=tuple(BITS), default="float", help=decoder)
    parser.add_argument("--vision-weights", choices=tuple(BITS), help="default: float, or int8 where --weights rounds")
    parser.add_argument(
        "--block-size", type=whole_number, choices=BLOCK_SIZES, default=32, help="weights that share a scale"
    )
    given = parser.parse_args(arguments)
    export(given.checkpoint, given.bundle, read_recipe(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
