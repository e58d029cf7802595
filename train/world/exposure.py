"""What cameras do to a picture: exposure, gamma, noise, blur and JPEG. Never hue: colours are words here.

Drawn anew whenever a training sample is opened, so that no picture is seen twice alike.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

UNTOUCHED = 0.25  # of the pictures


def expose(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as some camera might have taken it, of the same size."""
    if rng.random() < UNTOUCHED:
        return image
    values = np.arange(256) / 255
    curve = rng.uniform(0.7, 1.25) * values ** rng.uniform(0.75, 1.3) + rng.uniform(-0.05, 0.05)
    image = image.point((np.clip(curve, 0, 1) * 255).round().astype(np.uint8).tolist() * 3)
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    if rng.random() < 0.5:
        pixels = np.asarray(image, np.float32)
        noisy = pixels + rng.normal(0, rng.uniform(1, 9), pixels.shape)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if rng.random() < 0.4:
        image.save(stored := io.BytesIO(), "JPEG", quality=int(rng.integers(40, 95)))
        with Image.open(stored) as opened:
            image = opened.convert("RGB")
    return image
