"""One object of a JSON file, its fields checked as they are read; a fault is one GemvgError sentence.

Serves the manifest of a bundle and the JSON files of a checkpoint. Knows no field's meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from gemvg_edge.errors import GemvgError


class Settings(Protocol):
    """A dataclass with a default for every field, which can be read from JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Any:
        """Read and check the fields."""


T = TypeVar("T")
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class JsonObject:
    """An object with the file it is from, how such a file is mended, and where in it, such as `model.vision.`."""

    path: Path
    content: Mapping[str, Any]
    fix: str
    place: str = ""

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A field of one type; null is as good as absent. A whole number is a float too, a bool is no number."""
        value = self.content.get(key)
        if value is None:
            value = default
        if value is None:
            raise GemvgError(f"{self.path} lacks the field {self.place}{key}; {self.fix}")
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            name = "object" if kind is dict else kind.__name__
            raise GemvgError(f"{self.path}: {self.place}{key} is {value!r}, not of type {name}; {self.fix}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        values = self.value(key, list)
        if not all(type(value) is int for value in values):
            raise GemvgError(f"{self.path}: {self.place}{key} is {values!r}, not a list of whole numbers; {self.fix}")
        return tuple(values)

    def object(self, key: str, default: dict[str, Any] | None = None) -> JsonObject:
        """An object inside this one."""
        return JsonObject(self.path, self.value(key, dict, default), self.fix, f"{self.place}{key}.")

    def settings(self, kind: type[S], others: bool = False) -> S:
        """The object as settings; with `others`, fields that these do not know are somebody else's."""
        where = f"{self.path}: {self.place[:-1]}" if self.place else str(self.path)
        known = {field.name: field.default for field in fields(kind)}
        if not others and (unknown := sorted(set(self.content) - set(known))):
            names = ", ".join(known)
            raise GemvgError(f"{where} has the unknown field {unknown[0]!r}; this gemvg-edge knows {names}")
        try:
            settings: S = kind.from_config(self.content)
        except (GemvgError, AttributeError, TypeError, ValueError) as error:
            raise GemvgError(f"{where} cannot be read ({error}); {self.fix}") from None
        for name, default in known.items():
            if not _alike(value := getattr(settings, name), default):
                raise GemvgError(f"{self.path}: {self.place}{name} is {value!r}, not like {default!r}; {self.fix}")
        return settings


def read_json_object(path: Path, fix: str, missing: str) -> JsonObject:
    """A file that holds one object; `missing` follows the file's name where there is none."""
    if not path.is_file():
        raise GemvgError(f"{path}: {missing}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GemvgError(f"{path} is not JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise GemvgError(f"{path} is not a JSON object; {fix}")
    return JsonObject(path, content, fix)


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        same_length = isinstance(value, tuple) and len(value) == len(default)
        return same_length and all(map(_alike, value, default))
    if isinstance(default, (bool, str)) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else int)
