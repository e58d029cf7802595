"""A camera, a video or a folder that fills with pictures: the newest frame is looked at, boxes come as JSON Lines.

    python examples/watch.py 0 --query "the red mug" --query "all balls"      # a camera's number, its path or its URL
    python examples/watch.py pictures --query "what was moved" --reference before.png --rounds 10 > boxes.jsonl

A thread reads and keeps the newest frame alone, so that boxes are never about an old one; `dropped` counts what it
replaced. References stand first in every look: their keys and values are computed once. `time` is in unix seconds: of a
file its time of change, else this machine's clock when the frame was read; `clock` says which. `latency_ms` counts from
the reading, of a file from when it was seen. Needs the runtime, and OpenCV for videos and cameras.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gemvg_edge import GemvgError, Grounder, TimedOut
from gemvg_edge.command import Terminated, one_line, path_name, positive_number, run_command, whole_number
from gemvg_edge.files import is_file, is_folder, printable, unreadable
from gemvg_edge.images import load_image
from gemvg_edge.prompt import check_query

SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
POLL, SETTLED = 0.05, 0.2  # seconds between two looks into a folder; for how long a file that is whole has not changed
ATTEMPTS, PAUSE = 5, 1.0  # how often, and after how many seconds, a camera that is lost is opened again
USUAL_RATE, MOST_RATE = 25.0, 1000.0  # frames a second of a video that does not say, or says nonsense
PATIENCE = 2.0  # seconds for a camera to let go at the end


class Frame(NamedTuple):
    """What the source gave: a picture as `Grounder.look` takes it, or why there is none."""

    number: int  # of the source, from 1
    stamp: float  # unix seconds
    came: float  # the same on `time.monotonic`
    picture: Any
    dropped: int = 0  # frames that it replaced


class Latest:
    """The newest frame of a source. What failed waits beside it, so that every fault is told."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._changed, self._waiting = threading.Condition(), deque[Frame]()
        self._ended: list[BaseException | None] = []  # what the source ended with

    def fill(self, frames: Iterator[Frame]) -> None:
        """Take frames until the source ends or `over` is set; the thread's work."""
        error = None
        try:
            for frame in frames:
                with self._changed:
                    replaced = [] if isinstance(frame.picture, GemvgError) else list(self._waiting)[-1:]
                    if replaced and not isinstance(replaced[0].picture, GemvgError):
                        frame = frame._replace(dropped=self._waiting.pop().dropped + 1)
                    self._waiting.append(frame)
                    self._changed.notify()
        except BaseException as raised:  # whatever it is ends the wait for a frame, and is raised there
            error = raised
        with self._changed:
            self._ended.append(error)
            self._changed.notify()

    def take(self) -> Frame | None:
        """The next frame, waited for; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if self._waiting:
                return self._waiting.popleft()
        if self._ended[0] is not None:
            raise self._ended[0]
        return None


def open_source(source: str, over: threading.Event) -> Iterator[Frame]:
    """The frames of a folder, a video or a camera; GemvgError where there is none of these."""
    if source.isdecimal() or "://" in source:
        return camera_frames(source, open_capture(source), over)
    if is_folder(path := Path(source)):
        return folder_frames(path, pictures_in(path), over)
    if not os.path.exists(source):
        raise GemvgError(f"{printable(source)}: no such folder or video; a camera is a number, such as 0, or a URL")
    if path.suffix.lower() in SUFFIXES:
        raise GemvgError(f"{printable(source)} is a picture; give the folder that the pictures come into")
    return (video_frames if is_file(path) else camera_frames)(source, open_capture(source), over)


def open_capture(source: str) -> Any:
    """OpenCV's reader of a video or a camera."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said in one sentence, ours
    try:
        import cv2
    except ImportError as error:
        fix = "run `pip install opencv-python-headless`, or give a folder of pictures"
        raise GemvgError(
            f"videos and cameras need OpenCV, which cannot be imported ({one_line(error)}); {fix}"
        ) from None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    capture = cv2.VideoCapture(device(source))
    if not capture.isOpened():
        raise GemvgError(f"{printable(source)} cannot be opened as a video or a camera; try it in another player")
    return capture


def device(source: str) -> str | int:
    """A source as OpenCV names it: a camera by its number."""
    return int(source[:9]) if source.isdecimal() else source


def pictures_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Each picture's time of change (nanoseconds) and size in bytes; hidden and empty files are still being written."""
    try:
        entries = [e for e in os.scandir(folder) if Path(e.name).suffix.lower() in SUFFIXES and e.name[0] != "."]
    except OSError as error:
        raise unreadable(folder, error) from None
    found = {}
    for entry in entries:
        try:
            if entry.is_file() and (about := entry.stat()).st_size:
                found[Path(entry.path)] = about.st_mtime_ns, about.st_size
        except OSError:  # taken away meanwhile
            continue
    return found


def folder_frames(folder: Path, found: dict[Path, tuple[int, int]], over: threading.Event) -> Iterator[Frame]:
    """The newest picture that is there, then each that comes or changes, once it has kept still for a moment."""
    newest, number, pause = max(found, key=lambda path: (found[path][0], path), default=None), 0, 0.0
    done = {path: about for path, about in found.items() if path != newest}
    waiting: dict[Path, tuple[tuple[int, int], float]] = {}
    while not over.wait(pause):
        began = time.monotonic()
        found = pictures_in(folder)
        fresh = {path: (about, began) for path, about in found.items() if done.get(path) != about}
        waiting = {p: waiting[p] if p in waiting and waiting[p][0] == new[0] else new for p, new in fresh.items()}
        whole = [path for path, (_, since) in waiting.items() if began - since >= SETTLED]
        for path in sorted(whole, key=lambda path: (found[path][0], path)):
            number += 1
            yield Frame(number, found[path][0] / 1e9, waiting[path][1], path)
        done = {path: about for path, about in done.items() if path in found} | {path: found[path] for path in whole}
        pause = max(POLL, 4 * (time.monotonic() - began))  # a folder of very many files keeps no core busy


def video_frames(source: str, capture: Any, over: threading.Event) -> Iterator[Frame]:
    """A video at its own rate, as if a camera gave it."""
    rate = capture.get(5)  # cv2.CAP_PROP_FPS
    rate = rate if 0 < rate <= MOST_RATE else USUAL_RATE
    began, number = time.monotonic(), 0
    while (read := capture.read())[0] and not over.wait(max(0.0, began + number / rate - time.monotonic())):
        number += 1
        yield Frame(number, time.time(), time.monotonic(), read[1])
    if not number and not over.is_set():
        raise GemvgError(f"{printable(source)} holds no frame that can be read; try it in another player")


def camera_frames(source: str, capture: Any, over: threading.Event) -> Iterator[Frame]:
    """A camera's frames; one that is lost is opened again some times, each a frame with an error."""
    number = lost = 0
    while not over.is_set():
        good, pixels = capture.read()
        number, lost = number + good, 0 if good else lost + 1
        if lost > ATTEMPTS:
            raise GemvgError(f"{printable(source)} gives no frames any more; see to the camera and start again")
        again = f"{printable(source)} gives no frame; it is opened again in {PAUSE:g} s ({lost} of {ATTEMPTS})"
        yield Frame(number, time.time(), time.monotonic(), pixels if good else GemvgError(again))
        if not good and not over.wait(PAUSE):
            capture.release()
            capture.open(device(source))


def ask(grounder: Grounder, pictures: Sequence[Any], options: argparse.Namespace, first: bool) -> dict[str, Any]:
    """What a line says of these pictures: the answers, or why there are none."""
    end, scene = time.monotonic() + (options.timeout or math.inf), None
    try:
        if isinstance(pictures[-1], GemvgError):
            raise pictures[-1]
        scene = grounder.look(pictures, bgr=True, timeout=options.timeout)
        left = max(0.001, end - time.monotonic()) if options.timeout else None
        return {"answers": [one.to_dict() for one in scene.ground(options.query, timeout=left)]}
    except GemvgError as error:
        if first and scene and not isinstance(error, TimedOut):  # the question is at fault, and no frame mends it
            raise
        return {"error": one_line(error)}


def watch(options: argparse.Namespace) -> None:
    """Frames in, lines out, until the source ends, --rounds are over or a signal comes."""
    for query in options.query:
        check_query(query)
    if options.rounds is not None and options.rounds < 1:
        raise GemvgError(f"--rounds is {options.rounds}; give how many frames to look at, 1 or more")
    references = [load_image(path) for path in options.reference]
    latest, rounds, answered = Latest(), 0, False
    frames = open_source(options.source, latest.over)
    reader = threading.Thread(target=latest.fill, args=(frames,), name="watch", daemon=True)
    reader.start()  # before the model is opened: a camera's own queue would hold old frames by then
    try:
        with Grounder.open(options.bundle, max_pixels=options.max_pixels) as grounder:
            if references:
                grounder.look(references)  # what is wrong with them is said before the first frame
            while rounds != options.rounds and (frame := latest.take()):
                said = ask(grounder, [*references, frame.picture], options, not answered)
                rounds, answered = rounds + 1, answered or "answers" in said
                clock = "file" if isinstance(frame.picture, Path) else "machine"
                line = {"frame": frame.number, "time": round(frame.stamp, 6), "clock": clock, "dropped": frame.dropped}
                line |= {"latency_ms": round((time.monotonic() - frame.came) * 1e3, 1), **said}
                sys.stdout.write(json.dumps(line) + "\n")  # at once: a signal leaves no half of a line
                sys.stdout.flush()
    finally:
        latest.over.set()
        reader.join(PATIENCE)


def main() -> int:
    """Command line; the exit code, 0 after a signal too."""
    parser = argparse.ArgumentParser(description="Look at the newest frame, again and again; boxes as JSON Lines.")
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a folder that fills with pictures, a video file, a camera's number or URL")
    add("--query", action="append", required=True, metavar="TEXT", help="a question about every frame; may be repeated")
    reference = "a picture that stays and comes first: image 1 of a question, the frame image 2; may be repeated"
    add("--reference", action="append", default=[], type=path_name, metavar="PICTURE", help=reference)
    add("--bundle", type=path_name, metavar="FOLDER", help="bundle folder (default: the shipped model)")
    add("--rounds", type=whole_number, metavar="N", help="end after so many frames (default: when the source ends)")
    add("--timeout", type=positive_number, metavar="SECONDS", help="give up on a frame after so long (default: never)")
    add("--max-pixels", type=whole_number, metavar="N", help="pixels of each picture when resized (default: bundle's)")
    options = parser.parse_args()

    def work() -> None:
        with suppress(KeyboardInterrupt, Terminated):  # a camera's loop has no other end: it is no fault
            watch(options)

    return run_command("watch", work)


if __name__ == "__main__":
    sys.exit(main())
