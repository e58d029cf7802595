"""What a compiler needs for a C++ or C program that embeds gemvg_edge in this Python.

    c++ $(python -m gemvg_edge.config --cflags) main.cpp $(python -m gemvg_edge.config --libs) -o main
    cmake -S . -B build -Dgemvg_edge_DIR=$(python -m gemvg_edge.config --cmake-dir)

The program starts the Python that answers here, with all that is installed in it. Needs pybind11: pip install
'gemvg-edge[cpp]'. Knows paths alone; compiles nothing.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from gemvg_edge.command import run_command
from gemvg_edge.errors import GemvgError

FOLDER = Path(__file__).resolve().parent
DEVELOPMENT = "install its development files (Debian: apt install python3-dev)"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 for a Python that cannot be embedded."""
    return run_command("gemvg_edge.config", lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m gemvg_edge.config", description=__doc__, formatter_class=raw)
    parser.add_argument("--cflags", action="store_true", help="flags to compile C++ with, the includes among them")
    parser.add_argument("--includes", action="store_true", help="folders of headers alone; enough for C")
    parser.add_argument("--libs", action="store_true", help="libraries to link, and where they are when it runs")
    parser.add_argument("--source", action="store_true", help="the C++ file that a program in C compiles and links")
    parser.add_argument("--cmake-dir", action="store_true", help="the folder for CMake's gemvg_edge_DIR")
    given = parser.parse_args(arguments)
    said = {"cflags": cflags, "includes": includes, "libs": libs, "source": source, "cmake_dir": cmake_dir}
    wanted = [name for name in said if getattr(given, name)]
    if not wanted:
        parser.error("give one of --cflags, --includes, --libs, --source and --cmake-dir")
    for line in [" ".join(_unsplit(said[name]())) for name in wanted]:
        print(line)
    return 0


def cflags() -> list[str]:
    """Of C++17: the Python to start, and the includes."""
    # In quotes, which $(..) leaves; without, as make's shell hands them on, the header writes them itself.
    return ["-std=c++17", "-pthread", f'-DGEMVG_PYTHON="{sys.executable}"', *includes()]


def includes() -> list[str]:
    """Ours, pybind11's and Python's; the latter two as a system's, whose warnings are nobody's."""
    try:
        pybind11 = importlib.import_module("pybind11")
    except ImportError as error:
        raise GemvgError(f"pybind11 cannot be imported ({error}); run `pip install 'gemvg-edge[cpp]'`") from None
    python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
    if not any((Path(folder) / "Python.h").is_file() for folder in python):
        raise GemvgError(f"{sys.executable} has no Python.h in {' or '.join(python)}; {DEVELOPMENT}")
    return [f"-I{FOLDER / 'include'}", *(f"-isystem{folder}" for folder in (pybind11.get_include(), *python))]


def libs() -> list[str]:
    """Python's shared library by its path, so that no other version can be taken for it."""
    names = dict.fromkeys(str(sysconfig.get_config_var(name)) for name in ("LDLIBRARY", "INSTSONAME"))
    folders = [str(sysconfig.get_config_var("LIBDIR")), f"{sys.base_prefix}/lib"]
    found = [Path(folder) / name for folder in folders for name in names if ".so" in name]
    for library in found:
        if library.is_file():
            return [str(library), f"-Wl,-rpath,{library.parent}", "-ldl", "-pthread"]
    looked = f" ({found[0]} is missing)" if found else ""
    raise GemvgError(
        f"{sys.executable} has no shared library{looked}; {DEVELOPMENT}, or use a Python that was built with "
        "--enable-shared"
    )


def source() -> list[str]:
    """The one source file behind gemvg_edge.h."""
    return [str(FOLDER / "include" / "gemvg_edge.cpp")]


def cmake_dir() -> list[str]:
    """Where gemvg_edge-config.cmake lies."""
    return [str(FOLDER / "cmake")]


def _unsplit(words: Sequence[str]) -> Sequence[str]:
    """The words; GemvgError for one that a shell would cut in pieces."""
    if cut := [word for word in words if len(word.split()) > 1]:
        raise GemvgError(f"{shlex.quote(cut[0])} has a space, where a shell would cut it; use CMake, or another folder")
    return words


if __name__ == "__main__":
    sys.exit(main())
