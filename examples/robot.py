"""A robot's loop: two cameras, one look a round, several questions about it, an answer in time or none.

    python examples/robot.py left.png right.png --ask "the red mug" --ask "what both images show"

Pictures stand in for the cameras here; with OpenCV, `read` is `cv2.VideoCapture(k).read()[1]`. Needs the runtime alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from gemvg_edge import Grounder, TimedOut

Frame = npt.NDArray[np.uint8]  # (height, width, 3) in BGR order, as OpenCV has it


class Camera:
    """A camera that always sees the same picture."""

    def __init__(self, path: str) -> None:
        with Image.open(path) as picture:
            self._frame = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])

    def read(self) -> Frame:
        """The latest frame."""
        return self._frame


def one_round(grounder: Grounder, cameras: Sequence[Camera], asked: Sequence[str], seconds: float) -> None:
    """Look once, ask everything, and be done in time."""
    frames, end = [camera.read() for camera in cameras], time.monotonic() + seconds
    try:
        scene = grounder.look(frames, bgr=True, timeout=seconds)
        for query in asked:
            answer = scene.ground(query, timeout=max(0.001, end - time.monotonic()))
            if answer.problem:  # boxes may be missing, or were clipped: no reason to move an arm
                print(f"{query}: not sure ({answer.problem})")
                continue
            for box in answer:
                print(
                    f"{query}: camera {box.image}, around x={(box.x1 + box.x2) / 2:.0f} y={(box.y1 + box.y2) / 2:.0f}"
                )
            if not answer:
                print(f"{query}: not there")
    except TimedOut as late:
        print(f"too slow this round: {late}")


def main() -> None:
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description="Ask two cameras several questions, round after round.")
    parser.add_argument("pictures", nargs=2, help="what the cameras see")
    parser.add_argument("--ask", action="append", required=True, metavar="TEXT", help="a question of every round")
    parser.add_argument("--bundle", metavar="FOLDER", help="bundle folder (default: the shipped model)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="N", help="time of a round (default: %(default)s)"
    )
    args = parser.parse_args()
    cameras = [Camera(path) for path in args.pictures]
    with Grounder.open(args.bundle) as grounder:
        for _ in range(args.rounds):
            one_round(grounder, cameras, args.ask, args.seconds)


if __name__ == "__main__":
    main()
