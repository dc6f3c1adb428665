"""Copies between memory and a device that neither side waits for: through pinned memory, beside the computation."""

from collections.abc import Sequence

import torch


class DeviceCopies:
    """Copies to one device.

    Args:
        device: The device; what is on it already is not copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def stacked(self, photos: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return photos of one size as a batch (N, C, H, W) on the device."""
        if self._stream is None or any(photo.is_cuda for photo in photos):
            return torch.stack(self.each(photos))
        first = photos[0]
        batch = torch.empty((len(photos), *first.shape), dtype=first.dtype, pin_memory=True)
        torch.stack(list(photos), out=batch)
        return self._copied(batch)

    def each(self, photos: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return photos (C, H, W) of any sizes on the device, copied together."""
        waiting = [number for number, photo in enumerate(photos) if photo.device.type != self.device.type]
        on_device = list(photos)
        if not waiting:
            return on_device
        if self._stream is None:
            return [photo.to(self.device) for photo in photos]
        sizes = [photos[number].numel() for number in waiting]
        joined = torch.empty(sum(sizes), dtype=photos[waiting[0]].dtype, pin_memory=True)
        torch.cat([photos[number].reshape(-1) for number in waiting], out=joined)
        for number, part in zip(waiting, self._copied(joined).split(sizes), strict=True):
            on_device[number] = part.view(photos[number].shape)
        return on_device

    def _copied(self, pinned: torch.Tensor) -> torch.Tensor:
        """Copy on the stream of copies; whatever the current stream does next waits for it."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            copied = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        copied.record_stream(current)
        return copied


class HostCopy:
    """A copy of a device's tensors in memory, complete when it is asked for; the device computes on meanwhile.

    Reading a value by `.item()` or `.cpu()` waits for everything that the device was given before, this only for its
    own tensors.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._is_pinned = tensors[0].is_cuda
        self._tensors = list(tensors)
        if self._is_pinned:
            self._tensors = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for pinned, tensor in zip(self._tensors, tensors, strict=True):
                pinned.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors on the CPU, after waiting for them."""
        if not self._is_pinned:
            return [tensor.cpu() for tensor in self._tensors]
        self._copied.synchronize()
        return [pinned.clone() for pinned in self._tensors]  # the pinned memory is used again
