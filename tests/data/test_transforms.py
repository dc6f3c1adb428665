"""Pixels → what a network sees, against torchvision and numpy."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from regraft.card import Preprocessing
from regraft.data.transforms import augmentation, center_crop, normalize

PREPROCESSING = Preprocessing(size=32, resize=36)


def pixels(height: int = 36, width: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (36, 48), (37, 36), (33, 45), (144, 36)], ids=str)
def test_the_middle_is_torchvisions(shape: tuple[int, int]) -> None:
    image = pixels(*shape)
    assert torch.equal(center_crop(32)(image), v2.CenterCrop(32)(image))


@pytest.mark.parametrize("kind", ["none", "flip", "standard", "trivial"])
def test_every_augmentation_gives_whole_pixels_of_the_right_size(kind: str) -> None:
    change = augmentation(kind, PREPROCESSING)  # type: ignore[arg-type]
    image = pixels()
    before = image.clone()
    for _ in range(30):
        found = change(image)
        assert found.shape == (3, 32, 32)
        assert found.dtype == torch.uint8
    assert torch.equal(image, before)


def test_without_augmentation_nothing_is_random() -> None:
    image = pixels()
    assert torch.equal(augmentation("none", PREPROCESSING)(image), center_crop(32)(image))


def test_a_flip_is_the_middle_or_its_mirror_image_each_half_of_the_time() -> None:
    image, change = pixels(), augmentation("flip", PREPROCESSING)
    middle = center_crop(32)(image)
    flipped = 0
    for _ in range(200):
        found = change(image)
        is_flipped = torch.equal(found, middle.flip(2))
        assert is_flipped or torch.equal(found, middle)
        flipped += is_flipped
    assert 70 < flipped < 130


@pytest.mark.parametrize("kind", ["flip", "standard", "trivial"])
def test_the_same_seed_gives_the_same_change(kind: str) -> None:
    image, change = pixels(), augmentation(kind, PREPROCESSING)  # type: ignore[arg-type]

    def series() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [change(image) for _ in range(8)]

    first = series()
    assert all(torch.equal(a, b) for a, b in zip(first, series(), strict=True))
    assert any(not torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize(
    "preprocessing", [PREPROCESSING, Preprocessing(size=32, resize=36, mean=(0.5,), std=(0.25,))], ids=["rgb", "gray"]
)
def test_normalizing_is_what_numpy_computes(preprocessing: Preprocessing) -> None:
    batch = torch.randint(0, 256, (2, preprocessing.channels, 5, 4), dtype=torch.uint8)
    mean, std = (np.array(value).reshape(-1, 1, 1) for value in (preprocessing.mean, preprocessing.std))
    found = normalize(batch, preprocessing)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (batch.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
