"""MC-Bench as its authors publish it: questions from its annotations, and answers from a results file.

    FOLDER/mc-bench_v0.2_val.json   {images, annotations, descriptions, categories}, COCO-like
    FOLDER/mc-bench_images/COCO/.., D3/.., winogavil_images/.., BLINK_val_multiview/.., Mantis-Eval_val/..

Layout: github.com/XuYunqiu/MC-Bench. A sample is two pictures and a text; the categories of its boxes are groups of
instances ("group 1", ..).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bench.boxes.answers import Benchmark, Question, is_number_id
from bench.boxes.mc_bench import Sample, group_of
from gemvg_edge.boxes import Box
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from gemvg_edge.json_object import short
from train.data.annotations import (
    MALFORMED,
    corners_of,
    entries,
    find_files,
    identity,
    index_all,
    inside,
    numbers,
    read_json,
    read_size,
)
from train.data.pictures import measure_as
from train.data.record import Fault

LAYOUT = "unpack MC-Bench (github.com/XuYunqiu/MC-Bench): mc-bench_v0.2_val.json beside mc-bench_images"
NEW_TOKENS = 256


class Described(NamedTuple):
    """One sample as its annotations say it."""

    name: str
    style: str
    text: str
    images: tuple[int, int]  # ids
    places: tuple[int, int]  # of its pictures in the list of images
    truth: tuple[Box, ...]  # labelled by group
    entries: tuple[Any, Any]  # of its pictures


def load(folder: Path) -> Benchmark:
    """Every sample with its two pictures; GemvgError names what is not as published."""
    questions = tuple(_question(sample, folder) for sample in read_annotations(folder))
    return Benchmark("mc-bench", "v0.2", folder, questions, NEW_TOKENS)


def read_annotations(folder: Path) -> list[Described]:
    """Every sample of the annotation file, joined and checked."""
    file = annotation_file(folder)
    content = read_json(file, dict, LAYOUT)
    images, groups = (
        index_all(content, key, what, file, LAYOUT) for key, what in (("images", "image"), ("categories", "category"))
    )
    places = {image: place for place, image in enumerate(images)}
    boxes: dict[Any, list[tuple[str, tuple[float, ...]]]] = {}
    for number, annotation in enumerate(entries(content, "annotations", file)):
        try:
            image, group = identity(annotation, "image_id"), groups.get(identity(annotation, "category_id"))  # type: ignore[arg-type]
            if image not in images or group is None:
                raise ValueError("an unknown image or category")
            if group_of(str(group["name"])) != identity(annotation, "category_id") or annotation.get("iscrowd"):
                raise ValueError("a category that is not named `group` and its id, or a crowd")
            boxes.setdefault(image, []).append((str(group["name"]), corners_of(annotation["bbox"])))
        except MALFORMED as error:
            raise _unusable(file, f"annotation {number}", error) from None
    samples, taken = [], set[int]()
    for number, entry in enumerate(entries(content, "descriptions", file)):
        try:
            pair, text, style = entry["images_id"], entry["text"], entry["text_style"]
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(text, str) or not text.strip():
                raise ValueError("a sample is two images and a text")
            first, second = pair
            if not all(is_number_id(image) and image in images for image in pair):
                raise ValueError("an image whose id is no whole number, or that is not in the list of images")
            if first == second or not taken.isdisjoint(pair):
                # Its boxes are joined by the image alone: those of one text would count for the other.
                raise ValueError("an image of another sample, or one image twice")
            taken.update(pair)
            truth = tuple(
                Box(k, *box, label=name) for k, image in enumerate(pair) for name, box in boxes.get(image, ())
            )
            name = f"{str(style).lower()}/{entry.get('id', number)}"
            about = name, str(style).lower(), text.strip(), (first, second), (places[first], places[second])
            samples.append(Described(*about, truth, (images[first], images[second])))
        except MALFORMED as error:
            raise _unusable(file, f"description {number}", error) from None
    return samples


def _unusable(file: Path, what: str, error: BaseException) -> GemvgError:
    return GemvgError(f"{printable(file)}, {what} is not laid out as MC-Bench ({printable(str(error))}); {LAYOUT}")


def annotation_file(folder: Path) -> Path:
    """The annotations of a folder; GemvgError where there is no one such file."""
    found = find_files(folder, "mc-bench*_val.json")
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} files"
        raise GemvgError(f"{printable(folder)} has {what} named mc-bench*_val.json; {LAYOUT}")
    return found[0]


def _question(sample: Described, folder: Path) -> Question:
    paths, sizes = [], []
    for entry in sample.entries:
        try:
            path, size = picture(folder, entry["file_name"]), read_size(entry)
        except MALFORMED as error:
            raise _unusable(annotation_file(folder), f"the image of {short(sample.name)}", error) from None
        if isinstance(found := measure_as(path, size), Fault):
            raise GemvgError(f"{found.where} is {found.reason}; {LAYOUT}; `bench.score --answers` needs no pictures")
        paths.append(path.relative_to(folder))
        sizes.append(size)
    extra = {"image_ids": list(sample.images), "places": list(sample.places)}
    return Question(sample.name, sample.style, tuple(paths), tuple(sizes), sample.text, sample.truth, extra=extra)


def picture(folder: Path, name: Any) -> Path:
    """Where a picture lies: in mc-bench_images, or in the folder itself."""
    within = inside(folder / "mc-bench_images", name)
    return within if is_file(within) else inside(folder, name)


def read_published(file: Path, folder: Path) -> list[Sample]:
    """The results file of the authors' script, [{image_id, category_id, bbox: xywh, score}], with the annotations."""
    rows: dict[int, list[tuple[int, tuple[float, ...], float]]] = {}
    fix = "give a results file of MC-Bench, or answers of bench.accuracy"
    for number, row in enumerate(read_json(file, list, fix)):
        try:
            (score,), image, group = numbers([row["score"]], 1), identity(row, "image_id"), identity(row, "category_id")
            if not isinstance(image, int) or not isinstance(group, int) or group < 1:
                raise ValueError("image_id and category_id are whole numbers, the latter from 1")
            rows.setdefault(image, []).append((group, corners_of(row["bbox"]), score))
        except MALFORMED as error:
            raise GemvgError(f"{printable(file)}, row {number} is no box of MC-Bench ({error})") from None
    samples = []
    for number, sample in enumerate(read_annotations(folder)):
        true = [(group_of(box.label), box) for box in sample.truth]
        found = [
            (group, Box(k, *box, score=score))
            for k, image in enumerate(sample.images)
            for group, box, score in rows.get(image, ())
        ]
        samples.append(Sample(number, sample.name, sample.style, sample.images, sample.places, true, found))
    if unknown := set(rows) - {image for sample in samples for image in sample.image_ids}:
        raise GemvgError(f"{printable(file)} has boxes in image {min(unknown)}, which no sample of {folder} shows")
    return samples
