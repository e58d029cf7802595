"""A bundle's folder, written all or nothing, where only a bundle of ours is replaced: see train/output_folder.py."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gemvg_edge import bundle
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder, list_folder
from gemvg_edge.json_object import read_json_object
from train.output_folder import MARK, check_target, new_folder

LEFT_ALONE = "the folder is left alone, give another one"


def check_bundle_folder(
    target: Path, files: Collection[str], inputs: Sequence[Path] = (), *, overwrite: bool = False
) -> None:
    """GemvgError, to be had before any work, where `new_bundle_folder` would refuse to write."""
    check_target(target, bundle.MANIFEST, inputs, overwrite=overwrite, older=_older(target, files))


@contextmanager
def new_bundle_folder(
    target: Path, files: Collection[str], inputs: Sequence[Path] = (), *, overwrite: bool = False
) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end; after an error nothing has changed.

    An older bundle there, of these files, is replaced with `overwrite`; anything else is refused at once, one of the
    `inputs` too.
    """
    older = _older(target, files)
    with new_folder(target, bundle.MANIFEST, inputs, overwrite=overwrite, older=older, keep_mark=False) as folder:
        yield folder


def _older(target: Path, files: Collection[str]) -> Collection[str]:
    """The files of a bundle that is there: its manifest vouches for them, where a kill left no mark."""
    target = Path(os.path.realpath(target))
    if not is_folder(target):
        return ()
    found = [name for name in list_folder(target) if not bundle.is_incidental(name)]
    if not found or MARK in list_folder(target):
        return ()
    if others := sorted(set(found) - {*files, bundle.MANIFEST}):
        raise GemvgError(f"{target} holds {others[0]}, no part of a bundle, so it is left alone; give another folder")
    manifest = read_json_object(target / bundle.MANIFEST, LEFT_ALONE, f"no such file; {LEFT_ALONE}")
    if manifest.content.get("format") != bundle.FORMAT:
        raise GemvgError(f"{manifest.path} is not the manifest of a bundle; {LEFT_ALONE}")
    return found
