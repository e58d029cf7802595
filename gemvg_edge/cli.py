"""The command `gemvg`.

    gemvg ground left.png right.png --query "the red mug" [--json] [--draw out.png] [--bundle FOLDER]
    gemvg inspect [BUNDLE]
    gemvg serve [BUNDLE] [--port 8000]
    gemvg train|quantize|export|bench COMMAND ...      the workshop's commands, where its checkout is installed

Exit code 0, or 2 with one sentence on stderr when the input is at fault (gemvg_edge.command has the others).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemvg_edge import __version__
from gemvg_edge.command import path_name, positive_number, run_command, told, whole_number
from gemvg_edge.engines import ENGINES
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.serve.settings import add_arguments, read_settings
from gemvg_edge.workshop import STAGES, commands_of, run_workshop

if TYPE_CHECKING:
    from gemvg_edge.answer import AnswerFormat

# What takes time to import is imported where it is used: inside `run_command`, which answers an interrupt with a line.

COMMANDS = """find boxes:
  ground      find what sentences describe in some pictures
                gemvg ground left.png right.png --query "the red mug" --draw found.png
  inspect     check a bundle and say what it holds
                gemvg inspect my-bundle
  serve       answer over HTTP, with a page for people at the same address
                gemvg serve my-bundle --port 8000

make a model (in a checkout, after `make workshop`; `gemvg train --help` lists the commands):
  train       data sets, simulated scenes, SFT, GRPO, distillation
                gemvg train sft --model checkpoints/tabletop --data data/world/train --out runs/mine
  quantize    GPTQ and what goes before it
                gemvg quantize gptq --model runs/mine --out runs/mine.gptq --group-size 32
  export      a checkpoint to a bundle, a bundle to TensorRT engines, verification
                gemvg export to_onnx runs/mine.gptq runs/mine.int4
  bench       accuracy, speed and memory
                gemvg bench accuracy --model runs/mine.int4
  plan        whether a model fits a device, and how fast it will be
                gemvg plan --model qwen2-vl-2b --device jetson-orin-nano-8gb

shell:
  completion  a script that completes commands, and the flags of those that find boxes
                gemvg completion bash > ~/.local/share/bash-completion/completions/gemvg
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command("gemvg", lambda: _run(given))


def _run(given: list[str]) -> int:
    if given and given[0] in STAGES:  # their commands read their own arguments
        return run_workshop(given[0], given[1:])
    options = build_parser().parse_args(given)
    with told(getattr(options, "verbose", False)):
        match options.command:
            case "ground":
                from gemvg_edge.cli_ground import ground

                return ground(options)
            case "inspect":
                return _inspect(options)
            case "serve":
                return _serve(options)
            case _:
                return _completion(options)


def build_parser(listed: str | None = argparse.SUPPRESS) -> argparse.ArgumentParser:
    """The command line of what the package itself does; argparse's own list is hidden: COMMANDS is one."""
    parser = argparse.ArgumentParser(
        prog="gemvg",
        usage="gemvg [-h] [--version] COMMAND ...",
        description="Ask several pictures a question and get boxes.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="version", version=f"gemvg-edge {__version__}", help="print the version and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", help=listed, prog="gemvg")
    _add_ground(commands)
    inspect = commands.add_parser("inspect", help="check a bundle", description="Check a bundle and say what it holds.")
    inspect.add_argument(
        "bundle", nargs="?", type=Path, default=DEFAULT_BUNDLE, help="bundle folder (default: the shipped model)"
    )
    serve = commands.add_parser(
        "serve",
        help="answer over HTTP",
        description="Answer over HTTP, with a page for people at the same address; bytes, pixels and time have bounds.",
    )
    add_arguments(serve)
    completion = commands.add_parser(
        "completion",
        help="complete commands in a shell",
        description="Print a script that completes commands and flags; needs the package shtab.",
    )
    for stage in STAGES:  # `_run` has taken them already: they stand here for completion, and for who mistypes one
        names = commands_of(stage) if listed is None else ()
        door = commands.add_parser(stage, help=f"the workshop's {stage}")
        door.add_argument("name", nargs="?", choices=names or None, help="one of its commands")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that the script is for")
    return parser


def _add_ground(commands: Any) -> None:
    ground = commands.add_parser(
        "ground",
        help="find what sentences describe",
        description="Find what sentences describe in some pictures: they are looked at once, and asked each query.",
        epilog="In --queries each line is a JSON string, or an object with `query` and, if wanted, `id` and `think`; "
        "each brings a line of JSON, with `error` in place of boxes where the query is refused.",
    )
    add = ground.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture files, in the order the query numbers them; - is stdin")
    asked = ground.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--query", action="append", default=[], metavar="TEXT", help="what to look for; may be given several times"
    )
    asked.add_argument(
        "--queries", metavar="FILE", help="a file of queries in JSON Lines, or - for stdin; answers come as JSON Lines"
    )
    add(
        "--bundle",
        type=Path,
        metavar="FOLDER",
        default=DEFAULT_BUNDLE,
        help="bundle folder (default: the shipped model)",
    )
    add("--json", action="store_true", help="print one JSON object a query instead of lines")
    add(
        "--draw",
        type=path_name,
        metavar="PATH",
        help="write the pictures with their boxes: one sheet to a picture file, or each into a folder that is there",
    )
    add("--overwrite", action="store_true", help="let --draw replace files that are there")
    add("--think", action="store_true", help="let the model reason before it answers; slower")
    add(
        "--engine",
        choices=ENGINES,
        help="what runs the bundle (default: the fastest that runs it here)",
    )
    add("--threads", type=whole_number, metavar="N", default=0, help="processor threads (default: one a physical core)")
    add(
        "--max-pixels",
        type=whole_number,
        metavar="N",
        help="budget of each picture, in pixels after resizing (default: the bundle's)",
    )
    add(
        "--max-new-tokens", type=whole_number, default=256, metavar="N", help="longest answer, in tokens (default: 256)"
    )
    add("--timeout", type=positive_number, metavar="SECONDS", help="give up on a query after so long (default: never)")
    add("--verbose", action="store_true", help="say on stderr what is done and how long it takes")


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
    print(f"answers: {_describe_answers(manifest.answer)}; profile {manifest.profile}")
    print(f"dialect: {manifest.dialect}; weights: " + ", ".join(f"{k} {v}" for k, v in manifest.weights.items()))
    for name, record in manifest.files.items():
        print(f"  {record.bytes:>12,}  {record.sha256[:12]}  {name}")
    print("all files are as they were written")
    return 0


def _serve(options: argparse.Namespace) -> int:
    try:
        from gemvg_edge.serve.server import serve
    except ImportError as error:
        if (error.name or "").startswith("gemvg_edge"):
            raise
        raise GemvgError(f"a service needs more ({error}); run `pip install 'gemvg-edge[serve]'`") from None
    return serve(read_settings(options))


def _describe_answers(answer: AnswerFormat) -> str:
    if answer.coordinates == "pixels":
        return "pixels of each resized picture"
    kind = "JSON" if answer.coordinates == "json" else answer.coordinates
    return f"{kind}, 0..{answer.steps()[0]} of each picture's width and height"


def _completion(options: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise GemvgError("completion needs the package shtab; run `pip install shtab`") from None
    print(shtab.complete(build_parser(listed=None), options.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
