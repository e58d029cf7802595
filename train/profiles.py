"""How published checkpoints are asked and how they answer: one small JSON file each in `profiles/`.

A checkpoint of ours says it itself, under `grounding` of its config.json. One of somebody else's gets the profile that
its config or its name points to, which is written into what is made of it, or the one that `export.to_onnx --profile`
names. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import JsonObject, read_json_object

FOLDER = Path(__file__).with_name("profiles")
NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))
OURS, OWN = "gemvg", "own"  # what train/ teaches; what a config says under `grounding`
FAMILIES = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl"}
FINE_TUNES = {"migician": "migician", "univg": "univg-r1"}  # a part of the name that a checkpoint goes by


def read_profile(name: str) -> JsonObject:
    """One of NAMES: `about`, and `prompt` and `answer` as `grounding` has them; GemvgError for another."""
    if name not in NAMES:
        raise GemvgError(f"no profile {name!r} is known; give one of {', '.join(NAMES)}")
    return read_json_object(FOLDER / f"{name}.json", "mend it", "no such profile")


def says_itself(grounding: Mapping[str, Any]) -> bool:
    """Whether a config's `grounding` has words of the checkpoint's own."""
    return "prompt" in grounding or "answer" in grounding


def guess_profile(config: JsonObject) -> str:
    """The profile of a checkpoint by its config.json: its own words, the name it goes by, or its family's."""
    grounding = config.object("grounding", default={})
    if says_itself(grounding.content):
        return OWN
    if named := grounding.value("profile", str, ""):
        return named
    saved_from = str(config.content.get("_name_or_path") or "").rstrip("/").split("/")[-1]
    folder = config.path.parent.resolve()
    if folder.parent.name == "snapshots":  # of the hub's cache, whose own folders are named by a hash
        folder = folder.parent.parent
    known_as = f"{saved_from} {folder.name}".lower()
    for part, name in FINE_TUNES.items():
        if part in known_as:
            return name
    return FAMILIES.get(config.value("model_type", str, ""), OURS)
