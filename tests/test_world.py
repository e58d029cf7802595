"""The simulated world: scenes depend on their seed alone, and truth matches the pictures."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.errors import GemvgError
from train.world.meshes import BORROWED, borrow_mesh
from train.world.records import world_records
from train.world.render import MIN_PIXELS_SHARE, _start_pool, boxes_of, render
from train.world.scenes import NEW_NAMES_SEED, NEW_STYLE_SEED, Scene, read_scenes
from train.world.things import HELD_OUT_NAMES, NAMES, plan_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    render(folder, first_seed=7_000, scenes=12, size=144, processes=2)
    return folder


@pytest.fixture(scope="module")
def scenes(folder: Path) -> list[Scene]:
    return read_scenes(folder)


def test_a_scene_depends_on_its_seed_alone(folder: Path, scenes: list[Scene], tmp_path: Path) -> None:
    render(tmp_path, first_seed=7_005, scenes=2, size=144, processes=1)
    assert read_scenes(tmp_path) == scenes[5:7]
    file = scenes[5].views[0].file
    assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(Image.open(folder / file)))


def test_finished_shards_are_kept(folder: Path) -> None:
    shard = next(folder.glob("scenes-*.jsonl"))
    written = shard.stat().st_mtime_ns
    render(folder, first_seed=7_000, scenes=12, size=144, processes=1)
    assert shard.stat().st_mtime_ns == written


def test_a_short_shard_is_rendered_anew(tmp_path: Path) -> None:
    render(tmp_path, first_seed=7_000, scenes=1, size=64, processes=1)
    render(tmp_path, first_seed=7_000, scenes=2, size=64, processes=1)
    assert [scene.seed for scene in read_scenes(tmp_path)] == [7_000, 7_001]


def test_a_process_that_waits_for_work_can_be_ended() -> None:
    """A handler in Python may never run while a process waits, and the pool would wait for it for ever."""
    with _start_pool(1) as pool:
        assert pool.apply(signal.getsignal, (signal.SIGTERM,)) == signal.SIG_DFL


def test_scenes_of_other_settings_are_not_mixed(folder: Path) -> None:
    with pytest.raises(GemvgError, match=r"was rendered with .*'size': 144.* not .*'size': 64"):
        render(folder, first_seed=7_000, scenes=12, size=64, processes=1)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "7000"}, {"seed": -1}, {"things": [["mug", 5]]}, {"moved": [99]}, {"moved": [True]}, {"views": []},
        {"views": {"width": 10**400}}, {"views": {"boxes": [[0, 0, 1e9, 9]]}}, {"views": {"file": "../a.png"}},
        {"views": {"file": "/etc/passwd"}}, {"views": {"boxes": []}}, {"views": {"height": 0.5}},
        {"things": [["mug", "red"]], "moved": [], "removed": [], "added": [], "views": {"boxes": [None]}},
    ],
)  # fmt: skip
def test_scenes_of_strangers_are_a_sentence(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    lines = next(folder.glob("scenes-*.jsonl")).read_text().splitlines()
    scene = json.loads(lines[1])
    for key, value in change.items():
        scene[key] = [{**view, **value} for view in scene[key]] if isinstance(value, dict) else value
    (tmp_path / "scenes-0.jsonl").write_text(f"{lines[0]}\n{json.dumps(scene)}\n")
    with pytest.raises(GemvgError, match=r"scenes-0\.jsonl, line 2 is not a scene; delete the file and render again"):
        read_scenes(tmp_path)


@pytest.mark.parametrize("line", [b"caf\xe9", b"[" * 100_000, b'{"seed": NaN}', b"7"])
def test_lines_that_are_no_scene(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "scenes-0.jsonl").write_bytes(line)
    with pytest.raises(GemvgError, match=r"line 1 is not a scene"):
        read_scenes(tmp_path)


def test_a_scene_that_stands_twice_is_one_or_a_sentence(folder: Path, tmp_path: Path) -> None:
    line = next(folder.glob("scenes-*.jsonl")).read_text().splitlines()[0]
    (tmp_path / "scenes-0.jsonl").write_text(f"{line}\n{line}\n")
    assert len(read_scenes(tmp_path)) == 1
    (tmp_path / "scenes-1.jsonl").write_text(line.replace('"moved": [', '"moved": [0, '))
    with pytest.raises(GemvgError, match=r"scenes-1\.jsonl, line 1: scene 7000 stands twice"):
        read_scenes(tmp_path)


def test_too_few_scenes_are_no_endless_search(tmp_path: Path, folder: Path) -> None:
    line = next(folder.glob("scenes-*.jsonl")).read_text().splitlines()[0]
    (tmp_path / "scenes-0.jsonl").write_text(line)
    with pytest.raises(GemvgError, match="give no semantic question; render more of them"):
        list(world_records(tmp_path, 5, 0.0, seed=0))


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # as if there were no more room
    try:
        with pytest.raises(GemvgError, match=r"cannot be written \(File too large\)"):
            render(tmp_path, first_seed=7_000, scenes=1, size=144, processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["images", "settings.json"]
    render(tmp_path, first_seed=7_000, scenes=1, size=144, processes=1)
    assert len(read_scenes(tmp_path)) == 1


def test_boxes_lie_in_the_picture_and_around_the_colour(folder: Path, scenes: list[Scene]) -> None:
    checked = 0
    for scene in scenes:
        for view in scene.views:
            pixels = np.asarray(Image.open(folder / view.file), np.float64)
            assert pixels.shape == (view.height, view.width, 3)
            for (_, colour), box in zip(scene.things, view.boxes, strict=True):
                if box is None:
                    continue
                x1, y1, x2, y2 = map(int, box)
                assert 0 <= x1 < x2 <= view.width
                assert 0 <= y1 < y2 <= view.height
                if colour in ("red", "green", "blue"):
                    inside = pixels[y1:y2, x1:x2].mean(axis=(0, 1))
                    channel = ("red", "green", "blue").index(colour)
                    shade = pixels.mean(axis=(0, 1))
                    assert (inside - shade)[channel] > max(np.delete(inside - shade, channel)), (scene.seed, colour)
                    checked += 1
    assert checked > 10


def test_what_happened_shows_in_the_boxes(scenes: list[Scene]) -> None:
    for scene in scenes:
        before, after = ([v.boxes for v in scene.views[start : start + 2]] for start in (0, 2))
        assert all(boxes[k] is None for boxes in before for k in scene.added)
        assert all(boxes[k] is None for boxes in after for k in scene.removed)
        still = set(range(len(scene.things))) - {*scene.moved, *scene.added, *scene.removed}
        for k in still:  # views 0 and 2 are one camera's; a thing that came may hide part of another
            if before[0][k] and after[0][k] and not scene.moved and not scene.added and not scene.removed:
                assert before[0][k] == after[0][k]
        for k in scene.moved:
            assert before[0][k] is None or before[0][k] != after[0][k]


def test_plans_change_something_and_leave_something() -> None:
    plans = [plan_scene(seed) for seed in range(600)]
    assert all(len(plan.things) - len(plan.removed) - len(plan.added) >= 1 for plan in plans)
    assert all(not {*plan.moved} & {*plan.removed} for plan in plans)
    for part in ("moved", "removed", "added"):
        assert 60 < sum(bool(getattr(plan, part)) for plan in plans) < 500, part
    related = sum(bool({*plans[k].things} & {*plans[k + 1].things}) for k in range(0, 600, 2))
    strangers = sum(bool({*plans[k].things} & {*plans[k + 3].things}) for k in range(0, 596, 2))
    assert related > 200 > 2 * strangers


def test_held_out_names_are_only_in_their_split() -> None:
    def names(first: int) -> set[str]:
        return {name for seed in range(first, first + 300) for name, _ in plan_scene(seed).things}

    assert names(0) == names(1_000_000) == names(NEW_STYLE_SEED) == set(NAMES)
    assert set(HELD_OUT_NAMES) < names(NEW_NAMES_SEED)


def test_a_thing_that_barely_shows_spoils_the_view() -> None:
    mask = np.zeros((50, 50), np.int64)
    mask[10:20, 5:30] = 7
    assert boxes_of(mask, {0: 7, 1: 8}, 3) == ((5.0, 10.0, 30.0, 20.0), None, None)
    few = int(MIN_PIXELS_SHARE * mask.size) - 1
    mask[0, :few] = 8
    assert boxes_of(mask, {0: 7, 1: 8}, 3) is None
    assert boxes_of(np.zeros((50, 50)), {0: 7}, 1) is None


@pytest.mark.parametrize("name", BORROWED)
def test_borrowed_meshes_stand_on_the_table(name: str, tmp_path: Path) -> None:
    lines = Path(borrow_mesh(name, tmp_path)).read_text().splitlines()
    points = np.asarray([line.split()[1:] for line in lines if line.startswith("v ")], float)
    assert points[:, 2].min() == pytest.approx(0, abs=1e-5)
    assert 0.1 < (points.max(axis=0) - points.min(axis=0)).max() < 0.11
    assert not any(line.startswith("vn ") or "//" in line for line in lines)


def test_a_folder_without_scenes_says_how_to_render_them(tmp_path: Path) -> None:
    with pytest.raises(GemvgError, match=r"python -m train\.world\.render"):
        read_scenes(tmp_path)
    (tmp_path / "scenes-00000000.jsonl").write_text('{"seed": 1}\n')
    with pytest.raises(GemvgError, match=r"scenes-00000000\.jsonl, line 1 is not a scene"):
        read_scenes(tmp_path)
