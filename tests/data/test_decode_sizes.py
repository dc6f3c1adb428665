"""Sizes of decoded photos, against torchvision and timm, and photos that are very large."""

import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import v2

from data.pixels import AS_IS, SIDE, as_array, difference, noise
from regraft.card import Preprocessing
from regraft.data.decoding.files import Unreadable, decode, decode_all
from regraft.data.decoding.resizing import resized_size
from regraft.data.transforms import center_crop

pytestmark = pytest.mark.usefixtures("engine")


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ((1, 1), (3, 36, 36)),
        ((2, 3), (3, 54, 36)),
        ((1, 5000), (3, 144, 36)),
        ((5000, 1), (3, 36, 144)),
        ((36, 200), (3, 144, 36)),
        ((7, 28), (3, 144, 36)),
        ((48, 64), (3, 48, 36)),
        ((50, 73), (3, 52, 36)),
    ],
    ids=str,
)
def test_decode_resizes_any_shape_to_its_shorter_side(
    size: tuple[int, int], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    Image.new("RGB", size, (9, 80, 200)).save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", AS_IS)
    assert found.shape == shape
    assert torch.equal(found, torch.tensor([9, 80, 200], dtype=torch.uint8).view(3, 1, 1).expand(shape))


def test_decode_keeps_the_middle_of_a_long_image(tmp_path: Path) -> None:
    pixels = np.zeros((SIDE, 999, 3), np.uint8)
    pixels[:, 999 // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = as_array(decode(tmp_path / "a.png", AS_IS))
    assert abs(int(found[0, :, 0].argmax()) - found.shape[1] // 2) <= 1


@pytest.mark.parametrize("filter_name", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(50, 73), (73, 50), (500, 375), (20, 30)], ids=str)
def test_decode_resizes_as_torchvision_does(
    filter_name: str, size: tuple[int, int], engine: str, tmp_path: Path
) -> None:
    from torchvision.transforms import v2

    image = Image.fromarray(noise(size[1], size[0], 3))
    image.save(tmp_path / "a.png")
    preprocessing = Preprocessing(size=32, resize=SIDE, interpolation=filter_name)  # type: ignore[arg-type]
    expected = v2.Resize(SIDE, interpolation=v2.InterpolationMode(filter_name))(image)
    found = as_array(decode(tmp_path / "a.png", preprocessing))
    assert difference(found, np.asarray(expected)) <= (engine != "pillow")  # torch rounds otherwise


def write_flat(path: Path, mode: str, side: int) -> Path:
    Image.new(mode, (side, side), 1 if mode == "1" else 77).save(path)
    return path


@pytest.mark.parametrize(("name", "mode", "value"), [("a.png", "1", 255), ("a.jpg", "L", 77)], ids=["png", "jpeg"])
def test_decode_all_reads_a_hundred_megapixels_quietly(name: str, mode: str, value: int, tmp_path: Path) -> None:
    write_flat(tmp_path / name, mode, 10_000)
    began = time.perf_counter()
    (found,) = decode_all([tmp_path / name], AS_IS)  # warnings are errors
    assert time.perf_counter() - began < 10
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.full((3, SIDE, SIDE), value, dtype=torch.uint8))


def test_decode_all_refuses_more_pixels_than_pillow_opens(tmp_path: Path) -> None:
    write_flat(tmp_path / "a.png", "1", 13_400)  # its limit is 178,956,970
    (found,) = decode_all([tmp_path / "a.png"], AS_IS)
    assert isinstance(found, Unreadable)
    assert found.path == tmp_path / "a.png"
    assert found.reason.startswith("DecompressionBombError: Image size (179560000 pixels) exceeds limit")


@pytest.mark.parametrize(
    ("side", "factor"), [(SIDE * 2 - 1, 1), (SIDE * 3, 1), (SIDE * 4, 2), (SIDE * 9, 4), (SIDE * 40, 8)]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_decode_reads_a_jpeg_that_is_much_too_large_at_a_reduced_size(
    tmp_path: Path, side: int, factor: int, orientation: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = np.mgrid[0:side, 0 : round(side * 1.2)] / side
    smooth = np.stack([rows, columns / 1.2, (rows + columns) / 2.2], 2)
    image = Image.fromarray((255 * smooth).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    sizes: list[tuple[int, int]] = []
    load = JpegImageFile.load

    def noting(self: JpegImageFile, *args: object) -> object:
        sizes.append(self.size)
        return load(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(JpegImageFile, "load", noting)
    found = decode(tmp_path / "a.jpg", AS_IS)
    assert sizes or engine != "pillow"  # the others leave only the largest to Pillow
    assert not sizes or sizes[0][1] == math.ceil(side / factor)
    with Image.open(tmp_path / "a.jpg") as opened:
        whole = ImageOps.exif_transpose(opened).resize((found.shape[2], found.shape[1]), Image.Resampling.BILINEAR)
    assert np.abs(as_array(found).astype(float) - np.asarray(whole)).mean() < 3


def test_resized_size_is_that_of_torchvision_and_timm() -> None:
    draw = random.Random(0)
    sizes = [(375, 200, 232), (750, 500, 288), (400, 300, 342), (1350, 900, 260), (1, 7, 8), (900, 1350, 260)]
    sizes += [(draw.randint(1, 5000), draw.randint(1, 5000), draw.randint(8, 600)) for _ in range(20_000)]
    for width, height, resize in sizes:
        expected = v2.Resize(resize)(torch.empty(1, height, width, device="meta")).shape[:0:-1]
        assert resized_size((width, height), Preprocessing(resize=resize)) == expected
        bordered = ResizeKeepRatio.get_params(torch.empty(1, height, width, device="meta"), (resize, resize), 1.0)
        border = Preprocessing(resize=resize, crop_mode="border")
        assert resized_size((width, height), border) == tuple(max(1, side) for side in reversed(bordered))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("size", [(401, 301), (1201, 900), (333, 1000), (450, 1350)])
def test_decode_gives_a_reduced_photo_the_size_of_the_whole_one(
    size: tuple[int, int], orientation: int, tmp_path: Path
) -> None:
    image = Image.new("RGB", size, "red")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = v2.Resize(SIDE + 16)(ImageOps.exif_transpose(opened)).size
    assert decode(tmp_path / "a.jpg", Preprocessing(size=32, resize=SIDE + 16)).shape[:0:-1] == expected


def test_decode_gives_a_long_photo_the_middle_of_the_whole_one() -> None:
    draw = random.Random(0)
    for _ in range(100):
        short, resize = draw.randint(5, 60), draw.randint(16, 50)
        long, size = short * draw.randint(4, 12) + draw.randint(0, 40), draw.randint(8, resize)
        image = Image.fromarray(noise(*draw.choice([(short, long, 3), (long, short, 3)])))
        expected = np.asarray(v2.CenterCrop(size)(v2.Resize(resize)(image)))
        decoded = decode(image, Preprocessing(size=size, resize=resize))
        assert max(decoded.shape) <= 5 * resize
        assert difference(as_array(center_crop(size)(decoded).contiguous()), expected) <= 1
