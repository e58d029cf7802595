"""What TensorRT would make of a bundle's graphs, on a machine without a GPU: TensorRT-RTX compiles a few of the layers.

Evidence, not proof, for TensorRT 10 and 11, whose compiler is a relative. Needs `pip install tensorrt-rtx-cu12` (x86).
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path

from export.build_memory import build_bytes
from export.build_peak import GIB, MIB
from export.engine_reading import Reading, describe
from export.shortened import count_layers, shorten
from export.tensorrt_build import BuildOptions
from export.to_tensorrt import Limits, plan_jobs, read_graphs, run_job
from gemvg_edge.bundle import Bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.system_memory import available_memory

LAYERS = 2  # the first and the last: a compiler does the same for all
PREFILL = 1024
WORKSPACE = 2048 * MIB


def read_shortened(bundle: Bundle) -> dict[str, list[Reading]]:
    """The readings of each engine's profiles, printed; none, with a word, of what cannot be compiled or read."""
    try:
        rtx = importlib.import_module("tensorrt_rtx_bindings")
    except (ImportError, OSError) as error:  # the latter where one of its libraries cannot be loaded
        print(f"not compiled: no TensorRT-RTX here ({error}; pip install tensorrt-rtx-cu12, on x86)")
        return {}
    limits = Limits.of(bundle.manifest, 2, None, PREFILL, None)
    vision, decoder = (shorten(graph, LAYERS) for graph in read_graphs(bundle, limits))
    needed, free = max(map(build_bytes, (vision, decoder))), available_memory()
    if free is not None and needed > free:
        print(f"not compiled: it takes about {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free")
        return {}
    found = {}
    print(f"up to {LAYERS} layers of each graph, compiled by TensorRT-RTX {rtx.__version__}:")
    with tempfile.TemporaryDirectory() as folder:
        for job in plan_jobs(vision, decoder, limits, bundle.manifest, 1):
            try:
                found[job.name] = run_job(rtx, job, bundle.folder, BuildOptions(WORKSPACE), Path(folder))
            except GemvgError as error:  # evidence that is missing; the verdict is about the numbers
                print(f"{job.name} is not read: {error}")
                continue
            print("\n".join(describe(found[job.name], job.name, job.phases, count_layers(job.graph))))
    return found
