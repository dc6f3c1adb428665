"""Engines beside each other: the same photos, up to rounding; which file is whose; and which engine is chosen."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pixels import AS_IS, SIDE, as_array, difference, noise
from regraft.card import Preprocessing
from regraft.data.decoding import native, nvjpeg, pillow
from regraft.data.decoding.engines import require_engine, usable_engine
from regraft.data.decoding.files import Unreadable, decode_all, quiet_decoders
from regraft.data.decoding.headers import read_header
from regraft.errors import ConfigError

needs_decoders = pytest.mark.skipif(native.library() is None, reason="neither torchcodec nor torchvision has decoders")
CPU = torch.device("cpu")


def photo(side: int = SIDE) -> Image.Image:
    """Return something smooth, as photos are."""
    rows, columns = np.mgrid[0:side, 0 : side + 8] / side
    waves = np.stack([np.sin(5 * rows), np.cos(4 * columns), np.sin(3 * rows * columns)], 2)
    return Image.fromarray((127 + 120 * waves).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.fixture
def nvjpeg_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvjpeg, "device", lambda: CPU)


@pytest.fixture
def left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that Pillow decodes."""
    names: list[str] = []
    original = pillow.decode

    def noting(source: Path, preprocessing: Preprocessing) -> torch.Tensor:
        names.append(source.name)
        return original(source, preprocessing)

    monkeypatch.setattr(pillow, "decode", noting)
    return names


@needs_decoders
@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30, "subsampling": 2}], ids=str)
def test_native_gives_the_pixels_of_pillow_where_nothing_is_resized(
    kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encoded(photo().convert(mode), kind, **options)
    found = native.decode(data, AS_IS)
    assert found is not None
    assert np.array_equal(as_array(found), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@needs_decoders
@pytest.mark.parametrize("orientation", range(1, 9))
def test_native_turns_photos_upright_as_pillow_does(orientation: int, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(photo(), "jpeg", exif=with_orientation(orientation)))
    found = native.decode((tmp_path / "a.jpg").read_bytes(), AS_IS)
    assert found is not None
    assert torch.equal(found, pillow.decode(tmp_path / "a.jpg", AS_IS))


@needs_decoders
@pytest.mark.usefixtures("nvjpeg_on_cpu")
@pytest.mark.parametrize("decoder", ["native", "nvjpeg"])
def test_decode_all_gives_the_same_photos_with_each_engine(decoder: str, shared: Path) -> None:
    """Over all real photos: within a step of Pillow, but for large ones, of which Pillow decodes fewer pixels."""
    paths = sorted(path for path in shared.glob("data/*/*/*/*") if path.is_file())[::3]
    plain = Preprocessing()
    ours = plain.model_copy(update={"decoder": decoder})
    means, number = [], 0
    for path, expected, found in zip(paths, decode_all(paths, plain), decode_all(paths, ours), strict=True):
        assert not isinstance(expected, Unreadable)
        assert not isinstance(found, Unreadable)
        assert expected.shape == found.shape, path
        with Image.open(path) as opened:
            is_reduced = opened.format == "JPEG" and min(opened.size) >= 2 * pillow.REDUCTION * plain.resize / 2
        distance = (expected.int() - found.int()).abs()
        assert is_reduced or distance.max() <= 1, path
        means.append(float(distance.float().mean()))
        number += not is_reduced
    assert number > 300
    assert np.mean(means) < 0.01


@needs_decoders
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(20, 31), (80, 61), (300, 200)], ids=str)
def test_native_resizes_as_pillow_does(interpolation: str, size: tuple[int, int], tmp_path: Path) -> None:
    preprocessing = AS_IS.model_copy(update={"interpolation": interpolation})
    Image.fromarray(noise(size[1], size[0], 3)).save(tmp_path / "a.png")
    found = native.decode((tmp_path / "a.png").read_bytes(), preprocessing)
    assert found is not None
    assert difference(as_array(found), as_array(pillow.decode(tmp_path / "a.png", preprocessing))) <= 1


@needs_decoders
@pytest.mark.usefixtures("nvjpeg_on_cpu")
@pytest.mark.parametrize("decoder", ["native", "nvjpeg"])
def test_decode_all_leaves_to_pillow_what_an_engine_does_not_read(
    decoder: str, left_to_pillow: list[str], tmp_path: Path
) -> None:
    """One of each in one batch, in order, and a photo that is damaged in the middle."""
    plain = encoded(photo(), "jpeg", quality=95)
    files = {
        "0 plain.jpg": plain,
        "1 cmyk.jpg": encoded(photo().convert("CMYK"), "jpeg"),
        "2 ends early.jpg": plain[: len(plain) // 2],
        "3 gray.jpg": encoded(photo().convert("L"), "jpeg"),
        "4 alpha.png": encoded(photo().convert("RGBA"), "png"),
        "5 no photo.jpg": b"\xff\xd8\xff" + bytes(50),
        "6 progressive.jpg": encoded(photo(), "jpeg", progressive=True),
        "7 turned.jpg": encoded(photo(), "jpeg", exif=with_orientation(6)),
        "8 palette.gif": encoded(photo(), "gif"),
        "9 plain.jpg": plain,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "missing.jpg", tmp_path]
    found = list(decode_all(paths, AS_IS.model_copy(update={"decoder": decoder})))
    expected = list(decode_all(paths, AS_IS))
    for path, ours, theirs in zip(paths, found, expected, strict=True):
        if isinstance(theirs, Unreadable):
            assert ours == theirs
        else:
            assert torch.equal(ours, theirs), path  # type: ignore[arg-type]
    first_round = left_to_pillow[: len(left_to_pillow) - len(paths)]
    alone = {"1 cmyk.jpg", "2 ends early.jpg", "4 alpha.png", "5 no photo.jpg", "8 palette.gif", "missing.jpg"}
    assert set(first_round) == alone | {tmp_path.name}


def test_nvjpeg_goes_on_where_one_photo_of_a_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that refuses a whole batch for one of its photos, as nvJPEG does; it is asked for halves."""
    calls: list[int] = []

    def refusing(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(batch))
        if any(data[-3] == 77 for data in batch):
            raise RuntimeError("unsupported")
        return [torch.zeros(3, SIDE, SIDE, dtype=torch.uint8) for _ in batch]

    monkeypatch.setattr(nvjpeg, "decoder", lambda on: refusing)
    good = encoded(photo(), "jpeg")
    bad = good[:-3] + b"M" + good[-2:]
    found = nvjpeg.decode([good, good, bad, good, good], AS_IS, CPU)
    assert [pixels is None for pixels in found] == [False, False, True, False, False]
    assert calls[0] == 5
    assert len(calls) <= 7


@needs_decoders
def test_nvjpeg_leaves_to_the_cpu_what_a_gpu_has_no_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    data = [encoded(photo(), "jpeg")] * 3
    with monkeypatch.context() as context:
        context.setattr(nvjpeg, "decoder", lambda on: no_room)
        assert nvjpeg.decode(data, AS_IS, CPU) == [None] * 3
    monkeypatch.setattr(nvjpeg, "resized", no_room)
    assert nvjpeg.decode(data, AS_IS, CPU) == [None] * 3


@needs_decoders
def test_nvjpeg_takes_no_more_pixels_at_a_time_than_have_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    original = nvjpeg.decoder(CPU)
    assert original is not None

    def noting(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(batch))
        return original(batch)

    monkeypatch.setattr(nvjpeg, "decoder", lambda on: noting)
    monkeypatch.setattr(nvjpeg, "MAX_PIXELS", 2 * SIDE * (SIDE + 8))
    data = [encoded(photo(), "jpeg")] * 5
    found = nvjpeg.decode(data, AS_IS, CPU)
    assert calls == [2, 2, 1]
    assert all(pixels is not None for pixels in found)


def test_read_header_says_what_pillow_says(shared: Path) -> None:
    for path in sorted(shared.glob("data/*/*/*/*")):
        header = read_header(path.read_bytes())
        with Image.open(path) as opened:
            if header is None:
                plain = opened.format == "JPEG" and opened.mode in ("L", "RGB")
                assert not plain, path
                continue
            assert (header.width, header.height) == opened.size
            assert header.orientation == opened.getexif().get(0x0112, 1)
            assert header.kind == (opened.format or "").lower()
            assert header.channels == (1 if opened.mode in ("L", "I;16") else 3)
            assert header.is_baseline <= ("progressive" not in opened.info)


@pytest.mark.parametrize("length", range(0, 700, 7))
def test_read_header_of_a_file_that_ends_early_raises_nothing(length: int) -> None:
    for kind in ("jpeg", "png"):
        data = encoded(photo(), kind, exif=with_orientation(3))
        read_header(data[:length])


@needs_decoders
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_native_decodes_by_torchvision_as_by_torchcodec(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(), kind, **({"exif": with_orientation(6)} if kind == "jpeg" else {}))
    expected = native.decode(data, AS_IS)
    torchvisions = native._torchvision()
    monkeypatch.setattr(native, "library", lambda: torchvisions)
    with quiet_decoders():  # of a deprecation
        found = native.decode(data, AS_IS)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)


def test_usable_engine_is_the_fastest_that_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, plain = torch.device("cuda", 0), Preprocessing()
    monkeypatch.setattr(nvjpeg, "decoder", lambda on: list)
    monkeypatch.setattr(native, "library", lambda: native.Decoders("some", torch.clone, torch.clone))
    assert usable_engine("auto", plain, gpu) == "nvjpeg"
    assert usable_engine("auto", plain, CPU) == "native"
    assert usable_engine("nvjpeg", plain, CPU) == "native"
    assert usable_engine("pillow", plain, gpu) == "pillow"
    assert usable_engine("auto", plain.model_copy(update={"interpolation": "lanczos"}), gpu) == "pillow"
    monkeypatch.setattr(native, "library", lambda: None)
    assert usable_engine("auto", plain, CPU) == "pillow"
    monkeypatch.setattr(nvjpeg, "decoder", lambda on: None)
    assert usable_engine("auto", plain, gpu) == "pillow"


def test_require_engine_says_why_one_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(nvjpeg, "decoder", lambda on: None)
    for engine in ("auto", "pillow"):
        require_engine(engine, CPU)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"decoder='native' cannot be used: neither torchcodec 0\.16 nor torchvision"):
        require_engine("native", CPU)
    with pytest.raises(ConfigError, match="decodes on a GPU of NVIDIA, and the network runs on cpu"):
        require_engine("nvjpeg", CPU)
    with pytest.raises(ConfigError, match="no decoder is installed that was built for this GPU"):
        require_engine("nvjpeg", torch.device("cuda", 0))
