"""Random parts of a batch, against torchvision's, which takes one photo at a time."""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from regraft.data.random_parts import RATIO, SCALE, random_boxes, random_parts, uniform


def photos(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    """Return smooth photos of some sizes (height, width), so that antialiasing hardly matters."""
    result = []
    for height, width in sizes:
        rows, columns = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
        result.append((127 + 120 * torch.stack([rows.sin(), columns.cos(), (rows * columns).sin()])).byte())
    return result


def test_uniform_is_splitmix64() -> None:
    mask = 2**64 - 1

    def by_hand(seed: int, count: int) -> list[float]:
        numbers = []
        for _ in range(count):
            seed = (seed + 0x9E3779B97F4A7C15) & mask
            z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            numbers.append(((z ^ (z >> 31)) >> 11) / 2**53)
        return numbers

    seeds = [0, 1, 2**62 - 1, 1234567]
    assert uniform(torch.tensor(seeds), 5).tolist() == [by_hand(seed, 5) for seed in seeds]


@pytest.mark.parametrize("size", [(256, 384), (384, 256), (256, 256), (60, 900), (900, 60)], ids=str)
def test_random_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    height, width = size
    count = 4_000
    ours = torch.stack(
        random_boxes(
            torch.full((count,), height).double(), torch.full((count,), width).double(), torch.rand(count, 22).double()
        ),
        1,
    )
    crop = v2.RandomResizedCrop(32, scale=SCALE, ratio=RATIO)
    image = torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[box["top"], box["left"], box["height"], box["width"]] for box in drawn]).double()
    spread = theirs.std(0).clamp(min=1)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * spread / count**0.5 * 1.5 + 0.5).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < 0.06 * spread + 0.5).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert (ours[:, :2] >= 0).all()


def test_random_parts_are_those_that_torchvision_cuts_out_and_resizes() -> None:
    batch = photos((40, 60), (60, 40), (33, 90), (50, 50))
    seeds = torch.arange(4) * 977 + 3
    found = random_parts(batch, 64, seeds)
    numbers = uniform(seeds, 23)
    sizes = torch.tensor([photo.shape[1:] for photo in batch]).double()
    boxes = torch.stack(random_boxes(sizes[:, 0], sizes[:, 1], numbers[:, 1:]), 1).int().tolist()
    for part, photo, box, number in zip(found, batch, boxes, numbers[:, 0], strict=True):
        expected = F.resized_crop(photo, *box, [64, 64], antialias=False)
        expected = expected.flip(-1) if number < 0.5 else expected
        assert (part.int() - expected.int()).abs().max() <= 1


def test_random_parts_depend_on_nothing_but_photo_and_seed() -> None:
    batch, seeds = photos((40, 60), (64, 96), (30, 30)), torch.tensor([5, 6, 7])
    together = random_parts(batch, 24, seeds)
    torch.manual_seed(9)
    alone = torch.cat([random_parts([photo], 24, seed[None]) for photo, seed in zip(batch, seeds, strict=True)])
    assert (together.int() - alone.int()).abs().max() <= 1  # the canvas is larger, and coordinates round
    assert torch.equal(random_parts(batch, 24, seeds), together)
    assert not torch.equal(random_parts(batch, 24, seeds + 1), together)
