"""A bundle's folder is written beside its place and renamed into it when all of it is there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemvg_edge import bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import read_json_object

LEFT_ALONE = "the folder is left alone, give another one"


@contextmanager
def new_bundle_folder(target: Path, files: Collection[str]) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end; after an error nothing has changed.

    An older bundle there, of these files, is replaced but for its README.md; anything else is refused at once.
    """
    target = target.resolve()  # gives `.` and links their name
    _check(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        work.chmod(0o755)  # mkdtemp's folder is for its owner alone
        yield work
        if (target / bundle.CARD).is_file():
            shutil.copyfile(target / bundle.CARD, work / bundle.CARD)
        if target.exists():
            target.rename(work / "replaced")
        work.rename(target)
    except BaseException:
        if (work / "replaced").exists():
            (work / "replaced").rename(target)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(target / "replaced", ignore_errors=True)


def _check(target: Path, files: Collection[str]) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise GemvgError(f"{target} is a file; give a folder to write the bundle to")
    found = {path.name for path in target.iterdir()}
    if others := sorted(found - {*files, bundle.MANIFEST, bundle.CARD}):
        raise GemvgError(f"{target} holds {others[0]}, no part of a bundle, so it is left alone; give another folder")
    if found:
        manifest = read_json_object(target / bundle.MANIFEST, LEFT_ALONE, f"no such file; {LEFT_ALONE}")
        if manifest.content.get("format") != bundle.FORMAT:
            raise GemvgError(f"{manifest.path} is not the manifest of a bundle; {LEFT_ALONE}")
