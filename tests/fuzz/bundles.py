"""A bundle with one of its files damaged and its manifest sealed over that: refused, or it answers; never a crash.

The first byte of an input says which file it is. Hashes tell that a file is as it was written, not by whom.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from PIL import Image

from gemvg_edge import Grounder
from gemvg_edge.bundle import DECODER_GRAPH, MANIFEST, SEAL, TOKENIZER, VISION_GRAPH, seal
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE

_FILES = {b"V": VISION_GRAPH, b"D": DECODER_GRAPH, b"T": TOKENIZER}
_PICTURE = Image.new("RGB", (32, 32), "teal")
_ENGINE = "native" if find_library() else "onnx"


def seeds() -> list[bytes]:
    """The shipped graphs and tokenizer."""
    return [key + (DEFAULT_BUNDLE / name).read_bytes() for key, name in _FILES.items()]


def check(data: bytes) -> None:
    """Open the bundle and ask it something."""
    name, content = _FILES.get(data[:1], VISION_GRAPH), data[1:]
    manifest = json.loads((DEFAULT_BUNDLE / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest[SEAL] = seal(manifest)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        folder = Path(place)
        for file in DEFAULT_BUNDLE.iterdir():
            if file.name not in (name, MANIFEST):
                (folder / file.name).symlink_to(file)
        (folder / name).write_bytes(content)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with suppress(GemvgError), Grounder.open(folder, engine=_ENGINE, threads=1, max_new_tokens=16) as grounder:
            grounder.ground([_PICTURE], "the mug")
