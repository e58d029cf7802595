"""MC-Bench as its authors publish it: questions from its annotations, and answers from a results file.

    FOLDER/mc-bench_v0.2_val.json   {images, annotations, descriptions, categories}, COCO-like
    FOLDER/mc-bench_images/COCO/.., D3/.., winogavil_images/.., BLINK_val_multiview/.., Mantis-Eval_val/..

Layout: github.com/XuYunqiu/MC-Bench. A sample is two pictures and a text; the categories of its boxes are groups of
instances ("group 1", ..).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.boxes.answers import Benchmark, Question
from bench.boxes.mc_bench import STYLES, Sample, group_of
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from train.data.annotations import (
    MALFORMED,
    entries,
    find_files,
    identity,
    index_by_id,
    inside,
    numbers,
    read_json,
    read_size,
    with_ids,
)
from train.data.pictures import measure_as
from train.data.record import Fault

LAYOUT = "unpack MC-Bench (github.com/XuYunqiu/MC-Bench): mc-bench_v0.2_val.json beside mc-bench_images"
NEW_TOKENS = 256


def load(folder: Path) -> Benchmark:
    """Every sample with its two pictures; GemvgError names what is not as published."""
    file = annotation_file(folder)
    content = read_json(file, dict, LAYOUT)
    where = printable(file)
    images = index_by_id(with_ids(entries(content, "images", file)), "image", where)
    groups = index_by_id(with_ids(entries(content, "categories", file)), "category", where)
    for fault in (*images.faults, *groups.faults):
        raise GemvgError(f"{fault.where}: {fault.reason}; {LAYOUT}")
    boxes: dict[Any, list[Any]] = {}
    for annotation in entries(content, "annotations", file):
        boxes.setdefault(identity(annotation, "image_id"), []).append(annotation)
    places = image_places(content, file)
    questions = []
    for number, description in enumerate(entries(content, "descriptions", file)):
        try:
            questions.append(_question(number, description, images.entries, groups.entries, boxes, places, folder))
        except MALFORMED as error:
            raise GemvgError(f"{where}, description {number} is not laid out as MC-Bench ({error}); {LAYOUT}") from None
    return Benchmark("mc-bench", "v0.2", folder, tuple(questions), STYLES, NEW_TOKENS)


def annotation_file(folder: Path) -> Path:
    """The annotations of a folder; GemvgError where there is no one such file."""
    found = find_files(folder, "mc-bench*_val.json")
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise GemvgError(f"{printable(folder)} has {what} named mc-bench*_val.json; {LAYOUT}")
    return found[0]


def _question(
    number: int,
    description: Any,
    images: Mapping[Any, Any],
    groups: Mapping[Any, Any],
    boxes: Mapping[Any, list[Any]],
    places: Mapping[Any, int],
    folder: Path,
) -> Question:
    pair, text, style = description["images_id"], description["text"], description["text_style"]
    if not isinstance(pair, list) or len(pair) != 2 or not isinstance(text, str) or not text.strip():
        raise ValueError("a sample is two images and a text")
    paths, sizes, truth = [], [], []
    for place, image_id in enumerate(pair):
        entry = images[image_id]
        path, size = picture(folder, entry["file_name"]), read_size(entry)
        if isinstance(found := measure_as(path, size), Fault):
            raise GemvgError(f"{found.where} is {found.reason}; {LAYOUT}; `bench.score --answers` needs no pictures")
        paths.append(path.relative_to(folder))
        sizes.append(size)
        for annotation in boxes.get(image_id, ()):
            x, y, w, h = numbers(annotation["bbox"], 4)
            name = str(groups[identity(annotation, "category_id")]["name"])
            truth.append(Box(place, x, y, x + w, y + h, label=name))
    style = str(style).lower()
    extra = {"image_ids": pair, "places": [places[image_id] for image_id in pair]}
    name = f"{style}/{description.get('id', number)}"
    return Question(name, style, tuple(paths), tuple(sizes), text.strip(), tuple(truth), extra=extra)


def image_places(content: Any, file: Path) -> dict[Any, int]:
    """Where each image stands in the list of images."""
    return {identity(entry): place for place, entry in enumerate(entries(content, "images", file))}


def picture(folder: Path, name: str) -> Path:
    """Where a picture lies: in mc-bench_images, or in the folder itself."""
    within = inside(folder / "mc-bench_images", name)
    return within if is_file(within) else inside(folder, name)


def read_published(file: Path, folder: Path) -> list[Sample]:
    """The results file of the authors' script, [{image_id, category_id, bbox: xywh, score}], with the annotations."""
    rows: dict[int, list[tuple[int, list[float], float]]] = {}
    fix = "give a results file of MC-Bench, or answers of bench.accuracy"
    for number, row in enumerate(read_json(file, list, fix)):
        try:
            box, (score,) = numbers(row["bbox"], 4), numbers([row["score"]], 1)
            image, group = identity(row, "image_id"), identity(row, "category_id")
            if not isinstance(image, int) or not isinstance(group, int) or group < 1:
                raise ValueError("image_id and category_id are whole numbers, the latter from 1")
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, row {number} is no box of MC-Bench ({error})") from None
        rows.setdefault(image, []).append((group, box, score))
    content = read_json(path := annotation_file(folder), dict, LAYOUT)
    names = {identity(entry): str(entry.get("name")) for entry in entries(content, "categories", path)}
    truth: dict[Any, list[tuple[int, list[float]]]] = {}
    for annotation in entries(content, "annotations", path):
        group = group_of(names.get(identity(annotation, "category_id")))
        truth.setdefault(identity(annotation, "image_id"), []).append((group, numbers(annotation["bbox"], 4)))
    places = image_places(content, path)
    samples = []
    for number, description in enumerate(entries(content, "descriptions", path)):
        first, second = description["images_id"]
        style, pair = str(description["text_style"]).lower(), (int(first), int(second))
        stand = places[first], places[second]
        true = [(g, _box(k, box)) for k, image in enumerate(pair) for g, box in truth.get(image, ())]
        found = [(g, _box(k, box, score)) for k, image in enumerate(pair) for g, box, score in rows.get(image, ())]
        samples.append(Sample(number, f"{style}/{description.get('id', number)}", style, pair, stand, true, found))
    if unknown := set(rows) - {image for sample in samples for image in sample.image_ids}:
        raise GemvgError(f"{printable(file)} has boxes in image {min(unknown)}, which {printable(path)} does not have")
    return samples


def _box(image: int, corners: Sequence[float], score: float | None = None) -> Box:
    x, y, w, h = corners
    return Box(image, x, y, x + w, y + h, score=score)
