"""Gradual unfreezing: which layers start to train at which epoch, and how they join the running optimizer.

Source: Howard and Ruder 2018, https://arxiv.org/abs/1801.06146, section 3.3.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from regraft.arguments import check_arguments
from regraft.errors import ConfigError, SelectionError
from regraft.freezing.flags import FreezeReport, freeze, unfreeze
from regraft.freezing.groups import param_groups
from regraft.freezing.patterns import select_parameters
from regraft.freezing.state import FreezeState

ALL = "all"
EXPRESSION = "re:"
CLOSED_KINDS = (  # with lists or schedules of their own beside the base rates, from which a new group would be missing
    torch.optim.lr_scheduler.OneCycleLR,
    torch.optim.lr_scheduler.CyclicLR,
    torch.optim.lr_scheduler.SequentialLR,
    torch.optim.lr_scheduler.ChainedScheduler,
    torch.optim.lr_scheduler.ReduceLROnPlateau,
    torch.optim.swa_utils.SWALR,
)


@dataclass(frozen=True)
class Stage:
    """A number of epochs, and what becomes trainable with the first: patterns of layers, `head` or `all`."""

    patterns: tuple[str, ...]
    epochs: int


@dataclass(frozen=True, repr=False)
class Schedule:
    """Consecutive stages; layers of earlier stages stay trainable.

    In your own loop:

        schedule = Schedule.parse("head:3,layer4:5,all:10")
        schedule.start(model)
        optimizer = build_optimizer("adamw", model, lr=1e-3)
        for epoch in range(1, schedule.epochs + 1):
            schedule.advance(epoch, model, optimizer, lr=1e-3)
            ...
    """

    stages: tuple[Stage, ...]

    def __repr__(self) -> str:
        return f"Schedule.parse({','.join(map(_as_text, self.stages))!r})"

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Read `"head:3,layer4+layer3:5,all:10"`: for each stage patterns, joined by `+`, and a number of epochs.

        `head` is the classifier where no layer has that name, `all` everything. A regular expression with a `+` or a
        comma stands in quotes.

        Raises:
            ConfigError: The text is of another form.

        >>> Schedule.parse("head:3,layer4:5,all:10").epochs
        18
        >>> Schedule.parse("head+'re:blocks[.](8|9|1[0-9]+)':3").stages[0].patterns
        ('head', 're:blocks[.](8|9|1[0-9]+)')
        """
        check_arguments(Schedule.parse, locals())
        stages = []
        for part in _split(text, ","):
            patterns, colon, epochs = part.strip().rpartition(":")
            layers = [pattern.strip() for pattern in _split(patterns, "+")]
            if any(layer.startswith(EXPRESSION) for layer in layers[:-1]):
                raise ConfigError(
                    f"'{patterns}' in the schedule '{text}' has a + after a regular expression, which may be a part of "
                    "it or join the next layer. Put the expression in quotes, as in \"'re:blocks[.][0-9]+'+head:3\"."
                )
            is_stage = colon and all(_unquoted(layer) for layer in layers) and epochs.strip().isdecimal()
            if not is_stage or int(epochs) < 1:
                hint = " A regular expression with a comma needs quotes: 're:…':3." if EXPRESSION in text else ""
                raise ConfigError(
                    f"'{part.strip()}' in the schedule '{text}' is no stage. Expected LAYERS:EPOCHS, as in "
                    f"'head:3,layer4:5,all:10'.{hint}"
                )
            stages.append(Stage(tuple(map(_unquoted, layers)), int(epochs)))
        return cls(tuple(stages))

    @property
    def epochs(self) -> int:
        """Number of epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    def start(self, model: nn.Module) -> FreezeReport:
        """Freeze everything but what the first stage trains.

        Raises:
            SelectionError: A pattern of any stage selects nothing. Nothing was changed.
        """
        check_arguments(Schedule.start, locals())
        for stage in self.stages:
            if not select_parameters(model, *_patterns(stage)):
                raise SelectionError(
                    f"'{'+'.join(stage.patterns)}' selects no parameters of {type(model).__name__}: nothing to thaw."
                )
        freeze(model)
        return unfreeze(model, *_patterns(self.stages[0]))

    def advance(
        self,
        epoch: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        lr: float,
        weight_decay: float = 0.0,
        **rates: Any,
    ) -> FreezeReport | None:
        """Begin an epoch: unfreeze the layers of a stage that begins with it, and add them to the optimizer.

        The optimizer keeps its state of the other parameters.

        Args:
            epoch: From 1.
            model: The model that `start` was called on.
            optimizer: Gets the newly trainable parameters with the rates that `param_groups` gives them.
            scheduler: The learning-rate scheduler of the optimizer; new groups join it at its current step.
            lr: See `param_groups`, as `weight_decay` and the rest.
            weight_decay: See `param_groups`.
            **rates: `layer_decay`, `backbone_lr`, `no_decay`.

        Returns:
            The changes; None if no stage begins with this epoch.

        Raises:
            ConfigError: `scheduler` is of a kind that new groups cannot join, or the rates contradict each other.
                Nothing was changed.
        """
        check_arguments(Schedule.advance, locals())
        begins = 1
        for stage in self.stages:
            if begins == epoch and stage is not self.stages[0]:
                require_growing(scheduler)
                state = FreezeState.of(model)
                report = unfreeze(model, *_patterns(stage))
                try:
                    groups = param_groups(model, lr, weight_decay, **rates)
                except BaseException:
                    state.put_back()
                    raise
                add_trainable(optimizer, groups, scheduler)
                return report
            begins += stage.epochs
        return None


def add_trainable(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> int:
    """Add the parameters of `groups` that a running optimizer does not contain yet, and return their number.

    They join the group of the same rate and decay, or a new group at the current step of the learning-rate schedule.
    The optimizer state of other parameters (momentum and the like) does not change.
    """
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    added = 0
    for group in groups:
        new = [parameter for parameter in group["params"] if id(parameter) not in known]
        if not new:
            continue
        added += len(new)
        existing = next((own for own in optimizer.param_groups if _alike(own, group)), None)
        if existing is not None:
            existing["params"].extend(new)
            continue
        add_group(optimizer, {**group, "params": new}, scheduler)
    return added


def add_group(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> None:
    """Add a group to a running optimizer and its scheduler; `lr` is that at the start of the schedule."""
    first = optimizer.param_groups[0]
    factor = first["lr"] / first["initial_lr"] if first.get("initial_lr") else 1.0
    optimizer.add_param_group({**group, "initial_lr": group["lr"], "lr": group["lr"] * factor})
    if scheduler is not None:
        scheduler.base_lrs.append(group["lr"])
        if isinstance(scheduler, (torch.optim.lr_scheduler.LambdaLR, torch.optim.lr_scheduler.MultiplicativeLR)):
            scheduler.lr_lambdas.append(scheduler.lr_lambdas[0])


def require_growing(scheduler: torch.optim.lr_scheduler.LRScheduler | None) -> None:
    """Refuse a schedule that new groups cannot join.

    Raises:
        ConfigError: It is of such a kind.
    """
    if scheduler is None:
        return
    if not hasattr(scheduler, "base_lrs") or isinstance(scheduler, CLOSED_KINDS):
        raise ConfigError(
            f"new layers cannot join the rates of a running {type(scheduler).__name__}. Use LambdaLR, StepLR, "
            "CosineAnnealingLR or another with one base rate a group. Nothing was changed."
        )


def _alike(own: dict[str, Any], group: dict[str, Any]) -> bool:
    return own.get("initial_lr", own["lr"]) == group["lr"] and own["weight_decay"] == group["weight_decay"]


def _patterns(stage: Stage) -> tuple[str, ...]:
    return tuple("" if pattern == ALL else pattern for pattern in stage.patterns)


def _as_text(stage: Stage) -> str:
    """Return a stage as `Schedule.parse` reads it."""
    quoted = [f"'{pattern}'" if set(pattern) & set(",+") else pattern for pattern in stage.patterns]
    return f"{'+'.join(quoted)}:{stage.epochs}"


def _split(text: str, separator: str) -> list[str]:
    """Split a text where the separator stands outside of quotes."""
    return re.split(rf"{re.escape(separator)}(?=(?:[^'\"]|'[^']*'|\"[^\"]*\")*$)", text)


def _unquoted(pattern: str) -> str:
    return pattern[1:-1] if pattern[:1] in ("'", '"') and pattern[-1:] == pattern[:1] and len(pattern) > 1 else pattern
