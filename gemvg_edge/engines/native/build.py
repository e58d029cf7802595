"""Compile the native library, once per instruction set, into the folder of this file.

    python -m gemvg_edge.engines.native.build [--compiler g++]

Needs g++ 11 or newer (or another compiler that takes its options); the wheels have the result. Without it everything
runs on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys

from gemvg_edge.command import run_command
from gemvg_edge.engines.native.compiling import INSTRUCTIONS, CannotCompile, compile_all
from gemvg_edge.errors import GemvgError


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    return run_command("gemvg_edge.engines.native.build", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    module = "python -m gemvg_edge.engines.native.build"
    parser = argparse.ArgumentParser(module, description=__doc__, formatter_class=raw)
    compiler = os.environ.get("CXX", "g++")
    parser.add_argument("--compiler", default=compiler, help="the C++ compiler (default: %(default)s)")
    machine = "processor to compile for (default: this one, %(default)s)"
    parser.add_argument("--machine", default=platform.machine(), choices=tuple(INSTRUCTIONS), help=machine)
    given = parser.parse_args(arguments)
    try:
        paths = compile_all(given.compiler, given.machine)
    except CannotCompile as error:
        raise GemvgError(str(error)) from None
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
