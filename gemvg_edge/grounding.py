"""What a question brings back: boxes, the text that they were read from, and how long it took; as others want it.

JSON (docs/reference/json.md has the schema), numpy, COCO and supervision. Knows no model and no engine.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject, parse_json, short

if TYPE_CHECKING:
    from supervision import Detections  # an option: see to_supervision

FORMAT, FORMAT_VERSION = "gemvg-edge-grounding", 1
_JSON = Path("the grounding")  # what a sentence about its fields names
_FIX = "give what Grounding.to_json wrote"


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each phase, and how many tokens went through it; the first three belong to the scene."""

    preprocess_ms: float = 0.0  # reading and resizing
    vision_ms: float = 0.0  # the vision tower
    image_prefill_ms: float = 0.0  # the decoder over the pictures
    query_prefill_ms: float = 0.0  # the decoder over the query, to the first token of the answer
    decode_ms: float = 0.0  # the rest of the answer
    image_tokens: int = 0  # of the pictures and the words before them
    cached_tokens: int = 0  # of those, what an earlier look had left
    query_tokens: int = 0  # of the query and the words around it
    answer_tokens: int = 0  # that the model wrote

    @property
    def look_ms(self) -> float:
        """What the scene took, once for all its questions."""
        return self.preprocess_ms + self.vision_ms + self.image_prefill_ms

    @property
    def answer_ms(self) -> float:
        """What this question took."""
        return self.query_prefill_ms + self.decode_ms

    @property
    def total_ms(self) -> float:
        """All phases together."""
        return self.look_ms + self.answer_ms


class Picture(NamedTuple):
    """A picture as it was given: its file's name, or its place in the list, and its size in pixels."""

    name: str  # as a sentence or a COCO file shows it
    width: int  # pixels, once it is upright
    height: int


class BoxArrays(NamedTuple):
    """The boxes of an answer, a row each, in their order."""

    xyxy: npt.NDArray[np.float32]  # (n, 4): x1, y1, x2, y2 in pixels of the original picture
    images: npt.NDArray[np.int64]  # (n,): which picture, from 0
    scores: npt.NDArray[np.float32]  # (n,): NaN where there is none
    labels: list[str]


@dataclass(frozen=True)
class Grounding:
    """An answer: boxes in pixels of the original pictures, and how they came about. Iterates over its boxes."""

    boxes: tuple[Box, ...]
    text: str  # what the model wrote
    thinking: str  # the reasoning before the answer, where the model gave one
    problem: str | None  # why boxes may be missing: what was malformed in the text; None if nothing was
    timings: Timings
    query: str = ""
    pictures: tuple[Picture, ...] = ()

    def __iter__(self) -> Iterator[Box]:
        return iter(self.boxes)

    def __getitem__(self, k: int) -> Box:
        return self.boxes[k]

    def __len__(self) -> int:
        return len(self.boxes)

    def __bool__(self) -> bool:
        return bool(self.boxes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, of the documented format and its version."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "query": self.query,
            "images": [{"index": k, **picture._asdict()} for k, picture in enumerate(self.pictures)],
            "boxes": [asdict(box) for box in self.boxes],
            "text": self.text,
            "thinking": self.thinking,
            "problem": self.problem,
            "timings": asdict(self.timings),
        }

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON text, on one line unless `indent` says otherwise."""
        try:
            return json.dumps(self.to_dict(), indent=indent, allow_nan=False, default=float)  # numpy's numbers too
        except (TypeError, ValueError) as error:
            raise GemvgError(f"{_JSON} has what JSON has not ({error}); give finite numbers") from None

    @staticmethod
    def from_json(text: str) -> Grounding:
        """Read what `to_json` wrote; GemvgError names the field that is missing or wrong."""
        if not isinstance(text, str):
            raise GemvgError(f"{_JSON} is a {type(text).__name__}; {_FIX}, a text")
        try:
            content = parse_json(text)
        except ValueError as error:
            raise GemvgError(f"{_JSON} is not JSON ({error}); {_FIX}") from None
        return _read(content)

    def to_numpy(self) -> BoxArrays:
        """The boxes as arrays."""
        return BoxArrays(
            np.array([tuple(box) for box in self.boxes], np.float32).reshape(-1, 4),
            np.array([box.image for box in self.boxes], np.int64),
            np.array([math.nan if box.score is None else box.score for box in self.boxes], np.float32),
            [box.label or "" for box in self.boxes],
        )

    def to_coco(self) -> dict[str, Any]:
        """A COCO data set with these pictures, a category a label; ids count from 1, boxes are x, y, width, height."""
        categories = {label: k for k, label in enumerate(self._labels(), 1)}
        annotations = []
        for k, box in enumerate(self.boxes, 1):
            annotation: dict[str, Any] = {
                "id": k,
                "image_id": box.image + 1,
                "category_id": categories[box.label or ""],
            }
            annotation |= {"bbox": [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1], "area": box.area, "iscrowd": 0}
            annotations.append(annotation if box.score is None else annotation | {"score": box.score})
        return {
            "images": [
                {"id": k, "file_name": picture.name, "width": picture.width, "height": picture.height}
                for k, picture in enumerate(self.pictures, 1)
            ],
            "annotations": annotations,
            "categories": [{"id": k, "name": label} for label, k in categories.items()],
        }

    def to_supervision(self) -> list[Detections]:
        """One `supervision.Detections` a picture, in their order, with labels as `data["class_name"]`.

        `confidence` is None where any box of the picture has no score. GemvgError without the package supervision.
        """
        try:
            supervision: Any = importlib.import_module("supervision")
        except ImportError:
            raise GemvgError("supervision cannot be imported; run `pip install supervision`") from None
        arrays, classes = self.to_numpy(), {label: k for k, label in enumerate(self._labels())}
        class_ids = np.array([classes[label] for label in arrays.labels], np.int64)
        found = []
        for k in range(len(self.pictures)):
            here = arrays.images == k
            scores = arrays.scores[here]
            found.append(
                supervision.Detections(
                    xyxy=arrays.xyxy[here],
                    confidence=None if np.isnan(scores).any() else scores,
                    class_id=class_ids[here],
                    data={"class_name": np.array(arrays.labels, dtype=str)[here]},
                )
            )
        return found

    def _labels(self) -> list[str]:
        """Every label once, in the order of the boxes."""
        return list(dict.fromkeys(box.label or "" for box in self.boxes))


def _read(content: Any) -> Grounding:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GemvgError(f"{_JSON} is not of format {FORMAT}; {_FIX}")
    whole = JsonObject(_JSON, content, _FIX)
    if (version := whole.value("version", int)) != FORMAT_VERSION:
        raise GemvgError(f"{_JSON} has version {version}, this gemvg-edge reads {FORMAT_VERSION}; update the older one")
    pictures = tuple(
        Picture(*(entry.value(name, kind, low=low) for name, kind, low in _PICTURE))
        for entry in _objects(whole, "images")
    )
    boxes = tuple(_read_box(entry, len(pictures)) for entry in _objects(whole, "boxes"))
    times = whole.object("timings")
    measured: dict[str, Any] = {
        field.name: times.value(field.name, int if field.type == "int" else float, _SINCE.get(field.name), low=0)
        for field in fields(Timings)
    }
    problem = whole.value("problem", str, "") or None
    return Grounding(
        boxes,
        whole.value("text", str),
        whole.value("thinking", str),
        problem,
        Timings(**measured),
        whole.value("query", str),
        pictures,
    )


_SINCE = {"cached_tokens": 0}  # what a field is where a text was written before there was such
_PICTURE: tuple[tuple[str, type[Any], int | None], ...] = (("name", str, None), ("width", int, 1), ("height", int, 1))


def _objects(whole: JsonObject, key: str) -> list[JsonObject]:
    values = whole.value(key, list)
    if bad := [value for value in values if not isinstance(value, dict)]:
        raise GemvgError(f"{_JSON}: {key} holds {short(bad[0])}, no object; {_FIX}")
    return [JsonObject(_JSON, value, _FIX, f"{key}[{k}].") for k, value in enumerate(values)]


def _read_box(entry: JsonObject, pictures: int) -> Box:
    x1, y1, x2, y2 = (entry.value(name, float) for name in ("x1", "y1", "x2", "y2"))
    label = entry.value("label", str) if entry.content.get("label") is not None else None
    score = entry.value("score", float, low=0, high=1) if entry.content.get("score") is not None else None
    return Box(entry.value("image", int, low=0, high=pictures - 1), x1, y1, x2, y2, label=label, score=score)


def merge(parts: Sequence[Grounding], pictures: tuple[Picture, ...], timings: Timings) -> Grounding:
    """The answers to one question about each picture alone as one about all: the k-th part is about picture k."""
    boxes = [replace(box, image=k) for k, part in enumerate(parts) for box in part.boxes]
    problems = [f"image {k}: {part.problem}" for k, part in enumerate(parts, 1) if part.problem]
    return Grounding(
        tuple(boxes),
        "\n".join(f"Image-{k}: {part.text}" for k, part in enumerate(parts, 1)),
        "\n".join(f"Image-{k}: {part.thinking}" for k, part in enumerate(parts, 1) if part.thinking),
        problems[0] if problems else None,
        timings,
        parts[0].query,
        pictures,
    )
