"""The simulated world: scenes depend on their seed alone, truth matches the pictures, questions match the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gemvg_edge.errors import GemvgError
from train.meshes import MESHES
from train.queries import KIND_SHARES, ask, held_out_question, phrases
from train.tabletop import COLOURS, TabletopScene, read_scenes, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tabletop")
    render(folder, first_seed=7_000, scenes=12, cameras=3, size=192, processes=2)
    return folder


@pytest.fixture(scope="module")
def scenes(folder: Path) -> list[TabletopScene]:
    return read_scenes(folder)


def test_a_scene_depends_on_its_seed_alone(folder: Path, scenes: list[TabletopScene], tmp_path: Path) -> None:
    render(tmp_path, first_seed=7_005, scenes=2, cameras=3, size=192, processes=1)
    assert read_scenes(tmp_path) == scenes[5:7]
    file = scenes[5].views[0].file
    assert np.array_equal(np.asarray(Image.open(tmp_path / file)), np.asarray(Image.open(folder / file)))


def test_finished_shards_are_kept(folder: Path) -> None:
    shard = next(folder.glob("scenes-*.jsonl"))
    written = shard.stat().st_mtime_ns
    render(folder, first_seed=7_000, scenes=12, cameras=3, size=192, processes=1)
    assert shard.stat().st_mtime_ns == written


def test_a_short_shard_is_rendered_anew(tmp_path: Path) -> None:
    render(tmp_path, first_seed=7_000, scenes=1, cameras=1, size=64, processes=1)
    render(tmp_path, first_seed=7_000, scenes=2, cameras=1, size=64, processes=1)
    assert [scene.seed for scene in read_scenes(tmp_path)] == [7_000, 7_001]


def test_scenes_of_other_settings_are_not_mixed(folder: Path) -> None:
    with pytest.raises(GemvgError, match=r"was rendered with .*'size': 192.* not .*'size': 64"):
        render(folder, first_seed=7_000, scenes=12, cameras=3, size=64, processes=1)


def test_boxes_lie_in_the_picture_and_around_the_colour(folder: Path, scenes: list[TabletopScene]) -> None:
    checked = 0
    for scene in scenes:
        for view in scene.views:
            pixels = np.asarray(Image.open(folder / view.file), np.float64)
            assert pixels.shape == (view.height, view.width, 3)
            for (_, colour), box in zip(scene.objects, view.boxes, strict=True):
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


def test_answers_are_exactly_the_objects_that_fit(scenes: list[TabletopScene]) -> None:
    rng = np.random.default_rng(1)
    empty = one_image = several = 0
    for _ in range(40):
        for scene in scenes:
            query = ask(scene, scene.views[:2], rng)
            names = [name for name in MESHES if any(word in query.text.split() for word in (name, name + "s"))]
            colours = [colour for colour in COLOURS if colour in query.text.split()]
            images = [int(query.text[-1]) - 1] if " in image " in query.text else [0, 1]
            expected = sorted(
                box
                for image, view in enumerate(scene.views[:2])
                for k, (name, colour) in enumerate(scene.objects)
                if image in images
                and (box := view.box(k, image)) is not None
                and (not names or name in names)
                and (not colours or colour in colours)
            )
            assert list(query.boxes) == expected, query.text
            empty += not query.boxes
            one_image += images != [0, 1]
            several += len(query.boxes) > 2
    assert min(empty, one_image, several) > 10


def test_the_held_out_question_is_fixed_by_the_seed(scenes: list[TabletopScene]) -> None:
    assert [held_out_question(scene, 2) for scene in scenes] == [held_out_question(scene, 2) for scene in scenes]


def test_every_question_is_in_the_tokenizer_s_corpus(scenes: list[TabletopScene]) -> None:
    rng, known = np.random.default_rng(2), set(phrases())
    assert all(ask(scene, scene.views, rng).text in known for scene in scenes for _ in range(20))
    assert sum(KIND_SHARES.values()) == pytest.approx(1)


def test_a_folder_without_scenes_says_how_to_render_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m train\.tabletop"):
        read_scenes(tmp_path)
