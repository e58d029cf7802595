"""Folders that the workshop writes: results, and the work of a run in between. What is not ours is never touched.

A result is filled in a folder inside its place and moved up file by file, so that a mount point, a link or a `.git`
beside the files is no obstacle. What was recorded as ours goes first, the `key` file (without which nobody takes the
folder for a result) first of all, and comes last: a kill leaves the old result, the new one, or a folder without its
key that the next run completes. Knows no checkpoint and no bundle.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tqdm import tqdm

from gemvg_edge.bundle import is_incidental
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, printable, read_text, refuse_inputs, sha256, unreadable, unwritable
from gemvg_edge.json_object import parse_json, short

MARK = ".gemvg-edge.json"  # in a folder of ours: what it is and which of its files we wrote
STAGING = ".gemvg-edge.partial"  # inside a result's folder while it is written
REPLACED = ".replaced"  # inside that: what was there before
REPLACES = "replaces"  # in a work folder's mark: the fingerprint of the result that its run may replace
CONTENTS = "contents of "  # begins the key of a fingerprint in a run's mark
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what can only have come from writing
RESULT, WORK = "gemvg-edge-result", "gemvg-edge-work"
HASHED = (".json", ".jsonl", ".safetensors", ".jinja", ".txt")  # in a folder; of other files name and size count


@contextmanager
def new_folder(
    target: Path,
    key: str,
    inputs: Sequence[Path] = (),
    *,
    overwrite: bool = False,
    older: Collection[str] = (),
    keep_mark: bool = True,
) -> Iterator[Path]:
    """A folder to fill, whose files become those of `target` at the end; after an error nothing has changed.

    `older`: files of a result of ours that has no mark. Without `keep_mark` the finished folder has none either: it
    tells by itself what it consists of. GemvgError, before anything is written, for what `check_target` refuses.
    """
    target, made = check_target(target, key, inputs, overwrite=overwrite, older=older), False
    ours = recorded(target) | set(older)
    try:
        made = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        with marked(target / STAGING, {"format": WORK}) as staging:
            yield staging
            _move_up(staging, target, key, ours, keep_mark)
    except BaseException as error:
        if made and target.is_dir() and not os.listdir(target):
            target.rmdir()
        if isinstance(error, OSError) and (error.errno in FULL or str(error.filename).startswith(str(target))):
            raise unwritable(target, error) from None
        raise


def check_target(
    target: Path, key: str, inputs: Sequence[Path] = (), *, overwrite: bool = False, older: Collection[str] = ()
) -> Path:
    """The place of a result by its real path; GemvgError for an input, and for a place that holds what is not ours.

    Without `overwrite` it may not hold a finished result either, which is one with its key.
    """
    real = Path(os.path.realpath(target))
    refuse_inputs(real, inputs)
    if not real.name:
        raise GemvgError(f"{printable(target)} has no name of its own; give a folder to write to")
    if not is_folder(real):
        if os.path.lexists(real):
            raise GemvgError(f"{printable(target)} is a file; give a folder to write to")
        return real
    ours = recorded(real) | set(older)
    ours |= {str(parent) for name in ours for parent in PurePosixPath(name).parents}  # a kill may leave them empty
    if foreign := next((name for name in _files_in(real) if name not in ours), None):
        raise GemvgError(
            f"{printable(target)} holds {printable(foreign)}, which gemvg-edge did not write, so it is left alone; "
            "give another folder or take the file away"
        )
    if is_folder(staging := real / STAGING) and os.listdir(staging) and not (staging / MARK).is_file():
        raise GemvgError(f"{printable(staging)} is not ours to delete; take it away or give another folder")
    if not overwrite and os.path.lexists(real / key):
        raise GemvgError(
            f"{printable(target)} holds a finished result; add --overwrite to replace it, or give another place"
        )
    return real


def recorded(folder: Path) -> set[str]:
    """The files, relative to it, that the mark of a result's folder says we wrote; none without a mark."""
    content = _read_mark(folder)
    names = content.get("files") if content and content.get("format") == RESULT else []
    # A folder may be a stranger's, mark and all: its names stay inside.
    return (
        {name for name in names if isinstance(name, str) and _stays_inside(name)} if isinstance(names, list) else set()
    )


@contextmanager
def marked(folder: Path, content: dict[str, Any], *, keep: bool = False) -> Iterator[Path]:
    """A folder of ours, made or made empty, locked while it is used and taken away at the end, whatever happens.

    With `keep` its files, if there are any, stay both at the start and after an error: a run goes on with them.
    """
    lock = claim(folder, content, keep=keep)
    try:
        yield folder
    except BaseException:
        if not keep or not _filled(folder):
            remove(folder)
        raise
    else:
        remove(folder)
    finally:
        lock.close()


def claim(folder: Path, content: dict[str, Any], *, keep: bool = False) -> IO[str]:
    """Mark a folder as ours and lock it until the file given back is closed; without `keep` it is emptied first.

    With it, a folder that a run of another content left is refused. GemvgError too where it holds something and has
    no mark, or where another process uses it.
    """
    mark, before = folder / MARK, _read_mark(folder)
    if before.get("format") != WORK and _filled(folder):
        raise GemvgError(f"{printable(folder)} was not made by gemvg-edge to work in; move it away or give another")
    goes_on = keep and left_work(folder)
    if goes_on and _given(before) != _given(content):
        raise GemvgError(
            f"{printable(folder)} belongs to a run with other settings ({_difference(before, content)}); delete it, or "
            f"give it what {mark} says"
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = mark.open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            lock.close()
            raise GemvgError(f"{printable(folder)} is used by another run; wait for it or stop it") from None
        # A file system without locks: two runs at once are the user's to avoid.
    os.register_at_fork(after_in_child=lock.close)  # or a data loader's process that outlives a kill would hold it
    if not goes_on:
        _empty(folder)
        lock.truncate(0)  # in place, since the lock is on this very file
        lock.write(_as_text(content))
        lock.flush()
    return lock


def replaced_by(folder: Path) -> str:
    """The fingerprint of the result that the killed run in a work folder was told to replace; "" where it was not."""
    mark = _read_mark(folder) if left_work(folder) else {}
    return str(mark.get(REPLACES) or "")


def _given(content: dict[str, Any]) -> dict[str, Any]:
    """What makes two runs the same; a release may have settings that another lacks."""
    return {name: value for name, value in content.items() if value is not None and name != REPLACES}


def left_work(folder: Path) -> bool:
    """Whether a killed run left something in its folder to go on with."""
    mark = _read_mark(folder)
    return mark.get("format") == WORK and not mark.get("removing") and _filled(folder)


def remove(folder: Path) -> None:
    """Take a folder of ours away, its mark last: a kill on the way leaves one that is known as ours and of no use."""
    with suppress(OSError):  # a full disk, which this is about to mend
        _write_mark(folder, {"format": WORK, "removing": True})
    _empty(folder)
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def fingerprint(path: Path) -> str:
    """What a file holds, or a folder: names, contents of texts and weights, sizes of the rest; "" where nothing is."""
    if not path.exists():
        return ""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for name in tqdm(list(_files_in(path)), desc=f"reading {path.name}", unit="file", delay=3, leave=False):
        file = path / name
        what = sha256(file) if file.suffix in HASHED else str(file.stat().st_size)
        digest.update(f"{name}\0{what}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _move_up(staging: Path, target: Path, key: str, ours: set[str], keep_mark: bool) -> None:
    """Files from staging into the target, in the order that this module's first lines give reasons for.

    What they replace waits in the staging folder, so that a refusal of the system on the way can be undone.
    """
    new, before = list(_files_in(staging)), recorded(target)
    assert key in new, f"{key} was not written"
    _write_record(target, ours | set(new))
    mode = (target / MARK).stat().st_mode & 0o666  # as the umask has it; safetensors' files are their owner's alone
    old = [name for name in sorted(ours, key=lambda name: name != key) if os.path.lexists(target / name)]
    moves = [(target / name, staging / REPLACED / name) for name in old]
    moves += [(staging / name, target / name) for name in sorted(new, key=lambda name: (name == key, name))]
    for name in new:
        (staging / name).chmod(mode)
    done = []
    try:
        for source, goal in moves:
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, goal)
            done.append((source, goal))
    except BaseException:
        for source, goal in reversed(done):
            os.replace(goal, source)
        _write_record(target, before)
        raise
    for name in old:
        _remove_empty(target, (target / name).parent)
    _write_record(target, new if keep_mark else ())


def _write_record(target: Path, files: Collection[str]) -> None:
    """Which files of a result's folder are ours; without any it has no mark."""
    if files:
        _write_mark(target, {"format": RESULT, "files": sorted(files)})
    else:
        (target / MARK).unlink(missing_ok=True)


def _remove_empty(target: Path, folder: Path) -> None:
    while folder != target and folder.is_dir() and not os.listdir(folder):
        folder.rmdir()
        folder = folder.parent


def _files_in(folder: Path) -> Iterator[str]:
    """Every file and every empty folder, by its path relative to `folder`; what merely lies about is left out."""

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = sorted(name for name in folders if name not in links and not is_incidental(name))
        relative = Path(place).relative_to(folder)
        names = sorted(name for name in (*files, *links) if not is_incidental(name))
        yield from (str(relative / name) for name in names)
        if place != str(folder) and not names and not folders:
            yield str(relative)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two contents of a mark, such as `--bits was 4, now 8`."""
    said = []
    for name in _given(before) | _given(now):
        if before.get(name) == now.get(name):
            continue
        if not name.startswith(CONTENTS):
            said.append(f"--{name.replace('_', '-')} was {_said(before, name)}, now {_said(now, name)}")
        elif name in before and name in now:  # another path is said by its flag
            said.append(f"the {name} changed")
    return "; ".join(said)


def _said(settings: dict[str, Any], name: str) -> str:
    """A setting in a sentence; releases differ in which there are."""
    value = settings.get(name)
    if value is None:
        return "not given"
    return value if isinstance(value, str) else short(value)


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\0" not in name


def _read_mark(folder: Path) -> dict[str, Any]:
    if not (folder / MARK).is_file():
        return {}
    try:
        content = parse_json(read_text(folder / MARK))
    except ValueError:  # cut off by a kill, or somebody else's
        return {}
    return content if isinstance(content, dict) else {}


def _write_mark(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / f"{MARK}.partial"
    partial.write_text(_as_text(content), encoding="utf-8")
    os.replace(partial, folder / MARK)


def _filled(folder: Path) -> bool:
    """Whether there is such a folder with something in it beside its mark."""
    return is_folder(folder) and bool(set(os.listdir(folder)) - {MARK})


def _as_text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _empty(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != MARK:
            os.unlink(entry.path)
