"""Pictures -> patches, exactly as transformers' Qwen2VLImageProcessorPil makes them: wrong resizing shifts boxes.

Knows nothing about tokens or engines. Every number comes from the checkpoint's preprocessor_config.json.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from gemvg_edge.boxes import Size
from gemvg_edge.errors import GemvgError

ImageSource = str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]
Grid = tuple[int, int, int]  # patches: time, height, width

MAX_ASPECT_RATIO = 200  # the limit in Qwen's own smart_resize


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
        size = config.get("size") or {}
        values = {key: config[key] for key in Preprocessing.__dataclass_fields__ if config.get(key) is not None}
        for name, in_size in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            budget = config.get(name) or size.get(name) or size.get(in_size)
            if budget:
                values[name] = int(budget)
        for name in ("image_mean", "image_std"):
            if name in values:
                values[name] = tuple(float(v) for v in values[name])
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise GemvgError(
                    f"preprocessor_config.json: {step} is switched off, which Qwen2-VL never does; set it to true"
                )
        return Preprocessing(**values)

    def to_config(self) -> dict[str, Any]:
        """The same fields as plain JSON values."""
        return asdict(self)


def load_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Decode one picture to RGB with its EXIF orientation applied.

    A path, encoded bytes, a PIL image, or uint8 RGB of shape (height, width, 3). `name` stands in error messages.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise GemvgError(
                f"{name} is an array of {source.dtype} with shape {source.shape}; "
                "give uint8 RGB of shape (height, width, 3)"
            )
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return _decode(source, name)
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), f"{name} ({len(source)} bytes)")
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise GemvgError(f"{path}: no such picture file")
        return _decode(path, str(path))
    raise GemvgError(f"{name} is a {type(source).__name__}; give a path, bytes, a PIL image or a uint8 RGB array")


def _decode(source: Path | io.BytesIO | Image.Image, name: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(source))
        with Image.open(source) as opened:
            return _to_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise GemvgError(f"{name} is not a picture that Pillow can read; give a PNG, JPEG, WebP or similar") from None
    except Image.DecompressionBombError:
        raise GemvgError(f"{name} has more pixels than Pillow's safety limit; scale it down first") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise GemvgError(f"{name} is damaged or cut short: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        # White shows through, as in transformers and Qwen's own tools; dropping alpha would show colours nobody sees.
        visible = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", visible.size, "white"), visible)
    elif image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which turns a 16-bit camera's picture white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def smart_resize(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """The (height, width) Qwen2-VL resizes to: multiples of patch x merge, within the budget, aspect nearly kept."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise GemvgError(
            f"a picture of {width} x {height} pixels is longer than {MAX_ASPECT_RATIO} to 1; crop it first"
        )
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
