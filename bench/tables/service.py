"""Tables of the service, its wheel, and what a call from C++ costs."""

from __future__ import annotations

from typing import Any

from bench.tables.markdown import table

Result = dict[str, Any]


def load(result: Result) -> str:
    """Throughput beside a plain loop, and what became of all requests at once."""
    through, robust, busy = result["throughput"], result["robustness"], result["busy"]
    rows = [
        [
            row["name"],
            f"{row['per_second']:.1f}",
            f"{row['share_of_loop']:.2f} [{row['least_share']:.2f}, {row['most_share']:.2f}]",
        ]
        for row in through["rows"]
    ]
    tally = ", ".join(f"{count} {what}" for what, count in robust["tally"].items())
    memory = ", ".join(
        f"{name.removesuffix('_mb')} {entry['first_third_mb']:.0f} and {entry['last_mb']:.0f} MB"
        for name, entry in robust["memory"].items()
    )
    statuses = ", ".join(f"{count} times {status}" for status, count in sorted(busy["statuses"].items()))
    lines = [
        f"* {robust['requests']:,} requests by {robust['clients']} clients: {tally}. "
        f"Median {robust['p50_ms']:.0f} ms, 99 % "
        f"within {robust['p99_ms']:.0f} ms; the queue had {robust['longest_queue']:.0f} at most, "
        f"{robust['restarts']:.0f} workers were lost. Most memory in the first third and at the end: {memory}.",
        f"* {busy['clients']} clients on a queue of {busy['max_queue']}: {statuses}.",
    ]
    head = ["questions about new pictures", "a second", f"share of the loop [least, most of {through['blocks']} turns]"]
    return table(head, rows) + "\n\n" + "\n".join(lines) + "\n\n"


def workers(result: Result) -> str:
    """Memory of several workers."""
    rows = [[str(row["workers"]), f"{row['all_mib']:.0f}", f"{row['service_mib']:.0f}"] for row in result["rows"]]
    about = f"`{result['bundle']}`, {result['bundle_mib']:.0f} MiB of files. "
    return table(["workers", "all processes, MiB", "of them the HTTP side"], rows) + "\n\n" + about


def wheel(result: Result) -> str:
    """Megabytes and seconds of an environment with the wheel."""
    rows = [
        ["the wheel, MB", f"{result['wheel_mb']:.1f}"],
        ["runtime with ONNX Runtime, installed, MB", f"{result['runtime_mb']:.0f}"],
        ["the service adds, MB", f"{result['service_adds_mb']:.1f}"],
        ["`import gemvg_edge`, s", f"{result['import_s']:.3f}"],
        ["`from gemvg_edge import Grounder`, s", f"{result['import_runtime_s']:.2f}"],
    ]
    return table(["", "measured"], rows) + "\n\n"


def host(result: dict[str, Any]) -> str:
    """What a call from C++ costs beside Python's."""
    names = {"look_and_ground": "`look` and `ground`", "ground": "`ground`"}
    head = ["call", "Python, ms", "C++, ms", "difference, ms", "of single blocks"]
    rows = [
        [
            names[row["call"]],
            *(f"{row[key]:.3f}" for key in ("python_ms", "host_ms")),
            f"{row['difference_ms']:+.3f}",
            f"{row['least_ms']:+.3f} to {row['most_ms']:+.3f}",
        ]
        for row in result["rows"]
    ]
    return table(head, rows)
