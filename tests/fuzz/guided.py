"""The same targets, guided by which lines of the readers an input reaches: Google's atheris over libFuzzer.

    python -m tests.fuzz answers --guided --minutes 10

Runs in a process of its own, which libFuzzer ends. Knows no reader.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from tests.fuzz.drive import HANG, open_target

LONGEST = 200_000  # bytes of an input
MEMORY = 4096  # MiB of the process


def run_guided(name: str, seconds: int, number: int) -> tuple[int, list[Path]]:
    """How many inputs were tried, and the files of those that failed, left where the command was started."""
    with tempfile.TemporaryDirectory() as corpus:
        command = [sys.executable, "-m", "tests.fuzz.guided", name, corpus, f"-max_total_time={seconds}"]
        command += [f"-seed={number + 1}", f"-timeout={HANG}", f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY}"]
        command += ["-print_final_stats=1", f"-artifact_prefix=fuzz-{name}-"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    count = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    found = [Path(line) for line in re.findall(r"Test unit written to (\S+)", done.stderr)]
    if done.returncode or count is None:
        print(done.stderr[-5000:], file=sys.stderr)
    if done.returncode and not found:
        raise RuntimeError(f"libFuzzer ended with {done.returncode}")
    return int(count[1]) if count else 0, found


def main() -> None:
    """Fuzz one target, as `run_guided` asks; libFuzzer's own flags follow the corpus."""
    import atheris

    with atheris.instrument_imports(include=["gemvg_edge"]):
        target: ModuleType = open_target(sys.argv[1])
    logging.getLogger("gemvg_edge").setLevel(logging.ERROR)
    for k, seed in enumerate(target.seeds()):
        (Path(sys.argv[2]) / f"seed{k}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
