"""Update a running optimizer after an edit of its model."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.anatomy.paths import is_within
from regraft.arguments import check_arguments
from regraft.errors import ConfigError, SelectionError
from regraft.freezing.groups import undecayed_names
from regraft.freezing.schedule import add_group, require_growing

NO_DECAY = ("bias", "norm")  # as `param_groups` has it
NOT_COPIED = ("params", "param_names", "lr", "initial_lr", "weight_decay")  # from the options of a group into a new one


@dataclass(frozen=True)
class Followed:
    """The result of `follow`.

    Attributes:
        dropped: Names, before the edit, of the parameters that were removed from the optimizer.
        added: Names, after the edit, of the parameters that were added to it.
        kept: Number of parameters that keep their optimizer state.
    """

    dropped: tuple[str, ...]
    added: tuple[str, ...]
    kept: int

    def __str__(self) -> str:
        names = f" ({', '.join(self.added)})" if self.added else ""
        removed = len(self.dropped)
        return f"{removed} parameters dropped, {len(self.added)} added{names}, {self.kept} kept with their state"


def follow(
    optimizer: torch.optim.Optimizer,
    before: nn.Module,
    after: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> Followed:
    """Update an optimizer of `before` in place for `after`, an edit of it.

    Removed parameters are dropped with their state; the state of the others does not change. New trainable parameters
    join an existing group, so that learning-rate schedulers continue: that of the parameter which had the same name, or
    of those in the layer around it; otherwise the group with the highest rate, which is that of the head if the head
    has its own. Among groups of that rate, biases, other vectors and norms join one without weight decay, as in
    `param_groups`, and other parameters one with it. With `lr` or `weight_decay`, new groups are created instead, with
    all other options of the group that the parameters would have joined.

    Parameters of `before` that the optimizer did not contain stay out, and so do frozen parameters of `after`.

    Args:
        optimizer: Contains parameters of `before`.
        before: The network before the edit.
        after: The network after it, which shares the parameters that both have.
        lr: Learning rate of new parameters, at the start of the schedule.
        weight_decay: Weight decay of new parameters; biases, other vectors and norms have none.
        scheduler: The learning-rate scheduler of the optimizer; new groups join it at its current step. Needed
            with `lr` or `weight_decay` only.

    Raises:
        ConfigError: The optimizer holds no parameter of `before`, or keeps one state for all parameters together
            (LBFGS), a rate is no number from 0 up, or new groups cannot join the schedule. Nothing was changed.
        SelectionError: Nothing would be left to train. Nothing was changed.

    >>> before = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> optimizer = torch.optim.SGD(before.parameters(), lr=0.1)
    >>> print(follow(optimizer, before, nn.Sequential(before[0], nn.Linear(2, 3))))
    2 parameters dropped, 2 added (1.weight, 1.bias), 2 kept with their state
    """
    check_arguments(follow, locals())
    _require_usable(optimizer, before, lr, weight_decay)
    owners = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in before.named_parameters()}
    remaining = {id(parameter) for parameter in after.parameters()}
    removed = {key for key in owners if key in names and key not in remaining}
    trainable = {name: parameter for name, parameter in after.named_parameters() if parameter.requires_grad}
    new = {n: p for n, p in trainable.items() if id(p) not in owners and id(p) not in names}
    if not new and not any(id(parameter) in owners for parameter in trainable.values()):
        raise SelectionError(
            "after: nothing of the edited network is trainable that this optimizer holds or may gain. Thaw a layer, as "
            "with regraft.unfreeze. Nothing was changed."
        )
    undecayed = undecayed_names(after, NO_DECAY)
    group_of = {name: owners[id(p)] for name, p in before.named_parameters(remove_duplicate=False) if id(p) in owners}
    targets = {
        name: _choose_group(optimizer, _predecessor(group_of, name), decays=name not in undecayed) for name in new
    }
    if lr is not None or weight_decay is not None:
        require_growing(scheduler)
        groups = _new_groups(targets, new, undecayed, lr, weight_decay)
        _drop(optimizer, removed)
        for group in groups:
            add_group(optimizer, group, scheduler)
    else:
        _drop(optimizer, removed)
        for name, target in targets.items():
            target["params"].append(new[name])
            if "param_names" in target:
                target["param_names"].append(name)
    dropped = tuple(name for key, name in names.items() if key in removed)
    return Followed(dropped, tuple(new), len(owners) - len(removed))


def _require_usable(
    optimizer: torch.optim.Optimizer, before: nn.Module, lr: float | None, weight_decay: float | None
) -> None:
    kind = type(optimizer).__name__
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if known.isdisjoint(id(parameter) for parameter in before.parameters()):
        raise ConfigError(
            f"this {kind} holds no parameter of the network before the edit. "
            "Pass the optimizer that was built for it. Nothing was changed."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            f"{kind} keeps one history for all parameters together, which no edit can follow. Build a new optimizer "
            "for the edited network. Nothing was changed."
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} is {value}, expected a number from 0 up. Nothing was changed.")


def _predecessor(group_of: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the group of the parameter that had a name, or of the last one in the smallest layer around it."""
    around = name
    while around:
        inside = [group for known, group in group_of.items() if is_within(known, around)]
        if inside:
            return inside[-1]
        around = around.rpartition(".")[0]
    return None


def _choose_group(
    optimizer: torch.optim.Optimizer, predecessor: dict[str, Any] | None, *, decays: bool
) -> dict[str, Any]:
    """Return the group that a new parameter joins."""
    groups = optimizer.param_groups
    rate = _rate(predecessor) if predecessor is not None else max(map(_rate, groups))
    near = [group for group in groups if _rate(group) == rate]
    alike = [group for group in near if (group.get("weight_decay", 0) != 0) == decays] or near
    return predecessor if predecessor is not None and any(group is predecessor for group in alike) else alike[-1]


def _new_groups(
    targets: Mapping[str, dict[str, Any]],
    new: Mapping[str, nn.Parameter],
    undecayed: Collection[str],
    lr: float | None,
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Return one group for the new parameters of each rate and decay, with the other options of its target group."""
    groups: dict[tuple[int, float, float | None], dict[str, Any]] = {}
    for name, target in targets.items():
        rate = _rate(target) if lr is None else lr
        decay = target.get("weight_decay")
        if weight_decay is not None and decay is not None:
            decay = 0.0 if name in undecayed else weight_decay
        options = {key: value for key, value in target.items() if key not in NOT_COPIED}
        options |= {"lr": rate} | ({} if decay is None else {"weight_decay": decay})
        group = groups.setdefault((id(target), rate, decay), options | {"params": []})
        group["params"].append((name, new[name]) if "param_names" in target else new[name])
    return list(groups.values())


def _rate(group: dict[str, Any]) -> float:
    """Return the rate at the start of the schedule."""
    return float(group.get("initial_lr", group["lr"]))


def _drop(optimizer: torch.optim.Optimizer, removed: set[int]) -> None:
    for group in optimizer.param_groups:
        left = [position for position, parameter in enumerate(group["params"]) if id(parameter) not in removed]
        for parameter in group["params"]:
            if id(parameter) in removed:
                optimizer.state.pop(parameter, None)
        for key in ("params", "param_names"):  # in place, as some optimizers keep the list itself
            if key in group:
                group[key][:] = [group[key][position] for position in left]
