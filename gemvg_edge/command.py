"""What every command line of ours shares: exit codes, and one line instead of a traceback.

0 is success, 1 a verdict against what was checked, 2 bad input (one sentence on stderr), 130 and 143 an interrupt and a
termination, after which nothing half-written is left. A reader that closes our output, as `| head` does, is no error.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TextIO

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import reason

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
LARGEST = 2**31 - 1  # of a whole number on a command line; libraries below count in 32 bits
LAST_SEED = 2**32 - 1  # numpy's
OVERWRITE = "replace a finished result that is there already (default: say so and stop)"  # what --overwrite does
P = ParamSpec("P")


class Terminated(BaseException):
    """SIGTERM, raised where the program stands, so that every `with` and `finally` on the way out is run."""


def run_command(name: str, work: Callable[[], int | None]) -> int:
    """Do the work of the command `name` and give its exit code; None from `work` is 0.

    SystemExit, argparse's for usage, passes. Only bad input (GemvgError), the system's refusals (OSError, MemoryError)
    and signals become lines: any other exception is a fault of ours and keeps its traceback.
    """
    _make_writable()
    try:
        with _termination_raises():
            try:
                return work() or 0
            finally:
                sys.stdout.flush()  # here, where a closed or full output is caught
    except BrokenPipeError:
        _discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        return INTERRUPTED
    except Terminated:
        _say(f"{name}: terminated")
        return TERMINATED
    except GemvgError as error:
        _say(f"{name}: {one_line(error)}")
    except MemoryError as error:
        _say(f"{name}: out of memory ({one_line(error) or 'no more to be had'}); give smaller input or free some")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{name}: {where}{reason(error)}; check the place, its permissions and the room on the disk")
        _discard(sys.stdout)  # may be what is full
    return BAD_INPUT


def command(name: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a `main` the command `name`: as `run_command`, but an exit code that is not 0 ends the process."""

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def run(*arguments: P.args, **named: P.kwargs) -> None:
            if code := run_command(name, lambda: main(*arguments, **named)):
                sys.exit(code)

        return run

    return decorate


def whole_number(text: str) -> int:
    """A whole number on a command line, for argparse's `type`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]} is past {LARGEST}")
    return value


def seed_number(text: str) -> int:
    """What random numbers start from."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= LAST_SEED:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no seed; give a whole number from 0 to {LAST_SEED}")
    return value


def finite_number(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number that can be used")
    return value


def positive_number(text: str) -> float:
    """A number above zero, such as of seconds."""
    value = finite_number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not above zero")
    return value


def path_name(text: str) -> Path:
    """A path that is not empty, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give the name of a file or a folder")
    return Path(text)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks: an engine's own messages have several lines."""
    return " ".join(str(error).split())


@contextmanager
def told(verbose: bool) -> Iterator[None]:
    """What the package logs, on stderr: warnings, and with `verbose` what it does."""
    log, handler = logging.getLogger("gemvg_edge"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("gemvg: %(message)s"))
    level, log.propagate = log.level, False
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = True


@contextmanager
def _termination_raises() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning short
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_writable() -> None:
    """Give the process streams that take any text: a closed one swallows it, an ASCII one gets escapes."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # Python's own mark of a descriptor that was closed at the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the whole process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Let what is still buffered go nowhere, or Python would complain of it once more at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # a stream of a test's, without a descriptor
