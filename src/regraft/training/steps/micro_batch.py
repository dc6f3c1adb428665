"""Micro-batches: split a batch to fit into memory, with the gradients of the whole batch.

Few losses are the mean of the losses of the parts: a weighted cross-entropy divides by the sum of its weights, a sum
divides by nothing, and a contrastive loss compares samples across parts. So the forward runs twice:

    1. outputs of all parts, without gradients ─► concatenate ─► loss ─► gradient of the loss by the outputs
    2. each part once more, with gradients ─► backward from its share of that gradient

Random state and buffers are restored in between, so the second forward gives the same outputs as the first. It costs a
third more than the simple way, which is used for losses known to be means over samples: each part runs once.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from regraft.anatomy.modes import preserved_randomness
from regraft.errors import DataError
from regraft.torch_internals import buffers_of

SINGLE_SAMPLE_MESSAGE = (
    "every batch is a single sample, and batch norm cannot learn from one alone. Use a batch_size of 2 or more, or "
    "freeze the batch norms."
)

Inputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs, targets, the targets of the mixed-in samples (mixup), and the share of the first targets."""

    inputs: Inputs
    targets: torch.Tensor
    others: torch.Tensor
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def part(self, part: slice) -> "Batch":
        """Return a slice of the samples."""
        return Batch(rows(self.inputs, part), self.targets[part], self.others[part], self.share)

    def split(self, size: int, *, min_size: int = 1) -> list["Batch"]:
        """Split into parts of nearly equal sizes, of at most `size` samples.

        Args:
            size: Largest number of samples in a part.
            min_size: Smallest number of samples in a part. It takes precedence: parts may be larger than `size`.
        """
        count = len(self)
        pieces = max(1, min(math.ceil(count / size), count // min_size))
        edges = [count * piece // pieces for piece in range(pieces + 1)]
        return [self.part(slice(start, end)) for start, end in itertools.pairwise(edges)]


def apply_mixup(inputs: Inputs, targets: torch.Tensor, mixup: float) -> Batch:
    """Return a batch with mixup: each sample is blended with another one. `mixup` is as in `TrainConfig`."""
    if mixup == 0:
        return Batch(inputs, targets, targets, 1.0)
    share = float(torch.distributions.Beta(mixup, mixup).sample())
    order = torch.randperm(len(targets))
    blends = tuple(
        torch.lerp(x[order.to(x.device)], x, share) if x.is_floating_point() else x for x in as_tuple(inputs)
    )
    others = targets[order.to(targets.device)]
    return Batch(blends[0] if isinstance(inputs, torch.Tensor) else blends, targets, others, share)


def as_tuple(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return the tensors of some inputs as a tuple."""
    return (inputs,) if isinstance(inputs, torch.Tensor) else inputs


def rows(inputs: Inputs, part: slice) -> Inputs:
    """Return a slice of the samples of each tensor."""
    return inputs[part] if isinstance(inputs, torch.Tensor) else tuple(tensor[part] for tensor in inputs)


def backward_in_parts(
    forward: Callable[[Inputs], torch.Tensor],
    loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
    model: nn.Module,
    batch: Batch,
    parts: list[Batch],
    scale: Callable[[torch.Tensor], torch.Tensor],
    *,
    is_mean: bool,
    is_read: bool = True,
) -> float | torch.Tensor:
    """Accumulate the gradients of a batch's loss in the parameters, and return the loss; see the module docstring.

    Where the loss is not finite, no gradient of it is added, unless it is not read.

    Args:
        forward: Function from inputs to outputs, with gradients where they are enabled.
        loss_of: Function from outputs and their batch to the loss.
        model: The network, whose buffers the forward may change.
        batch: The whole batch.
        parts: The parts that it was split into.
        scale: Scales a loss before its backward pass (`GradScaler.scale`).
        is_mean: Whether the loss is known to be a mean over samples.
        is_read: Whether to wait for the loss of a single part; otherwise it is returned as a tensor on the device.
    """
    if len(parts) == 1 and is_mean and not is_read:
        loss = loss_of(forward(batch.inputs), batch)
        scale(loss).backward()
        return loss.detach()
    if is_mean:
        total = 0.0
        for part in parts:
            loss = loss_of(forward(part.inputs), part) * (len(part) / len(batch))
            total += loss.item()
            if not math.isfinite(total):
                break
            scale(loss).backward()
        return total
    # Batch norm counts and averages a batch once, in the second pass, and dropout draws the same masks in both.
    with buffers_restored(model), torch.no_grad(), preserved_randomness():
        outputs = torch.cat([forward(part.inputs) for part in parts]).requires_grad_()
        with torch.enable_grad():
            loss = loss_of(outputs, batch)
    if not math.isfinite(loss.item()):
        return loss.item()
    scale(loss).backward()
    assert outputs.grad is not None
    # Chain rule: the backward pass from the outputs of a part needs only the gradient of the loss by these outputs.
    for part, gradient in zip(parts, outputs.grad.split([len(part) for part in parts]), strict=True):
        forward(part.inputs).backward(gradient)
    return loss.item()


@contextlib.contextmanager
def buffers_restored(model: nn.Module, *, on_failure: bool = False) -> Iterator[None]:
    """Restore all buffers and their values after the block, also where a forward replaced a buffer's tensor.

    Args:
        model: The network.
        on_failure: Restore only if the block raises.
    """
    saved = [
        (layer, name, buffer, buffer.clone())
        for layer in model.modules()
        for name, buffer in buffers_of(layer).items()
        if buffer is not None
    ]
    has_ended = False
    try:
        yield
        has_ended = True
    finally:
        if not (has_ended and on_failure):
            with torch.no_grad():
                for layer, name, buffer, value in saved:
                    buffer.copy_(value)
                    buffers_of(layer)[name] = buffer


class SingleSampleError(Exception):
    """Batch norm got a single value per channel in training mode, which has no variance."""


@contextlib.contextmanager
def single_samples_refused(model: nn.Module, count: int) -> Iterator[None]:
    """Raise `SingleSampleError` if batch norm fails on a single sample in the block; buffers are restored then."""
    with buffers_restored(model, on_failure=True) if count == 1 else contextlib.nullcontext():
        try:
            yield
        except ValueError as error:
            if count == 1 and str(error).startswith("Expected more than 1 value per channel when training"):
                raise SingleSampleError from error
            raise


def require_learnable(model: nn.Module, forward: Callable[[], object], count: int) -> None:
    """Refuse batches of one sample if batch norm cannot train on them; the model is not changed.

    Args:
        model: The network.
        forward: Runs the network on such a batch.
        count: Number of samples in the batch.

    Raises:
        DataError: The batch is a single sample, and batch norm refuses it.
    """
    if count > 1:
        return
    before = [(layer, layer.training) for layer in model.modules()]
    try:
        with buffers_restored(model), torch.no_grad(), preserved_randomness(), single_samples_refused(model, count):
            model.train()
            forward()
    except SingleSampleError as error:
        raise DataError(SINGLE_SAMPLE_MESSAGE) from error
    except Exception:  # any other failure is reported by `try_one_batch`, with its reason
        return
    finally:
        for layer, training in before:
            layer.training = training
