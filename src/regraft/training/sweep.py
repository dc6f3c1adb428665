"""Choose the learning rate of a head by training many of them together on the same features.

All heads start from the same weights and see the same batches; one call trains them all (`torch.func.vmap`), which
costs little more than training one, as a head is so small that calling it takes longer than computing it. The best is
chosen on photos that are kept back from those to learn from; the validation photos are not touched.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from regraft.freezing.groups import undecayed_names
from regraft.training.features import FeatureBatches
from regraft.training.loop import Engine, main_output
from regraft.training.losses import Loss

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
KEPT_BACK = 0.2  # share of the photos that choose
MOST_PARAMETERS = 2_000_000  # of all heads together
FEWEST_PHOTOS = 40
BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, https://arxiv.org/abs/1711.05101


@dataclass(frozen=True)
class Sweep:
    """What each learning rate came to.

    Attributes:
        rates: The learning rates.
        losses: Mean loss on the photos kept back, for each.
        best: The rate with the least.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    best: float

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(self.rates, self.losses, strict=True))
        return f"learning rate {self.best:g}, of {len(self.rates)} heads trained together (loss on kept back: {tried})"


def sweep_rates(
    live: nn.Module,
    batches: FeatureBatches,
    criterion: Loss,
    engine: Engine,
    *,
    epochs: int,
    weight_decay: float,
    seed: int,
) -> Sweep | None:
    """Train a head with each of several learning rates, and say which did best; `live` itself is not trained.

    Args:
        live: The part of a network that takes the features.
        batches: Features and targets to learn from.
        criterion: The loss.
        engine: Where and in which precision.
        epochs: Passes over the features, as in the run itself.
        weight_decay: Of weight matrices.
        seed: Decides which photos are kept back, and the order of the others.

    Returns:
        None where it cannot be done: too few photos, too large a head, or layers that cannot be trained side by side.
    """
    start = {name: parameter.detach() for name, parameter in live.named_parameters() if parameter.requires_grad}
    count = len(batches.dataset)
    if sum(tensor.numel() for tensor in start.values()) * len(RATES) > MOST_PARAMETERS or count < FEWEST_PHOTOS:
        return None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    kept, learned = order[: round(count * KEPT_BACK)], order[round(count * KEPT_BACK) :]
    heads = {name: tensor.repeat(len(RATES), *[1] * tensor.ndim).requires_grad_() for name, tensor in start.items()}
    undecayed = undecayed_names(live, ("bias", "norm"))
    optimizer = _AdamW(heads, torch.tensor(RATES), {n: 0.0 if n in undecayed else weight_decay for n in heads})

    def losses_of(rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        tensors, targets = batches.pick(rows, draws)

        def loss_of(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            with engine.autocast():
                return criterion(main_output(functional_call(live, parameters, tensors)), targets)

        return vmap(loss_of, randomness="different")(heads)

    try:
        live.train()
        steps = list(_steps(learned, batches.batch_size, epochs, generator))
        for step, rows in enumerate(steps):
            draws = torch.randint(2**62, (len(rows),), generator=generator)
            losses_of(rows, draws).sum().backward()
            optimizer.step(0.5 * (1 + math.cos(math.pi * step / len(steps))))
        live.eval()
        with torch.no_grad():
            losses = losses_of(kept, torch.zeros_like(kept)).tolist()
    except (RuntimeError, ValueError):  # batch norm in the head, a loss that branches, …
        return None
    finally:
        live.train()
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return Sweep(RATES, tuple(losses), RATES[finite.index(min(finite))])


class _AdamW:
    """AdamW for parameters with a leading dimension of heads, each of which has a learning rate of its own."""

    def __init__(self, heads: dict[str, torch.Tensor], rates: torch.Tensor, decays: dict[str, float]) -> None:
        self._heads, self._rates, self._decays, self._count = heads, rates, decays, 0
        self._moments: dict[str, Any] = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in heads.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step with all rates times a factor, and drop the gradients."""
        self._count += 1
        for name, parameter in self._heads.items():
            gradient = parameter.grad
            assert gradient is not None
            first, second = self._moments[name]
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            rate = (self._rates * factor).to(parameter.device, parameter.dtype).view(-1, *[1] * (parameter.ndim - 1))
            deviation = (second / (1 - BETAS[1] ** self._count)).sqrt_().add_(EPSILON)
            parameter.mul_(1 - rate * self._decays[name])
            parameter.sub_(rate * (first / (1 - BETAS[0] ** self._count)) / deviation)
            parameter.grad = None


def _steps(rows: torch.Tensor, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        yield from rows[torch.randperm(len(rows), generator=generator)].split(batch_size)
