"""Command lines as shells and services start them: closed, full and ASCII streams, signals, numbers of no sense."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemvg_edge.command import finite_number, run_command, seed_number, whole_number
from gemvg_edge.errors import GemvgError

IMAGES = Path(__file__).parents[1] / "examples" / "images"
ASK = ["gemvg_edge.cli", "ground", str(IMAGES / "scene1-a.png"), str(IMAGES / "scene1-b.png"), "--query", "the red mug"]
FAULT = ["gemvg_edge.cli", "ground", "café.png", "--query", "the red mug"]


def started(command: list[str], **streams: Any) -> subprocess.Popen[str]:
    # In a session of its own, as a terminal gives it, so that a signal reaches its own processes too; and listening to
    # interrupts, which are ignored where the tests themselves run in the background.
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **streams,
    )


def shell(command: list[str], streams: str) -> tuple[int, str, str]:
    """Exit code and both outputs of a command with its streams set as a shell sets them."""
    line = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


STREAMS = {
    "closed output": (ASK, ">&-", 0, ""),
    "full output": (ASK, "> /dev/full", 2, "gemvg: No space left on device; check the place, its permissions and"),
    "full output, JSON": ([*ASK, "--json"], "> /dev/full", 2, "gemvg: No space left on device"),
    "a reader that left": (ASK, "| true", 0, ""),
    "closed errors": (FAULT, "2>&-", 2, ""),
    "full errors": (FAULT, "2> /dev/full", 2, ""),
    "both closed": (FAULT, ">&- 2>&-", 2, ""),
    "a workshop command, full output": (["bench.plan", "--check"], "> /dev/full", 2, "bench.plan: No space left"),
    "a workshop command, closed output": (["bench.plan", "--check"], ">&-", 0, ""),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_take_nothing(case: str) -> None:
    command, streams, code, said = STREAMS[case]
    found, output, errors = shell(command, streams)
    assert (found, output) == (code, "")
    assert errors.startswith(said)
    assert errors.count("\n") == (1 if said else 0)


def test_streams_in_ascii() -> None:
    process = started(FAULT, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert process.communicate(timeout=20)[1] == "gemvg: caf\\xe9.png: no such picture file\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_are_one_line_and_leave_nothing(number: signal.Signals, code: int, said: str, tmp_path: Path) -> None:
    process = started(["train.world.render", str(tmp_path / "scenes"), "--scenes", "100000", "--processes", "1"])
    give_up = time.monotonic() + 60
    while not list(tmp_path.glob("scenes/images/*.png")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors.splitlines()[-1].endswith(f"train.world.render: {said}")
    assert "Traceback" not in errors


def test_an_interrupt_during_imports_is_one_word() -> None:
    process = started(["train.rewrite", "--help"], stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < give_up
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (-signal.SIGINT, "interrupted\n")


def fail(error: BaseException) -> Callable[[], int]:
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (GemvgError("a.png: no\n such file"), 2, "x: a.png: no such file\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "x: /a/b: Permission denied; check"),
        (OSError("no words"), 2, "x: no words; check the place"),
        (MemoryError(), 2, "x: out of memory (no more to be had); give smaller input"),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_command("x", fail(error)) == code
    errors = capsys.readouterr().err
    assert errors.startswith(said)
    assert errors.count("\n") == (1 if said else 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("x", fail(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (seed_number, "-1"), (seed_number, str(2**32)), (seed_number, "1.5"), (seed_number, "x" * 9999),
        (finite_number, "nan"), (finite_number, "inf"), (finite_number, "1e999"), (finite_number, "many"),
        (whole_number, str(10**30)), (whole_number, "1e3"), (whole_number, ""), (whole_number, "9" * 9999),
    ],
)  # fmt: skip
def test_numbers_of_no_sense_are_refused(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert len(str(caught.value)) < 120


def test_numbers_are_read() -> None:
    assert (seed_number("0"), seed_number("4294967295"), whole_number("-7"), finite_number("1e-3")) == (
        0, 2**32 - 1, -7, 0.001,
    )  # fmt: skip
