"""C++ and C hosts: the example is built by CMake, cpp_host.cpp by the compiler alone, and both ask as Python does.

Skips where there is no CMake, compiler, pybind11 or shared library of Python.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gemvg_edge
from bench.readme import ROOT
from gemvg_edge import Grounder, Grounding
from gemvg_edge.config import cflags, cmake_dir, includes, libs, main, source
from gemvg_edge.errors import GemvgError

IMAGES = ROOT / "examples" / "images"
SCENES = json.loads((IMAGES / "scenes.json").read_text())
EXAMPLE = ROOT / "examples" / "cpp_service"
QUERY = "all balls"
SECONDS = 120


def missing() -> str:
    """Why no host can be built here."""
    for tool in ("cmake", "c++", "make"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    try:
        libs(), includes()
    except GemvgError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is there")


def run(
    *command: str | Path, said: str = "", code: int = 0, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A finished command, with the exit code that is expected of it."""
    done = subprocess.run(
        [str(word) for word in command], input=said, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, **(environment or {})}, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's build folder, by way of CMake."""
    build = tmp_path_factory.mktemp("build")
    found = f"-Dgemvg_edge_DIR={cmake_dir()[0]}"
    options = ("-DCMAKE_BUILD_TYPE=Test", "-DCMAKE_CXX_FLAGS=-O0 -Werror", "-DCMAKE_C_FLAGS=-Werror")
    run("cmake", "-S", EXAMPLE, "-B", build, found, f"-DPython_EXECUTABLE={sys.executable}", *options)
    run("cmake", "--build", build)
    return build


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases of cpp_host.cpp, compiled as `gemvg_edge.config` says."""
    folder = tmp_path_factory.mktemp("host")
    page = (ROOT / "docs" / "howto" / "cpp.md").read_text()
    (program,) = re.findall(r"```text\n(#include.*?)```", page, re.DOTALL)
    (folder / "documented.hpp").write_text(program.replace("int main()", "static int documented()"))
    warnings = ("-Wall", "-Wextra", "-pedantic", "-Werror", f'-DDOCUMENTED="{folder / "documented.hpp"}"')
    run("c++", *warnings, *cflags(), ROOT / "tests" / "cpp_host.cpp", *libs(), "-o", folder / "host")
    return folder / "host"


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder.open()


@pytest.fixture(scope="module")
def pixels() -> Any:
    with Image.open(IMAGES / "scene1-a.png") as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def case(host: Path, pixels: Any, tmp_path: Path) -> Any:
    """Runs a case and gives its lines by their first word; several of one word are a list."""
    raw = tmp_path / "pixels"
    raw.write_bytes(pixels.tobytes())
    height, width, _ = pixels.shape

    def started(name: str, **environment: str) -> dict[str, list[str]]:
        lines: dict[str, list[str]] = {}
        for line in run(host, name, raw, str(width), str(height), environment=environment).stdout.splitlines():
            word, _, rest = line.partition(" ")
            lines.setdefault(word.rstrip(":"), []).append(rest)
        return lines

    return started


def shown(answer: Grounding) -> str:
    """Boxes as cpp_host.cpp prints them."""
    return " ".join(f"{b.image} {b.x1:.17g} {b.y1:.17g} {b.x2:.17g} {b.y2:.17g} {b.score:.17g}" for b in answer)


def as_ppm(name: str, folder: Path) -> Path:
    with Image.open(IMAGES / name) as picture:
        picture.convert("RGB").save(folder / f"{Path(name).stem}.ppm")
    return folder / f"{Path(name).stem}.ppm"


def test_the_service_answers_as_python_does(example: Path, grounder: Grounder, tmp_path: Path) -> None:
    lines, expected = [], []
    for scene in SCENES:
        left, right = scene["images"]
        for first in (as_ppm(left, tmp_path), IMAGES / left):  # pixels of the host's, and a file that Python reads
            lines.append("\t".join([scene["query"], str(first), str(IMAGES / right)]))
            expected.append(grounder.look([str(first), str(IMAGES / right)]).ground(scene["query"]).to_dict())
    lines = [*lines * 3, "the mug\t/nope.png", "", "\u00e9\\ \x01", 'all balls\tno\u00e9 "picture"']
    for threads in ("1", "4"):
        said = run(example / "cpp_service", "--threads", threads, said="\n".join(lines)).stdout.splitlines()
        answers = [json.loads(line) for line in said]
        assert len(answers) == len(lines)
        for answer, truth in zip(answers, expected * 3, strict=False):
            boxes = [{k: v for k, v in box.items() if k != "label"} for box in truth["boxes"]]
            assert (answer["query"], answer["boxes"], answer["text"]) == (truth["query"], boxes, truth["text"])
            assert answer["problem"] == truth["problem"]
        errors = [answer["error"] for answer in answers[-4:]]
        nothing = "no pictures were given; a query needs at least one"
        assert errors == [
            "/nope.png: no such picture file",
            nothing,
            nothing,
            'no\u00e9 "picture": no such picture file',
        ]
    assert sum(len(truth["boxes"]) for truth in expected) > 10


def test_the_service_refuses_in_a_sentence_and_measures(example: Path, tmp_path: Path) -> None:
    service, nowhere = example / "cpp_service", tmp_path / "nowhere"
    assert run(service, "--bundle", nowhere, code=2).stderr.startswith(f"cpp_service: {nowhere}: no such bundle folder")
    assert "above 0" in run(service, "--threads", "-1", code=2).stderr
    line = f"{QUERY}\t{as_ppm('scene1-a.png', tmp_path)}"
    answer = json.loads(run(service, "--repeat", "3", said=line).stdout)
    assert len(answer["look_and_ground_ms"]) == len(answer["ground_ms"]) == 3
    assert min(answer["ground_ms"]) > 0
    late = json.loads(run(service, "--timeout", "1e-9", said=line).stdout)
    assert late["error"].startswith("no answer within timeout=1e-09 s;")


def test_ctrl_c_is_the_hosts(example: Path, tmp_path: Path) -> None:
    command = [str(example / "cpp_service")]
    usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=usual
    ) as service:
        assert service.stdin
        assert service.stdout
        service.stdin.write(f"{QUERY}\t{as_ppm('scene1-a.png', tmp_path)}\n")
        service.stdin.flush()
        assert "boxes" in service.stdout.readline()
        service.send_signal(signal.SIGINT)
        assert service.wait(SECONDS) == -signal.SIGINT


def test_c_asks_as_python_does(example: Path, grounder: Grounder) -> None:
    files = [str(IMAGES / name) for name in SCENES[0]["images"]]
    said = run(example / "ask", *files, QUERY).stdout.splitlines()
    assert " ".join(said) == shown(grounder.look(files).ground(QUERY))
    refused = run(example / "ask", "/nope.png", QUERY, code=2)
    assert (refused.stdout, refused.stderr) == ("", "ask: /nope.png: no such picture file\n")


def test_the_documented_program(
    host: Path, grounder: Grounder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, shipped in zip(("left.png", "right.png"), SCENES[0]["images"], strict=True):
        shutil.copyfile(IMAGES / shipped, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    said = [[float(word) for word in line.split()] for line in run(host, "documented").stdout.splitlines()]
    answer = grounder.look(["left.png", "right.png"]).ground(QUERY)
    assert said == [[box.image, *box.corners] for box in answer]
    (tmp_path / "right.png").unlink()
    assert run(host, "documented", code=1).stderr == "right.png: no such picture file\n"


def test_every_layout_of_pixels_is_read_right_and_not_kept(case: Any, grounder: Grounder, pixels: Any) -> None:
    green = np.ascontiguousarray(pixels[:, :, 1])
    colour, grey = (shown(grounder.look([first, pixels]).ground(QUERY)) for first in (pixels, green))
    assert colour != grey
    answers = case("views")
    assert len(answers) == 10
    assert answers == {name: [grey if name.startswith("grey") else colour] for name in answers}


def test_errors_are_pythons_sentences(case: Any, grounder: Grounder, pixels: Any) -> None:
    said = {name: lines[0] for name, lines in case("errors").items()}
    scene = grounder.look([pixels])
    assert said.pop("still") == shown(scene.ground(QUERY))
    for name, wrong in {
        "negative": lambda: scene.ground(QUERY, timeout=-1.0),
        "max_pixels": lambda: grounder.look([pixels], max_pixels=3),
        "bundle": lambda: Grounder.open("/nope"),
        "none": lambda: grounder.look([]),
        "missing": lambda: grounder.look(["/nope.png"]),
        "mark": lambda: scene.mark(gemvg_edge.Box(7, 0.0, 0.0, 1.0, 1.0)),
        "timeout": lambda: scene.ground(QUERY, timeout=1e-9),
        "look_timeout": lambda: grounder.look([pixels], timeout=1e-9),
    }.items():
        with pytest.raises(GemvgError, match=re.escape(said.pop(name))):
            wrong()
    assert said == {
        "cancel": "the request was cancelled before it was answered",
        "null": "images[1] is a View of no pixels, its pointer is null; give the first row's",
        "empty": "images[0] is a View of height 0 and width 5; give both in pixels, from 1 on",
        "stride": "images[0] is a View whose rows have 15 bytes and a stride of 14; give the bytes from a row to the "
        "next, or 0 where there is no gap",
        "utf8": "query is not UTF-8; convert it",
        "python": "ModuleNotFoundError: No module named 'no_such_module'",
        "late": "Python was started already; call use_python before everything else",
        "moved": "this Scene was moved from; use the one it was moved to",
        "closed": "this Grounder was closed; open one again with Grounder.open",
    }


def test_again_and_again(case: Any, grounder: Grounder, pixels: Any) -> None:
    scene = grounder.look([pixels])
    answer = scene.ground(QUERY)
    shows = f"the same object as {scene.mark(answer[0])}"
    assert case("again") == {
        "again": [shown(answer)] * 3,
        "marked": [shown(scene.ground(shows))],
        "each": [shown(one) for one in scene.ground([QUERY, "the plate"])],
        "pictures": ["images[0] 320 320 1"],
        "few": ["the answer was cut at max_new_tokens=5"],
        "usual": ["nothing"],
        "unlike": ["5 pictures were given, and the model was trained on at most 4 at once"],
    }


def test_a_callback_runs_without_the_lock(case: Any, grounder: Grounder, pixels: Any) -> None:
    assert case("callback") == {
        "text": ["1"],
        "cancelled": ["the request was cancelled before it was answered"],
        "thrown": ["the host's own"],
        "still": [shown(grounder.look([pixels]).ground(QUERY))],
    }


def test_threads(case: Any, grounder: Grounder, pixels: Any) -> None:
    said = case("threads")
    assert said.pop("thread") == [shown(grounder.look([pixels]).ground(QUERY))] * 4
    assert said.pop("onnx") == ["lets others go on"]
    (native,) = said.pop("native")
    assert native == "lets others go on" or "the native engine" in native
    assert not said


def test_the_end_while_threads_ask(case: Any) -> None:
    for _ in range(3):
        assert case("ending") == {"printed": ["by Python"]}


def test_python_changes_nothing_of_the_host(case: Any) -> None:
    said = case("manners", LC_ALL="C.UTF-8")
    assert said["asked"] == said["parent"]
    assert (said["signals"], said["locale"], said["child"]) == (["1"], ["C"], ["0"])
    assert said["forked"][0].startswith("this process was forked")


def test_a_python_of_the_hosts_own_is_used(case: Any, grounder: Grounder, pixels: Any) -> None:
    said = case("guest")
    assert said["guest"] == [shown(grounder.look([pixels]).ground(QUERY))]
    assert said["the"] == ["host's Python goes on"]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"GEMVG_PYTHON": "/nope/python"}, "/nope/python is no program that can be started; set GEMVG_PYTHON to the"),
        ({"GEMVG_PYTHON": "/usr"}, "/usr is no program that can be started; set GEMVG_PYTHON to the Python that"),
        ({"GEMVG_PYTHON": "/bin/sh"}, "gemvg_edge cannot be imported by /bin/sh (ModuleNotFoundError: No module named"),
        ({"PYTHONHOME": "/nope"}, "Python cannot start (failed to get the Python codec"),
    ],
)
def test_no_python_is_a_sentence(example: Path, environment: dict[str, str], sentence: str) -> None:
    said = run(example / "cpp_service", code=2, environment=environment).stderr
    assert f"cpp_service: {sentence}" in said
    assert "set GEMVG_PYTHON to the Python that gemvg_edge is installed in" in said


def test_config_says_what_is_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--cflags", "--libs", "--cmake-dir", "--includes", "--source"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        " ".join(words()) for words in (cflags, includes, libs, source, cmake_dir)
    ]
    assert (Path(cmake_dir()[0]) / "gemvg_edge-config.cmake").is_file()
    assert Path(source()[0]).is_file()
    with pytest.raises(SystemExit):
        main([])
    monkeypatch.setattr(sys, "executable", "/my python/bin/python")
    assert main(["--cflags"]) == 2
    assert "has a space" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert main(["--includes"]) == 2
    assert "pip install 'gemvg-edge[cpp]'" in capsys.readouterr().err


def test_cmake_says_what_is_missing(tmp_path: Path) -> None:
    found = f"-Dgemvg_edge_DIR={cmake_dir()[0]}"
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    said = run("cmake", "-S", EXAMPLE, "-B", tmp_path / "b", found, f"-DPython_EXECUTABLE={bare}", code=1).stderr
    assert "cannot import gemvg_edge; give the Python" in said
