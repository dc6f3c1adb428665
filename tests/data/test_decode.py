"""Files → pixels, against numpy and against upright or opaque references, for every odd kind of file."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels import AS_IS, GRAY, SIDE, as_array, difference, noise
from regraft.card import Preprocessing
from regraft.data.decoding.files import Unreadable, decode, decode_all
from regraft.errors import DataError

pytestmark = pytest.mark.usefixtures("engine")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm"])
def test_decode_gives_rgb_pixels_as_stored(name: str, tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE + 4, 3)
    Image.fromarray(pixels).save(tmp_path / name)
    assert np.array_equal(as_array(decode(tmp_path / name, AS_IS)), pixels)


def test_decode_does_not_mind_the_ending_of_a_name(tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(as_array(decode(tmp_path / "a.jpg", AS_IS)), pixels)


@pytest.mark.parametrize(("preprocessing", "channels"), [(AS_IS, 3), (GRAY, 1)], ids=["rgb", "gray"])
def test_decode_gives_gray_as_many_channels_as_asked_for(
    preprocessing: Preprocessing, channels: int, tmp_path: Path
) -> None:
    pixels = noise(SIDE, SIDE)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = decode(tmp_path / "a.png", preprocessing)
    assert found.shape == (channels, SIDE, SIDE)
    assert all(np.array_equal(channel.numpy(), pixels) for channel in found)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("preprocessing", [AS_IS, GRAY], ids=["rgb", "gray"])
def test_decode_scales_16_bit_gray_to_8(name: str, preprocessing: Preprocessing, tmp_path: Path) -> None:
    values = noise(SIDE, SIDE, top=65536, dtype=np.uint16)
    values[0, :3] = 0, 128, 65535
    Image.fromarray(values).save(tmp_path / name)
    for channel in decode(tmp_path / name, preprocessing):
        assert np.array_equal(channel.numpy(), np.round(values / 65535 * 255))


def test_decode_reads_16_bit_gray_of_either_byte_order_alike(tmp_path: Path) -> None:
    values = noise(SIDE, SIDE, top=65536, dtype=np.uint16)
    Image.frombytes("I;16B", (SIDE, SIDE), values.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert np.array_equal(decode(tmp_path / "a.tif", GRAY)[0].numpy(), np.round(values / 65535 * 255))


def test_decode_reads_32_bit_integers_as_the_8_or_16_bits_they_hold(tmp_path: Path) -> None:
    for top, largest in ((256, 255), (65536, 65535)):
        values = noise(SIDE, SIDE, top=top, dtype=np.int32)
        values[0, 0] = largest
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert np.array_equal(decode(tmp_path / "a.tif", GRAY)[0].numpy(), np.round(values / largest * 255))


@pytest.mark.parametrize("odd", [None, np.nan, np.inf, -np.inf])
def test_decode_stretches_floats_between_their_finite_ends(odd: float | None, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    expected = np.round((values - values[1:].min()) / (values[1:].max() - values[1:].min()) * 255)
    values[0] = values[1] if odd is None else odd  # the first row, which is not compared
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert difference(decode(tmp_path / "a.tif", GRAY)[0, 1:].numpy(), expected[1:]) <= 1


@pytest.mark.parametrize("value", [0.0, np.nan, 7.5])
def test_decode_gives_black_for_equal_floats(value: float, tmp_path: Path) -> None:
    Image.fromarray(np.full((SIDE, SIDE), value, np.float32)).save(tmp_path / "a.tif")
    assert not decode(tmp_path / "a.tif", GRAY).any()


def test_decode_gives_black_and_white_for_bits(tmp_path: Path) -> None:
    bits = noise(SIDE, SIDE, top=2, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", GRAY)[0].numpy(), bits * 255)


def test_decode_converts_cmyk(tmp_path: Path) -> None:
    inks = np.zeros((SIDE, SIDE, 4), np.uint8)
    inks[: SIDE // 2, :, 0] = 255  # cyan above, yellow below
    inks[SIDE // 2 :, :, 2] = 255
    Image.frombytes("CMYK", (SIDE, SIDE), inks.tobytes()).save(tmp_path / "a.jpg", quality=100)
    found = as_array(decode(tmp_path / "a.jpg", AS_IS))
    assert difference(found[:16], np.broadcast_to(np.array([0, 255, 255]), (16, SIDE, 3))) <= 8
    assert difference(found[20:], np.broadcast_to(np.array([255, 255, 0]), (16, SIDE, 3))) <= 8


def test_decode_lays_alpha_on_white(tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE, 4)
    pixels[0, :2, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    share = pixels[..., 3:] / 255
    expected = np.round(pixels[..., :3] * share + 255 * (1 - share))
    assert difference(as_array(decode(tmp_path / "a.png", AS_IS)), expected) <= 1


def test_decode_lays_gray_with_alpha_on_white(tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE, 2)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    share = pixels[..., 1] / 255
    expected = np.round(pixels[..., 0] * share + 255 * (1 - share))
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "LA"
    assert difference(decode(tmp_path / "a.png", GRAY)[0].numpy(), expected) <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_decode_makes_a_transparent_colour_white(mode: str, tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE, top=2) * 200
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.png", transparency=(0, 0, 0) if mode == "RGB" else 0)
    with Image.open(tmp_path / "a.png") as stored:
        assert "transparency" in stored.info
    expected = np.where(pixels == 0, 255, 255 if mode == "1" else 200)
    assert np.array_equal(decode(tmp_path / "a.png", GRAY)[0].numpy(), expected)


@pytest.mark.parametrize("alphas", [0, bytes([0, 128, 255])], ids=["one colour", "an alpha per colour"])
def test_decode_lays_a_palette_with_transparency_on_white(alphas: int | bytes, tmp_path: Path) -> None:
    indices = noise(SIDE, SIDE, top=3)
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 60, 250]])
    image = Image.frombytes("P", (SIDE, SIDE), indices.tobytes())
    image.putpalette(colours.astype(np.uint8).tobytes())
    image.save(tmp_path / "a.png", transparency=alphas)
    share = np.array([[0], [255], [255]] if alphas == 0 else [[0], [128], [255]]) / 255
    expected = np.round(colours * share + 255 * (1 - share))[indices]
    assert difference(as_array(decode(tmp_path / "a.png", AS_IS)), expected) <= 1


def test_decode_takes_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(
            tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in name else {})
        )
        found = as_array(decode(tmp_path / name, AS_IS))
        assert np.array_equal(found, np.broadcast_to(np.array([255, 0, 0]), (SIDE, SIDE, 3))), name


# What a viewer has to do to what is stored, by the EXIF standard (JEITA CP-3451, tag 274), as index arithmetic.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_decode_applies_the_orientation(orientation: int, name: str, tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE + 4, 3)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, **({"lossless": True} if "w" in name else {}))
    assert np.array_equal(as_array(decode(tmp_path / name, AS_IS)), UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_decode_turns_real_photos_upright(orientation: int, shared: Path) -> None:
    file = next((shared / "data" / "odd_images").rglob(f"hopper_orientation_{orientation}.jpg"))
    with Image.open(file) as stored:
        size = min(stored.size)
        pixels = np.asarray(stored.convert("RGB"))
    found = as_array(decode(file, Preprocessing(size=size, resize=size)))
    assert np.array_equal(found, UPRIGHT[orientation](pixels))


@pytest.mark.parametrize(
    "junk", [b"garbage", b"II*\0\x08\0\0\0\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04abc\0"]
)
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_decode_all_reads_a_photo_with_damaged_metadata(junk: bytes, name: str, tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE), (200, 100, 0)).save(tmp_path / name, exif=b"Exif\0\0" + junk)
    (found,) = decode_all([tmp_path / name], AS_IS)
    assert isinstance(found, torch.Tensor)
    assert difference(as_array(found)[0, :1], np.array([[200, 100, 0]])) <= 3


def half(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, file_format)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no photo", "not an image"),
        (bytes(1000), "not an image"),
        (half("JPEG"), "OSError: image file is truncated"),
        (half("PNG"), "OSError: image file is truncated"),
        (half("GIF"), "OSError: image file is truncated"),
        (half("WEBP"), "OSError: could not create decoder object"),
        (b"GIF89a", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
    ids=["empty", "text", "zeros", "half a jpeg", "half a png", "half a gif", "half a webp", "a head", "svg"],
)
def test_decode_says_why_it_cannot_read_what_is_no_whole_image(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError) as caught:
        decode(tmp_path / "a.jpg", AS_IS)
    assert str(caught.value).startswith(reason)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (lambda path: path.symlink_to(path), "OSError"),
        (lambda path: path.mkdir(), "not a file"),
        (make_pipe, "not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a file"),
    ],
    ids=["missing", "dangling link", "circular link", "folder", "pipe", "device"],
)
def test_decode_all_says_why_it_cannot_read_what_is_no_file(
    make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    make(tmp_path / "a.png")
    (found,) = decode_all([tmp_path / "a.png"], AS_IS)
    assert isinstance(found, Unreadable)
    assert found.reason.startswith(reason)


def test_decode_all_says_that_a_path_is_too_long() -> None:
    (found,) = decode_all([Path("x" * 5000)], AS_IS)
    assert isinstance(found, Unreadable)
    assert "File name too long" in found.reason


@pytest.mark.parametrize("name", [b"a b.png", b'it\'s "q".png', "é 猫.png".encode(), b"two\nlines.png", b"\xff.png"])
def test_decode_reads_any_file_name(name: bytes, tmp_path: Path) -> None:
    pixels = noise(SIDE, SIDE, 3)
    path = tmp_path / os.fsdecode(name)
    Image.fromarray(pixels).save(path)
    assert np.array_equal(as_array(decode(path, AS_IS)), pixels)


def test_decode_all_keeps_the_order_with_the_unreadable_in_their_places(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        if number % 7 == 3:
            path.write_text("no photo")
        else:
            Image.new("L", (SIDE, SIDE), number).save(path)
    for number, found in enumerate(decode_all(paths, GRAY)):
        if number % 7 == 3:
            assert found == Unreadable(paths[number], "not an image")
        else:
            assert isinstance(found, torch.Tensor)
            assert found.unique().tolist() == [number]


def test_decode_all_leaves_the_warnings_as_they_were_where_it_stops_early(tmp_path: Path) -> None:
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    decoding = decode_all([tmp_path / "a.png"] * 20, GRAY)
    next(decoding)
    decoding.close()  # type: ignore[attr-defined]
    assert list(warnings.filters) == before


def test_decode_takes_an_open_image_and_leaves_it_as_it_is() -> None:
    pixels = noise(SIDE, SIDE, 4)
    image = Image.fromarray(pixels)
    assert decode(image, AS_IS).shape == (3, SIDE, SIDE)
    assert np.array_equal(np.asarray(image), pixels)


def test_decode_all_reads_real_odd_images_and_not_the_broken_ones(shared: Path) -> None:
    folder = shared / "data" / "odd_images"
    good = [path for part in ("train", "val") for path in sorted((folder / part).rglob("*")) if path.is_file()]
    broken = sorted((folder / "broken").iterdir())
    assert (len(good), len(broken)) == (14, 2)
    *read, first, second = decode_all([*good, *broken], AS_IS)
    for path, pixels in zip(good, read, strict=True):
        assert isinstance(pixels, torch.Tensor), path
        assert min(pixels.shape[1:]) == SIDE
        assert pixels.float().std() > 0, path
    for path, found in zip(broken, (first, second), strict=True):
        assert isinstance(found, Unreadable)
        assert found.path == path
        assert "truncated" in found.reason


def test_decode_gives_the_real_16_bit_photo_the_brightness_that_numpy_finds(shared: Path) -> None:
    file = next((shared / "data" / "odd_images").rglob("16bit.cropped.tif"))
    with Image.open(file) as stored:
        values = np.asarray(stored).astype(float)
    found = decode(file, Preprocessing(size=min(values.shape), resize=min(values.shape), mean=(0.5,), std=(0.5,)))
    assert np.array_equal(found[0].numpy(), np.round(values / 65535 * 255))
