"""examples/watch.py: real videos, folders and a camera over HTTP, the shipped model, and what may go wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import pytest

from bench.readme import ROOT
from gemvg_edge import GemvgError, Grounder

SCRIPT = ROOT / "examples" / "watch.py"
LEFT, RIGHT = (ROOT / "examples" / "images" / f"scene1-{k}.png" for k in "ab")


@pytest.fixture
def script() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("watch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watching:
    """The example with some arguments, in this process."""

    def __init__(self, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.script, self._monkeypatch, self._capsys = script, monkeypatch, capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, list[dict[str, Any]], str]:
        """Its exit code, its lines and what it said on stderr."""
        self._monkeypatch.setattr(sys, "argv", ["watch", *map(str, arguments)])
        code = self.script.main()
        out, err = self._capsys.readouterr()
        return code, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture
def watching(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Watching:
    return Watching(script, monkeypatch, capsys)


def video(path: Path, frames: int, rate: float) -> Path:
    """The two shipped pictures, by turns."""
    pictures = [read for picture in (LEFT, RIGHT) if (read := cv2.imread(str(picture))) is not None]
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, (width, height))
    for k in range(frames):
        writer.write(pictures[k % 2])
    writer.release()
    return path


def boxes(line: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [answer["boxes"] for answer in line["answers"]]


def test_a_video_plays_as_a_camera_would(watching: Watching, tmp_path: Path) -> None:
    film = video(tmp_path / "film.avi", 6, 10)
    began = time.time()
    code, lines, said = watching(film, "--query", "all balls", "--query", "the red mug")
    assert (code, said) == (0, "")
    assert lines[-1]["frame"] == 6  # the last one is looked at, whatever was dropped
    assert sum(line["dropped"] + 1 for line in lines) == 6
    assert 0.4 < lines[-1]["time"] - lines[0]["time"] + (lines[0]["frame"] - 1) / 10 < 5
    assert all(began <= line["time"] <= time.time() and line["clock"] == "machine" for line in lines)
    assert all(line["latency_ms"] > 0 for line in lines)
    capture = cv2.VideoCapture(str(film))
    decoded = [capture.read()[1] for _ in range(6)]
    with Grounder.open() as grounder:
        for line in lines:  # red and blue in their places, which the model would not tell
            rgb = cv2.cvtColor(decoded[line["frame"] - 1], cv2.COLOR_BGR2RGB)
            scene = grounder.look([rgb])
            wanted = [scene.ground(query).to_dict() for query in ("all balls", "the red mug")]
            assert boxes(line) == [answer["boxes"] for answer in wanted]
            assert [answer["query"] for answer in line["answers"]] == ["all balls", "the red mug"]
    assert any(boxes(line)[0] for line in lines)


def test_what_a_newer_frame_replaced_is_counted(watching: Watching, tmp_path: Path) -> None:
    film = video(tmp_path / "film.avi", 100, 1000)
    code, lines, _ = watching(film, "--query", "all balls")
    assert code == 0
    assert lines[0]["dropped"] > 0  # while the model was opened
    numbers = [0, *(line["frame"] for line in lines)]
    assert [line["dropped"] for line in lines] == [b - a - 1 for a, b in pairwise(numbers)]
    assert numbers[-1] == 100


def test_a_reference_is_computed_once(watching: Watching, tmp_path: Path) -> None:
    film = video(tmp_path / "film.avi", 4, 2)  # so slow that none is dropped but while opening: the next one is another
    code, lines, _ = watching(film, "--query", "the object that was moved", "--reference", LEFT, "--rounds", "2")
    assert (code, len(lines)) == (0, 2)
    with Grounder.open() as grounder:
        tokens = grounder.look([LEFT]).timings.image_tokens
    for line in lines:
        (answer,) = line["answers"]
        assert tokens <= answer["timings"]["cached_tokens"] < answer["timings"]["image_tokens"]
        assert [picture["name"] for picture in answer["images"]] == [str(LEFT), "images[1]"]


class Started:
    """The example as a shell starts it, its lines read as they come."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    def line(self) -> dict[str, Any]:
        """The next one."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def end(self) -> tuple[int, str, str]:
        """Exit code and what else it said."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two pictures, the second newer."""
    (tmp_path / "in").mkdir()
    for age, picture in ((100, LEFT), (50, RIGHT)):
        shutil.copyfile(picture, tmp_path / "in" / picture.name)
        os.utime(tmp_path / "in" / picture.name, (time.time() - age,) * 2)
    return tmp_path / "in"


def test_a_folder_that_fills(folder: Path) -> None:
    watch = Started(folder, "--query", "all balls", "--rounds", "5")
    first = watch.line()
    assert (first["frame"], first["dropped"], first["clock"]) == (1, 0, "file")
    assert first["answers"][0]["images"][0]["name"] == str(folder / RIGHT.name)  # the newest alone
    assert first["time"] == pytest.approx((folder / RIGHT.name).stat().st_mtime, abs=1e-5)
    assert first["latency_ms"] < 20_000

    shutil.copyfile(LEFT, folder / "another.png")
    second = watch.line()
    assert [box["image"] for box in second["answers"][0]["boxes"]] == [0, 0]

    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("not yet a picture")
    (folder / "broken.png").write_text("never a picture")
    third = watch.line()
    assert third["frame"] == 3
    assert third["error"].startswith(f"{folder / 'broken.png'} is not a picture")

    shutil.copyfile(RIGHT, folder / "broken.png")  # the same name, another picture
    assert "answers" in watch.line()
    for k in range(3):  # at once: the last one counts
        shutil.copyfile(LEFT, folder / f"many-{k}.png")
        os.utime(folder / f"many-{k}.png", (time.time() + k,) * 2)
    last = watch.line()
    assert last["dropped"] in (0, 1, 2)  # as its looks into the folder fell
    assert watch.end() == (0, "", "")


def test_a_file_is_read_when_it_is_whole(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "SETTLED", 0.6)
    latest, whole = script.Latest(), LEFT.read_bytes()
    reader = threading.Thread(target=latest.fill, args=(script.open_source(str(tmp_path), latest.over),))
    reader.start()
    with (tmp_path / "slow.png").open("wb") as file:  # nothing, then a part, then all of it
        time.sleep(0.1)
        file.write(whole[:5000])
        file.flush()
        time.sleep(0.1)
        written = time.monotonic()
        file.write(whole[5000:])
    frame = latest.take()
    assert (frame.number, frame.picture) == (1, tmp_path / "slow.png")
    assert written < frame.came < time.monotonic() - 0.6
    latest.over.set()
    reader.join()
    assert latest.take() is None


def test_a_folder_that_goes_away(folder: Path) -> None:
    watch = Started(folder, "--query", "all balls")
    assert "answers" in watch.line()
    shutil.rmtree(folder)
    code, out, err = watch.end()
    assert (code, out) == (2, "")
    assert err.startswith(f"watch: {folder} cannot be read")
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_clean_end(folder: Path, number: signal.Signals) -> None:
    watch = Started(folder, "--query", "all balls")
    watch.line()
    watch.process.send_signal(number)
    assert watch.end() == (0, "", "")


def test_a_reader_that_left(folder: Path) -> None:
    command = f"{sys.executable} {SCRIPT} {folder} --query 'all balls' | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def camera(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of a film of three frames that is given twice and then never again, and what was asked of it."""
    film, asked = video(tmp_path / "film.avi", 3, 10).read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if len(asked) < 3 else 404)
            self.send_header("Content-Length", str(len(film) if len(asked) < 3 else 0))
            self.end_headers()
            if len(asked) < 3:
                self.wfile.write(film)

        def log_message(self, *said: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/film.avi", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_camera_that_is_lost(watching: Watching, camera: tuple[str, list[str]]) -> None:
    url, asked = camera
    watching._monkeypatch.setattr(watching.script, "PAUSE", 0.2)
    code, lines, said = watching(url, "--query", "all balls")
    assert code == 2
    assert said == f"watch: {url} gives no frames any more; see to the camera and start again\n"
    errors = [line["error"] for line in lines if "error" in line]
    assert errors[0] == f"{url} gives no frame; it is opened again in 0.2 s (1 of 5)"
    assert errors[1:] == [f"{url} gives no frame; it is opened again in 0.2 s ({k} of 5)" for k in range(1, 6)]
    answered = [line for line in lines if "answers" in line]
    assert sum(line["dropped"] + 1 for line in answered) == 6  # three before it was lost, three after
    assert len(asked) == 2 + 5


def test_time_that_is_too_short(watching: Watching, tmp_path: Path) -> None:
    film = video(tmp_path / "film.avi", 2, 10)
    code, lines, _ = watching(film, "--query", "all balls", "--timeout", "0.000001")
    assert code == 0
    assert lines
    assert all(line["error"].startswith("no answer within timeout=1e-06 s") for line in lines)


REFUSED = {
    "nothing there": (["nowhere"], "nowhere: no such folder or video; a camera is a number"),
    "no such camera": (["77"], "77 cannot be opened as a video or a camera"),
    "a number past all": (["9" * 30], "99999999999999"),
    "a URL that nobody serves": (["http://127.0.0.1:1/a"], "http://127.0.0.1:1/a cannot be opened as a video"),
    "a picture": ([str(LEFT)], f"{LEFT} is a picture; give the folder"),
    "no video": ([str(SCRIPT)], f"{SCRIPT} cannot be opened as a video or a camera"),
    "an empty question": ([str(LEFT.parent), "--query", " "], "the query is empty"),
    "no such picture to ask about": (
        [str(LEFT.parent), "--query", "the ball in image 3", "--reference", str(LEFT)],
        "the query names image 3, of 2 pictures",
    ),
    "no reference": ([str(LEFT.parent), "--reference", "nowhere.png"], "nowhere.png: no such picture file"),
    "no rounds": ([str(LEFT.parent), "--rounds", "0"], "--rounds is 0; give how many frames"),
    "no bundle": ([str(LEFT.parent), "--bundle", "nowhere"], "nowhere: no such bundle folder"),
    "few pixels": ([str(LEFT.parent), "--max-pixels", "1"], "max_pixels=1; give a whole number of pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, watching: Watching) -> None:
    arguments, wanted = REFUSED[case]
    code, lines, said = watching(*arguments, *([] if "--query" in arguments else ["--query", "all balls"]))
    assert (code, lines) == (2, [])
    assert said.startswith(f"watch: {wanted}")
    assert said.count("\n") == 1


def test_without_opencv(watching: Watching, tmp_path: Path) -> None:
    film = video(tmp_path / "film.avi", 1, 10)
    watching._monkeypatch.setitem(sys.modules, "cv2", None)
    code, _, said = watching(film, "--query", "all balls")
    assert code == 2
    assert "run `pip install opencv-python-headless`" in said


def test_faults_wait_and_frames_do_not(script: Any) -> None:
    fault = GemvgError("lost")
    given = ["a", "b", fault, fault, "c", "d", "e"]
    latest = script.Latest()
    latest.fill(script.Frame(k, 0.0, 0.0, picture) for k, picture in enumerate(given, 1))
    taken = [latest.take() for _ in range(5)]
    assert [frame and (frame.number, frame.picture, frame.dropped) for frame in taken] == [
        (2, "b", 1), (3, fault, 0), (4, fault, 0), (7, "e", 2), None,
    ]  # fmt: skip


def test_what_a_source_raises_is_raised_where_frames_are_taken(script: Any) -> None:
    latest = script.Latest()
    latest.fill(script.Frame(1, 0.0, 0.0, 1 // 0) for _ in range(1))
    with pytest.raises(ZeroDivisionError):
        latest.take()
