"""The choice of an engine for a bundle. An engine is imported only here, so that everything else works without one."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from gemvg_edge.bundle import Bundle
from gemvg_edge.engines import ENGINES
from gemvg_edge.engines.protocol import Decoder, VisionTower
from gemvg_edge.errors import GemvgError

log = logging.getLogger("gemvg_edge")
Networks = tuple[VisionTower, Decoder[Any]]


def open_engine(bundle: Bundle, engine: str | None, threads: int) -> Networks:
    """Both networks of a bundle, on the engine of this name, or without one on the fastest that runs it here."""
    built = bundle.manifest.tensorrt is not None
    if engine is not None and engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise GemvgError(f"engine={engine!r}; give one of {known} (for what `python -m export.to_tensorrt` built)")
    if engine is not None and built != (engine == "tensorrt"):
        holds = "TensorRT engines" if built else "ONNX graphs"
        fix = "open it with engine='tensorrt'" if built else "build engines with `python -m export.to_tensorrt`"
        raise GemvgError(f"{bundle.folder} holds {holds}, which engine={engine!r} does not run; {fix}")
    if built:
        from gemvg_edge.engines.tensorrt import open_engines

        return open_engines(bundle)
    if engine == "native":
        from gemvg_edge.engines.native import open_native

        return open_native(bundle, threads)
    if engine is None and (networks := _native_if_possible(bundle, threads)):
        return networks
    from gemvg_edge.engines.onnxruntime import OnnxDecoder, OnnxVisionTower

    provider = engine or "onnx"
    return OnnxVisionTower(bundle, threads, provider), OnnxDecoder(bundle, threads, provider)


def _native_if_possible(bundle: Bundle, threads: int) -> Networks | None:
    """Our own engine where its library is built, suits the processor, and runs the bundle."""
    from gemvg_edge.engines.graph_weights import Unsupported
    from gemvg_edge.engines.native.library import find_library

    if find_library() is None:
        return None
    from gemvg_edge.engines.native import open_native

    try:
        return open_native(bundle, threads)
    except Unsupported as error:
        if importlib.util.find_spec("onnxruntime") is None:
            raise
        log.info("%s; ONNX Runtime runs it", error)
        return None
