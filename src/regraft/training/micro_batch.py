"""A batch in parts, for which there is memory, whose gradients are those of the whole.

The mean of the parts' losses is the loss of the batch for few losses: a weighted cross-entropy divides by the sum of
its weights, a sum divides by nothing, and a contrastive loss compares samples of different parts. So the outputs of
all parts are computed first, without gradients; the loss sees all of them together, and tells each part the gradient
of its outputs; then each part runs again, with gradients. Random draws and buffers are put back in between, so that
the second run gives what the first gave. That costs a third more than parts whose losses are means over their samples,
which run once.
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

LONELY = (
    "every batch is a single sample, and batch norm cannot learn from one alone. Use a batch_size of 2 or more, or "
    "freeze the batch norms."
)

Inputs = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Batch:
    """Inputs, targets, the targets of what was mixed in, and the share of the first."""

    inputs: Inputs
    targets: torch.Tensor
    others: torch.Tensor
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, size: int, *, min_size: int = 1) -> list["Batch"]:
        """Return parts of `size` samples at most and of nearly equal sizes.

        Args:
            size: Number of samples.
            min_size: Where a part would have fewer, there are fewer parts, which may be larger than `size`.
        """
        count = len(self)
        pieces = max(1, min(math.ceil(count / size), count // min_size))
        edges = [count * piece // pieces for piece in range(pieces + 1)]
        parts = [slice(start, end) for start, end in itertools.pairwise(edges)]
        return [Batch(rows(self.inputs, part), self.targets[part], self.others[part], self.share) for part in parts]


def mixed(inputs: Inputs, targets: torch.Tensor, mixup: float) -> Batch:
    """Return a batch in which another sample is mixed into each; `mixup` as in `TrainConfig`."""
    if mixup == 0:
        return Batch(inputs, targets, targets, 1.0)
    share = float(torch.distributions.Beta(mixup, mixup).sample())
    order = torch.randperm(len(targets))
    tensors = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    blends = tuple(torch.lerp(x[order.to(x.device)], x, share) if x.is_floating_point() else x for x in tensors)
    others = targets[order.to(targets.device)]
    return Batch(blends[0] if isinstance(inputs, torch.Tensor) else blends, targets, others, share)


def rows(inputs: Inputs, part: slice) -> Inputs:
    """Return some samples of each tensor."""
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
) -> float:
    """Add the gradients of a batch's loss to the parameters, and return the loss; see this module's docstring.

    Where the loss is not finite, no gradient is added.

    Args:
        forward: From inputs to outputs, with gradients where they are enabled.
        loss_of: From outputs and the batch that they are of to the loss.
        model: Whose buffers the forward changes.
        batch: The whole.
        parts: What it is made of.
        scale: Multiplies a loss before its gradients are computed.
        is_mean: Whether the loss is known to be the mean of a loss of each sample.
    """
    if is_mean:
        return _backward_of_means(forward, loss_of, parts, scale)
    with buffers_put_back(model), torch.no_grad(), preserved_randomness():
        outputs = torch.cat([forward(part.inputs) for part in parts]).requires_grad_()
        with torch.enable_grad():
            loss = loss_of(outputs, batch)
    if not math.isfinite(loss.item()):
        return loss.item()
    scale(loss).backward()
    assert outputs.grad is not None
    for part, gradient in zip(parts, outputs.grad.split([len(part) for part in parts]), strict=True):
        forward(part.inputs).backward(gradient)
    return loss.item()


def _backward_of_means(
    forward: Callable[[Inputs], torch.Tensor],
    loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
    parts: list[Batch],
    scale: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    total, count = 0.0, sum(map(len, parts))
    for part in parts:
        loss = loss_of(forward(part.inputs), part) * (len(part) / count)
        total += loss.item()
        if not math.isfinite(total):
            break
        scale(loss).backward()
    return total


@contextlib.contextmanager
def buffers_put_back(model: nn.Module, *, on_failure: bool = False) -> Iterator[None]:
    """Put every buffer and its values back on leaving, also where a forward has put another tensor in its place.

    Args:
        model: Whose buffers.
        on_failure: Whether they are put back only where the block raises.
    """
    saved = [
        (layer, name, buffer, buffer.clone())
        for layer in model.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None
    ]

    def put_back() -> None:
        with torch.no_grad():
            for layer, name, buffer, value in saved:
                buffer.copy_(value)
                layer._buffers[name] = buffer

    try:
        yield
    except BaseException:
        put_back()
        raise
    if not on_failure:
        put_back()


class LonelySample(Exception):
    """Batch norm was given one value per channel to learn from."""


@contextlib.contextmanager
def lonely_samples(model: nn.Module, count: int) -> Iterator[None]:
    """Raise `LonelySample` where the block fails as batch norm was given a single sample; buffers are put back then."""
    with buffers_put_back(model, on_failure=True) if count == 1 else contextlib.nullcontext():
        try:
            yield
        except ValueError as error:
            if count == 1 and str(error).startswith("Expected more than 1 value per channel when training"):
                raise LonelySample from error
            raise


def require_learnable(model: nn.Module, forward: Callable[[], object], count: int) -> None:
    """Refuse batches of one sample where batch norm cannot learn from them; the model stays as it is.

    Args:
        model: The network.
        forward: Runs it on such a batch.
        count: Number of samples of the batch.

    Raises:
        DataError: They are.
    """
    if count > 1:
        return
    before = [(layer, layer.training) for layer in model.modules()]
    try:
        with buffers_put_back(model), torch.no_grad(), preserved_randomness(), lonely_samples(model, count):
            model.train()
            forward()
    except LonelySample as error:
        raise DataError(LONELY) from error
    except Exception:  # of any other kind: said where the model is tried, with its reason
        return
    finally:
        for layer, training in before:
            layer.training = training
