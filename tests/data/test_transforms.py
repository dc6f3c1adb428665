"""Pixels → what a network sees, against torchvision and numpy."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import CenterCropOrPad
from torchvision.transforms import v2

from regraft.card import Preprocessing
from regraft.data.decoding.files import decode
from regraft.data.transforms import augmentation, center_crop, normalize

PREPROCESSING = Preprocessing(size=32, resize=36)


def pixels(height: int = 36, width: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (36, 48), (37, 36), (33, 45), (144, 36)], ids=str)
def test_center_crop_is_torchvisions(shape: tuple[int, int]) -> None:
    image = pixels(*shape)
    assert torch.equal(center_crop(32)(image), v2.CenterCrop(32)(image))


@pytest.mark.parametrize("shape", [(20, 48), (48, 21), (19, 20), (31, 32)], ids=str)
def test_center_crop_puts_a_border_around_what_is_smaller(shape: tuple[int, int]) -> None:
    image = pixels(*shape)
    assert torch.equal(center_crop(32)(image), v2.CenterCrop(32)(image))
    expected = CenterCropOrPad(32, fill=(124, 116, 104))(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert np.array_equal(center_crop(32, (124, 116, 104))(image).permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("resize", [28, 36])
def test_augmentation_takes_every_crop_mode(resize: int, crop_mode: str) -> None:
    preprocessing = Preprocessing(size=32, resize=resize, crop_mode=crop_mode)  # type: ignore[arg-type]
    photos = [decode(Image.new("RGB", size, "red"), preprocessing) for size in ((50, 20), (31, 90), (9, 9))]
    for kind in ("none", "flip", "standard", "trivial"):
        versions = augmentation(kind, preprocessing, 2)
        assert {versions.of(0, photo, draw).shape for photo in photos for draw in range(3)} == {(3, 32, 32)}


@pytest.mark.parametrize("kind", ["none", "flip", "standard", "trivial"])
def test_augmentation_gives_whole_pixels_of_the_right_size(kind: str) -> None:
    versions = augmentation(kind, PREPROCESSING)  # type: ignore[arg-type]
    image = pixels()
    before = image.clone()
    for draw in range(30):
        found = versions.of(0, image, draw)
        assert found.shape == (3, 32, 32)
        assert found.dtype == torch.uint8
    assert torch.equal(image, before)


def test_augmentation_of_none_is_not_random() -> None:
    image = pixels()
    versions = augmentation("none", PREPROCESSING)
    assert versions.count == 1
    assert all(torch.equal(versions.of(0, image, draw), center_crop(32)(image)) for draw in range(5))


def test_augmentation_flip_is_the_middle_or_its_mirror_image_each_half_of_the_time() -> None:
    image, versions = pixels(), augmentation("flip", PREPROCESSING)
    assert versions.count == 2
    middle = center_crop(32)(image)
    flipped = 0
    for draw in torch.randint(2**62, (200,)).tolist():
        found = versions.of(0, image, draw)
        is_flipped = torch.equal(found, middle.flip(2))
        assert is_flipped or torch.equal(found, middle)
        flipped += is_flipped
    assert 70 < flipped < 130


@pytest.mark.parametrize("kind", ["flip", "standard", "trivial"])
def test_augmentation_makes_the_same_change_of_the_same_draw(kind: str) -> None:
    image, versions = pixels(), augmentation(kind, PREPROCESSING)  # type: ignore[arg-type]
    first = [versions.of(0, image, draw) for draw in range(8)]
    torch.rand(3)
    state = torch.get_rng_state()
    assert all(torch.equal(a, versions.of(0, image, draw)) for draw, a in enumerate(first))
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("kind", ["standard", "trivial"])
def test_augmentation_repeats_a_number_of_views_for_each_photo_and_differs_between_photos(kind: str) -> None:
    image, versions = pixels(), augmentation(kind, PREPROCESSING, 3)  # type: ignore[arg-type]
    assert versions.count == 3
    assert torch.equal(versions.of(0, image, 1), versions.of(0, image, 4))
    seen = [versions.of(index, image, draw) for index in range(2) for draw in range(3)]
    assert len({found.numpy().tobytes() for found in seen}) == 6
    assert augmentation(kind, PREPROCESSING).count is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "preprocessing", [PREPROCESSING, Preprocessing(size=32, resize=36, mean=(0.5,), std=(0.25,))], ids=["rgb", "gray"]
)
def test_normalize_is_what_numpy_computes(preprocessing: Preprocessing) -> None:
    batch = torch.randint(0, 256, (2, preprocessing.channels, 5, 4), dtype=torch.uint8)
    mean, std = (np.array(value).reshape(-1, 1, 1) for value in (preprocessing.mean, preprocessing.std))
    found = normalize(batch, preprocessing)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (batch.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
