"""Pictures that are arrays of pixels: read rightly where their layout is plain, else refused with the fix."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from gemvg_edge.errors import GemvgError

WANTED = "give uint8 of shape (height, width, 3) in RGB order (bgr=True for OpenCV's), or grey (height, width)"
CHANNELS = (1, 3, 4)  # grey, colours, colours and alpha


def from_array(array: npt.NDArray[Any], name: str, bgr: bool) -> Image.Image:
    """An array (height, width) or (height, width, channels) as a picture of the same pixels.

    uint8: grey, RGB or RGBA (with `bgr` BGR or BGRA); uint16: grey of 16 bits. GemvgError for anything else.
    """
    shape = array.shape
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = array.astype(np.uint16)  # in this machine's order of bytes
    if 0 in shape or len(shape) not in (2, 3):
        raise GemvgError(f"{name} is an array of {array.dtype} with shape {shape}; {WANTED}")
    if len(shape) == 3 and shape[2] not in CHANNELS:
        turned = "np.moveaxis(array, 0, -1), if its channels come first, or " if shape[0] in CHANNELS else ""
        raise GemvgError(f"{name} is an array of {array.dtype} with shape {shape}; give {turned}{WANTED[5:]}")
    if array.dtype.kind == "f":
        raise GemvgError(
            f"{name} is an array of {array.dtype}, which does not say which value is white; give "
            "(array * 255).round().astype(np.uint8) if white is 1.0, or array.astype(np.uint8) if it is 255"
        )
    if array.dtype == bool:
        raise GemvgError(f"{name} is an array of bool; give array.astype(np.uint8) * 255 for white where it is true")
    colours = shape[2] if len(shape) == 3 else 1
    if array.dtype == np.uint16 and colours > 1:
        raise GemvgError(
            f"{name} is an array of uint16 with {colours} channels; give (array >> 8).astype(np.uint8) if white is "
            "65535, or by as many bits as its camera has above 8"
        )
    if array.dtype not in (np.uint8, np.uint16):
        raise GemvgError(f"{name} is an array of {array.dtype} with shape {shape}; {WANTED}")
    if colours == 1:
        return Image.fromarray(np.ascontiguousarray(array.reshape(shape[:2])))
    if bgr:
        array = array[:, :, [2, 1, 0, 3][:colours]]
    return Image.fromarray(np.ascontiguousarray(array))


def refuse_tensor(source: Any, name: str) -> None:
    """GemvgError with the fix for a torch tensor, whose channels come first or last as its owner knows."""
    if not type(source).__module__.startswith("torch"):
        return
    shape = tuple(getattr(source, "shape", ()))
    first = len(shape) == 3 and shape[0] in CHANNELS and shape[2] not in CHANNELS
    turned = "tensor.permute(1, 2, 0)" if first else "tensor"
    if len(shape) == 4:
        raise GemvgError(f"{name} is a torch tensor of shape {shape}, a batch; give one picture of it, tensor[0]")
    floats = bool(getattr(source, "is_floating_point", bool)())
    scaled = f"({turned} * 255).round().byte()" if floats else f"{turned}.byte()"
    raise GemvgError(
        f"{name} is a torch tensor of shape {shape}; give {scaled}.cpu().numpy()"
        + (", if white is 1.0" if floats else "")
        + f", that is, {WANTED[5:]}"
    )
