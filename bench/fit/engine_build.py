"""One engine built in a process of its own, for bench.engines: imports no torch, as export.to_tensorrt does not."""

from __future__ import annotations

import json
import time
from pathlib import Path

from bench.speed.tradeoff_process import STATUS, peak_bytes
from export.build_memory import build_bytes
from export.build_peak import GIB, MIB
from export.engine_graphs import weight_bytes
from export.engine_reading import as_json
from export.shortened import count_layers
from export.tensorrt_build import BuildOptions
from export.to_tensorrt import Limits, plan_jobs, read_graphs, run_job
from gemvg_edge.bundle import open_bundle

PICTURES, PREFILL, VISUAL_TOKENS = 2, 1024, 1024
WORKSPACE = 1024 * MIB


def build(source: str, index: str, work: str) -> None:
    """One of a bundle's engines, into the folder `work`; its readings, time and memory are printed as JSON."""
    import tensorrt_rtx_bindings as rtx

    bundle = open_bundle(source, check_hashes=False)  # just written
    limits = Limits.of(bundle.manifest, PICTURES, None, PREFILL, VISUAL_TOKENS)
    job = plan_jobs(*read_graphs(bundle, limits), limits, bundle.manifest, 1)[int(index)]
    predicted, started = build_bytes(job.graph), time.perf_counter()
    readings = run_job(rtx, job, bundle.folder, BuildOptions(WORKSPACE), Path(work))
    layers = count_layers(job.graph)
    row = {
        "engine": job.name,
        "layers": layers,
        "capacity": limits.max_tokens,
        "graph_bytes": weight_bytes([job.graph]),
        "engine_bytes": Path(work, job.name).stat().st_size,
        "seconds": time.perf_counter() - started,
        "predicted_gib": predicted / GIB,
        "peak_gib": peak_bytes(STATUS.read_text(encoding="ascii")) / GIB,
        "profiles": [
            as_json(reading) | {"phase": phase, "faults": reading.faults(layers)}
            for phase, reading in zip(job.phases, readings, strict=True)
        ],
    }
    print(json.dumps(row))
