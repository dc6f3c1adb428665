"""Choose learning rate, weight decay and initial weights of a head by cross-validation.

The training photos are split into folds. For each choice and fold, a head is trained on the other folds and evaluated
on this one. A linear head starts from its own weights, or from ridge regression, which is hard to beat on few photos;
the smallest rate hardly changes these. All heads are trained together (`torch.func.vmap`), which costs little more than
training one: a head is so small that a call takes longer than its arithmetic. Validation photos are not used.

The computation is in the dtype of the head's weights, whatever the precision of the run: a small head gains nothing
from fewer bits, and differences of losses are compared.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from regraft.anatomy.modes import preserved_randomness
from regraft.freezing.groups import undecayed_names
from regraft.progress import SILENT, Progress
from regraft.training.checks.targets import fit_targets
from regraft.training.features.batches import FeatureBatches
from regraft.training.heads.ridge import is_solvable, linear_head, ridge
from regraft.training.loop import main_output
from regraft.training.losses import Loss

RATES = (1e-5, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the smallest leaves a start from ridge regression nearly unchanged
DECAYS = (0.05, 1.0)
FOLDS = 5
MAX_EPOCHS = 8  # enough to compare choices; longer training changes little
MAX_PARAMETERS = 4_000_000  # all heads together
MIN_PHOTOS, MAX_PHOTOS = 40, 4_000
MAX_BYTES = 2**30  # of the features in the sweep
BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's, https://arxiv.org/abs/1711.05101


@dataclass(frozen=True)
class HeadChoice:
    """Options of a head: learning rate, weight decay, and whether it starts from `ridge`."""

    lr: float
    weight_decay: float
    starts_from_ridge: bool


@dataclass(frozen=True)
class Sweep:
    """Results of the cross-validation.

    Attributes:
        tried: The choices.
        losses: Mean loss of each choice on held-out folds.
        best: The choice with the lowest loss, or one hardly worse that stays nearer to ridge regression.
        folds: Number of heads that were trained for each choice.
    """

    tried: tuple[HeadChoice, ...]
    losses: tuple[float, ...]
    best: HeadChoice
    folds: int = FOLDS

    def __str__(self) -> str:
        least: dict[float, float] = {}
        for choice, loss in zip(self.tried, self.losses, strict=True):
            least[choice.lr] = min(loss, least.get(choice.lr, math.inf))
        by_rate = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in least.items())
        best = self.best
        start = ", starting from ridge regression" if best.starts_from_ridge else ""
        return (
            f"learning rate {best.lr:g}, weight decay {best.weight_decay:g}{start}, of {len(self.tried) * self.folds} "
            f"heads trained together "
            f"(loss on photos not learned from, by rate: {by_rate})"
        )


def sweep_heads(
    live: nn.Module,
    batches: FeatureBatches,
    criterion: Loss,
    *,
    epochs: int,
    decays: tuple[float, ...],
    may_start_from_ridge: bool,
    seed: int,
    progress: Progress = SILENT,
) -> Sweep | None:
    """Train heads with several options, and return their losses; `live` is not changed.

    Args:
        live: The part of a network that takes the features.
        batches: Training features and targets.
        criterion: The loss, which has been tried on the head; its own state is not changed.
        epochs: Epochs of the run itself; the sweep trains for at most `MAX_EPOCHS`.
        decays: Weight decays to try, of weight matrices.
        may_start_from_ridge: Whether to try that start as well, if every fold has a solution.
        seed: Random seed of the folds, the order of the photos, and the initial weights.
        progress: Counts the steps.

    Returns:
        None if a sweep is impossible: too few photos, too large a head, or layers that vmap cannot train.
    """
    size = sum(parameter.numel() for parameter in live.parameters() if parameter.requires_grad)
    photos = min(len(batches.dataset), MAX_PHOTOS)
    is_large = 2 * size * len(decays) * len(RATES) * FOLDS > MAX_PARAMETERS
    is_large |= photos * batches.features.row_bytes > MAX_BYTES
    if is_large or photos < MIN_PHOTOS:
        return None
    generator = torch.Generator().manual_seed(seed)
    folds = torch.randperm(len(batches.dataset), generator=generator)[: photos // FOLDS * FOLDS].view(FOLDS, -1)
    train_rows = torch.stack([torch.cat([*folds[:fold], *folds[fold + 1 :]]) for fold in range(FOLDS)])
    with preserved_randomness(seed):
        tried, heads = _initial_heads(live, batches, train_rows, decays, may_start_from_ridge=may_start_from_ridge)
    optimizer = _AdamW(heads, tried, undecayed_names(live, ("bias", "norm")))
    loss = copy.deepcopy(criterion) if isinstance(criterion, nn.Module) else criterion

    def losses_of(rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        tensors, targets = batches.pick(rows.flatten(), draws.flatten())
        by_fold = tuple(tensor.unflatten(0, rows.shape) for tensor in tensors)

        def loss_of(parameters: Any, tensors: tuple[torch.Tensor, ...], targets: torch.Tensor) -> torch.Tensor:
            outputs = main_output(functional_call(live, parameters, tensors))
            return loss(outputs, fit_targets(loss, outputs, targets))

        # Each choice has targets of its own, as losses such as F.mse_loss fail under vmap where scores alone are many.
        of_choices = vmap(loss_of, in_dims=(0, None, 0), randomness="different")
        by_choice = targets.view(rows.shape)[:, None].expand(-1, len(tried), -1)
        return vmap(of_choices, randomness="different")(heads, by_fold, by_choice)

    try:
        with preserved_randomness(seed):
            live.train()
            steps = list(_steps(train_rows, batches.batch_size, min(epochs, MAX_EPOCHS), generator))
            for step, rows in enumerate(progress.track(steps, "choosing the learning rate", len(steps))):
                draws = torch.randint(2**62, rows.shape, generator=generator)
                losses_of(rows, draws).sum().backward()
                optimizer.step(0.5 * (1 + math.cos(math.pi * step / len(steps))))
            live.eval()
            with torch.no_grad():
                fold_losses = losses_of(folds, torch.zeros_like(folds))  # (F, P)
    except Exception:  # batch norm in the head, a loss that branches or leaves torch, memory, …
        return None
    finally:
        live.train()
    return Sweep(tried, tuple(fold_losses.mean(0).nan_to_num(math.inf).tolist()), tried[_simplest(tried, fold_losses)])


def _simplest(tried: tuple[HeadChoice, ...], losses: torch.Tensor) -> int:
    """Return the index of the best choice, or of one hardly worse that stays nearer to ridge regression.

    Hardly worse: within one standard error of the lowest mean loss (the one-standard-error rule), as differences below
    it are noise. Source: Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.

    Args:
        tried: The P choices.
        losses: Loss of each fold and choice, (F, P).
    """
    means = losses.mean(0).nan_to_num(math.inf)
    best = int(means.argmin())
    limit = means[best] + losses[:, best].std() / math.sqrt(len(losses))
    near = [number for number, choice in enumerate(tried) if choice.starts_from_ridge and means[number] <= limit]
    return min(near, key=lambda number: tried[number].lr, default=best)


def _initial_heads(
    live: nn.Module,
    batches: FeatureBatches,
    train_rows: torch.Tensor,
    decays: tuple[float, ...],
    *,
    may_start_from_ridge: bool,
) -> tuple[tuple[HeadChoice, ...], dict[str, torch.Tensor]]:
    """Return the choices, and the initial parameters (F, P, …) of the heads for F folds and P choices."""
    drawn = [_initial_weights(live, fold) for fold in range(FOLDS)]
    solved = [ridge_start(live, batches, rows) for rows in train_rows] if may_start_from_ridge else [None]
    by_fold = [[weights] for weights in drawn]
    if None not in solved:
        by_fold = [[weights, start] for weights, start in zip(drawn, solved, strict=True)]
    pairs = [(rate, decay) for decay in decays for rate in RATES]
    tried = tuple(HeadChoice(*pair, bool(start)) for start in range(len(by_fold[0])) for pair in pairs)
    heads = {
        name: torch.stack([torch.stack([start[name] for start in starts for _ in pairs]) for starts in by_fold])
        for name in drawn[0]
    }
    return tried, {name: tensor.requires_grad_() for name, tensor in heads.items()}


def ridge_obstacle(live: nn.Module, batches: FeatureBatches, rows: torch.Tensor) -> str | None:
    """Return why `ridge` cannot give `live` its initial weights, as text; None if it can be tried."""
    features, targets = batches.pick(rows[:2], torch.zeros_like(rows[:2]))
    head, views = linear_head(live, features), batches.features.views
    if head is None:
        return "what is trained is not one linear layer with a bias"
    width, outputs = head[1].in_features, head[1].out_features
    if targets.is_floating_point() and outputs != 1:
        return f"the head gives {outputs} values for one number"
    if not is_solvable(len(rows), width, outputs, views=views):
        return (
            f"{len(rows)} photos × {views} with {width} features and {outputs} outputs are too many or too few for it"
        )
    return None


def ridge_start(live: nn.Module, batches: FeatureBatches, rows: torch.Tensor) -> dict[str, torch.Tensor] | None:
    """Return initial weights by `ridge` on some photos in all of their views; None if it has no solution."""
    if ridge_obstacle(live, batches, rows) is not None:
        return None
    views = batches.features.views
    (features,), targets = batches.pick(rows.repeat_interleave(views), torch.arange(views).repeat(len(rows)))
    head = linear_head(live, (features[:2],))
    assert head is not None
    path, layer = head
    solution = ridge(features, targets, layer.out_features, views=views)
    if solution is None:
        return None
    weight, bias = (tensor.to(layer.weight.dtype) for tensor in solution)
    return {f"{path}.weight".lstrip("."): weight, f"{path}.bias".lstrip("."): bias}


def _initial_weights(live: nn.Module, number: int) -> dict[str, torch.Tensor]:
    """Return the trainable parameters as they are (number 0), or reset if their layers have `reset_parameters`."""
    trainable = {name for name, parameter in live.named_parameters() if parameter.requires_grad}
    drawn = {}
    for path in {name.rpartition(".")[0] for name in trainable}:
        layer: Any = copy.deepcopy(live.get_submodule(path))
        if number and hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        drawn |= {f"{path}.{name}".lstrip("."): value.detach() for name, value in layer.named_parameters(recurse=False)}
    return {name: drawn[name] for name, _ in live.named_parameters() if name in trainable}


class _AdamW:
    """AdamW for parameters (F, P, …) of many heads, with a learning rate and weight decay for each head."""

    def __init__(self, heads: dict[str, torch.Tensor], tried: Sequence[HeadChoice], undecayed: set[str]) -> None:
        self._heads, self._count = heads, 0
        self._rates = torch.tensor([choice.lr for choice in tried]).expand(FOLDS, -1)
        decays = torch.tensor([choice.weight_decay for choice in tried]).expand(FOLDS, -1)
        self._decays = {name: torch.zeros_like(decays) if name in undecayed else decays for name in heads}
        self._moments: dict[str, Any] = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in heads.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step with all learning rates times a factor, and clear the gradients."""
        self._count += 1
        for name, parameter in self._heads.items():
            gradient = parameter.grad
            assert gradient is not None
            first, second = self._moments[name]
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            rate, decay = (_broadcast_to(values, parameter) for values in (self._rates * factor, self._decays[name]))
            deviation = (second / (1 - BETAS[1] ** self._count)).sqrt_().add_(EPSILON)
            parameter.mul_(1 - rate * decay)
            parameter.sub_(rate * (first / (1 - BETAS[0] ** self._count)) / deviation)
            parameter.grad = None


def _broadcast_to(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Reshape (F, P) so that it broadcasts against a parameter (F, P, …), in float32 at least."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return values.to(parameter.device, dtype).reshape(*values.shape, *[1] * (parameter.ndim - values.ndim))


def _steps(rows: torch.Tensor, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches (F, N) of the rows of each fold, reshuffled in each epoch."""
    for _ in range(epochs):
        order = torch.stack([torch.randperm(rows.shape[1], generator=generator) for _ in rows])
        yield from rows.gather(1, order).split(batch_size, dim=1)
