"""Things with paint of their own for the simulated world: the models of a Sweet Home 3D furniture library (.sh3f).

    apt install sweethome3d-furniture
    python -m train.world.render data/world/furnished --furniture /usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f

A library is a zip with a catalogue (`name#7=Mailbox`, `model#7=/mailbox/mailbox.obj`) and OBJ files with materials and
pictures. The one above is CC0; nothing of it is copied into this repository. A model that has one of the world's
colours on most of itself is a thing that is asked for by its name; of every three such names one is never shown in
training. A model of no such colour is clutter. The renderer knows one picture a mesh, so each triangle gets one colour,
after large ones are cut into smaller. What a library holds is a stranger's: a model that is too large, too thin to be
seen or not to be read is left out.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import trimesh
from PIL import Image, ImageDraw

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import reason
from train.world.meshes import LONGEST_SIDE, set_down
from train.world.things import COLOURS, HELD_OUT_NAMES, NAMES

LIBRARY = Path("/usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f")  # of Debian's sweethome3d-furniture
CATALOGUE = "PluginFurnitureCatalog.properties"
MOST_PIECES = 500  # of a library; each may come to 1.2 MB
MOST_BYTES = 8 << 20  # of one file in a library, unpacked
MOST_PIXELS = 1 << 24  # of a picture in it
MOST_TRIANGLES = 16_000  # of a model, large ones cut: a scene of five stays as quick to render as others
CUTS, FINE = 5, 1 / 12  # how often a triangle is cut in four at most, and the edge that is left, in longest sides
LEAST_SEEN = 0.5  # of a square of the longest side, what shows from the thinner side and from above: less is too little
SILHOUETTE = 48  # pixels along a side
MOSTLY = 0.6  # share of what shows of a model that has a colour which one may call it by
NEAR = 0.2  # how far from a colour, in each of red, green and blue, still counts as it
PALETTE = 64  # colours of a model
CELL = 4  # pixels of a palette's colour, so that a renderer that blends neighbours does not blend two


@dataclass(frozen=True)
class Furniture:
    """A model: triangles (n, 3, 3) in metres, standing on z = 0, and the colour of each (n, 3), 0 to 255."""

    name: str
    colour: str  # what one calls it, or "" for clutter
    corners: npt.NDArray[np.float64]
    paint: npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def read_furniture(library: Path) -> tuple[Furniture, ...]:
    """The models of a library that are fit for a table, one a name; GemvgError where there is none."""
    found: dict[str, Furniture] = {}
    try:
        with zipfile.ZipFile(library) as archive:
            catalogue = _read(archive, CATALOGUE).decode("latin-1")
            for name, file in islice(_entries(catalogue), MOST_PIECES):
                if name not in found and (model := _model(archive, name, file)):
                    found[name] = model
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        way = "install Debian's sweethome3d-furniture" if library == LIBRARY else "give a .sh3f file"
        raise GemvgError(f"{library} is no furniture library ({reason(error)}); {way}") from None
    if not any(model.colour for model in found.values()):
        raise GemvgError(f"{library} has no model that is fit for a table and has a colour; give another .sh3f file")
    return tuple(found.values())


def named(models: Iterable[Furniture], held_out: bool) -> dict[str, str]:
    """Name -> colour of the models that are asked for: those of training, or those that it never shows."""
    colours = {model.name: model.colour for model in models if model.colour}
    return {name: colours[name] for k, name in enumerate(sorted(colours)) if (k % 3 == 2) == held_out}


def write_furniture(model: Furniture, folder: Path, stem: str) -> str:
    """Write a model as OBJ with its material and a picture of its colours; the path of the OBJ."""
    palette = Image.fromarray(model.paint[None]).quantize(PALETTE)
    colours = np.asarray(palette.convert("RGB"))[0]
    unique, cell = np.unique(colours, axis=0, return_inverse=True)
    picture = np.repeat(np.repeat(unique[None], CELL, axis=0), CELL, axis=1)
    Image.fromarray(picture).save(folder / f"{stem}.png", compress_level=1)
    (folder / f"{stem}.mtl").write_text(f"newmtl paint\nKd 1 1 1\nmap_Kd {stem}.png\n", encoding="utf-8")
    lines = [f"mtllib {stem}.mtl", "usemtl paint"]
    lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in model.corners.reshape(-1, 3)]
    lines += [f"vt {(k + 0.5) / len(unique):.6f} 0.5" for k in range(len(unique))]
    lines += [
        f"f {3 * k + 1}/{c + 1} {3 * k + 2}/{c + 1} {3 * k + 3}/{c + 1}" for k, c in enumerate(cell.ravel().tolist())
    ]
    path = folder / f"{stem}.obj"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def _entries(catalogue: str) -> Iterator[tuple[str, str]]:
    """(name, file in the archive) of the catalogue's pieces, in its order; doors and windows are none."""
    pieces: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d{1,6})=(.*?)\r?$", catalogue, re.MULTILINE):
        pieces.setdefault(int(number), {})[key] = value.strip()
    for piece in pieces.values():
        name = piece.get("name", "").lower()
        # "all boxs" would be read, "all headphoness" is too odd; our own names are meshes of ours.
        plain = re.fullmatch(r"[a-z]+( [a-z]+)*", name) and not name.endswith("s") and len(name) < 25
        if plain and name not in (*NAMES, *HELD_OUT_NAMES) and piece.get("doorOrWindow") != "true" and "model" in piece:
            yield name, piece["model"].lstrip("/")


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MOST_BYTES:
        raise ValueError(f"{name} has more than {MOST_BYTES >> 20} MiB")
    return archive.read(name)


class _Beside(trimesh.resolvers.Resolver):
    """What a model's file names, from its own folder of the archive."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder

    def get(self, name: str) -> bytes:
        content = _read(self.archive, self.folder + name.strip().replace("\\", "/").removeprefix("./"))
        if not name.lower().endswith(".mtl"):
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"{name} has too many pixels")
        return content

    def namespaced(self, namespace: str) -> Any:
        return _Beside(self.archive, f"{self.folder}{namespace}/")

    def keys(self) -> list[str]:
        return []

    def write(self, name: str, data: Any) -> None:
        raise OSError("a library is only read")


def _model(archive: zipfile.ZipFile, name: str, file: str) -> Furniture | None:
    """A model as one set of triangles; None where it cannot be read or is not fit."""
    try:
        content = _read(archive, file)
        if content.count(b"\nf ") > MOST_TRIANGLES:
            return None
        beside = _Beside(archive, file.rpartition("/")[0] + "/")
        scene = trimesh.load_scene(io.BytesIO(content), file_type="obj", resolver=beside)
        parts = [_painted(mesh) for mesh in scene.geometry.values()]
    except Exception:  # a stranger's file, and a parser that answers with whatever it stumbles over
        return None
    points = np.concatenate([part[0] for part in parts]).reshape(-1, 3) if parts else np.empty((0, 3))
    if not 0 < len(points) <= 3 * MOST_TRIANGLES or not np.isfinite(points).all():
        return None
    if not 0 < np.ptp(points, axis=0).max() < np.inf:
        return None
    corners = set_down(points, up="y").reshape(-1, 3, 3)
    paint = np.concatenate([part[1] for part in parts])
    sides = [_seen(corners, paint, along) for along in ((0, 1, 2), (1, 0, 2), (2, 0, 1))]
    if min(len(side) for side in sides[:2]) + len(sides[2]) < LEAST_SEEN * SILHOUETTE**2:
        return None
    return Furniture(name, _colour(np.concatenate(sides)), corners, paint)


def _seen(
    corners: npt.NDArray[np.float64], paint: npt.NDArray[np.uint8], axes: tuple[int, int, int]
) -> npt.NDArray[np.uint8]:
    """The pixels (n, 3) that a model covers, looked at along the first axis; the others go right and down."""
    pixels = (corners / LONGEST_SIDE + [0.5, 0.5, 0]) * (SILHOUETTE - 1)
    image = Image.new("RGBA", (SILHOUETTE, SILHOUETTE))
    draw = ImageDraw.Draw(image)
    flat, colours = pixels[:, :, axes[1:]].reshape(-1, 6).tolist(), paint.tolist()
    for k in pixels[:, :, axes[0]].mean(axis=1).argsort():  # the farthest first
        draw.polygon(flat[k], fill=(*colours[k], 255))
    seen = np.asarray(image).reshape(-1, 4)
    return seen[seen[:, 3] > 0, :3]


def _painted(mesh: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """A mesh of one material -> its triangles (n, 3, 3) and their colours (n, 3), large ones cut into smaller."""
    corners = np.asarray(mesh.vertices, float)[mesh.faces]
    material, uv = getattr(mesh.visual, "material", None), getattr(mesh.visual, "uv", None)
    picture = getattr(material, "image", None)
    if picture is None or uv is None:
        colour = np.full(4, 180) if material is None else np.asarray(material.main_color)
        return corners, np.tile(colour[:3].astype(np.uint8), (len(corners), 1))
    places = np.asarray(uv, float)[mesh.faces]  # (n, 3, 2)
    longest = FINE * max(np.ptp(corners.reshape(-1, 3), axis=0).max(), 1e-12)
    for _ in range(CUTS):
        edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
        large = edges > longest
        if not large.any() or len(corners) > MOST_TRIANGLES:
            break
        corners, places = (np.concatenate([x[~large], _in_four(x[large])]) for x in (corners, places))
    colours = trimesh.visual.color.uv_to_color(places.mean(axis=1), picture)
    return corners, colours[:, :3].astype(np.uint8)


def _in_four(triangles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Triangles (n, 3, k) -> the four of each between its corners and the middles of its sides, (4 n, 3, k)."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
    fours = ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))
    return np.concatenate([np.stack(four, axis=1) for four in fours])


def _colour(pixels: npt.NDArray[np.uint8]) -> str:
    """The world's colour that most pixels (n, 3) have, or ""."""
    apart = np.abs(pixels[:, None] / 255 - np.asarray(list(COLOURS.values()))).max(axis=2)  # (n, colours)
    shares = ((apart < NEAR) & (apart == apart.min(axis=1, keepdims=True))).mean(axis=0)
    best = int(shares.argmax())
    return list(COLOURS)[best] if shares[best] > MOSTLY else ""
