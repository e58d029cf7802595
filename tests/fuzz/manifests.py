"""A bundle's manifest, damaged: refused, or read as it was; sealed anew, its numbers never ask for much."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

from gemvg_edge.boxes import Box
from gemvg_edge.bundle import BARE_VERSION, MANIFEST, SEAL, read_manifest, seal
from gemvg_edge.decoding import Rope
from gemvg_edge.engines.graph_contract import decoder_contract, vision_contract
from gemvg_edge.errors import GemvgError
from gemvg_edge.images import smart_resize
from gemvg_edge.json_object import parse_json
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.positions import place_table, text_positions, vision_table
from gemvg_edge.prompt import prefix_text, query_text

_SHIPPED = (DEFAULT_BUNDLE / MANIFEST).read_bytes()
_BUILD = {"version": "10.3", "compute_capability": "8.7", "gpu": "Orin", "device": "x", "capacity": 4096,
          "max_prefill": 1024, "max_visual_tokens": 1024, "split_head": True}  # fmt: skip


def seeds() -> list[bytes]:
    """The shipped manifest, and others with engines, windows, deepstack, digits and pixels."""
    content = json.loads(_SHIPPED)
    pixels = content | {"answer": {"coordinates": "pixels", "locations": 0}, "coordinate_frame": {"kind": "absolute"}}
    windows = {**content["model"], "model_type": "qwen2_5_vl", "vision": {**content["model"]["vision"], "window": 4}}
    vision = {**content["model"]["vision"], "place_side": 48}
    qwen3 = {**content["model"], "model_type": "qwen3_vl", "vision": vision, "mrope_interleaved": True, "deepstack": 2}
    in_json = {"answer": {"coordinates": "json", "unnamed": "each"}, "prompt": {"system_turn": False}}
    names = ("vision.engine", "decoder.engine", "head.engine", "embedding.npy", "tokenizer.json")
    files = {name: {"bytes": 1, "sha256": "0" * 64} for name in names}
    others = [
        content | {"answer": {"coordinates": "digits", "locations": 0}},
        pixels | {"model": windows, "dialect": "standard", "precision": "float16"},
        content | in_json | {"model": qwen3},
        content | {"answer": {**content["answer"], "marks": False}, "format_version": BARE_VERSION},
        content | {"dialect": "plain", "tensorrt": _BUILD, "files": files},
    ]
    return [_SHIPPED, *(json.dumps(other | {SEAL: seal(other)}, indent=1).encode() for other in others)]


def check(data: bytes) -> None:
    """Once as it is, and once sealed again, so that its numbers are looked at and not only its seal."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / MANIFEST
        file.write_bytes(data)
        try:
            read = read_manifest(file)
        except GemvgError:
            pass
        else:  # guided by comparisons, a fuzzer finds the seal of what it changed
            content = parse_json(data.decode("utf-8-sig"))
            assert content[SEAL] == seal(content), f"a manifest that nobody sealed was read as {read}"
        try:
            content = parse_json(data.decode("utf-8-sig"))
        except ValueError:
            return
        if not isinstance(content, dict):
            return
        file.write_text(json.dumps(content | {SEAL: seal(content)}))
        with suppress(GemvgError):
            _use(file)


def _use(file: Path) -> None:
    """What is done with a manifest before a graph is opened: all of it is cheap."""
    read = read_manifest(file)
    shape, numbers = read.model, read.preprocessing
    height, width = smart_resize(100, 100, numbers)
    assert height * width <= 2**32
    prefix_text(read.prompt, 2)
    query_text(read.prompt, "the mug", think=True)
    steps = read.answer.steps((width, height))
    assert min(steps) > 0
    assert Box(0, 0, 0, *steps).area > 0
    Rope.of(shape).table(text_positions(0, 3))
    assert shape.embedding_width <= 2**21
    cell = numbers.merge_size
    if height * width <= 2**22 and cell <= 64:
        vision_table((1, 2 * cell, cell), cell, shape.vision.head_dim, shape.vision.rope_theta)
        if shape.vision.place_side:
            place_table((1, 2 * cell, cell), cell, shape.vision.place_side)
    assert len(decoder_contract(read)[0]) <= 6 + 2 * 1024
    vision_contract(read)
