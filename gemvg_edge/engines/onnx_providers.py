"""ONNX Runtime's providers: which bundle runs on which, and whether a session got the one that it was asked for.

ONNX Runtime falls back to the CPU without an error: for a whole session where CUDA's libraries cannot be loaded, for
single nodes where CUDA has no kernel. A binding copies what such a node reads once and for all, so keys and values
would stay the zeros that they began as. Here each of these is one sentence instead. Knows graphs by their
operators; imports no onnxruntime, `library` is that module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# CUDA leaves single nodes, such as those that compute shapes, to the one behind it.
PROVIDERS = {"onnx": (CPU,), "onnx-cuda": (CUDA, CPU)}
# The first with kernels for opset 24's Attention and TensorScatter, on the CPU and on CUDA alike: the CUDA library of
# onnxruntime-gpu 1.24.4 has no TensorScatter, that of 1.25.0 has one.
STANDARD_NEEDS = (1, 25)
# Up to 1.27 CUDA's kernel says "MatMulNBits does not support bias in CUDA kernel"; 1.28 has one that adds it.
BIAS_NEEDS = (1, 28)
ON_CUDA = ("float16", "bfloat16")  # of GroupQueryAttention (onnxruntime's docs/OperatorKernels.md)
# PyPI's wheels are for CUDA 12 up to 1.26 and for CUDA 13 from 1.27 on; 1.27 asks for packages that are on no index.
CUDA13_WHEEL = "`pip install 'onnxruntime-gpu[cuda,cudnn]>=1.28,<2'`"
CUDA12_WHEEL = "`pip install 'onnxruntime-gpu[cuda,cudnn]>=1.23,<1.27'`"
INSTALL = f"run {CUDA13_WHEEL} for a driver of CUDA 13, or {CUDA12_WHEEL} for one of CUDA 12 (`nvidia-smi` shows which)"
# What computes with activations, weights or the cache, and never with shapes, which ONNX Runtime wants on the CPU.
HEAVY = frozenset((
    "Attention", "DequantizeLinear", "Gelu", "Gemm", "GroupQueryAttention", "LayerNormalization", "MatMul",
    "MatMulNBits", "MultiHeadAttention", "QuickGelu", "RMSNormalization", "RotaryEmbedding", "Sigmoid",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax",
    "TensorScatter", "Transpose",
))  # fmt: skip
OUT_OF_MEMORY, NO_DEVICE = "2", "100"  # cudaErrorMemoryAllocation, cudaErrorNoDevice
RECORD = {"session.record_ep_graph_assignment_info": "1"}  # 1.24 and later; others ignore it
log = logging.getLogger("gemvg_edge")


def version_numbers(version: str) -> tuple[int, ...]:
    """(major, minor) of such as "1.28.0" or "1.33.0.dev20261101"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def refusal(version: str, engine: str, dialect: str, precision: str, biased: bool) -> str | None:
    """Why this engine of this onnxruntime cannot run such a graph, and what to do; None where it can.

    `biased`: whether a MatMulNBits of the graph has a bias.
    """
    here = version_numbers(version)
    if dialect == "standard" and here < STANDARD_NEEDS:
        return (
            f"has the standard dialect, which needs ONNX Runtime {STANDARD_NEEDS[0]}.{STANDARD_NEEDS[1]} or newer "
            f"(this is {version}); update it, or export with --dialect fused"
        )
    if engine == "onnx":
        if precision != "bfloat16":
            return None
        return (
            "is in bfloat16, for TensorRT, and ONNX Runtime's CPU has no kernels for it; build engines from it "
            "(export.to_tensorrt), compute it with export.verify, or export with --precision float32"
        )
    if dialect == "plain":
        return (
            "has the plain dialect, whose cache ONNX Runtime keeps on the CPU; export it with --dialect fused or "
            f"standard for engine={engine!r}, or build TensorRT engines from it"
        )
    if dialect == "fused" and precision not in ON_CUDA:
        return (
            f"has the fused dialect in {precision}, and ONNX Runtime's GroupQueryAttention on CUDA takes "
            f"{' and '.join(ON_CUDA)} only; export with --precision float16"
        )
    if biased and here < BIAS_NEEDS:
        return (
            f"has quantised layers with a bias, which ONNX Runtime computes on CUDA from {BIAS_NEEDS[0]}."
            f"{BIAS_NEEDS[1]} on (this is {version}); run {CUDA13_WHEEL}, which needs a driver of CUDA 13, or export "
            "the checkpoint unquantised"
        )
    return None


def check_available(library: Any, engine: str, said: str = "") -> None:
    """GemvgError where onnxruntime has not the engine's provider; `said`: by load_cuda."""
    available = library.get_available_providers()
    if missing := [name for name in PROVIDERS[engine] if name not in available]:
        raise GemvgError(
            f"engine={engine!r} needs ONNX Runtime's {missing[0]}, which this build ({library.__version__}) has not"
            f"{said and f' ({said})'}; run `pip uninstall onnxruntime` first, then {INSTALL}"
        )


def load_cuda(library: Any) -> str:
    """Load the CUDA libraries that pip installed, which no session finds by itself; what is said of one missing."""
    if not hasattr(library, "preload_dlls"):  # builds of others, as there are for JetPack
        return ""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # it prints, and stdout is for answers
        library.preload_dlls()
    failed = re.search(r"^Failed to load [^:]+: (.+)$", said.getvalue(), re.MULTILINE)
    return failed[1] if failed else ""


def why_not_opened(error: Exception, said: str) -> str:
    """In one line: CUDA's own words where there are any, else ONNX Runtime's; `said`: by load_cuda."""
    words = " ".join(str(error).split())
    if failure := re.search(r"CUDA failure (\d+): [^;]+", words):
        fixes = {
            OUT_OF_MEMORY: "close what else uses the GPU",
            NO_DEVICE: "see with `nvidia-smi` whether there is one, and whether CUDA_VISIBLE_DEVICES hides it",
        }
        fix = fixes.get(failure[1], INSTALL)
        return f"{failure[0].strip()}; {fix}"
    return f"{words}; first, CUDA's libraries: {said}; {INSTALL}" if said else words


def check_started(library: Any, session: Any, engine: str, said: str) -> None:
    """GemvgError for a session without the engine's provider; `said`: by load_cuda."""
    if session.get_providers()[0] == PROVIDERS[engine][0]:
        return
    raise GemvgError(
        f"engine={engine!r}: ONNX Runtime {library.__version__} started without its {PROVIDERS[engine][0]} and would "
        f"compute on the CPU ({said or 'its log says why'}); {INSTALL}"
    )


def reads_on_cpu(session: Any, names: Sequence[str]) -> list[str]:
    """Those of a session's inputs and outputs that its nodes want, or leave, in the processor's memory."""
    values = [*session.get_inputs(), *session.get_outputs()]
    places = [*session.get_input_memory_infos(), *session.get_output_memory_infos()]
    where = {value.name: place.name for value, place in zip(values, places, strict=True)}
    return [name for name in names if where[name] == "Cpu"]


def check_cache_placement(path: Path, session: Any, names: Sequence[str]) -> None:
    """GemvgError where one of these keys and values is read or written by the CPU, while the GPU holds them.

    `session` was opened with RECORD.
    """
    if found := reads_on_cpu(session, names):
        kinds = ", ".join(computed_on_cpu(session)) or "what reads it"
        raise GemvgError(
            f"{path}: ONNX Runtime has {found[0]} on the CPU, since CUDA has no kernel for {kinds}, and the cache on "
            "the GPU would not change; export with --dialect fused --precision float16, or open it with engine='onnx'"
        )


def computed_on_cpu(session: Any) -> list[str]:
    """Operators among HEAVY that were placed on the CPU, of a session that was opened with RECORD."""
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return []
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    return sorted({node.op_type for part in parts for node in part.get_nodes()} & HEAVY)


def warn_of_cpu(path: Path, session: Any) -> None:
    """Say what is computed on the CPU though CUDA was asked for: the answers are the same, and slow."""
    if kinds := computed_on_cpu(session):
        log.warning(
            "%s: ONNX Runtime computes %s on the CPU, and copies there and back at every step; "
            "--dialect fused --precision float16 stays on the GPU",
            path,
            ", ".join(kinds),
        )
