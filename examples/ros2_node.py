"""A ROS 2 node: the newest picture of each topic, looked at together; boxes as vision_msgs/Detection2DArray.

    source /opt/ros/humble/setup.bash
    python3 ros2_node.py --ros-args -p topics:="['/left/image_raw', '/right/image_raw']" -p queries:="the red mug"
    ros2 param set /gemvg queries "['all balls', 'the red mug']"              # at any time; the other parameters stay

Boxes of a picture go to its topic's `/detections`, with that picture's header. A round needs a new picture of every
topic, so nothing is said about an old one; the model works in a thread of its own. Tested against a stand-in of rclpy
and the messages (tests/ros2_messages.py); NOT YET RUN under ROS 2. Needs sensor_msgs and vision_msgs 4 (Humble on).
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge import GemvgError, Grounder, Grounding
from gemvg_edge.command import one_line
from gemvg_edge.prompt import check_query

try:
    import rclpy
    from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
    from rclpy.executors import ExternalShutdownException
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import Image
    from vision_msgs.msg import Detection2D, Detection2DArray, ObjectHypothesisWithPose
except ImportError as missing:
    fix = "source /opt/ros/$ROS_DISTRO/setup.bash, and apt install ros-$ROS_DISTRO-vision-msgs"
    print(f"ros2_node: {missing}; {fix}", file=sys.stderr)
    sys.exit(2)

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
ENCODINGS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "mono16": 1}  # and their channels
SILENT = 5.0  # seconds without a picture of some topic, after which the log says so
LARGEST = 1e6  # of a rate, and of seconds
PARAMETERS: dict[str, tuple[Any, str]] = {
    "topics": (["image"], "sensor_msgs/Image topics, in the order in which questions number their pictures"),
    "queries": ([""], "what to look for in every round; may be set at any time"),
    "bundle": ("", "bundle folder; empty: the shipped model"),
    "rate": (0.0, "rounds a second at most; 0: as many as the model manages"),
    "timeout": (0.0, "seconds after which a round is given up; 0: never"),
}


def to_array(message: Any, topic: str = "the picture") -> Pixels:
    """A sensor_msgs/Image -> (height, width, 3) in RGB order, or (height, width) in grey; GemvgError says why not.

    Alpha is left out: nothing shows through a camera's picture.
    """
    name, height, width, step = message.encoding, message.height, message.width, message.step
    if name not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        raise GemvgError(f"{topic} has the encoding {name[:40]!r}, none of {known}; convert it, as image_proc does")
    channels, item = ENCODINGS[name], 2 if name == "mono16" else 1
    row, size = width * channels * item, len(message.data)
    if not (height and width and step >= row and size >= step * (height - 1) + row):
        what = f"{width} x {height} pixels in {name}, a step of {step} and {size} bytes"
        raise GemvgError(f"{topic} has {what}, which do not fit each other; see to the camera's driver")
    kind = np.dtype(np.uint8 if item == 1 else ">u2" if message.is_bigendian else "<u2")
    array = np.ndarray((height, width, channels), kind, message.data, 0, (step, channels * item, item))
    if channels == 1:
        return array[:, :, 0].astype(np.uint16 if item == 2 else np.uint8)  # in this machine's order of bytes
    return array[:, :, [2, 1, 0] if name.startswith("bgr") else [0, 1, 2]]


def to_detections(answers: Sequence[Grounding], picture: int, header: Any) -> Any:
    """The boxes of one picture in some answers -> vision_msgs/Detection2DArray with the picture's header.

    `class_id` is a box's label: what was asked for, or the model's own word. `score` is NaN where a model gives none.
    """
    message = Detection2DArray(header=header)
    for box in (box for answer in answers for box in answer if box.image == picture):
        found = ObjectHypothesisWithPose()
        found.hypothesis.class_id = box.label or ""
        found.hypothesis.score = float("nan") if box.score is None else float(box.score)
        detection = Detection2D(header=header, results=[found])
        detection.bbox.center.position.x = float(box.x1 + box.x2) / 2
        detection.bbox.center.position.y = float(box.y1 + box.y2) / 2
        detection.bbox.size_x, detection.bbox.size_y = float(box.x2 - box.x1), float(box.y2 - box.y1)
        message.detections.append(detection)
    return message


class Watcher:
    """A node that subscribes, and a thread that answers. `close` ends both."""

    def __init__(self, node: Any) -> None:
        self.node, self.failed = node, False
        for name, (default, text) in PARAMETERS.items():
            about = ParameterDescriptor(description=text, read_only=name != "queries", dynamic_typing=True)
            node.declare_parameter(name, default, about)
        values = {name: node.get_parameter(name).value for name in PARAMETERS}
        self.topics, self.queries = texts("topics", values["topics"]), questions(values["queries"])
        self.rate, self.timeout = number("rate", values["rate"]), number("timeout", values["timeout"])
        self.grounder = Grounder.open(values["bundle"] or None)
        self.newest: dict[str, Any] = {}  # message by topic, each looked at once
        self.changed, self.over = threading.Condition(), threading.Event()
        self.publishers = [node.create_publisher(Detection2DArray, f"{topic}/detections", 10) for topic in self.topics]
        for topic in self.topics:
            node.create_subscription(Image, topic, functools.partial(self.keep, topic), qos_profile_sensor_data)
        node.add_on_set_parameters_callback(self.set)
        self.thread = threading.Thread(target=self.work, name="gemvg")
        self.thread.start()

    def close(self) -> None:
        """End the round that is worked on, the thread and the node."""
        self.over.set()
        with self.changed:
            self.changed.notify()
        self.thread.join()
        self.grounder.close()
        self.node.destroy_node()

    def set(self, parameters: Sequence[Any]) -> Any:
        """Take other queries, from the next round on."""
        try:
            self.queries = next((questions(one.value) for one in parameters if one.name == "queries"), self.queries)
        except GemvgError as error:
            return SetParametersResult(successful=False, reason=one_line(error))
        return SetParametersResult(successful=True)

    def keep(self, topic: str, image: Any) -> None:
        """A picture that came, in place of the one before."""
        with self.changed:
            self.newest[topic] = image
            self.changed.notify()

    def take(self) -> list[Any]:
        """A new picture of every topic, waited for; none at the end."""
        with self.changed:
            while len(self.newest) < len(self.topics) and not self.over.is_set():
                if not self.changed.wait(SILENT):
                    silent = ", ".join(topic for topic in self.topics if topic not in self.newest)
                    self.node.get_logger().warning(f"waiting for pictures on {silent}")
            taken, self.newest = self.newest, {}
        return [] if self.over.is_set() else [taken[topic] for topic in self.topics]

    def work(self) -> None:
        """Round after round; the thread's."""
        pause = 0.0
        while not self.over.wait(pause) and (images := self.take()):
            began = time.monotonic()
            try:
                self.round(images)
            except GemvgError as error:
                if not self.over.is_set():
                    self.node.get_logger().error(one_line(error))
            except Exception:
                if rclpy.ok():  # a fault of ours; else ROS has ended, and nothing can be published
                    self.failed = True
                    rclpy.try_shutdown()
                    raise
                return
            pause = max(0.0, began + 1 / self.rate - time.monotonic()) if self.rate else 0.0

    def round(self, images: Sequence[Any]) -> None:
        """Look at the pictures and publish what is in each."""
        end = time.monotonic() + self.timeout
        pictures = [to_array(image, topic) for topic, image in zip(self.topics, images, strict=True)]
        scene = self.grounder.look(pictures, timeout=self.timeout or None, cancel=self.over)
        left = max(0.001, end - time.monotonic()) if self.timeout else None
        answers = scene.ground(list(self.queries), timeout=left, cancel=self.over)
        for answer in answers:
            if answer.problem:
                self.node.get_logger().warning(f"{answer.query}: {answer.problem}")
        if any(answer.problem and not answer for answer in answers):
            return  # an empty message would say that nothing is there
        for k, (publisher, image) in enumerate(zip(self.publishers, images, strict=True)):
            publisher.publish(to_detections(answers, k, image.header))


def texts(name: str, value: Any) -> list[str]:
    """A parameter that is a text or several."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(one, str) and one for one in several):
        raise GemvgError(f"the parameter {name} is {value!r}; give a text or a list of texts, such as ['one', 'two']")
    if not several or len(set(several)) < len(several):
        raise GemvgError(f"the parameter {name} is {value!r}; name one or more, each once")
    return several


def questions(value: Any) -> list[str]:
    """The parameter `queries`."""
    for query in (queries := texts("queries", value)):
        check_query(query)
    return queries


def number(name: str, value: Any) -> float:
    """A parameter that is 0 or a number above it."""
    if not isinstance(value, (int, float)) or not 0 <= value < LARGEST:
        raise GemvgError(f"the parameter {name} is {value!r}; give 0 or a number above it")
    return float(value)


def main() -> int:
    """Run until a signal; the exit code."""
    rclpy.init()
    try:
        watcher = Watcher(rclpy.create_node("gemvg"))
    except GemvgError as error:
        print(f"ros2_node: {one_line(error)}", file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    with suppress(KeyboardInterrupt, ExternalShutdownException):
        rclpy.spin(watcher.node)
    watcher.close()
    rclpy.try_shutdown()
    return int(watcher.failed)


if __name__ == "__main__":
    sys.exit(main())
