"""One object of a JSON file, its fields checked as they are read; a fault is one GemvgError sentence.

Serves the manifest of a bundle and the JSON files of a checkpoint. Knows no field's meaning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable, read_bytes


class Settings(Protocol):
    """A dataclass with a default for every field, which can be read from JSON."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Any:
        """Read and check the fields."""


LARGEST = 2**53  # the whole numbers up to here are floats too
DIGITS = 300  # of a whole number; longer ones are an attack on `int`, or on a float that is made of them
SHOWN = 120  # characters of a value in a sentence

T = TypeVar("T")
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class JsonObject:
    """An object with the file it is from, how such a file is mended, and where in it, such as `model.vision.`."""

    path: Path
    content: Mapping[str, Any]
    fix: str
    place: str = ""

    def value(
        self, key: str, kind: type[T], default: T | None = None, *, low: float | None = None, high: float | None = None
    ) -> T:
        """A field of one type; null is as good as absent. A whole number is a float too, a bool is no number.

        A number lies between `low` and `high`, both allowed, where these are given.
        """
        value = self.content.get(key)
        if value is None:
            value = default
        if value is None:
            raise GemvgError(f"{self.path} lacks the field {self.place}{key}; {self.fix}")
        if kind is float and type(value) is int and abs(value) <= LARGEST:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            name = "object" if kind is dict else kind.__name__
            raise GemvgError(f"{self.path}: {self.place}{key} is {short(value)}, not of type {name}; {self.fix}")
        self.in_range(key, value, low, high)
        return value

    def in_range(self, key: str, value: Any, low: float | None, high: float | None) -> None:
        """GemvgError for a number outside `low`..`high`."""
        if (low is not None and value < low) or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise GemvgError(f"{self.path}: {self.place}{key} is {short(value)}, not {wanted}; {self.fix}")

    def integers(self, key: str, *, low: int | None = None, high: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers, each between `low` and `high` where these are given."""
        values = self.value(key, list)
        if not all(type(value) is int for value in values):
            raise GemvgError(
                f"{self.path}: {self.place}{key} is {short(values)}, not a list of whole numbers; {self.fix}"
            )
        for value in values:
            self.in_range(key, value, low, high)
        return tuple(values)

    def only(self, *known: str) -> None:
        """GemvgError for a field of another name."""
        if unknown := sorted(set(self.content) - set(known)):
            where = f"{self.path}: {self.place[:-1]}" if self.place else str(self.path)
            names = ", ".join(known)
            raise GemvgError(f"{where} has the unknown field {short(unknown[0])}; this gemvg-edge knows {names}")

    def object(self, key: str, default: dict[str, Any] | None = None) -> JsonObject:
        """An object inside this one."""
        return JsonObject(self.path, self.value(key, dict, default), self.fix, f"{self.place}{key}.")

    def settings(self, kind: type[S], others: bool = False) -> S:
        """The object as settings; with `others`, fields that these do not know are somebody else's."""
        where = f"{self.path}: {self.place[:-1]}" if self.place else str(self.path)
        known = {field.name: field.default for field in fields(kind)}
        if not others:
            self.only(*known)
        try:
            settings: S = kind.from_config(self.content)
        except (GemvgError, AttributeError, TypeError, ValueError) as error:
            if isinstance(error, GemvgError) and str(error).split(" ")[0] in known:  # a sentence about one field
                raise GemvgError(f"{self.path}: {self.place}{error}; {self.fix}") from None
            raise GemvgError(f"{where} cannot be read ({error}); {self.fix}") from None
        for name, default in known.items():
            if not _alike(value := getattr(settings, name), default):
                raise GemvgError(f"{self.path}: {self.place}{name} is {value!r}, not like {default!r}; {self.fix}")
        return settings


def read_json_object(path: Path, fix: str, missing: str) -> JsonObject:
    """A file that holds one object; `missing` follows the file's name where there is none."""
    if not is_file(path):
        raise GemvgError(f"{printable(path)}: {missing}")
    stored = read_bytes(path)
    try:
        content = parse_json(stored.decode("utf-8-sig"))
    except ValueError as error:
        raise GemvgError(f"{printable(path)} is not JSON ({error}); {fix}") from None
    if not isinstance(content, dict):
        raise GemvgError(f"{printable(path)} is not a JSON object; {fix}")
    return JsonObject(path, content, fix)


def parse_json(text: str) -> Any:
    """One JSON value as the standard has it, for text from strangers; ValueError says what is wrong.

    Python's own reader takes the last of two equal keys, and NaN and Infinity, which are no JSON; a number may be of
    any size there, and deep nesting is a RecursionError.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {short(twice)} stands twice in one object")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {short(text)} is past every range")
    return number


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"the number {short(text)} is past every range")
    return int(text)


def short(value: Any) -> str:
    """A value for a sentence: as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        same_length = isinstance(value, tuple) and len(value) == len(default)
        return same_length and all(map(_alike, value, default))
    if isinstance(default, (bool, str)) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else int)
