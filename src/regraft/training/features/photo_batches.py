"""Batches of photos that are kept on a device: they are cropped, augmented and normalized there."""

from dataclasses import replace

import torch

from regraft.data.device_copies import DeviceCopies
from regraft.data.photos import Photos, SeededShuffle
from regraft.data.transforms import normalize
from regraft.training.features.batches import PickedBatches

SHARE = 0.25  # of a GPU's free memory, for decoded photos
COPIED = 256  # photos that are copied together


class PhotoBatches(PickedBatches):
    """Batches (normalized views (N, C, size, size) of float32, targets).

    Args:
        photos: Photos in memory.
        batch_size: N.
        device: Where the photos are kept from now on.
        sampler: See `PickedBatches`.
    """

    def __init__(
        self, photos: Photos, batch_size: int, device: torch.device, sampler: SeededShuffle | None = None
    ) -> None:
        super().__init__(kept_on(photos, device), batch_size, device, sampler)

    def pick(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of photos by index, in the views that `draws` stand for."""
        photos = self.dataset
        pixels = photos.views.of_batch(indices, [photos.decoded(index) for index in indices.tolist()], draws)
        inputs = normalize(pixels.contiguous(memory_format=torch.channels_last), photos.preprocessing)
        return inputs, self.targets[indices.to(self.targets.device)]


def fit_device(parts: tuple[Photos, ...], device: torch.device) -> bool:
    """Return whether photos in memory are worth keeping on a device: on a GPU with enough free memory."""
    if device.type != "cuda" or not all(isinstance(photos.pixels, tuple) for photos in parts):
        return False
    free, _ = torch.cuda.mem_get_info(device)
    size = sum(pixels.numel() for photos in parts for pixels in photos.pixels or () if not pixels.is_cuda)
    return size < SHARE * free


def kept_on(photos: Photos, device: torch.device) -> Photos:
    """Return the same photos with their pixels on a device."""
    assert photos.pixels is not None
    copies, on_device = DeviceCopies(device), list[torch.Tensor]()
    for first in range(0, len(photos), COPIED):
        on_device += copies.each([photos.pixels[index] for index in range(first, min(first + COPIED, len(photos)))])
    return replace(photos, pixels=tuple(on_device))
