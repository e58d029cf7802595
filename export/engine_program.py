"""What a compiled engine does, as far as it can be read: its kernels, and every tensor that they read and write.

TensorRT-RTX writes its compiled programs into the engine file as text, one for each optimisation profile, so that an
engine can be read where no GPU can run it. TensorRT's own engines are read by its inspector, as JSON, which says less:
it does not tell weights from other tensors
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html; its schema in 11:
https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html). Knows
programs, not models; engine_reading.py judges them.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError

# Bits of the types, as programs and the inspector write them.
BITS = {
    "half": 16, "bf16": 16, "float": 32, "int4": 4, "int8": 8, "int32": 32, "int64": 64, "bool": 8, "fp8": 8,
    "bfloat16": 16, "uint8": 8, "fp4": 4,
}  # fmt: skip
_START = b"header {\n  version = 5"  # of a program that kernels of its own are called from; those of kernels have 4
_LONGEST = 64 * 2**20  # bytes of a program's text
_TENSOR = re.compile(r"^ *tensor=\{ (.*) \}$", re.MULTILINE)
_PART = re.compile(r"^ *sub_tensor=\{ (.*) \}$", re.MULTILINE)
_STEP = re.compile(r"^  (?!tensor=|sub_tensor=)(\w+)=\{ (.*)\}$", re.MULTILINE)
_NODE = re.compile(r"ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Tensor:
    """What a kernel reads or writes."""

    dims: tuple[int | None, ...]  # None: as long as the run makes it
    type: str  # one of BITS
    constant: bool = False  # a weight
    part_of: str = ""  # the tensor that it is a part of, if it is one

    @property
    def elements(self) -> int:
        """How many numbers it has; a dimension that a run decides counts as 1."""
        return prod(1 if size is None else size for size in self.dims)

    @property
    def bytes(self) -> int:
        """Its size, so counted."""
        return self.elements * BITS[self.type] // 8


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    kind: str  # "function", "runtime_fusion", ...
    reads: tuple[str, ...]  # names of tensors
    writes: tuple[str, ...]
    nodes: tuple[str, ...]  # of the ONNX graph


@dataclass(frozen=True)
class Program:
    """One optimisation profile of an engine."""

    profile: int
    tensors: Mapping[str, Tensor]
    kernels: Sequence[Kernel]
    scratch: int  # bytes of memory that it needs for activations


def read_engine(path: Path) -> list[Program]:
    """The programs of an engine file of TensorRT-RTX, in the order of its profiles; GemvgError where none is found."""
    found: list[Program] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_START)
        while at >= 0:
            # A program's text ends in zeros; some separators in it are no printable characters.
            end = content.find(b"\0", at, at + _LONGEST)
            text = content[at : end if end >= 0 else at + _LONGEST].decode("latin-1")
            if "\nmain {" in text:
                found.append(_read_program(text, len(found)))
            at = content.find(_START, at + len(_START))
    if not found:
        raise GemvgError(f"{path} holds no compiled program that can be read; it is read from TensorRT-RTX 1.7's alone")
    return found


def read_inspector(information: str) -> list[Program]:
    """The programs of an engine as TensorRT's inspector tells of it, built with detailed profiling verbosity."""
    try:
        layers = json.loads(information)["Layers"]
        found: dict[int, tuple[dict[str, Tensor], list[Kernel]]] = {}
        for layer in layers:
            profile = re.search(r"\[profile (\d+)\]", str(layer))
            tensors, kernels = found.setdefault(int(profile[1]) if profile else 0, ({}, []))
            for one in (*layer["Inputs"], *layer["Outputs"]):
                tensors[one["Name"]] = Tensor(_dims_of(one), "half")  # the inspector's types are whole sentences
            reads, writes = (tuple(one["Name"] for one in layer[part]) for part in ("Inputs", "Outputs"))
            nodes = tuple(_NODE.findall(layer.get("Metadata", "")))
            kernels.append(Kernel(f"{layer['Name']} {layer.get('TacticName', '')}", "function", reads, writes, nodes))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise GemvgError(
            f"what TensorRT's inspector says cannot be read ({error!r}); it is of another version"
        ) from None
    return [Program(profile, *found[profile], 0) for profile in sorted(found)]


def _dims_of(tensor: dict[str, Any]) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) and size >= 0 else None for size in tensor.get("Dimensions", []))


def _read_program(text: str, number: int) -> Program:
    tensors = {}
    for line in _TENSOR.findall(text):
        tensors[_field(line, "name")] = Tensor(_dims(line), _type(line), "const_payload_size=" in line)
    for line in _PART.findall(text):
        whole = _field(line, "base")
        constant = whole in tensors and tensors[whole].constant
        tensors[_field(line, "name")] = Tensor(_dims(line), _type(line), constant, whole)
    kernels = [
        Kernel(_field(body, "name"), kind, _names(body, "input"), _names(body, "output"), tuple(_NODE.findall(body)))
        for kind, body in _STEP.findall(text[text.index("\nmain {") :])
        if re.search(r"\boutput(_args)?=", body)
    ]
    regions = {_field(line, "name"): line for line in re.findall(r"^  region = \{ (.*) \}$", text, re.MULTILINE)}
    scratch = sum(int(_field(line, "size")) for name, line in regions.items() if name.startswith("devmem"))
    return Program(number, tensors, kernels, scratch)


def _field(line: str, name: str) -> str:
    found = re.search(rf'(?:^|[ {{]){name}=(?:"([^"]*)"|([^ ]*))', line)
    if found is None:
        raise GemvgError(f"a compiled program has a line without {name} ({line[:80]!r}); it is of another version")
    return found[1] if found[1] is not None else found[2]


def _type(line: str) -> str:
    if (found := _field(line, "type")) not in BITS:
        raise GemvgError(f"a compiled program has tensors of type {found!r}, not known here; it is of another version")
    return found


def _dims(line: str) -> tuple[int | None, ...]:
    found = re.search(r"(?:^| )dims=\{ ?([^}]*)\}", line)
    sizes = found[1].split() if found else []
    return tuple(int(size) if size.isdigit() else None for size in sizes)


def _names(body: str, which: str) -> tuple[str, ...]:
    found = re.search(rf"(?:^| ){which}(?:_args)?=\{{ ?([^}}]*)\}}", body)
    return tuple(re.findall(r'"([^"]*)"', found[1])) if found else ()
