"""A checkpoint by its hub id where a folder is expected: downloaded by huggingface_hub, or found in its cache.

Only weights in safetensors, JSON and the chat template come: nothing that is code, and no pickle.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from gemvg_edge.command import one_line
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
USUAL = ("runs", "checkpoints", "data", "bundles")  # our own folders, which a wrong place misses
UNREACHED = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError")
WANTED = ("*.safetensors", "*.json", "chat_template.jinja")  # the template is text, rendered within bounds


def checkpoint_folder(given: Path) -> Path:
    """The folder itself, or of `OWNER/NAME` that is no folder here the hub's files; GemvgError where there are none."""
    name = str(given)
    ours = given.parts[:1] and given.parts[0] in USUAL
    if is_folder(given) or given.exists() or not _ID.fullmatch(name) or is_folder(given.parent) or ours:
        return given  # a wrong path has its own sentence, where it is read
    wanted = " ".join(f"'{pattern}'" for pattern in WANTED)
    by_hand = f"hf download {name} --include {wanted} --local-dir {given.name}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise GemvgError(
            f"{name} is no folder here; to have it from the hub run `pip install huggingface_hub` and `{by_hand}`"
        ) from None
    print(f"{name} is no folder here; asking the hub for it", file=sys.stderr)
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except Exception as error:  # no such id, no access, no connection: kinds of its own and of the libraries below it
        kind = type(error).__name__
        reason = "no connection, and not in its cache" if kind in UNREACHED else one_line(error).split(". ")[0][:200]
        raise GemvgError(
            f"{name} is no folder here, and the hub does not give it ({kind}: {reason}); check the id and the "
            f"connection, or bring it by hand: `{by_hand}`"
        ) from None
