"""Tables of bench.engines: what compiled engines do, and what building them took."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import table
from export.build_peak import MIB

Result = dict[str, Any]


def engines(result: Result) -> str:
    """A row for each phase of each engine."""
    rows = [
        [
            row["model"],
            f"`{row['dialect']}`, {row['precision']}",
            profile["phase"],
            str(profile["kernels"]),
            f"{profile['attention']} of {row['layers']}",
            f"{profile['weights'] / MIB:.0f}",
            f"{profile['weights_moved'] / profile['weights']:.2f}",
            _cache(profile),
            f"{(profile['weights_moved'] + profile['cache_read']) / profile['weights']:.2f}",
            f"{profile['scratch'] / MIB:.0f}",
            _faults(profile),
        ]
        for row in result["rows"]
        for profile in row["profiles"]
        if profile["phase"] not in ("small pictures", "middle pictures", "question")  # as large ones, and a prefill
    ]
    head = ["model", "graphs", "phase", "kernels", "attentions fused", "weights, MiB", "moved of these"]
    head += ["cache read, MiB", "both, of the weights", "scratch, MiB", "slow"]
    return (
        table(head, rows) + f"\n\nCompiled by {result['compiler']} for a GPU that is not there, and read; nothing ran."
    )


def engine_builds(result: Result) -> str:
    """What building each engine took, and what was predicted."""
    rows = [
        [
            row["model"],
            f"`{row['dialect']}`, {row['precision']}",
            row["engine"].removesuffix(".engine"),
            f"{row['graph_bytes'] / MIB:.0f}",
            f"{row['engine_bytes'] / MIB:.0f}",
            f"{row['predicted_gib']:.2f}",
            f"{row['peak_gib']:.2f}",
            f"{100 * (row['predicted_gib'] / row['peak_gib'] - 1):+.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    head = ["model", "graphs", "engine", "weights, MiB", "engine, MiB", "predicted peak, GiB", "peak, GiB", "error, %"]
    return table([*head, "seconds"], rows)


def _cache(profile: Result) -> str:
    return f"{profile['cache_read'] / MIB:.0f}" if profile["cache_read"] else "-"


def _faults(profile: Result) -> str:
    """Kinds of faults with their numbers."""
    found = []
    if profile["written_out"]:
        found.append(f"{profile['written_out']} weights written out")
    if profile["copied"]:
        found.append(f"{profile['copied']} caches copied")
    if any("several kernels" in fault for fault in profile["faults"]):
        found.append("attention in pieces")
    return ", ".join(found) or "-"
