"""The help of every command of the project: the docs' reference is made from it, the tests read it.

Finds the modules that can be run and asks each for its `--help` within this process, so torch is imported once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from unittest.mock import patch

from gemvg_edge.workshop import FOLDERS, commands

NAMES = {"gemvg_edge.cli": "gemvg"}  # of commands that are not called by their module
SAME = {"COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"}  # whatever the terminal


def help_texts() -> dict[str, str]:
    """What `--help` says of each command, by its name: `train.sft`, `gemvg`, `gemvg ground`."""
    texts: dict[str, str] = {}
    with patch.dict(os.environ, SAME):
        for module in runnable_modules():
            texts |= _helps(module, NAMES.get(module, module))
    return texts


def runnable_modules() -> list[str]:
    """The modules that people run, in the order of the pipeline."""
    return [module for stage in ("gemvg_edge", *FOLDERS) for module in commands(stage)]


def _helps(module: str, name: str) -> dict[str, str]:
    """The help of one command and of each of its subcommands."""
    main, said = importlib.import_module(module).main, io.StringIO()
    asked: list[argparse.ArgumentParser] = []

    def print_help(parser: argparse.ArgumentParser) -> None:
        asked.append(parser)
        print(parser.format_help())

    with (
        patch.object(argparse.ArgumentParser, "print_help", print_help),
        patch.object(sys, "argv", [name, "--help"]),
        redirect_stdout(said),
        suppress(SystemExit),
    ):
        main()
    texts = {name: said.getvalue()}
    for action in (action for parser in asked for action in parser._actions):
        if isinstance(action.choices, dict):  # subcommands and their parsers
            texts |= {f"{name} {word}": parser.format_help() for word, parser in action.choices.items()}
    return {name: "\n".join(map(str.rstrip, text.strip().splitlines())) + "\n" for name, text in texts.items()}
