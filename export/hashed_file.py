"""A file that is hashed while it is written: a bundle's gigabytes are read once and never again for their sha256."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

Bytes = bytes | memoryview
FileEntry = dict[str, int | str]
# Written at a time, about as much as `cp` does: a longer write gets large pages, and on a virtual machine those are
# often ones that the host has to find first, which took several times as long.
STEP = 64 * 2**10


class HashedFile:
    """Open for writing as a context. The hash runs in a thread of its own beside the disk, one piece behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._position = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, data: Bytes) -> None:
        """Append bytes; they must not change afterwards."""
        if self._hashing:
            self._hashing.result()  # one piece at a time, or a slow hash would gather them all in memory
        self._hashing = self._thread.submit(self._hash.update, data)
        for start in range(0, len(data), STEP):
            self._file.write(data[start : start + STEP])
        self._position += len(data)

    def tell(self) -> int:
        """How many bytes there are."""
        return self._position

    def record(self) -> FileEntry:
        """The manifest's entry: how many bytes, and their sha256."""
        if self._hashing:
            self._hashing.result()
        return {"bytes": self._position, "sha256": self._hash.hexdigest()}


def describe(path: Path) -> FileEntry:
    """The manifest's entry for a file that is there."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
