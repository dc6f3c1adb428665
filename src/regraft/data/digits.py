"""The 1797 handwritten digits of scikit-learn, written as folders of PNG files.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from regraft.card import Preprocessing

PREPROCESSING = Preprocessing(size=8, resize=8, mean=(0.5,), std=(0.5,))
HELD_OUT = 3  # every third image is for validation


def write_digits(folder: Path, digits: Sequence[int]) -> Path:
    """Write the images of some digits as `folder/{train,val}/DIGIT/NUMBER.png`, 8 × 8 gray pixels each.

    Args:
        folder: Folder to create; existing files of the same names are replaced.
        digits: Digits to write; each becomes a class.

    Returns:
        The folder.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    for digit in digits:
        for part in ("train", "val"):
            (folder / part / str(digit)).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(np.flatnonzero(bunch.target == digit)):
            part = "val" if number % HELD_OUT == 0 else "train"
            pixels = (bunch.images[index] * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / str(digit) / f"{index}.png")
    return folder
