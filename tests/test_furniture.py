"""Furniture of strangers' libraries in the simulated world: what is taken, what it is called, and that it is seen."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gemvg_edge.errors import GemvgError
from train.world.dense_head import UNNAMED, DenseHead, SeenObject, dense_targets
from train.world.furniture import CATALOGUE, LIBRARY, MOST_BYTES, named, read_furniture, write_furniture
from train.world.meshes import LONGEST_SIDE, MESHES, Mesh, block, join
from train.world.render import render
from train.world.samples import held_out_questions
from train.world.scenes import FURNISHED_SEED, HELD_OUT_SEED, read_scenes, style_of
from train.world.staging import World

RED = "newmtl paint\nKd 0.8 0.1 0.1\n"
TEXTURED = "newmtl paint\nKd 1 1 1\nmap_Kd wood.png\n"


def obj(mesh: Mesh) -> str:
    """A mesh as furniture is stored: y up, in centimetres, with a material and places in its picture."""
    vertices, triangles = mesh
    lines = ["mtllib model.mtl", "usemtl paint", "vt 0.1 0.2", "vt 0.9 0.2", "vt 0.5 0.9"]
    lines += [f"v {100 * x:.3f} {100 * z:.3f} {-100 * y:.3f}" for x, y, z in vertices]
    return "\n".join([*lines, *(f"f {a + 1}/1 {b + 1}/2 {c + 1}/3" for a, b, c in triangles)]) + "\n"


def picture(colour: tuple[int, int, int]) -> bytes:
    """A PNG of one colour."""
    Image.new("RGB", (16, 16), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def library(path: Path, **pieces: Mapping[str, str | bytes]) -> Path:
    """A library of pieces by name: `obj` and `mtl`, other files, and further lines of the catalogue."""
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, (name, files) in enumerate(pieces.items(), start=1):
            folder = f"models/{name}"
            lines += [f"name#{number}={name.capitalize()}", f"model#{number}=/{folder}/model.obj"]
            lines += [f"{key}#{number}={value!s}" for key, value in files.items() if key == "doorOrWindow"]
            for file, content in files.items():
                if file != "doorOrWindow":
                    archive.writestr(f"{folder}/{file}", content)
        archive.writestr(CATALOGUE, "\n".join(lines))
    return path


def crate(mtl: str = RED, **files: str | bytes) -> dict[str, str | bytes]:
    """A piece that is a cube."""
    return {"model.obj": obj(block(0.5, 0.4, 0.45)), "model.mtl": mtl, **files}


def spoilt(path: Path) -> bytes:
    """A library's bytes with the catalogue's own, which lie at the end of the files, changed."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo(CATALOGUE).header_offset + 30 + len(CATALOGUE)
    content[at : at + 8] = b"\xff" * 8
    return bytes(content)


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    rod = {"model.obj": obj(block(1, 0.01, 0.01)), "model.mtl": RED}
    return library(
        tmp_path / "pieces.sh3f",
        crate=crate(), hatch=crate(doorOrWindow="true"), rod=rod, mug=crate(), glasses=crate(),
        green=crate(TEXTURED, **{"wood.png": picture((30, 150, 45))}), broken={"model.obj": "f 9 9 9"},
        brown=crate(TEXTURED, **{"wood.png": picture((120, 80, 50))}), shelf=crate(), **{"coffee table": crate()},
    )  # fmt: skip


def test_what_is_fit_is_taken_and_called_by_what_shows(pieces: Path) -> None:
    models = read_furniture(pieces)
    assert {model.name: model.colour for model in models} == {
        "crate": "red", "green": "green", "brown": "", "shelf": "red", "coffee table": "red",
    }  # fmt: skip
    trained, held_out = named(models, held_out=False), named(models, held_out=True)
    assert trained == {"coffee table": "red", "crate": "red", "shelf": "red"}
    assert held_out == {"green": "green"}
    for model in models:
        low, high = model.corners.min(axis=(0, 1)), model.corners.max(axis=(0, 1))
        assert low[2] == pytest.approx(0, abs=1e-9)
        assert high - low == pytest.approx(np.asarray([0.5, 0.4, 0.45]) / 0.5 * LONGEST_SIDE, abs=1e-4)  # upright


def test_a_picture_is_kept_triangle_by_triangle(tmp_path: Path) -> None:
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = (200, 30, 30), (30, 30, 200)
    Image.fromarray(halves).save(file := io.BytesIO(), "PNG")
    striped = read_furniture(
        library(tmp_path / "a.sh3f", crate=crate(), box=crate(TEXTURED, **{"wood.png": file.getvalue()}))
    )[1]
    assert striped.colour == ""
    assert len(striped.corners) > 12 * 16, "large triangles are cut"
    assert {tuple(colour) for colour in striped.paint.tolist()} == {(200, 30, 30), (30, 30, 200)}


def test_the_renderer_shows_its_colours(pieces: Path) -> None:
    models = {model.name: model for model in read_furniture(pieces)}
    with World(list(models.values())) as world:
        p = world.bullet
        for name, channel in (("crate", 0), ("green", 1)):
            p.resetSimulation()
            shape = p.createVisualShape(p.GEOM_MESH, fileName=world.mesh_file(name), meshScale=[1.2] * 3)
            body = p.createMultiBody(0, -1, shape, [0, 0, 0])
            view = p.computeViewMatrixFromYawPitchRoll([0, 0, 0.03], 0.6, 30, -45, 0, 2)
            lens = p.computeProjectionMatrixFOV(40, 1, 0.05, 10)
            _, _, rgba, _, mask = p.getCameraImage(96, 96, view, lens, renderer=p.ER_TINY_RENDERER)
            seen = np.reshape(rgba, (96, 96, 4))[np.reshape(mask, (96, 96)) == body][:, :3]
            assert len(seen) > 400
            assert (seen.argmax(axis=1) == channel).mean() > 0.95


def test_scenes_are_furnished_by_their_seed_and_their_library(pieces: Path, tmp_path: Path) -> None:
    folder, again = tmp_path / "a", tmp_path / "b"
    render(folder, 40, scenes=8, size=96, processes=1, furniture=pieces)
    render(again, 44, scenes=2, size=96, processes=1, furniture=pieces)
    scenes = read_scenes(folder)
    assert scenes[4:6] == read_scenes(again)
    names = {name for scene in scenes for name, _ in scene.things}
    assert names & set(MESHES)
    assert names & {"coffee table", "crate", "shelf"}
    assert "green" not in names
    assert len(json.loads((folder / "settings.json").read_text())["furniture"]) == 64
    with pytest.raises(GemvgError, match="was rendered with"):
        render(folder, 40, scenes=8, size=96, processes=1)
    render(tmp_path / "held-out", HELD_OUT_SEED, scenes=6, size=96, processes=1, furniture=pieces)
    held_out = {name for scene in read_scenes(tmp_path / "held-out") for name, _ in scene.things}
    assert "green" in held_out
    assert not held_out & {"coffee table", "crate", "shelf"}


def test_things_without_a_score_of_their_own_are_learned_by_the_rest() -> None:
    head = DenseHead(16, names=3, colours=2)
    tokens = torch.randn(4, 16, requires_grad=True)
    seen = [SeenObject(name, 1, (0.1, 0.1, 0.4, 0.4)) for name in (UNNAMED, 2)]
    for objects in (seen[:1], seen):
        loss = head.tower_loss(tokens, dense_targets([(1, 4, 4)], 2, [objects]))
        assert torch.isfinite(loss)
        loss.backward()
    assert head.tower.weight.grad is not None
    assert torch.isfinite(head.tower.weight.grad).all()


def test_too_much_is_left_out(tmp_path: Path) -> None:
    bomb: dict[str, str | bytes] = {"model.obj": b"v 0 0 0\n" * (MOST_BYTES // 8 + 1), "model.mtl": RED}
    crowd = {"model.obj": obj(join(*[block(0.5, 0.4, 0.45)] * 1500)), "model.mtl": RED}
    wide = crate(TEXTURED, **{"wood.png": b"\x89PNG\r\n\x1a\n" + bytes(50)})
    outside = {"model.obj": obj(block(0.5, 0.4, 0.45)).replace("model.mtl", "../../../../etc/passwd")}
    models = read_furniture(
        library(tmp_path / "a.sh3f", crate=crate(), bomb=bomb, crowd=crowd, wide=wide, outside=outside)
    )
    assert {model.name for model in models} <= {"crate", "wide", "outside"}
    assert models[0].colour == "red"


def test_a_library_without_end_is_read_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.world.furniture.MOST_PIECES", 2)
    models = read_furniture(library(tmp_path / "a.sh3f", crate=crate(), shelf=crate(), bench=crate()))
    assert [model.name for model in models] == ["crate", "shelf"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "a.sh3f is no furniture library .*No such file"),
        (lambda path: path.write_bytes(b"PK but no zip"), "a.sh3f is no furniture library"),
        (lambda path: library(path), "has no model that is fit for a table and has a colour"),
        (lambda path: library(path, broken={"model.obj": "f 1 2 3"}), "has no model that is fit"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "a.sh3f is no furniture library"),
        (lambda path: library(path, crate=crate()).write_bytes(spoilt(path)), "a.sh3f is no furniture library"),
    ],
)
def test_what_is_no_library_is_a_sentence(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "a.sh3f")
    with pytest.raises(GemvgError, match=message):
        read_furniture(tmp_path / "a.sh3f")
    with pytest.raises(GemvgError, match=message):
        render(tmp_path / "out", 0, scenes=1, size=96, processes=1, furniture=tmp_path / "a.sh3f")
    assert not (tmp_path / "out").exists()


def test_furnished_scenes_are_plain_and_asked_about_as_others(pieces: Path, tmp_path: Path) -> None:
    assert style_of(FURNISHED_SEED) == style_of(HELD_OUT_SEED)
    render(tmp_path / "a", FURNISHED_SEED, scenes=6, size=96, processes=1, furniture=pieces)
    assert {pictures.count for pictures, _ in held_out_questions(read_scenes(tmp_path / "a"))} <= {1, 2}


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARY.is_file(), reason="needs Debian's sweethome3d-furniture")
def test_debians_library(tmp_path: Path) -> None:
    models = read_furniture(LIBRARY)
    assert len(models) > 30
    assert len(named(models, held_out=False)) >= 5
    told = len(models), len(named(models, held_out=False)), len(named(models, held_out=True))
    assert told == (41, 6, 2), "what docs/training.md says of it"
    written = write_furniture(models[0], tmp_path, "model")
    assert Path(written).stat().st_size > 10_000
