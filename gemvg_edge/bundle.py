"""The bundle: a folder with `manifest.json`, two graphs, their weights, the embedding table and the tokenizer.

This module reads and verifies; `export.bundle_writer` writes. Whatever is wrong with a folder is one GemvgError that
names the file and the fix. Knows no engine and no model arithmetic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import Preprocessing
from gemvg_edge.prompt import PromptTemplate

FORMAT = "gemvg-edge-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VISION_GRAPH, VISION_DATA = "vision.onnx", "vision.data"
DECODER_GRAPH, DECODER_DATA = "decoder.onnx", "decoder.data"
EMBEDDING, TOKENIZER = "embedding.npy", "tokenizer.json"
FILES = (VISION_GRAPH, VISION_DATA, DECODER_GRAPH, DECODER_DATA, EMBEDDING, TOKENIZER)
MODEL_TYPES = ("qwen2_vl",)

T = TypeVar("T")


@dataclass(frozen=True)
class VisionShape:
    """What the runtime must know of the vision tower."""

    depth: int
    embed_dim: int
    heads: int
    head_dim: int
    rope_theta: float


@dataclass(frozen=True)
class ModelShape:
    """What the runtime must know of the model."""

    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    vocab_size: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    vision: VisionShape


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle, as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, checked and typed."""

    name: str
    model: ModelShape
    preprocessing: Preprocessing
    answer: AnswerFormat
    prompt: PromptTemplate
    coordinate_frame: Mapping[str, Any]  # {"kind": "relative", "size": 1000}
    dialect: str
    weights: Mapping[str, str]  # part -> what was done to it, such as "int4-rtn-g32"
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where one of the bundle's files lies."""
        return self.folder / name


def open_bundle(folder: str | Path, check_hashes: bool = True) -> Bundle:
    """Read a bundle's manifest and check every file against it; without `check_hashes` only presence and size."""
    folder = Path(folder)
    if not folder.is_dir():
        raise GemvgError(f"{folder}: no such bundle folder; make one with `python -m export.to_onnx CHECKPOINT BUNDLE`")
    manifest = _read_manifest(folder / MANIFEST)
    for name, record in manifest.files.items():
        _check_file(folder / name, record, check_hashes)
    return Bundle(folder, manifest)


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise GemvgError(f"{path}: no such file; write a bundle with `python -m export.to_onnx CHECKPOINT BUNDLE`")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemvgError(f"{path} is not JSON ({error}); export the bundle again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise GemvgError(f"{path} is not the manifest of a {FORMAT}; give one that `python -m export.to_onnx` wrote")
    version = _field(path, content, "format_version", int)
    if version > FORMAT_VERSION:
        raise GemvgError(
            f"{path} has format version {version}, this gemvg-edge reads {FORMAT_VERSION}; update gemvg-edge"
        )
    files = _read_files(path, _field(path, content, "files", dict))
    settings: Callable[[str], dict[str, Any]] = lambda key: _field(path, content, key, dict)  # noqa: E731
    return Manifest(
        name=_field(path, content, "name", str),
        model=_read_model(path, settings("model")),
        preprocessing=_read_settings(path, "preprocessing", Preprocessing.from_config, settings("preprocessing")),
        answer=_read_settings(path, "answer", AnswerFormat.from_config, settings("answer")),
        prompt=_read_settings(path, "prompt", PromptTemplate.from_config, settings("prompt")),
        coordinate_frame=_read_frame(path, settings("coordinate_frame")),
        dialect=_field(path, content, "dialect", str),
        weights={str(part): str(what) for part, what in settings("weights").items()},
        files=files,
    )


def _read_model(path: Path, model: Mapping[str, Any]) -> ModelShape:
    model_type = _field(path, model, "model_type", str, "model.")
    if model_type not in MODEL_TYPES:
        raise GemvgError(f"{path}: unknown model type {model_type!r}; this gemvg-edge runs {', '.join(MODEL_TYPES)}")
    numbers = ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size", "image_token_id")
    sections = _integers(path, model, "mrope_section", "model.")
    if len(sections) != 3:
        raise GemvgError(f"{path}: model.mrope_section has {len(sections)} numbers, not 3; export the bundle again")
    vision = _field(path, model, "vision", dict, "model.")
    vision_numbers = {
        key: _field(path, vision, key, int, "model.vision.") for key in ("depth", "embed_dim", "heads", "head_dim")
    }
    return ModelShape(
        model_type=model_type,
        rope_theta=_field(path, model, "rope_theta", float, "model."),
        mrope_section=(sections[0], sections[1], sections[2]),
        eos_token_ids=_integers(path, model, "eos_token_ids", "model."),
        vision=VisionShape(**vision_numbers, rope_theta=_field(path, vision, "rope_theta", float, "model.vision.")),
        **{key: _field(path, model, key, int, "model.") for key in numbers},
    )


def _read_files(path: Path, files: Mapping[str, Any]) -> dict[str, FileRecord]:
    if missing := [name for name in FILES if name not in files]:
        raise GemvgError(f"{path} lacks the field files.{missing[0]}; export the bundle again")
    records = {}
    for name, record in files.items():
        # A manifest is untrusted: its names stay inside the bundle folder.
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise GemvgError(f"{path} names the file {name!r}, outside the bundle folder; do not use this bundle")
        if not isinstance(record, dict):
            raise GemvgError(f"{path}: files.{name} is not an object; export the bundle again")
        size = _field(path, record, "bytes", int, f"files.{name}.")
        records[name] = FileRecord(size, _field(path, record, "sha256", str, f"files.{name}."))
    return records


def _read_settings(path: Path, field: str, read: Callable[[Mapping[str, Any]], T], config: Mapping[str, Any]) -> T:
    try:
        return read(config)
    except (GemvgError, TypeError, ValueError) as error:
        raise GemvgError(f"{path}: {field} cannot be read ({error}); export the bundle again") from None


def _read_frame(path: Path, frame: Mapping[str, Any]) -> Mapping[str, Any]:
    if frame != {"kind": "relative", "size": 1000}:
        raise GemvgError(f"{path}: unknown coordinate frame {dict(frame)}; this gemvg-edge knows relative ones of 1000")
    return frame


def _field(path: Path, section: Mapping[str, Any], key: str, kind: type[T], prefix: str = "") -> T:
    if key not in section:
        raise GemvgError(f"{path} lacks the field {prefix}{key}; export the bundle again")
    value = section[key]
    if kind is float and isinstance(value, int):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise GemvgError(f"{path}: {prefix}{key} is {value!r}, not of type {kind.__name__}; export the bundle again")
    return value


def _integers(path: Path, section: Mapping[str, Any], key: str, prefix: str) -> tuple[int, ...]:
    values = _field(path, section, key, list, prefix)
    if not all(type(value) is int for value in values):
        raise GemvgError(f"{path}: {prefix}{key} is {values!r}, not a list of whole numbers; export the bundle again")
    return tuple(values)


def _check_file(path: Path, record: FileRecord, check_hash: bool) -> None:
    if not path.is_file():
        raise GemvgError(f"{path}: this file of the bundle is missing; copy or export the bundle again")
    size = path.stat().st_size
    if size != record.bytes:
        raise GemvgError(f"{path} has {size} bytes instead of {record.bytes}; copy or export the bundle again")
    if check_hash:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            raise GemvgError(f"{path} was altered (its sha256 is not the manifest's); copy or export the bundle again")
