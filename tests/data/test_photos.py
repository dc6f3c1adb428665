"""Photos as a Dataset, and batches of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regraft.card import Preprocessing
from regraft.data.folders import Sample
from regraft.data.photos import Photos, SeededShuffle, loader, read_photos
from regraft.data.transforms import Views, augmentation, center_crop, normalize
from regraft.errors import DataError

PREPROCESSING = Preprocessing(size=32, resize=36)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(9):
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        found.append(Sample(tmp_path / f"{number}.png", number % 2))
    return found


@pytest.fixture(params=["in memory", "on disk"])
def photos(request: pytest.FixtureRequest, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> Photos:
    monkeypatch.setattr("regraft.data.photos.fit_memory", lambda *_: request.param == "in memory")
    found, unreadable = read_photos(samples, PREPROCESSING, classes=("a", "b"))
    assert unreadable == ()
    assert (found.pixels is not None) == (request.param == "in memory")
    return found


def test_photos_item_is_the_middle_of_the_file_with_its_target(photos: Photos, samples: list[Sample]) -> None:
    assert len(photos) == 9
    for index, sample in enumerate(samples):
        pixels, target = photos[index]
        expected = np.asarray(Image.open(sample.path))[2:34, 4:36]
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
        assert target == sample.target


def test_photos_share_pixels_with_a_subset_and_an_augmented_copy(photos: Photos) -> None:
    part = photos.subset([5, 0])
    assert [sample.path.name for sample in part.samples] == ["5.png", "0.png"]
    assert torch.equal(part[0][0], photos[5][0])
    flipped = photos.augmented(Views("mirrored", lambda pixels: center_crop(32)(pixels).flip(2)))
    assert torch.equal(flipped[3][0], photos[3][0].flip(2))
    if photos.pixels is not None:
        assert part.pixels is not None
        assert part.pixels[0] is photos.pixels[5]
        assert flipped.pixels is photos.pixels


def test_photos_item_depends_on_its_seed_alone_and_leaves_the_generator_as_it_was(photos: Photos) -> None:
    changed = photos.augmented(augmentation("standard", PREPROCESSING))
    before = torch.get_rng_state()
    first = changed[2, 7][0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(changed[2, 7][0], first)
    assert not torch.equal(changed[2, 8][0], first)


def test_read_photos_leaves_unreadable_files_out_and_lists_them(samples: list[Sample]) -> None:
    samples[4].path.write_text("no photo")
    photos, unreadable = read_photos(samples, PREPROCESSING)
    assert [found.path for found in unreadable] == [samples[4].path]
    assert photos.samples == (*samples[:4], *samples[5:])


@pytest.mark.parametrize("count", [0, 2])
def test_read_photos_refuses_a_list_with_nothing_readable(count: int, tmp_path: Path) -> None:
    samples = [Sample(tmp_path / f"{number}.png", 0) for number in range(count)]
    with pytest.raises(DataError, match=rf"^none of {count} files can be read as a photo"):
        read_photos(samples, PREPROCESSING)


def test_loader_gives_normalized_batches_in_order(photos: Photos) -> None:
    batches = list(loader(photos, 4, workers=0))
    assert [len(targets) for _, targets in batches] == [4, 4, 1]
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert torch.equal(inputs, normalize(torch.stack([photos[index][0] for index in range(9)]), PREPROCESSING))
    assert torch.cat([targets for _, targets in batches]).tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_loader_gives_numbers_as_float32_targets(samples: list[Sample]) -> None:
    photos, _ = read_photos([Sample(sample.path, sample.target + 0.5) for sample in samples], PREPROCESSING)
    _, targets = next(iter(loader(photos, 4)))
    assert targets.dtype == torch.float32
    assert targets.tolist() == [0.5, 1.5, 0.5, 1.5]


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(4, [4, 4]), (5, [5, 4]), (1, [1] * 9), (9, [9]), (20, [9]), (8, [8])], ids=str
)
def test_loader_leaves_out_a_lonely_last_photo_when_learning(
    batch_size: int, sizes: list[int], samples: list[Sample]
) -> None:
    photos, _ = read_photos(samples, PREPROCESSING)
    assert [len(targets) for _, targets in loader(photos, batch_size, shuffle_seed=0)] == sizes


def epoch(batches: torch.utils.data.DataLoader, number: int) -> torch.Tensor:  # type: ignore[type-arg]
    batches.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return torch.cat([inputs for inputs, _ in batches])


def test_loader_depends_on_seed_and_epoch_alone_and_not_on_workers(photos: Photos) -> None:
    changed = photos.augmented(augmentation("trivial", PREPROCESSING))
    first = epoch(loader(changed, 3, shuffle_seed=5, workers=0), 2)
    torch.rand(3)
    assert torch.equal(epoch(loader(changed, 3, shuffle_seed=5, workers=2), 2), first)
    assert not torch.equal(epoch(loader(changed, 3, shuffle_seed=5, workers=0), 3), first)
    assert not torch.equal(epoch(loader(changed, 3, shuffle_seed=6, workers=0), 2), first)


def test_seeded_shuffle_visits_everything_once_with_a_seed_of_its_own() -> None:
    sampler = SeededShuffle(50, 3)
    first = list(sampler)
    assert sorted(index for index, _ in first) == list(range(50))
    assert len({seed for _, seed in first}) == 50
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
