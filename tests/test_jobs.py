"""The four jobs of docs/tutorials: their scripts are what the pages say, and run from an empty folder, small."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.readme import ROOT
from tests.forking_python import forking_python
from tests.test_docs import TUTORIALS, snippets, workplace

JOBS = ROOT / "examples" / "jobs"
NAMES = ("robot", "compress", "train", "service")
SIZE = re.compile(r'"\$\{\w+:-([^}]*)\}"')  # what a script lets one set: its default is what the page says


@pytest.mark.parametrize("name", NAMES)
def test_script_has_every_command_of_its_page(name: str) -> None:
    script = SIZE.sub(r"\1", (JOBS / f"{name}.sh").read_text(encoding="utf-8"))
    commands = [s.code for s in snippets(TUTORIALS / f"{name}.md") if s.language == "sh" and s.norun is None]
    own = [code for code in commands if code not in script]
    # What only prints a plan needs no folder, and test_plan runs it.
    assert [code for code in own if not code.startswith("gemvg plan")] == []
    places = [script.index(code) for code in commands if code in script]
    assert places == sorted(places)


def test_every_tutorial_has_a_script() -> None:
    assert {page.stem for page in TUTORIALS.glob("*.md")} == set(NAMES) == {file.stem for file in JOBS.glob("*.sh")}


@pytest.fixture(scope="module")
def fast_gemvg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `gemvg` that forks from a process which has torch imported."""
    folder = tmp_path_factory.mktemp("jobs")
    with forking_python(folder / "server") as python:
        (folder / "bin").mkdir()
        command = folder / "bin" / "gemvg"
        command.write_text(f'#!/bin/sh\nexec {python} -m gemvg_edge.cli "$@"\n')
        command.chmod(0o755)
        yield folder / "bin"


def run(name: str, folder: Path, first_on_path: Path | None = None, **sizes: str) -> str:
    """What a job prints, run in the folder `job` of a new one."""
    environment = workplace(folder) | sizes
    if first_on_path:
        environment["PATH"] = f"{first_on_path}{os.pathsep}{environment['PATH']}"
    command = [str(JOBS / f"{name}.sh"), str(folder / "job")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_robot(tmp_path: Path) -> None:
    said = run("robot", tmp_path, ROUNDS="1")
    assert "all balls: camera 1" in said
    assert "the red mug: not there" in said


def test_service(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = run("service", tmp_path, PORT=str(port))
    answer = json.loads((tmp_path / "job" / "answer.json").read_text())
    assert {box["image"] for box in answer["answers"][0]["boxes"]} == {0, 1}
    assert '"query": "the black mug"' in said
    assert '{"error":{"message":"images[0] (11 bytes) is not a picture' in said
    assert said.endswith("stopped\n")


@pytest.mark.slow
def test_compress(tmp_path: Path, fast_gemvg: Path) -> None:
    said = run("compress", tmp_path, fast_gemvg, SAMPLES="4", QUESTIONS="10")
    assert '"passed": true' in said
    assert re.search(r"tabletop\.int4 +F1@0\.5 (0\.[5-9]|1\.)", said)
    assert "decoder int4-gptq-g32" in said


@pytest.mark.slow
def test_train(tmp_path: Path, fast_gemvg: Path) -> None:
    sizes = {"SCENES": "8", "HELD_OUT": "2", "RECORDS": "8", "STEPS": "2", "BATCH": "2", "WARMUP": "1"}
    said = run("train", tmp_path, fast_gemvg, **sizes)
    assert "records kept, 0 refused" in said
    assert re.search(r"^mine +F1@0\.5", said, re.MULTILINE)
    assert (tmp_path / "job" / "found.png").is_file()
    assert json.loads((tmp_path / "job" / "mine" / "training.json").read_text())["steps"] == 2
