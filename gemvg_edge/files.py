"""Files as people have them: asked about without a traceback, hashed, and written all or nothing.

A file is written beside its place under a name that is ours and renamed into it, so that a kill leaves the old file or
the new one, and the next run takes away what the killed one left. Knows paths and bytes, no format.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gemvg_edge.errors import GemvgError

PARTIAL = ".gemvg-edge-partial-"  # begins the name of a file that is being written
_beginning = threading.Lock()  # between a file's making and its locking no other thread may clear
STEP = 2**20  # bytes that are hashed at a time


def is_file(path: Path) -> bool:
    """Whether there is a file (or a link to one); GemvgError where the system does not say, such as for a long name."""
    return _is(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """The same of a folder."""
    return _is(path, stat.S_ISDIR)


def _is(path: Path, kind: Callable[[int], bool]) -> bool:
    try:
        return kind(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a null character
        raise unreadable(path, error) from None


def list_folder(path: Path) -> list[str]:
    """The names in a folder, sorted; GemvgError where it cannot be read."""
    try:
        return sorted(os.listdir(path))
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_bytes(path: Path) -> bytes:
    """All of a file; GemvgError where it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read_text(path: Path) -> str:
    """All of a text file in UTF-8, whatever the locale and with or without a byte order mark; GemvgError otherwise."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GemvgError(f"{printable(path)} is not text in UTF-8 (at byte {error.start}); save it as UTF-8") from None


def sha256(path: Path) -> str:
    """The digest of a file in hexadecimal; GemvgError where it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(STEP)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


def printable(path: str | os.PathLike[str]) -> str:
    """A path as text that any terminal takes: what would steer one is escaped, what is not Unicode replaced."""
    text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in os.fspath(path))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: BaseException) -> str:
    """Why, in the system's own words, without the path that the sentence names already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def unreadable(path: Path, error: BaseException) -> GemvgError:
    """The sentence for a path that the system refuses to open."""
    return GemvgError(f"{printable(path)} cannot be read ({reason(error)}); check its name and its permissions")


def unwritable(path: Path, error: BaseException) -> GemvgError:
    """The sentence for a path that the system refuses to write."""
    return GemvgError(f"{printable(path)} cannot be written ({reason(error)}); make room there or give another place")


def same_path(a: Path, b: Path) -> bool:
    """Whether two paths lead to one place, by links, `..`, hard links or another spelling."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)
    except ValueError:  # a null character, which leads nowhere
        return False


def refuse_inputs(output: Path, inputs: Iterable[Path], flag: str = "") -> None:
    """GemvgError where writing `output` (a file or a folder) would destroy an input: it is one, or holds one."""
    try:
        real = Path(os.path.realpath(output))
    except (OSError, ValueError) as error:
        raise unwritable(output, error) from None
    for given in inputs:
        same = same_path(output, given)
        if same or ("\0" not in os.fspath(given) and real in Path(os.path.realpath(given)).parents):
            what = "is" if same else "holds"
            name = f"{flag} {printable(output)}".strip()
            raise GemvgError(f"{name} {what} {printable(given)}, which is read; give another place to write to")


def refuse_present(output: Path, flag: str) -> None:
    """GemvgError where something is at `output`, or where its writing ends up: `nowhere/../a.png` is a.png."""
    if os.path.lexists(output) or os.path.lexists(os.path.realpath(output)):
        raise GemvgError(f"{flag} {printable(output)} is there already; add --overwrite to replace it, or give another")


@contextmanager
def replacing(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A file to write, of the same ending, that takes the place of `path` at the end; an error changes nothing.

    GemvgError where the place is a folder, a device or cannot be written, and without `overwrite` where a file has come
    to be there meanwhile. A link is followed, as `cp` does. Each writer has a file of its own: the last one counts.
    """
    target, mode = _place(path)
    # The name's digest, since the name itself may be as long as the system allows.
    begin = f"{PARTIAL}{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}"
    partial = target.with_name(f"{begin}-{os.getpid()}-{secrets.token_hex(4)}{target.suffix[:16]}")
    try:
        with _beginning:
            _clear(target.parent, begin)
            lock = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            _lock(lock)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        if mode is not None:
            os.fchmod(lock, mode)
        yield partial
        _put(partial, target, path, overwrite)
    except BaseException as error:
        with suppress(OSError):  # the first error says more
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, GemvgError):
            raise unwritable(path, error) from None
        raise
    finally:
        os.close(lock)


def _place(path: Path) -> tuple[Path, int | None]:
    """Where a path leads, and the permissions of the file that is there."""
    try:
        target = Path(os.path.realpath(path))
        there = os.stat(target).st_mode
    except FileNotFoundError:
        return target, None
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from None
    if not stat.S_ISREG(there):
        raise GemvgError(f"{printable(path)} cannot be written (it is a folder or a device); give the name of a file")
    return target, stat.S_IMODE(there)


def _clear(folder: Path, begin: str) -> None:
    """Take away what killed writers of a file left; a living one's is locked, or its process is about to lock it."""
    for name in os.listdir(folder):
        if name.startswith(begin) and not _is_alive(name.removeprefix(f"{begin}-").split("-")[0]):
            with suppress(OSError):  # a link, a pipe, somebody else's, or gone by now
                old = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(folder / name)
                finally:
                    os.close(old)


def _is_alive(process: str) -> bool:
    """Whether another process has this number; of this one's files the locks tell."""
    try:
        if int(process) == os.getpid():
            return False
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _lock(file: int) -> None:
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _put(partial: Path, target: Path, path: Path, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(partial, target)
        except OSError:
            if os.path.lexists(target):
                raise GemvgError(f"{printable(path)} has come to be there meanwhile, so it is left alone") from None
            # A file system without hard links: what comes in this moment is lost.
        else:
            partial.unlink()
            return
    os.replace(partial, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, all or nothing; GemvgError where it cannot be written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
