"""Checkpoint folder -> bundle folder: the graphs are written op by op, the weights streamed. Imports no torch.

    python -m export.to_onnx CHECKPOINT BUNDLE [--weights float32|int4] [--vision-weights float32|int8|int4]

Memory stays at a few times the largest piece read (64 MiB), whatever the size of the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from export.bundle_writer import Recipe, count_tensors, write_bundle
from export.weights import Scheme
from gemvg_edge.errors import GemvgError
from quantize.checkpoint import open_checkpoint
from quantize.rtn import BLOCK_SIZES

BITS = {"float32": 32, "int8": 8, "int4": 4}


def export(checkpoint: Path, target: Path, weights: str, vision_weights: str | None, block_size: int) -> None:
    """Write the bundle, with a progress bar over the checkpoint's tensors."""
    # The vision tower reads each weight once a picture, so it gains little from 4 bits and loses more.
    vision_weights = vision_weights or ("float32" if weights == "float32" else "int8")
    recipe = Recipe(decoder=Scheme(BITS[weights], block_size), vision=Scheme(BITS[vision_weights], block_size))
    opened = open_checkpoint(checkpoint)
    with tqdm(total=count_tensors(opened), desc=target.name, unit="tensor", delay=1) as bar:
        write_bundle(opened, target, recipe, on_tensor=lambda name: bar.update() and None)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a Qwen2-VL folder: config.json, safetensors, tokenizer")
    parser.add_argument("bundle", type=Path, help="the folder to write; an existing bundle is replaced")
    parser.add_argument("--weights", choices=("float32", "int4"), default="float32", help="decoder and head")
    parser.add_argument("--vision-weights", choices=tuple(BITS), help="default: float32, or int8 with --weights int4")
    parser.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=32, help="weights that share a scale")
    given = parser.parse_args(arguments)
    try:
        export(given.checkpoint, given.bundle, given.weights, given.vision_weights, given.block_size)
    except GemvgError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{given.bundle} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
