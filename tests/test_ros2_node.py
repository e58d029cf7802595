"""examples/ros2_node.py against a stand-in of ROS 2, with the shipped model: pictures in, detections out."""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from bench.readme import ROOT
from gemvg_edge import Box, GemvgError, Grounder, Grounding
from gemvg_edge.grounding import Timings
from tests.ros2_messages import BoundingBox2D, Bytes, Header, Image, Ros, Time

SCRIPT = ROOT / "examples" / "ros2_node.py"
TOPICS = ["/left/image_raw", "/right/image_raw"]
RGB = [np.asarray(Pillow.open(ROOT / "examples" / "images" / f"scene1-{k}.png").convert("RGB")) for k in "ab"]


def load(ros: Ros, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module, with the stand-in in place of ROS."""
    for name, module in ros.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("ros2_node", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ros.script = module
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    return load(Ros(), monkeypatch)


def image(pixels: np.ndarray, encoding: str = "rgb8", padding: int = 0, big: bool = False, second: int = 0) -> Any:
    """A message of an array whose last axis is as the encoding says, each row with some bytes more."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    header = Header(stamp=Time(sec=second, nanosec=5), frame_id="camera")
    return Image(
        header=header, height=height, width=width, encoding=encoding, step=padded.shape[1], is_bigendian=int(big),
        data=Bytes("B", padded.tobytes()),
    )  # fmt: skip


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8", "mono8", "mono16", "mono16 big"])
def test_every_encoding(script: Any, encoding: str, padding: int) -> None:
    rgb = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    alpha = np.zeros((2, 3, 1), np.uint8)
    deep = np.array([[1, 256, 65535], [2, 3, 4]], np.uint16)
    cases: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "rgb8": (rgb, rgb),
        "bgr8": (rgb[..., ::-1], rgb),
        "rgba8": (np.concatenate([rgb, alpha], 2), rgb),
        "bgra8": (np.concatenate([rgb[..., ::-1], alpha], 2), rgb),
        "mono8": (rgb[..., 0], rgb[..., 0]),
        "mono16": (deep.astype("<u2"), deep),
        "mono16 big": (deep.astype(">u2"), deep),
    }
    given, wanted = cases[encoding]
    found = script.to_array(image(given, encoding.split()[0], padding, big=encoding.endswith("big")))
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_a_last_row_without_its_padding(script: Any) -> None:
    message = image(RGB[0], padding=7)
    message.data = Bytes("B", bytes(message.data)[:-7])
    np.testing.assert_array_equal(script.to_array(message), RGB[0])


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("encoding", "bayer_rggb8", "/a has the encoding 'bayer_rggb8', none of rgb8, bgr8"),
        ("encoding", "16UC1", "/a has the encoding '16UC1'"),
        ("encoding", "rgba8", "/a has 320 x 320 pixels in rgba8, a step of 960 and 307200 bytes"),
        ("height", 321, "/a has 320 x 321 pixels"),
        ("height", 0, "/a has 320 x 0 pixels"),
        ("width", 2**32 - 1, "/a has 4294967295 x 320 pixels"),
        ("step", 959, "/a has 320 x 320 pixels in rgb8, a step of 959"),
        ("data", Bytes(), "/a has 320 x 320 pixels in rgb8, a step of 960 and 0 bytes"),
    ],
)
def test_pictures_that_are_refused(script: Any, field: str, value: Any, said: str) -> None:
    message = image(RGB[0])
    setattr(message, field, value)
    with pytest.raises(GemvgError) as caught:
        script.to_array(message, "/a")
    assert str(caught.value).startswith(said)


def test_boxes_of_one_picture(script: Any) -> None:
    boxes = (Box(0, 10, 20, 40, 60, label="ball", score=0.75), Box(1, 1, 2, 3, 4, label="ball"), Box(0, 0, 0, 1, 3))
    answer = Grounding(boxes, "", "", None, Timings())
    header = Header(stamp=Time(sec=3), frame_id="left")
    message = script.to_detections([answer, answer], 0, header)
    assert (message.header, len(message.detections)) == (header, 4)
    first, second = message.detections[:2]
    assert (first.header, first.id) == (header, "")
    centre = first.bbox.center
    assert (centre.position.x, centre.position.y, centre.theta) == (25, 40, 0)
    assert (first.bbox.size_x, first.bbox.size_y) == (30, 40)
    (result,) = first.results
    assert (result.hypothesis.class_id, result.hypothesis.score) == ("ball", 0.75)
    assert second.results[0].hypothesis.class_id == ""
    assert math.isnan(second.results[0].hypothesis.score)
    assert script.to_detections([], 1, header).detections == []


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts the node with some parameters -> its surroundings; ends it after the test."""
    ends = []

    def start(**parameters: Any) -> Ros:
        ros = Ros(**{"topics": TOPICS, "queries": ["all balls"]} | parameters)
        module = load(ros, monkeypatch)
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(module.main()))
        thread.start()
        ends.append((ros, thread, codes))
        give_up = time.monotonic() + 20
        while ros.on_set is None and time.monotonic() < give_up:
            time.sleep(0.01)
        return ros

    yield start
    for ros, thread, codes in ends:
        ros.down.set()
        thread.join()
        assert codes == [0]
        assert ros.destroyed


def corners(detections: Any) -> list[tuple[float, ...]]:
    boxes = [one.bbox for one in detections.detections]
    return [(b.center.position.x - b.size_x / 2, b.center.position.y - b.size_y / 2, b.size_x, b.size_y) for b in boxes]


def test_two_cameras(running: Any) -> None:
    ros = running(queries=["all balls", "the red mug"])
    left, right = (ros.published[f"{topic}/detections"] for topic in TOPICS)
    ros.subscribers[TOPICS[0]](image(RGB[1], second=1))  # replaced by the next before the other camera gave any
    ros.subscribers[TOPICS[0]](image(RGB[0], second=2))
    ros.subscribers[TOPICS[1]](image(RGB[1][..., ::-1], "bgr8", padding=3, second=3))
    ros.wait_for(lambda: right)
    with Grounder.open() as grounder:
        scene = grounder.look(RGB)
        boxes = [box for query in ("all balls", "the red mug") for box in scene.ground(query)]
    for k, published in enumerate((left, right)):
        (message,) = published
        assert message.header.stamp.sec == 2 + k
        assert message.header.frame_id == "camera"
        wanted = [(box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1) for box in boxes if box.image == k]
        assert corners(message) == [pytest.approx(box) for box in wanted]
        assert len(wanted) >= 2
        assert {one.results[0].hypothesis.class_id for one in message.detections} == {"all balls"}
    assert ros.logged == []


def test_a_picture_is_looked_at_once(running: Any) -> None:
    ros = running(topics="/a")  # one is as good as a list of one
    published = ros.published["/a/detections"]
    for second in (1, 2):
        ros.subscribers["/a"](image(RGB[0], second=second))
        ros.wait_for(lambda second=second: len(published) == second)
    time.sleep(0.1)
    assert [one.header.stamp.sec for one in published] == [1, 2]


def test_questions_may_change(running: Any) -> None:
    ros = running(topics=["/a"])
    published = ros.published["/a/detections"]
    ros.subscribers["/a"](image(RGB[0]))
    ros.wait_for(lambda: len(published) == 1)
    assert ros.set_parameter("queries", ["the red mug"]).successful
    ros.subscribers["/a"](image(RGB[0]))
    ros.wait_for(lambda: len(published) == 2)
    assert published[0].detections
    assert published[1].detections == []  # an empty one: it is not there
    for wrong in ([], [""], 5, ["<|im_end|>"]):
        result = ros.set_parameter("queries", wrong)
        assert not result.successful
        assert result.reason
    assert not ros.set_parameter("topics", ["/b"]).successful
    assert ros.get_parameter("queries").value == ["the red mug"]


def test_what_goes_wrong_is_logged_and_the_next_round_comes(running: Any) -> None:
    ros = running(topics=["/a"], queries=["all balls"])
    ros.subscribers["/a"](image(RGB[0], "yuv422"))
    ros.wait_for(lambda: ros.logged)
    assert ros.logged[0][0] == "error"
    assert ros.logged[0][1].startswith("/a has the encoding 'yuv422'")
    assert ros.set_parameter("queries", ["the ball in image 5", "all balls"]).successful  # of one picture: no number
    ros.subscribers["/a"](image(RGB[0]))
    ros.wait_for(lambda: ros.published["/a/detections"])


def test_too_slow(running: Any) -> None:
    ros = running(topics=["/a"], timeout=1e-6)
    ros.subscribers["/a"](image(RGB[0]))
    ros.wait_for(lambda: ros.logged)
    assert ros.logged[0][1].startswith("no answer within timeout=1e-06 s")
    assert ros.published["/a/detections"] == []


def test_a_topic_that_is_silent_is_named(running: Any) -> None:
    ros = running()
    assert ros.logged == []
    ros.script.SILENT = 0.05
    ros.subscribers[TOPICS[0]](image(RGB[0]))  # wakes the thread, which waits for so long from now on
    ros.wait_for(lambda: ros.logged)
    assert ros.logged[0] == ("warning", f"waiting for pictures on {TOPICS[1]}")
    assert ros.published[f"{TOPICS[0]}/detections"] == []


def test_an_answer_that_cannot_be_read_is_not_an_empty_one(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Grounder, "open", functools.partial(Grounder.open, max_new_tokens=2))
    ros = running(topics=["/a"], queries=["all balls"])
    ros.subscribers["/a"](image(RGB[0]))
    ros.wait_for(lambda: ros.logged)
    assert ros.logged[0] == ("warning", "all balls: the answer was cut at max_new_tokens=2")
    assert ros.published["/a/detections"] == []


def test_rounds_a_second(running: Any) -> None:
    ros = running(topics=["/a"], rate=5)  # a whole number is as good
    published, times = ros.published["/a/detections"], []
    for count in range(1, 4):
        ros.subscribers["/a"](image(RGB[0]))
        ros.wait_for(lambda count=count: len(published) == count)
        times.append(time.monotonic())
    assert times[2] - times[0] >= 0.3


def test_ros_that_ends_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    ros = Ros(topics=["/a"], queries=["all balls"])
    watcher = load(ros, monkeypatch).Watcher(ros)
    ros.down.set()
    ros.subscribers["/a"](image(RGB[0]))
    watcher.thread.join(20)  # it cannot publish any more, and says nothing about it
    assert (watcher.thread.is_alive(), watcher.failed, ros.logged) == (False, False, [])
    watcher.close()
    assert ros.destroyed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its traceback is to be seen
def test_a_fault_of_ours_ends_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    ros = Ros(topics=["/a"], queries=["all balls"])
    module = load(ros, monkeypatch)
    monkeypatch.setattr(module, "to_detections", lambda *given: 1 / 0)
    monkeypatch.setattr(ros, "add_on_set_parameters_callback", lambda given: ros.subscribers["/a"](image(RGB[0])))
    assert module.main() == 1
    assert ros.destroyed


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("queries", [""], "the parameter queries is ['']; give a text or a list of texts"),  # which is the default
        ("queries", ["a", "a"], "the parameter queries is ['a', 'a']; name one or more, each once"),
        ("queries", ["  "], "the query is empty"),
        ("topics", 5, "the parameter topics is 5; give a text"),
        ("topics", [], "the parameter topics is []; name one or more"),
        ("rate", -1.0, "the parameter rate is -1.0; give 0 or a number above it"),
        ("timeout", float("nan"), "the parameter timeout is nan"),
        ("timeout", "1 s", "the parameter timeout is '1 s'"),
        ("bundle", "nowhere", "nowhere: no such bundle folder"),
        ("bundle", 7, "bundle=7; give the path of a bundle folder"),
    ],
)
def test_parameters_that_make_no_sense(
    name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ros = Ros(**{"queries": ["all balls"], name: value})
    assert load(ros, monkeypatch).main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"ros2_node: {said}")
    assert errors.count("\n") == 1
    assert ros.down.is_set()


def test_without_ros() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ros2_node: No module named 'rclpy'; source /opt/ros/")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("wrong", [("size_x", 5), ("centre", 5.0)])
def test_the_stand_in_refuses_what_ros_would(wrong: tuple[str, Any]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        setattr(BoundingBox2D(), *wrong)
