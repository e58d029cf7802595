"""The bundle: a folder with `manifest.json`, two graphs, their weights, the embedding table and the tokenizer.

Or, built for one GPU from such a folder, with two or three TensorRT engines in place of graphs and weights. This module
reads and verifies; `export.bundle_writer` writes. Whatever is wrong with a folder is one GemvgError that names the file
and the fix. Knows no engine and no model arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gemvg_edge.answer import AnswerFormat
from gemvg_edge.boxes import FRAMES
from gemvg_edge.errors import GemvgError
from gemvg_edge.familiar import Familiar
from gemvg_edge.files import is_file, is_folder, list_folder, printable, sha256, unreadable
from gemvg_edge.images import Preprocessing
from gemvg_edge.json_object import LARGEST, JsonObject, read_json_object
from gemvg_edge.prompt import PromptTemplate
from gemvg_edge.scores import Calibration

FORMAT = "gemvg-edge-bundle"
FORMAT_VERSION = 6
BARE_VERSION = 7  # of bundles whose boxes have no marks, for which runtimes of version 6 would wait; else the same
MANIFEST = "manifest.json"
VISION_GRAPH, VISION_DATA = "vision.onnx", "vision.data"
DECODER_GRAPH, DECODER_DATA = "decoder.onnx", "decoder.data"
EMBEDDING, TOKENIZER = "embedding.npy", "tokenizer.json"
FILES = (VISION_GRAPH, VISION_DATA, DECODER_GRAPH, DECODER_DATA, EMBEDDING, TOKENIZER)
VISION_ENGINE, DECODER_ENGINE, HEAD_ENGINE = "vision.engine", "decoder.engine", "head.engine"
ENGINE_FILES = (VISION_ENGINE, DECODER_ENGINE, EMBEDDING, TOKENIZER)  # and the head's, where it was split off
SEAL = "sha256"  # the manifest's field for the digest of all its others
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
DIALECTS = ("fused", "standard", "plain")
PRECISIONS = ("float32", "float16", "bfloat16")
# Far past every model, and near enough that no number of a stranger's manifest asks for memory or time without end.
MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_TOKENS = 1024, 1024, 2**16, 2**24
MOST_DEEPSTACK, MOST_SIDE = 16, 4096
THETAS = 1.0, 1e12  # of rotary frequencies
PARTS = ("vision", "decoder", "head", "embedding")  # whose weights a manifest describes
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class VisionShape:
    """What the runtime must know of the vision tower."""

    depth: int  # layers
    embed_dim: int  # width of a patch
    heads: int
    head_dim: int  # width of a head
    rope_theta: float  # base of the rotary frequencies
    window: int = 0  # merged tokens a side of an attention window; 0: all blocks attend to the whole picture
    place_side: int = 0  # rows and columns of a learned table of places, stretched over each picture; 0: none


@dataclass(frozen=True)
class ModelShape:
    """What the runtime must know of the model."""

    model_type: str  # one of MODEL_TYPES
    hidden_size: int  # width of a token
    layers: int  # of the decoder
    heads: int  # of queries
    kv_heads: int  # of keys and values
    head_dim: int  # width of a head
    rope_theta: float  # base of the rotary frequencies
    mrope_section: tuple[int, int, int]  # frequencies that follow time, height and width
    vocab_size: int  # rows of the embedding table
    image_token_id: int  # the token in whose place a visual token goes
    eos_token_ids: tuple[int, ...]  # those that end an answer
    vision: VisionShape
    mrope_interleaved: bool = False  # time, height and width take turns among the frequencies, else each has its run
    deepstack: int = 0  # decoder layers, from the first, after each of which more of a picture's features are added

    @property
    def embedding_width(self) -> int:
        """Numbers of a token as the decoder takes it and the vision tower gives it: the deepstack features follow."""
        return self.hidden_size * (1 + self.deepstack)


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle, as it was written."""

    bytes: int  # its size
    sha256: str  # its digest, in hexadecimal


@dataclass(frozen=True)
class EngineBuild:
    """What TensorRT engines were built with and for: they run nowhere else."""

    version: str  # of TensorRT
    compute_capability: str  # such as "8.7"
    gpu: str
    device: str  # as it was named to `export.to_tensorrt`
    capacity: int  # the most tokens of a cache
    max_prefill: int  # the most tokens of one pass
    max_visual_tokens: int  # the most of one run of the vision tower
    split_head: bool


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, checked and typed."""

    name: str  # the folder's, when it was written
    model: ModelShape  # the networks' widths
    preprocessing: Preprocessing  # how a picture becomes patches
    answer: AnswerFormat  # how boxes are written
    prompt: PromptTemplate  # the words around pictures and query
    familiar: Familiar  # the pictures that it was trained on, where that is known
    profile: str  # whose words the prompt has: one of the files of train/profiles, or the checkpoint's own
    coordinate_frame: Mapping[str, Any]  # one of boxes.FRAMES
    dialect: str  # whose ops the graphs are made of, one of DIALECTS
    precision: str  # what the graphs compute in
    weights: Mapping[str, str]  # part -> what was done to it, such as "int4-rtn-g32"
    files: Mapping[str, FileRecord]  # every file of the bundle but the manifest
    calibration: Calibration | None = None  # what a box's probability means; None: scores are the probabilities
    tensorrt: EngineBuild | None = None  # of a folder of engines


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
    if not is_folder(folder):
        raise GemvgError(
            f"{printable(folder)}: no such bundle folder; make one with `python -m export.to_onnx CHECKPOINT BUNDLE`"
        )
    if not is_file(folder / MANIFEST) and is_file(folder / "config.json"):
        raise GemvgError(
            f"{printable(folder)} is a checkpoint, no bundle (it has no {MANIFEST}); make one of it with "
            f"`python -m export.to_onnx {printable(folder)} BUNDLE`"
        )
    manifest = read_manifest(folder / MANIFEST)
    known = {MANIFEST, *manifest.files}
    if foreign := [name for name in list_folder(folder) if name not in known and not is_incidental(name)]:
        name = printable(folder / foreign[0])
        raise GemvgError(f"{name} is no file of this bundle; take it away or export the bundle again")
    for name, record in manifest.files.items():
        _check_file(folder / name, record, check_hashes)
    return Bundle(folder, manifest)


def is_incidental(name: str) -> bool:
    """Whether a name is of a kind that lies about in people's folders and is no part of any result."""
    papers = ("README", "LICENSE", "LICENCE", "NOTICE", "COPYING", "CITATION", "CHANGELOG")
    return name.startswith((".", *papers)) or name in ("lost+found", "Thumbs.db", "desktop.ini", "__MACOSX")


def format_version(answer: AnswerFormat) -> int:
    """That of a bundle whose answers are so written."""
    return FORMAT_VERSION if answer.marks else BARE_VERSION


def seal(manifest: Mapping[str, Any]) -> str:
    """The digest of a manifest's fields, whatever their order and the spaces between them."""
    others = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read and check `manifest.json`; GemvgError names the field that has no sense, or says that one was altered."""
    manifest = read_json_object(
        path,
        "export the bundle again",
        "no such file; write a bundle with `python -m export.to_onnx CHECKPOINT BUNDLE`",
    )
    if manifest.content.get("format") != FORMAT:
        raise GemvgError(f"{path} is not the manifest of a {FORMAT}; give one that `python -m export.to_onnx` wrote")
    version = manifest.value("format_version", int)
    if version not in (FORMAT_VERSION, BARE_VERSION):
        fix = "update gemvg-edge" if version > BARE_VERSION else "export the bundle again"
        known = f"{FORMAT_VERSION} and {BARE_VERSION}"
        raise GemvgError(f"{path} has format version {version}, this gemvg-edge reads {known}; {fix}")
    tensorrt = _read_build(manifest.object("tensorrt")) if "tensorrt" in manifest.content else None
    answer, fit = manifest.object("answer").settings(AnswerFormat), manifest.content.get("calibration")
    read = Manifest(
        name=manifest.value("name", str),
        model=_read_model(manifest.object("model")),
        preprocessing=manifest.object("preprocessing").settings(Preprocessing),
        answer=answer,
        prompt=manifest.object("prompt").settings(PromptTemplate),
        familiar=manifest.object("familiar").settings(Familiar),
        profile=manifest.value("profile", str),
        coordinate_frame=_read_frame(manifest.object("coordinate_frame"), answer),
        dialect=_one_of(manifest, "dialect", DIALECTS),
        precision=_one_of(manifest, "precision", PRECISIONS),
        weights=_read_weights(manifest.object("weights")),
        files=_read_files(manifest.object("files"), _expected_files(tensorrt)),
        calibration=None if fit is None else manifest.object("calibration").settings(Calibration),
        tensorrt=tensorrt,
    )
    manifest.only("format", "format_version", *(field.name for field in fields(Manifest)), SEAL)
    # The last check: what is wrong by itself has been named by now.
    if manifest.value(SEAL, str) != seal(manifest.content):
        raise GemvgError(f"{printable(path)} was altered (its sha256 is not its own); copy or export the bundle again")
    return read


def _one_of(manifest: JsonObject, key: str, known: Sequence[str]) -> str:
    value = manifest.value(key, str)
    if value not in known:
        raise GemvgError(f"{manifest.path}: unknown {key} {value!r}; this gemvg-edge runs {', '.join(known)}")
    return value


def _read_build(build: JsonObject) -> EngineBuild:
    types: dict[str, type[Any]] = {"str": str, "int": int, "bool": bool}
    build.only(*(field.name for field in fields(EngineBuild)))
    values = {field.name: build.value(field.name, types[str(field.type)]) for field in fields(EngineBuild)}
    for name, value in values.items():
        if type(value) is int:
            build.in_range(name, value, 1, MOST_TOKENS)
    return EngineBuild(**values)


def _read_weights(weights: JsonObject) -> dict[str, str]:
    weights.only(*PARTS)
    return {part: weights.value(part, str) for part in PARTS}


def _expected_files(build: EngineBuild | None) -> tuple[str, ...]:
    if build is None:
        return FILES
    return (*ENGINE_FILES, HEAD_ENGINE) if build.split_head else ENGINE_FILES


def _read_model(model: JsonObject) -> ModelShape:
    model_type = model.value("model_type", str)
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise GemvgError(f"{model.path}: unknown model type {model_type!r}; this gemvg-edge runs {known}")
    most = {"hidden_size": MOST_WIDTH, "layers": MOST_LAYERS, "heads": MOST_HEADS, "kv_heads": MOST_HEADS}
    most |= {"head_dim": MOST_WIDTH, "vocab_size": MOST_TOKENS}
    shape = {key: model.value(key, int, low=1, high=high) for key, high in most.items()}
    last = shape["vocab_size"] - 1
    qwen3 = model_type == "qwen3_vl"
    # Qwen3's heads need not share a token's width among them.
    width = shape["heads"] * shape["head_dim"] if qwen3 else shape["hidden_size"]
    model.in_range("heads x head_dim", width, 1, MOST_WIDTH)
    _check_heads(model, width, shape["heads"], shape["head_dim"])
    if shape["heads"] % shape["kv_heads"]:
        raise GemvgError(
            f"{model.path}: model.heads is {shape['heads']}, no multiple of kv_heads {shape['kv_heads']}; {model.fix}"
        )
    sections, half = model.integers("mrope_section", low=0), shape["head_dim"] // 2
    if len(sections) != 3 or sum(sections) != half:
        raise GemvgError(
            f"{model.path}: model.mrope_section is {sections}, not three numbers with the sum {half}; {model.fix}"
        )
    if not (stops := model.integers("eos_token_ids", low=0, high=last)):
        raise GemvgError(f"{model.path}: model.eos_token_ids is empty, so that no answer would end; {model.fix}")
    if model.value("mrope_interleaved", bool, False) != qwen3:
        raise GemvgError(
            f"{model.path}: model.mrope_interleaved is {not qwen3}, not that of a {model_type}; {model.fix}"
        )
    most_deepstack = min(shape["layers"], MOST_DEEPSTACK) if qwen3 else 0
    model.only(*(field.name for field in fields(ModelShape)))
    return ModelShape(
        model_type=model_type,
        rope_theta=model.value("rope_theta", float, low=THETAS[0], high=THETAS[1]),
        mrope_section=(sections[0], sections[1], sections[2]),
        image_token_id=model.value("image_token_id", int, low=0, high=last),
        eos_token_ids=stops,
        vision=_read_vision(model.object("vision"), model_type),
        mrope_interleaved=qwen3,
        deepstack=model.value("deepstack", int, 0, low=0, high=most_deepstack),
        **shape,
    )


def _read_vision(vision: JsonObject, model_type: str) -> VisionShape:
    most = {"depth": MOST_LAYERS, "embed_dim": MOST_WIDTH, "heads": MOST_HEADS, "head_dim": MOST_WIDTH}
    numbers = {key: vision.value(key, int, low=1, high=high) for key, high in most.items()}
    _check_heads(vision, numbers["embed_dim"], numbers["heads"], numbers["head_dim"])
    vision.only(*(field.name for field in fields(VisionShape)))
    window = vision.value("window", int, 0, low=0, high=MOST_HEADS)
    if (window > 0) != (model_type == "qwen2_5_vl"):
        raise GemvgError(f"{vision.path}: model.vision.window is {window}, not that of a {model_type}; {vision.fix}")
    side = vision.value("place_side", int, 0, low=0, high=MOST_SIDE)
    if (side > 0) != (model_type == "qwen3_vl"):
        raise GemvgError(f"{vision.path}: model.vision.place_side is {side}, not that of a {model_type}; {vision.fix}")
    theta = vision.value("rope_theta", float, low=THETAS[0], high=THETAS[1])
    return VisionShape(**numbers, rope_theta=theta, window=window, place_side=side)


def _check_heads(shape: JsonObject, width: int, heads: int, head_dim: int) -> None:
    """Heads are slices of the width, and their rotary halves are themselves of two parts in the vision tower."""
    if heads * head_dim != width or head_dim % 4:
        raise GemvgError(
            f"{shape.path}: {shape.place}heads is {heads} of head_dim {head_dim}, which do not make up the width "
            f"{width} in multiples of 4; {shape.fix}"
        )


def _read_files(files: JsonObject, expected: Sequence[str]) -> dict[str, FileRecord]:
    records = {}
    for name in dict.fromkeys((*expected, *files.content)):
        # A manifest is untrusted: its names stay inside the bundle folder.
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise GemvgError(f"{files.path} names the file {name!r}, outside the bundle folder; do not use this bundle")
        record = files.object(name)
        record.only("bytes", "sha256")
        digest = record.value("sha256", str)
        if not _DIGEST.fullmatch(digest):
            raise GemvgError(f"{files.path}: {record.place}sha256 is {digest[:80]!r}, no sha256; {files.fix}")
        records[name] = FileRecord(record.value("bytes", int, low=0, high=LARGEST), digest)
    return records


def _read_frame(frame: JsonObject, answer: AnswerFormat) -> Mapping[str, Any]:
    if frame.content not in FRAMES:
        known = " and ".join(map(str, FRAMES))
        raise GemvgError(f"{frame.path}: unknown coordinate frame {frame.content}; this gemvg-edge knows {known}")
    if frame.content != answer.coordinate_frame:
        written = f"answer.coordinates {answer.coordinates!r}"
        raise GemvgError(f"{frame.path}: coordinate_frame {frame.content} does not fit {written}; {frame.fix}")
    return frame.content


def _check_file(path: Path, record: FileRecord, check_hash: bool) -> None:
    if not is_file(path):
        raise GemvgError(f"{path}: this file of the bundle is missing; copy or export the bundle again")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
    if size != record.bytes:
        raise GemvgError(f"{path} has {size} bytes instead of {record.bytes}; copy or export the bundle again")
    if check_hash and sha256(path) != record.sha256:
        raise GemvgError(f"{path} was altered (its sha256 is not the manifest's); copy or export the bundle again")
