"""What a compiled engine does, judged: weights written out as floats, attention in pieces, caches copied, bytes moved.

A weight-only product is as fast as its codes are small only where they are dequantised inside the product; attention
reads the cache where it lies only where it is one kernel. A compiler decides both, without a word. Here is the word.
Knows programs (engine_program.py) and what our graphs call their inputs, no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

from export.build_peak import MIB
from export.engine_program import Kernel, Program, Tensor

LEAST_WEIGHT = 2**14  # elements; norms and biases are smaller, and nobody misses them
LAUNCHES = ("function", "runtime_fusion", "fully_connected")  # other steps compute shapes, on the host
_CACHE = re.compile(r"(past|present)_(key|value)_\d+")
_DEQUANTIZE = re.compile(r"DequantizeLinear_node_\d+$")  # as onnxscript names our nodes
_FUSED = re.compile(r"mha", re.IGNORECASE)  # multi-head attention, as the kernels of all versions are called


@dataclass(frozen=True)
class Reading:
    """One optimisation profile of an engine. Bytes are those of one run, with open dimensions at 1."""

    profile: int
    kernels: int  # launches
    attention: int  # kernels that are a whole attention
    written_out: tuple[str, ...]  # nodes whose weight is written out as floats at every run
    copied: tuple[str, ...]  # inputs of the cache that are copied whole, or for every head
    taken_copied: int  # bytes of the cache's taken places that are copied, for each place
    weights: int  # bytes that the engine stores of them
    weights_moved: int  # bytes that a run reads of them, and of what it wrote them out as, written and read
    cache_read: int  # bytes of keys and values that attention reads
    scratch: int  # bytes of memory for activations

    def faults(self, attentions: int) -> list[str]:
        """What is slow in a graph with so many attentions, a sentence each."""
        found = [f"the weight of {node} is written out as floats at every run" for node in self.written_out]
        found += [f"{name} is copied at every run, whole or for every head" for name in self.copied]
        if self.attention < attentions:
            found.append(f"{attentions - self.attention} of {attentions} attentions are several kernels")
        return found


def read_program(program: Program) -> Reading:
    """Judge one program."""
    launches = [kernel for kernel in program.kernels if kernel.kind in LAUNCHES]
    constants = [tensor for tensor in program.tensors.values() if tensor.constant]
    written = [kernel for kernel in launches if _writes_weight_out(program, kernel)]
    copies = [copy for kernel in launches for copy in _copies(program, kernel)]
    read = sum(t.bytes for kernel in launches for t in _tensors(program, kernel.reads) if t.constant)
    outs = {name for kernel in written for name in kernel.writes}
    again = sum(program.tensors[name].bytes for kernel in launches for name in kernel.reads if name in outs)
    return Reading(
        profile=program.profile,
        kernels=len(launches),
        attention=sum(bool(_FUSED.search(kernel.name)) for kernel in launches),
        written_out=tuple(" ".join(kernel.nodes) or kernel.name for kernel in written),
        copied=tuple(dict.fromkeys(name for name, whole, _ in copies if whole)),
        taken_copied=sum(size for _, whole, size in copies if not whole),
        weights=sum(tensor.bytes for tensor in constants),
        weights_moved=read + again + sum(program.tensors[name].bytes for name in outs),
        cache_read=sum(_cache_read(program, kernel) for kernel in launches),
        scratch=program.scratch,
    )


def describe(readings: Sequence[Reading], name: str, phases: Sequence[str], attentions: int) -> list[str]:
    """The readings of an engine's profiles as lines; `phases`: what each profile is for."""
    lines = []
    for reading in readings:
        line = f"{name}, {phases[reading.profile]}: {reading.kernels} kernels, {reading.attention} of {attentions} "
        line += "attentions fused"
        if reading.weights:  # TensorRT's own inspector does not tell
            line += f", {reading.weights_moved / MIB:.1f} MiB moved for {reading.weights / MIB:.1f} MiB of weights"
            line += f", {reading.cache_read / MIB:.1f} MiB of cache read" if reading.cache_read else ""
            line += f", {reading.scratch / MIB:.1f} MiB of scratch"
        lines.append(line)
        lines += [f"  {fault}" for fault in reading.faults(attentions)]
    return lines


def as_json(reading: Reading) -> dict[str, Any]:
    """A reading's numbers, and how many weights are written out and caches copied."""
    return {**vars(reading), "written_out": len(reading.written_out), "copied": len(reading.copied)}


def _tensors(program: Program, names: Sequence[str]) -> list[Tensor]:
    return [program.tensors[name] for name in names if name in program.tensors]


def _origin(program: Program, name: str) -> str:
    """The tensor that a part is of, or the name itself."""
    return (program.tensors[name].part_of or name) if name in program.tensors else name


def _writes_weight_out(program: Program, kernel: Kernel) -> bool:
    """Whether a kernel does nothing but dequantise, or its output has the elements of a weight that it reads."""
    if kernel.nodes and all(_DEQUANTIZE.search(name) for name in kernel.nodes):
        return True
    weights = {t.elements for t in _tensors(program, kernel.reads) if t.constant}
    outputs = {t.elements for t in _tensors(program, kernel.writes) if None not in t.dims}
    return any(size >= LEAST_WEIGHT for size in weights & outputs)


def _copies(program: Program, kernel: Kernel) -> Iterator[tuple[str, bool, int]]:
    """(input of the cache, whether it is copied whole or for every head, bytes) of each copy that a kernel makes."""
    if any(_CACHE.search(name) for name in kernel.writes) or _FUSED.search(kernel.name):
        return  # it puts new tokens into their places, or attends
    for name in map(partial(_origin, program), kernel.reads):
        found = _CACHE.search(name)
        if found is None or name not in program.tensors:
            continue
        cache = program.tensors[name]  # (batch, kv_heads, capacity, head_dim)
        if len(cache.dims) != 4:
            continue  # TensorRT's inspector does not tell open dimensions
        a_place = prod(size for size in (cache.dims[1], cache.dims[3]) if size)
        for output in _tensors(program, kernel.writes):
            if None in output.dims and output.elements >= a_place:
                yield found[0], None in cache.dims or output.elements > a_place, output.bytes
            elif None not in output.dims and output.elements >= cache.elements:
                yield found[0], True, output.bytes


def _cache_read(program: Program, kernel: Kernel) -> int:
    """Bytes of the cache that a kernel reads where it does not write it, too."""
    names = [_origin(program, name) for name in kernel.reads if name not in kernel.writes]
    names = [name for name in names if _CACHE.search(name)]
    return sum(tensor.bytes for tensor in _tensors(program, names))
