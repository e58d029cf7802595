"""The things of the tabletop world as triangle meshes: turned profiles, boxes, ring arcs, and four borrowed ones.

Units are metres; an object stands on z = 0 at the origin. Knows nothing about pybullet, cameras or queries.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

SEGMENTS = 20

Mesh = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]  # vertices (n, 3), triangles (m, 3)


def revolve(profile: Sequence[tuple[float, float]]) -> Mesh:
    """Turn a profile of (radius, height) points around the z axis."""
    angles = np.arange(SEGMENTS) * 2 * np.pi / SEGMENTS
    radius, height = np.asarray(profile).T
    rings = np.stack(
        [np.outer(radius, np.cos(angles)), np.outer(radius, np.sin(angles)), np.outer(height, np.ones(SEGMENTS))], -1
    )
    return rings.reshape(-1, 3), _stitch(len(profile), SEGMENTS, closed=False)


def ring(radius: float, thickness: float, arc: float = 2 * np.pi, tube: int = 10) -> Mesh:
    """A ring (or an arc of one, in radians) around the z axis, lying on z = 0."""
    around = np.linspace(-arc / 2, arc / 2, SEGMENTS, endpoint=arc < 2 * np.pi)
    across = np.arange(tube) * 2 * np.pi / tube
    out = radius + thickness * np.cos(across)
    points = np.stack(
        [
            np.outer(np.cos(around), out),
            np.outer(np.sin(around), out),
            np.tile(thickness * (1 + np.sin(across)), (SEGMENTS, 1)),
        ],
        -1,
    )
    return points.reshape(-1, 3), _stitch(SEGMENTS, tube, closed=arc >= 2 * np.pi)


def block(x: float, y: float, z: float) -> Mesh:
    """A box of these side lengths."""
    corners = np.asarray([(sx * x / 2, sy * y / 2, sz * z) for sx in (-1, 1) for sy in (-1, 1) for sz in (0, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return corners, np.asarray([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])


def join(*meshes: Mesh) -> Mesh:
    """Several meshes as one."""
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in meshes[:-1]])
    return (
        np.concatenate([vertices for vertices, _ in meshes]),
        np.concatenate([triangles + start for (_, triangles), start in zip(meshes, starts, strict=True)]),
    )


def _stitch(rows: int, columns: int, closed: bool) -> npt.NDArray[np.int64]:
    """Triangles between neighbouring rings of points; `closed` joins the last ring to the first."""
    triangles = []
    for row in range(rows if closed else rows - 1):
        below, above = row * columns, (row + 1) % rows * columns
        for k in range(columns):
            right = (k + 1) % columns
            triangles += [(below + k, below + right, above + right), (below + k, above + right, above + k)]
    return np.asarray(triangles)


def _mug() -> Mesh:
    cup = revolve([(0, 0), (0.042, 0), (0.045, 0.1), (0.04, 0.1), (0.037, 0.012), (0, 0.012)])
    vertices, triangles = ring(0.03, 0.008, arc=1.2 * np.pi)
    handle = vertices[:, [0, 2, 1]] + np.asarray([0.045, -0.008, 0.05])
    return join(cup, (handle, triangles[:, ::-1]))


def _ball() -> Mesh:
    angles = np.linspace(-np.pi / 2, np.pi / 2, 12)
    return revolve([(0.048 * np.cos(a), 0.048 + 0.048 * np.sin(a)) for a in angles])


MESHES: dict[str, Mesh] = {
    "ball": _ball(),
    "cube": block(0.085, 0.085, 0.085),
    "can": revolve([(0, 0), (0.037, 0), (0.037, 0.11), (0, 0.11)]),
    "bottle": revolve([(0, 0), (0.036, 0), (0.038, 0.09), (0.014, 0.125), (0.014, 0.165), (0, 0.165)]),
    "mug": _mug(),
    "bowl": revolve([(0, 0), (0.03, 0), (0.055, 0.025), (0.066, 0.055), (0.06, 0.055), (0.05, 0.027), (0, 0.012)]),
    "plate": revolve([(0, 0), (0.045, 0), (0.075, 0.013), (0.072, 0.017), (0.045, 0.006), (0, 0.006)]),
    "cone": revolve([(0, 0), (0.055, 0), (0.004, 0.13), (0, 0.13)]),
    "book": block(0.14, 0.1, 0.028),
    "ring": ring(0.047, 0.015),
}


# pybullet_data's meshes that are used too: the file, and the axis of the file that points up.
BORROWED = {
    "duck": ("duck.obj", "y"),
    "brick": ("lego/lego.obj", "y"),
    "teddy": ("teddy2_VHACD_CHs.obj", "z"),
    "bunny": ("bunny.obj", "z"),
}
LONGEST_SIDE = 0.105  # metres, of a borrowed mesh


def data_file(inside: str) -> Path:
    """A file of pybullet_data."""
    import pybullet_data

    return Path(pybullet_data.getDataPath(), inside)


def set_down(points: npt.NDArray[np.float64], up: str) -> npt.NDArray[np.float64]:
    """Points (n, 3) of a mesh whose upward axis is `up`, y or z: upright, at our scale and standing on z = 0."""
    if up == "y":
        points = points[:, [0, 2, 1]] * (1, -1, 1)
    low, high = points.min(axis=0), points.max(axis=0)
    placed: npt.NDArray[np.float64] = (points - [*(low + high)[:2] / 2, low[2]]) * LONGEST_SIDE / (high - low).max()
    return placed


def borrow_mesh(name: str, folder: Path) -> str:
    """Write a borrowed mesh into the folder, upright, at our scale and standing on z = 0; the file's path."""
    inside, up = BORROWED[name]
    source = data_file(inside)
    lines = source.read_text(encoding="utf-8").splitlines()
    points = np.asarray([line.split()[1:4] for line in lines if line.startswith("v ")], float)
    rows = iter(f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in set_down(points, up))
    # Normals would have to be turned too; without them the renderer takes each face's own.
    kept = [line.split("#")[0] for line in lines if not line.startswith("vn ")]
    text = [next(rows) if line.startswith("v ") else _without_normals(line) for line in kept]
    target = folder / f"{name}.obj"
    target.write_text("\n".join(text) + "\n", encoding="utf-8")
    for companion in [*source.parent.glob(f"{source.stem}*.mtl"), *source.parent.glob(f"{source.stem}*.png")]:
        shutil.copyfile(companion, folder / companion.name)
    return str(target)


def _without_normals(line: str) -> str:
    if not line.startswith("f "):
        return line
    corners = [corner.split("/") for corner in line.split()[1:]]
    return "f " + " ".join(c[0] if len(c) == 1 or not c[1] else f"{c[0]}/{c[1]}" for c in corners)


def write_obj(mesh: Mesh, path: Path) -> None:
    """Write a Wavefront OBJ, the format pybullet reads."""
    vertices, triangles = mesh
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in vertices]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in triangles]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
