"""Pictures with things of many sizes in them, and copies of them as people make them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def picture(seed: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """Draw noise of several scales, of which no two seeds resemble each other."""
    noise = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size, 3), float)
        for side in (4, 8, 16, 32)
    ]
    return Image.fromarray((layers[0] * 0.4 + layers[1] * 0.3 + layers[2] * 0.2 + layers[3] * 0.1).astype(np.uint8))


def save(image: Image.Image, path: Path, quality: int = 92) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)
    return path


def copied(image: Image.Image) -> Image.Image:
    """Crop unevenly, mirror and enlarge."""
    width, height = image.size
    cropped = image.crop((width // 8, 0, width, round(height * 0.9)))
    return ImageOps.mirror(cropped).resize((width, height), 2)
