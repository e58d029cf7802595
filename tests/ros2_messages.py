"""A stand-in of what examples/ros2_node.py needs of ROS 2: message types and a small rclpy in one process.

Fields and their types are the published ones (sensor_msgs, std_msgs, builtin_interfaces, geometry_msgs, rcl_interfaces,
vision_msgs 4). As in the classes that ROS generates there are no other fields, and a value of another type is refused:
a whole number is no float there. Nothing here shows that a real ROS 2 takes it.
"""

from __future__ import annotations

import array
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any


def message(name: str, **fields: Any) -> type[Any]:
    """A class of messages: a field's default is a value, or a class that makes one."""

    def init(self: Any, **values: Any) -> None:
        for field, default in fields.items():
            setattr(self, field, values.pop(field, default() if isinstance(default, type) else default))
        assert not values, f"{name} has no field {next(iter(values))}"

    def set_field(self: Any, field: str, value: Any) -> None:
        default = fields[field]  # KeyError for a field that is none
        kind = default if isinstance(default, type) else type(default)
        assert isinstance(value, kind), f"{name}.{field} is a {type(value).__name__}, not a {kind.__name__}"
        object.__setattr__(self, field, value)

    return type(name, (), {"__slots__": tuple(fields), "__init__": init, "__setattr__": set_field})


class Bytes(array.array):
    """A uint8[]: `Bytes("B", content)`, or none."""

    def __new__(cls, typecode: Any = "B", content: bytes = b"") -> Any:
        """As array.array, whose kind may be left out."""
        return super().__new__(cls, typecode, content)


Time = message("Time", sec=0, nanosec=0)
Header = message("Header", stamp=Time, frame_id="")
Image = message("Image", header=Header, height=0, width=0, encoding="", is_bigendian=0, step=0, data=Bytes)
Point = message("Point", x=0.0, y=0.0, z=0.0)
Quaternion = message("Quaternion", x=0.0, y=0.0, z=0.0, w=1.0)
Pose = message("Pose", position=Point, orientation=Quaternion)
PoseWithCovariance = message("PoseWithCovariance", pose=Pose, covariance=list)
ObjectHypothesis = message("ObjectHypothesis", class_id="", score=0.0)
ObjectHypothesisWithPose = message("ObjectHypothesisWithPose", hypothesis=ObjectHypothesis, pose=PoseWithCovariance)
Point2D = message("Point2D", x=0.0, y=0.0)
Pose2D = message("Pose2D", position=Point2D, theta=0.0)
BoundingBox2D = message("BoundingBox2D", center=Pose2D, size_x=0.0, size_y=0.0)
Detection2D = message("Detection2D", header=Header, results=list, bbox=BoundingBox2D, id="")
Detection2DArray = message("Detection2DArray", header=Header, detections=list)
ParameterDescriptor = message("ParameterDescriptor", description="", read_only=False, dynamic_typing=False)
SetParametersResult = message("SetParametersResult", successful=False, reason="")


class ExternalShutdownException(Exception):
    """What `spin` raises where ROS was shut down meanwhile."""


class Parameter:
    """A name and a value."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


class Ros:
    """What one process of ROS knows: parameters of its command line, topics, what was published and logged."""

    def __init__(self, **parameters: Any) -> None:
        self.given, self.parameters, self.about = parameters, {}, {}  # type: ignore[var-annotated]
        self.subscribers: dict[str, Callable[[Any], None]] = {}
        self.published: dict[str, list[Any]] = {}
        self.logged: list[tuple[str, str]] = []
        self.down, self.changed, self.destroyed = threading.Event(), threading.Condition(), False
        self.script: Any = None  # the module that was loaded beside this
        self.on_set: Callable[[list[Parameter]], Any] | None = None

    def declare_parameter(self, name: str, value: Any, descriptor: Any) -> None:
        """Its value, from the command line or the default."""
        assert descriptor.dynamic_typing or type(self.given.get(name, value)) is type(value)
        self.parameters[name], self.about[name] = self.given.get(name, value), descriptor

    def get_parameter(self, name: str) -> Parameter:
        """By its name."""
        return Parameter(name, self.parameters[name])

    def add_on_set_parameters_callback(self, callback: Callable[[list[Parameter]], Any]) -> None:
        """What decides over new values."""
        self.on_set = callback

    def create_subscription(self, kind: Any, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        """Keep what takes a topic's pictures."""
        assert kind is Image
        self.subscribers[topic] = callback

    def create_publisher(self, kind: Any, topic: str, depth: int) -> Publisher:
        """Of one topic."""
        return Publisher(self, kind, self.published.setdefault(topic, []))

    def get_logger(self) -> Ros:
        """The log is kept here."""
        return self

    def warning(self, text: str) -> None:
        """Log it."""
        self._log("warning", text)

    def error(self, text: str) -> None:
        """Log it."""
        self._log("error", text)

    def destroy_node(self) -> None:
        """Be told that the node went in order."""
        self.destroyed = True

    def set_parameter(self, name: str, value: Any) -> Any:
        """`ros2 param set`."""
        if self.about[name].read_only:
            return SetParametersResult(reason="read-only")
        assert self.on_set is not None
        result = self.on_set([Parameter(name, value)])
        if result.successful:
            self.parameters[name] = value
        return result

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until something that was published or logged makes it true."""
        with self.changed:
            assert self.changed.wait_for(what, 20), (self.published, self.logged)

    def modules(self) -> dict[str, ModuleType]:
        """What `import` is to find."""
        rclpy = {
            "init": lambda: None,
            "create_node": lambda name: self,
            "spin": self._spin,
            "ok": lambda: not self.down.is_set(),
            "try_shutdown": self.down.set,
        }
        contents: dict[str, dict[str, Any]] = {
            "rclpy": rclpy,
            "rclpy.executors": {"ExternalShutdownException": ExternalShutdownException},
            "rclpy.qos": {"qos_profile_sensor_data": object()},
            "rcl_interfaces": {},
            "rcl_interfaces.msg": {
                "ParameterDescriptor": ParameterDescriptor,
                "SetParametersResult": SetParametersResult,
            },
            "sensor_msgs": {},
            "sensor_msgs.msg": {"Image": Image},
            "vision_msgs": {},
            "vision_msgs.msg": {
                "Detection2D": Detection2D,
                "Detection2DArray": Detection2DArray,
                "ObjectHypothesisWithPose": ObjectHypothesisWithPose,
            },
        }
        made = {}
        for name, content in contents.items():
            made[name] = ModuleType(name)
            vars(made[name]).update(content)
        return made

    def _spin(self, node: Any) -> None:
        self.down.wait()
        raise ExternalShutdownException

    def _log(self, level: str, text: str) -> None:
        with self.changed:
            self.logged.append((level, text))
            self.changed.notify_all()


class Publisher:
    """Keeps what is published, where ROS is still up."""

    def __init__(self, ros: Ros, kind: Any, kept: list[Any]) -> None:
        self.ros, self.kind, self.kept = ros, kind, kept

    def publish(self, message: Any) -> None:
        """Refuse other messages, and any after the shutdown."""
        assert isinstance(message, self.kind)
        if self.ros.down.is_set():
            raise RuntimeError("publisher's context is invalid")
        with self.ros.changed:
            self.kept.append(message)
            self.ros.changed.notify_all()
