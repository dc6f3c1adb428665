"""A training step of several ranks: that of the whole batch, of which each rank has a part of the rows.

Each rank runs the network on its rows. The outputs (N, K) of all ranks, which are few numbers, are exchanged, and every
rank computes the loss of the whole batch on them: so every loss is that of the batch, whether it is a mean over samples
or not, and however uneven the parts are, and all ranks agree whether it is finite. The gradient of the loss by a rank's
own outputs goes back through its network, and DDP adds up the gradients by the weights while they come.

DDP wraps a module that holds the trained parameters alone. It has no buffers, so that no running statistic is
overwritten in every step; and parameters that the outputs do not depend on, such as those of an auxiliary head, are not
in it, because DDP waits for the gradient of each. It is built anew when other parameters are trained: those that were
thawed later would drift apart, as they are unknown to it.
"""

import itertools
import zlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regraft.anatomy.modes import preserved_randomness
from regraft.errors import RunError
from regraft.training.ranks.group import MIN_ROWS, Ranks
from regraft.training.steps.micro_batch import Batch, Inputs, SingleSampleError, buffers_restored, rows
from regraft.wording import option

Forward = Callable[[Inputs], torch.Tensor]


class _Trained(nn.Module):
    """What DDP wraps: the trained parameters, and a forward that is passed in."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, forward: Forward | None, inputs: Inputs | None) -> torch.Tensor:
        if forward is None or inputs is None:  # without rows: zeros, for which DDP waits like for the others
            return torch.stack([parameter.sum() * 0 for parameter in self.trained]).sum()
        return forward(inputs)


class SharedLive:
    """The live part of a network that several ranks train together, for an epoch.

    Args:
        model: The live part; from here on it has the weights and buffers of rank 0.
        optimizer: Its optimizer; its state becomes that of rank 0.
        ranks: The ranks.
        first_step: Number of steps of the run so far.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks, first_step: int) -> None:
        self.model, self.ranks = model, ranks
        self._wrapped: DistributedDataParallel | None = None
        self._seeds = itertools.count(zlib.crc32(torch.get_rng_state().numpy().tobytes()) + first_step)
        states = (optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"])
        tensors = (state[name] for state in states for name in sorted(state) if isinstance(state[name], torch.Tensor))
        ranks.broadcast([*model.parameters(), *model.buffers(), *tensors])

    def draw_seed(self) -> int:
        """Return a seed for the masks of dropout in a step: another one on each rank.

        The global random state is left alone. It stays the same on all ranks, which draw their data from it.
        """
        return (next(self._seeds) * self.ranks.size + self.ranks.rank) % 2**32

    def reset(self) -> None:
        """Build DDP anew for the next step: it expects a backward after each forward, and there was none."""
        self._wrapped = None

    def finish(self) -> None:
        """Take the running statistics of rank 0, which are evaluated and saved."""
        self.ranks.pass_end("the end of the training batches")
        self.ranks.broadcast(self.model.buffers())

    def wrapped(self, forward: Forward, batch: Batch) -> DistributedDataParallel | None:
        """Return the parameters in DDP; it is built with the first rows. None as long as no rank has any."""
        if self._wrapped is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            source = next((rank for rank, count in enumerate(self.ranks.objects(len(batch))) if count), None)
            if source is None:
                return None
            has_rows = source == self.ranks.rank
            few = rows(batch.inputs, slice(0, MIN_ROWS))
            reached = self.ranks.objects(self._reached(forward, few, trained) if has_rows else None)[source]
            if reached is None:
                raise SingleSampleError
            used = [parameter for parameter, is_used in zip(trained, reached, strict=True) if is_used]
            self._wrapped = DistributedDataParallel(_Trained(used))
            # DDP orders its buckets by the first backward, and the ranks agree on them in the second forward. Here, as
            # later a rank without rows, or short of memory, calls it at another moment than the rest.
            with buffers_restored(self.model), preserved_randomness():
                (self._wrapped(forward, few).sum() if has_rows else self._wrapped(None, None)).backward()
            self._wrapped(None, None).backward()
            for parameter in used:
                parameter.grad = None
        return self._wrapped

    def _reached(self, forward: Forward, few: Inputs, trained: list[nn.Parameter]) -> list[bool] | None:
        """Return whether the outputs depend on each parameter; None where the network refuses the rows."""
        try:
            with buffers_restored(self.model), preserved_randomness(), torch.enable_grad():
                gradients = torch.autograd.grad(forward(few).sum(), trained, allow_unused=True)
        except SingleSampleError:
            return None
        return [gradient is not None for gradient in gradients]


class SharedStep:
    """One step on the rows of this rank, which may be attempted several times if memory is short.

    Args:
        live: The live part on all ranks.
        batch: The rows of this rank; possibly none.
    """

    def __init__(self, live: SharedLive, batch: Batch) -> None:
        self._live, self._batch = live, batch
        self._seed = live.draw_seed()
        self._gradient: torch.Tensor | None = None
        self._loss = 0.0
        self.count = 0  # rows of the whole batch; 0 before the exchange
        self.is_refused = False  # by the network of some rank, as all of them know

    def refuse(self) -> None:
        """Tell the other ranks that this one cannot train on its rows."""
        if not self.is_refused:
            self._live.reset()
            self._live.ranks.exchange(None, phase="a training batch", is_refused=True)

    def backward(
        self,
        forward: Forward,
        loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
        parts: list[Batch],
        scale: Callable[[torch.Tensor], torch.Tensor],
    ) -> float:
        """Add up the gradients of the whole batch's loss on all ranks, and return that loss.

        Args:
            forward: Function from inputs to outputs.
            loss_of: Function from outputs and their batch to the loss.
            parts: The rows of this rank, in parts that fit into memory.
            scale: Scales a loss before its backward pass.

        Raises:
            SingleSampleError: A rank cannot train on its rows.
        """
        live, batch = self._live, self._batch
        try:
            wrapped = live.wrapped(forward, batch)
        except SingleSampleError:
            self.is_refused = True
            raise
        outputs = None
        if len(batch) and (len(parts) > 1 or self._gradient is not None):
            if self._gradient is None:
                with buffers_restored(live.model), torch.no_grad(), preserved_randomness(self._seed):
                    outputs = torch.cat([forward(part.inputs) for part in parts])
        elif len(batch) and wrapped is not None:
            with preserved_randomness(self._seed):
                outputs = wrapped(forward, batch.inputs)
        if self._gradient is None:
            self._exchange(outputs, loss_of, scale)
        if self._gradient is None or wrapped is None:  # the loss is not finite, or no rank has rows
            live.reset()
            return self._loss
        if not len(batch):
            with live.ranks.naming_failures():
                wrapped(None, None).backward()
        elif len(parts) == 1 and outputs is not None:
            self._backward_on_all(outputs, self._gradient)
        else:
            *gradients, last = self._gradient.split([len(part) for part in parts])
            with preserved_randomness(self._seed):
                for part, gradient in zip(parts[:-1], gradients, strict=True):
                    with wrapped.no_sync():
                        wrapped(forward, part.inputs).backward(gradient)
                self._backward_on_all(wrapped(forward, parts[-1].inputs), last)
        return self._loss

    def _backward_on_all(self, outputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Run the backward pass during which DDP adds up the gradients; it cannot be repeated on one rank alone."""
        with self._live.ranks.naming_failures():
            try:
                outputs.backward(gradient)
            except torch.OutOfMemoryError as error:
                raise RunError(
                    f"{outputs.device} has no memory for the backward pass of {len(outputs)} photos, for which the "
                    f"other ranks wait. Try a smaller {option('batch_size')}."
                ) from error

    def _exchange(
        self,
        outputs: torch.Tensor | None,
        loss_of: Callable[[torch.Tensor, Batch], torch.Tensor],
        scale: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Compute the loss of the whole batch, and its gradient by the outputs of this rank."""
        ranks, batch = self._live.ranks, self._batch
        own_rows = None if outputs is None else (outputs.detach(), batch.targets, batch.others)
        whole, own, self.is_refused = ranks.exchange(own_rows, phase="a training batch")
        if self.is_refused:
            self._live.reset()
            raise SingleSampleError
        if not whole:
            return
        scores, targets, others = whole
        leaf = scores[own].clone().requires_grad_()
        scores = torch.cat([scores[: own.start], leaf, scores[own.stop :]])
        loss = loss_of(scores, Batch(scores, targets, others, batch.share))
        self._loss, self.count = loss.item(), len(targets)
        if loss.isfinite():
            # DDP divides by the number of ranks, as if each had a loss of its own.
            (gradient,) = torch.autograd.grad(scale(loss), leaf, allow_unused=True)
            self._gradient = (torch.zeros_like(leaf) if gradient is None else gradient) * ranks.size
