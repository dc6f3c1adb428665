from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from photo_checks.pictures import copied, picture, save
from regraft.data.checks import candidates
from regraft.data.checks.candidates import find_candidates
from regraft.data.checks.near_duplicates import find_near_duplicates
from regraft.data.checks.thumbnails import SIDE, read_thumbnails


def test_find_near_duplicates_finds_copies_that_were_altered_and_no_other_pair(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(12)]
    originals = [save(image, tmp_path / f"{number}.png") for number, image in enumerate(pictures)]
    copies = [save(copied(image), tmp_path / f"copy{n}.jpg", 60) for n, image in enumerate(pictures[:6])]
    same = save(pictures[0], tmp_path / "same.png")
    pairs = find_near_duplicates(read_thumbnails([*originals, *copies, same]))
    expected = {(number, 12 + number): (False, True) for number in range(6)} | {(0, 18): (True, False)}
    assert {(pair.first, pair.second): (pair.is_exact, pair.is_mirrored) for pair in pairs} == expected
    assert min(pair.similarity for pair in pairs) > 0.95


def test_find_near_duplicates_takes_flat_and_single_photos(tmp_path: Path) -> None:
    flat = [save(Image.new("RGB", (60, 40), (level, 0, 0)), tmp_path / f"{level}.png") for level in (0, 100, 250)]
    assert find_near_duplicates(read_thumbnails(flat)) == []
    assert find_near_duplicates(read_thumbnails([])) == []
    assert find_near_duplicates(read_thumbnails(flat[:1])) == []


def test_find_candidates_of_many_photos_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0)
    small = torch.from_numpy(noise.integers(0, 256, (300, 1, 8, 8))).float()
    pixels = torch.nn.functional.interpolate(small, (SIDE, SIDE), mode="bicubic").clamp(0, 255).byte()[:, 0]
    pixels[270:] = pixels[:30].flip(2)
    everything = find_candidates(pixels)
    monkeypatch.setattr(candidates, "MAX_COMPARED", 100)
    some = find_candidates(pixels)
    for found in (everything, some):
        pairs = zip(found.first.tolist(), found.second.tolist(), strict=True)
        assert {(min(pair), max(pair)) for pair in pairs} == {(number, 270 + number) for number in range(30)}


def test_read_thumbnails_reads_what_is_upright_and_names_the_rest(tmp_path: Path) -> None:
    image = picture(0)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    save(image, tmp_path / "upright.png")
    (tmp_path / "notes.txt").write_text("no photo")
    paths = [tmp_path / name for name in ("turned.png", "notes.txt", "gone.jpg", "upright.png")]
    thumbnails = read_thumbnails(paths)
    assert thumbnails.indices == (0, 3)
    assert thumbnails.sizes == ((150, 200), (200, 150))
    assert torch.equal(thumbnails.pixels[0], thumbnails.pixels[1])
    assert [(file.path.name, file.reason) for file in thumbnails.unreadable] == [
        ("notes.txt", "not an image"),
        ("gone.jpg", "no such file"),
    ]
