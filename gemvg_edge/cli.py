"""The command `gemvg`.

    gemvg ground left.png right.png --query "the red mug" [--json] [--draw out.png [--overwrite]] [--bundle FOLDER]
    gemvg inspect [BUNDLE]

Exit code 0, or 2 with one sentence on stderr when the input is at fault (gemvg_edge.command has the others).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gemvg_edge import __version__
from gemvg_edge.command import one_line, run_command, whole_number
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable, refuse_inputs, refuse_present, replacing
from gemvg_edge.models import DEFAULT_BUNDLE

if TYPE_CHECKING:
    from PIL import Image

    from gemvg_edge.answer import AnswerFormat
    from gemvg_edge.grounder import Grounding

# What takes time to import is imported where it is used: inside `run_command`, which answers an interrupt with a line.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    return run_command("gemvg", lambda: _run(_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> int:
    return _ground(options) if options.command == "ground" else _inspect(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemvg", description="Ask several pictures a question and get boxes.")
    parser.add_argument("--version", action="version", version=f"gemvg-edge {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    ground = commands.add_parser("ground", help="find what a sentence describes in some pictures")
    ground.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, in the order the query numbers them")
    ground.add_argument("--query", required=True, help="what to look for, such as 'the red mug'")
    ground.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, help="bundle folder (default: the shipped model)"
    )
    ground.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    ground.add_argument("--draw", type=Path, metavar="PICTURE", help="write the pictures with their boxes here")
    ground.add_argument("--overwrite", action="store_true", help="let --draw replace a file that is there")
    ground.add_argument("--think", action="store_true", help="let the model reason before it answers; slower")
    ground.add_argument("--threads", type=whole_number, default=0, help="processor threads (default: one a core)")
    inspect = commands.add_parser("inspect", help="check a bundle and say what it holds")
    inspect.add_argument("bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE)
    return parser


def _ground(options: argparse.Namespace) -> int:
    from gemvg_edge.draw import draw_boxes
    from gemvg_edge.grounder import Grounder
    from gemvg_edge.images import load_image

    if options.draw:
        _check_target(options.draw, options.images, options.overwrite)
    pictures = [load_image(path) for path in options.images]
    grounder = Grounder.open(options.bundle, threads=options.threads)
    grounding = grounder.ground(pictures, options.query, think=options.think)
    if options.draw:
        _save(draw_boxes(pictures, grounding.boxes, options.query), options.draw)
    if options.json:
        print(json.dumps(asdict(grounding)))
    else:
        _print_lines(options.images, grounding)
    return 0


def _print_lines(files: Sequence[str], grounding: Grounding) -> None:
    names = [printable(file) for file in files]  # a name need not be text
    for box in grounding.boxes:
        print(f"{names[box.image]}  x1={box.x1:.0f} y1={box.y1:.0f} x2={box.x2:.0f} y2={box.y2:.0f}")
    if not grounding.boxes:
        print(f"nothing found ({grounding.problem})" if grounding.problem else "nothing found")
    elif grounding.problem:
        print(f"note: {grounding.problem}")
    t = grounding.timings
    total = t.preprocess_ms + t.vision_ms + t.image_prefill_ms + t.query_prefill_ms + t.decode_ms
    print(
        f"{total:.0f} ms: preprocess {t.preprocess_ms:.0f}, vision {t.vision_ms:.0f}, "
        f"prefill {t.image_prefill_ms + t.query_prefill_ms:.0f}, decode {t.decode_ms:.0f} ({t.answer_tokens} tokens)"
    )


def _inspect(options: argparse.Namespace) -> int:
    from gemvg_edge.bundle import open_bundle

    bundle = open_bundle(options.bundle)
    manifest = bundle.manifest
    shape, numbers = manifest.model, manifest.preprocessing
    size = sum(record.bytes for record in manifest.files.values())
    print(f"{manifest.name}: {shape.model_type}, {size / 1e6:.1f} MB in {bundle.folder}")
    print(f"decoder: {shape.layers} layers of {shape.hidden_size}, {shape.heads} heads ({shape.kv_heads} key/value)")
    print(f"vision:  {shape.vision.depth} layers of {shape.vision.embed_dim}, patch {numbers.patch_size}")
    print(f"pixels:  {numbers.min_pixels} to {numbers.max_pixels} a picture after resizing")
    print(f"answers: {_describe_answers(manifest.answer)}")
    print(f"dialect: {manifest.dialect}; weights: " + ", ".join(f"{k} {v}" for k, v in manifest.weights.items()))
    for name, record in manifest.files.items():
        print(f"  {record.bytes:>12,}  {record.sha256[:12]}  {name}")
    print("all files are as they were written")
    return 0


def _save(picture: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        try:
            picture.save(partial)
        except Exception as error:  # each of Pillow's formats has limits and words of its own
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            raise GemvgError(
                f"--draw {printable(path)}: {picture.width} x {picture.height} pixels cannot be written as "
                f"{path.suffix} ({one_line(error) or type(error).__name__}); use .png"
            ) from None


def _describe_answers(answer: AnswerFormat) -> str:
    if answer.coordinates == "pixels":
        return "pixels of each resized picture"
    return f"{answer.coordinates}, 0..{answer.steps()[0]} of each picture's width and height"


def _check_target(path: Path, images: Sequence[str], overwrite: bool) -> None:
    """Refuse, before any work, a picture that cannot be written, or whose writing would lose a file of the user's."""
    from PIL import Image

    refuse_inputs(path, map(Path, images), "--draw")
    real = Path(os.path.realpath(path))  # where the writing ends up: `nowhere/../a.png` is a.png
    if is_folder(real):
        raise GemvgError(f"--draw {printable(path)} cannot be written (it is a folder); give the name of a picture")
    if not overwrite:
        refuse_present(path, "--draw")
    if not is_folder(real.parent):
        raise GemvgError(f"--draw {printable(path)}: the folder {printable(path.parent)} does not exist; make it first")
    file_format = Image.registered_extensions().get(path.suffix.lower())
    try:
        # Pillow reads more formats than it writes, and some it writes without colour.
        Image.new("RGB", (1, 1)).save(io.BytesIO(), file_format or "")
    except (KeyError, OSError, ValueError):
        ending = path.suffix or "no ending"
        raise GemvgError(
            f"--draw {printable(path)}: {ending} is not a picture format to write; use .png or .jpg"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
