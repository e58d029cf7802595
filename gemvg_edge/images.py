"""Pictures -> patches, exactly as transformers' Qwen2VLImageProcessorPil makes them: wrong resizing shifts boxes.

Knows nothing about tokens or engines. Every number comes from the checkpoint's preprocessor_config.json.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gemvg_edge.arrays import from_array, refuse_tensor
from gemvg_edge.boxes import Size
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_file, printable
from gemvg_edge.json_object import short
from gemvg_edge.pictures import NAME, open_picture, pillow_errors, upright_rgb

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Grid = tuple[int, int, int]  # patches: time, height, width

# The pixel budget of a picture that we advise, and that export takes where a checkpoint allows more: 512 tokens. The
# hub's Qwen2-VL allows 12,845,056; the published runs of MIG-Bench used this one (MIG-Agent's and UniVG-R1's).
EDGE_MAX_PIXELS = 401_408
MAX_ASPECT_RATIO = 200  # the limit in Qwen's own smart_resize

# The ranges of a stranger's numbers: far past every model, and near enough that no picture of them fills the memory. A
# picture of one pixel is enlarged to min_pixels, one as thin as allowed to 200 blocks of patch_size x merge_size.
_WHOLE = {
    "patch_size": (1, 256),
    "temporal_patch_size": (1, 16),
    "merge_size": (1, 16),
    "min_pixels": (1, 2**24),
    "max_pixels": (1, 2**31),
    "resample": (0, 5),  # the filters that every Pillow has
}
_RESCALE_FACTOR = (1e-6, 1e3)
_CHANNELS = {"image_mean": (-1e4, 1e4), "image_std": (1e-4, 1e4)}  # a standard deviation is positive


@dataclass(frozen=True)
class Preprocessing:
    """The numbers of a Qwen2-VL preprocessor_config.json; pixels are counted after resizing."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Preprocessing:
        """Read a preprocessor_config.json; both spellings of the pixel budget (`min_pixels`, `size`) count."""
        values = {key: config[key] for key in Preprocessing.__dataclass_fields__ if config.get(key) is not None}
        values |= _pixel_budget(config)
        for name, value in values.items():
            if name in _WHOLE:
                values[name] = _whole(name, value)
            elif name in _CHANNELS:
                values[name] = _channels(name, value)
            else:
                values[name] = _number(name, value, *_RESCALE_FACTOR)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise GemvgError(f"{step} is switched off, which Qwen2-VL never does; set it to true")
        preprocessing = Preprocessing(**values)
        if preprocessing.min_pixels > preprocessing.max_pixels:
            budget = f"min_pixels, {preprocessing.min_pixels}, is above max_pixels, {preprocessing.max_pixels}"
            raise GemvgError(f"{budget}; no picture has both")
        return preprocessing

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)

    def within(self, max_pixels: int | None) -> Preprocessing:
        """The same with another pixel budget a picture, in pixels after resizing; None leaves it as it is."""
        if max_pixels is None:
            return self
        low, high = (self.patch_size * self.merge_size) ** 2, _WHOLE["max_pixels"][1]
        if isinstance(max_pixels, np.integer):
            max_pixels = int(max_pixels)
        if type(max_pixels) is not int or not low <= max_pixels <= high:
            raise GemvgError(
                f"max_pixels={short(max_pixels)}; give a whole number of pixels a picture, {low} (one token) to {high}"
            )
        return replace(self, max_pixels=max_pixels, min_pixels=min(self.min_pixels, max_pixels))


def _pixel_budget(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("size")
    if size is None:
        size = {}
    if not isinstance(size, Mapping):
        raise GemvgError(f"size is {short(size)}, not an object with shortest_edge and longest_edge")
    budget: dict[str, Any] = {}
    for name, in_size in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        told = [value for value in (config.get(name), size.get(name), size.get(in_size)) if value is not None]
        if told and type(told[0]) not in (int, float):
            raise GemvgError(f"the budget {name} is {short(told[0])}, not a number of pixels")
        if told:
            budget[name] = told[0]
    if size and not budget:
        raise GemvgError(f"size is {short(size)}, without shortest_edge and longest_edge; give these, in pixels")
    return budget


def _whole(name: str, value: Any) -> int:
    low, high = _WHOLE[name]
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise _unlike(name, value)
    if not low <= value <= high:
        raise GemvgError(f"{name} is {short(value)}, not {low} to {high}")
    return value


def _channels(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise GemvgError(f"the colours {name} are {short(value)}, not a list of three numbers")
    values = tuple(_number(name, channel, *_CHANNELS[name]) for channel in value)
    if len(values) != 3:
        raise _unlike(name, values)
    return values


def _number(name: str, value: Any, low: float, high: float) -> float:
    if type(value) not in (int, float):
        raise _unlike(name, value)
    if not low <= value <= high:  # NaN is in no range
        raise GemvgError(f"{name} has {short(value)}, not {low:g} to {high:g}")
    return float(value)


def _unlike(name: str, value: Any) -> GemvgError:
    return GemvgError(f"{name} is {short(value)}, not like {getattr(Preprocessing, name)!r}")


def check_list(images: Sequence[ImageSource]) -> Sequence[ImageSource]:
    """The pictures themselves; GemvgError for one without a list around it, and for none."""
    if isinstance(images, (str, bytes, os.PathLike, np.ndarray)) or not isinstance(images, Sequence):
        raise GemvgError(f"images is a {type(images).__name__}; give a list of pictures, [picture] for a single one")
    if not images:
        raise GemvgError("no pictures were given; a query needs at least one")
    return images


def load_image(source: ImageSource, name: str = "image", bgr: bool = False) -> Image.Image:
    """Decode one picture to RGB with its EXIF orientation applied.

    A path, encoded bytes, a PIL image, or an array as `arrays.from_array` takes it; `bgr` tells the order of an array's
    channels and nothing else. `name` stands in error messages, and in those of later steps too: the picture carries it,
    or its file's.
    """
    if isinstance(source, np.ndarray):
        with pillow_errors(name, "cannot be read"):
            image = upright_rgb(from_array(source, name, bgr), name)
    elif isinstance(source, Image.Image):
        name = source.info.get(NAME, name)
        with pillow_errors(name, "is damaged or cut short, or its file was closed before its pixels were read"):
            image = upright_rgb(source, name)
    elif isinstance(source, bytes):
        with open_picture(source, f"{name} ({len(source)} bytes)") as opened:
            image = upright_rgb(opened, f"{name} ({len(source)} bytes)")
    elif isinstance(source, (str, os.PathLike)) and isinstance(path := os.fspath(source), str):
        name = printable(path)
        if not is_file(Path(path)):
            if os.path.exists(path) and not os.path.isdir(path):
                raise GemvgError(f"{name}: no such picture file (a pipe or a device); read it and give its bytes, or -")
            folder = " (it is a folder; name the files in it)" if os.path.isdir(path) else ""
            raise GemvgError(f"{name}: no such picture file{folder}")
        with open_picture(Path(path), name) as opened:
            image = upright_rgb(opened, name)
    else:
        refuse_tensor(source, name)
        failed = ", and not the None of a camera that failed" if source is None else ""
        wanted = f"give a path, bytes, a PIL image or a uint8 RGB array{failed}"
        raise GemvgError(f"{name} is a {type(source).__name__}; {wanted}")
    image.info = {NAME: name}  # and no EXIF, which would turn the picture again where it is given once more
    return image


def check_aspect(width: int, height: int, name: str = "") -> None:
    """GemvgError for a picture that is thinner than the model takes; `name` is the picture's."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        where = f"{name}: a picture" if name else "a picture"
        raise GemvgError(f"{where} of {width} x {height} pixels is longer than {MAX_ASPECT_RATIO} to 1; crop it first")


def smart_resize(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The (height, width) Qwen2-VL resizes to: multiples of patch x merge, within the budget, aspect nearly kept."""
    check_aspect(width, height)
    factor = preprocessing.patch_size * preprocessing.merge_size
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > preprocessing.max_pixels:
        beta = math.sqrt((height * width) / preprocessing.max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < preprocessing.min_pixels:
        beta = math.sqrt(preprocessing.min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def resized_sizes(sizes: Sequence[Size], preprocessing: Preprocessing) -> list[Size]:
    """Each original picture's (width, height) -> that which the model sees, the frame of answers in pixels."""
    resized = (smart_resize(height, width, preprocessing) for width, height in sizes)
    return [(width, height) for height, width in resized]


def resize(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An RGB picture -> uint8 (height, width, 3) at its smart size, by Pillow's own filter."""
    check_aspect(image.width, image.height, image.info.get(NAME, ""))
    height, width = smart_resize(image.height, image.width, preprocessing)
    resized = image.resize((width, height), resample=Image.Resampling(preprocessing.resample))
    return np.asarray(resized)


def patchify(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> tuple[npt.NDArray[np.float32], Grid]:
    """Resized uint8 RGB -> float32 patches (n, channels * time * patch * patch) in merge-block order, and the grid."""
    patch, merge = preprocessing.patch_size, preprocessing.merge_size
    scaled = pixels * preprocessing.rescale_factor
    mean = np.asarray(preprocessing.image_mean, np.float32)
    std = np.asarray(preprocessing.image_std, np.float32)
    normal = ((scaled.astype(np.float32) - mean) / std).transpose(2, 0, 1)  # (C, H, W)
    channels, height, width = normal.shape
    grid_h, grid_w = height // patch, width // patch
    blocks = normal.reshape(channels, grid_h // merge, merge, patch, grid_w // merge, merge, patch)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # (H/block, W/block, merge, merge, C, patch, patch)
    # A still picture is a film of temporal_patch_size equal frames.
    frames = np.repeat(blocks[:, :, :, :, :, None], preprocessing.temporal_patch_size, axis=5)
    return np.ascontiguousarray(frames.reshape(grid_h * grid_w, -1)), (1, grid_h, grid_w)
