"""Qwen2.5-VL from checkpoint to answer: windows and pixels through bundles of every dialect, against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.boxes.torch_grounder import TorchGrounder
from export.bundle_writer import Recipe, write_bundle
from gemvg_edge import Box, GemvgError, Grounder, mark
from gemvg_edge.bundle import MANIFEST, open_bundle
from gemvg_edge.cli import main as inspect
from gemvg_edge.engines.onnxruntime import OnnxVisionTower
from gemvg_edge.images import Grid
from quantize.checkpoint import open_checkpoint
from tests.checkpoints import TINY_2_5, random_pictures, torch_vision, write_checkpoint
from tests.damage import Damage, set_field

TOLERANCE = 1e-3
NEW_TOKENS = 24
# In windows of 2 x 2 tokens: fourteen patches across end in half a window, ten by ten on both sides, one token alone.
GRIDS: list[Grid] = [(1, 4, 14), (1, 10, 10), (1, 2, 2), (1, 4, 14), (1, 8, 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("qwen2_5_bundle")
    write_checkpoint(folder / "checkpoint", TINY_2_5)
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle", Recipe())
    return folder


@pytest.mark.parametrize("dialect", ["fused", "standard", "plain"])
def test_the_vision_tower_is_transformers(dialect: str, folder: Path, tmp_path: Path) -> None:
    write_bundle(open_checkpoint(folder / "checkpoint"), tmp_path / "bundle", Recipe(dialect=dialect))
    patches = random_pictures(GRIDS)
    expected = torch_vision(TorchGrounder.open(folder / "checkpoint").model, patches, GRIDS)
    ours = OnnxVisionTower(open_bundle(tmp_path / "bundle")).encode(patches, GRIDS)
    for visual, theirs in zip(ours, expected, strict=True):
        assert visual.shape == theirs.shape
        assert np.abs(visual - theirs).max() <= TOLERANCE


def noise(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


MIXED, ALIKE = [noise(120, 90, 1), noise(64, 200, 2)], [noise(90, 60, 3), noise(90, 60, 4)]
SHOWN = mark(Box(0, 10, 10, 50, 50), (90, 60))
ASKED: list[tuple[list[Image.Image], str]] = [
    (MIXED[:1], "the red mug"),
    (MIXED, "every blue block"),
    (ALIKE, f"like {SHOWN} in image 1"),
]


@pytest.mark.parametrize(("pictures", "query"), ASKED, ids=["one", "two of different shape", "a box in the query"])
def test_it_writes_what_transformers_writes(pictures: list[Image.Image], query: str, folder: Path) -> None:
    text, *_ = TorchGrounder.open(folder / "checkpoint").ground(pictures, query, NEW_TOKENS)
    grounder = Grounder.open(folder / "bundle", max_new_tokens=NEW_TOKENS)
    assert grounder.ground(pictures, query, constrained=False).text == text


def test_boxes_are_pixels_of_the_resized_picture(folder: Path) -> None:
    scene = Grounder.open(folder / "bundle").look(MIXED)
    assert (scene.sizes, scene.resized) == ([(120, 90), (64, 200)], [(112, 84), (56, 196)])
    answer = TorchGrounder.open(folder / "checkpoint").read('[{"bbox_2d": [28, 42, 56, 98], "image": 2}]', scene.sizes)
    assert answer.boxes == (Box(1, 32.0, 42 * 200 / 196, 64.0, 100.0),)


def test_a_box_in_a_query_about_pictures_of_several_sizes_is_refused(folder: Path) -> None:
    scene = Grounder.open(folder / "bundle").look(MIXED)
    with pytest.raises(GemvgError, match=r"several sizes \(112 x 84, 56 x 196 after resizing\)"):
        scene.ground(f"like {SHOWN}")


def test_the_manifest_says_so(folder: Path) -> None:
    manifest = open_bundle(folder / "bundle").manifest
    assert (manifest.coordinate_frame, manifest.answer.coordinates) == ({"kind": "absolute"}, "pixels")
    assert (manifest.model.model_type, manifest.model.vision.window) == ("qwen2_5_vl", 2)


def test_inspect_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(["inspect", str(folder / "bundle")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("answers: pixels")]
    assert "<" not in line


def edit(*keys: str, to: Any) -> Damage:
    return set_field(MANIFEST, *keys, to=to)


DAMAGES = {
    "no window": (edit("model", "vision", "window", to=None), "model.vision.window is 0, not that of a qwen2_5_vl"),
    "window below 0": (edit("model", "vision", "window", to=-2), "model.vision.window is -2, not 0 to 1024"),
    "window of Qwen2-VL": (edit("model", "model_type", to="qwen2_vl"), "window is 2, not that of a qwen2_vl; export"),
    "another frame": (
        edit("coordinate_frame", to={"kind": "relative", "size": 1000}),
        "coordinate_frame .* does not fit answer.coordinates 'pixels'; export the bundle again",
    ),
    "another answer": (edit("answer", "coordinates", to="digits"), "does not fit answer.coordinates 'digits'"),
    "unknown frame": (edit("coordinate_frame", to={"kind": "polar"}), "unknown coordinate frame {'kind': 'polar'}"),
}


@pytest.mark.parametrize("label", DAMAGES)
def test_a_manifest_that_contradicts_itself_is_refused(label: str, folder: Path, tmp_path: Path) -> None:
    damage, said = DAMAGES[label]
    bundle = shutil.copytree(folder / "bundle", tmp_path / "bundle")
    damage(bundle)
    with pytest.raises(GemvgError, match=said):
        open_bundle(bundle)
