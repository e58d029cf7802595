"""Ways to spoil a folder, for tables of what is said about it. Each gives a function that does it to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.bundle_writer import write_manifest
from gemvg_edge.bundle import MANIFEST

Damage = Callable[[Path], None]


def set_field(file: str, *keys: str, to: Any) -> Damage:
    """Set a field of a JSON file; None takes it away."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        section = content
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = to
        if to is None:
            del section[keys[-1]]
        (folder / file).write_text(json.dumps(content))

    return damage


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Set top-level fields of a bundle's manifest, and seal it again."""
    write_manifest(folder, json.loads((folder / MANIFEST).read_text()) | changes)


def write(file: str, content: bytes) -> Damage:
    """Replace a file's content."""

    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def remove(file: str) -> Damage:
    """Take a file away."""
    return lambda folder: (folder / file).unlink()


def truncate(file: str) -> Damage:
    """Cut a file's last byte off."""
    return lambda folder: write(file, (folder / file).read_bytes()[:-1])(folder)


def alter(file: str) -> Damage:
    """Change one bit in the middle of a file."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)

    return damage
