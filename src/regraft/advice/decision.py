"""The rule that turns measurements into a recommendation.

The head alone is the answer unless something speaks against it: it takes the least time, and a network whose features
suit the task is best left as it is. What speaks against it is a layer before the head whose activations tell more about
the targets than the head's features do. Then the last layers have thrown away what this task asks for, and a head,
however good, cannot get it back. The two are compared photo by photo, on photos left out, by squared error: it sees a
difference among a few photos that the number of right ones does not.

How much to train, where the head alone will not do, is read from the gradients. Surgical fine-tuning (arXiv
2210.11466) found that the layers to train are those whose gradient is large beside their weights. So the frozen part
ends before the first block whose relative gradient norm is at least half of the largest, and never after the layer that
tells the most.

With one photo of a class, none can be left out. LogME, which needs none, then stands in for the squared error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from regraft.advice.activations import PIXELS
from regraft.advice.probes import Probe
from regraft.advice.result import Certainty, DepthAdvice
from regraft.wording import option

WORSE = 1.0  # standard errors by which the head must be behind an earlier layer
CLEAR, LIKELY = 3.0, 1.5  # standard errors between the answer and the next one
SHARE_OF_GRADIENT = 0.5  # of the largest relative gradient norm


@dataclass(frozen=True)
class Decision:
    """Index of the recommended depth (None: nothing can be said), how certain it is, why, and what would change it."""

    index: int | None
    certainty: Certainty
    reason: str
    would_change: tuple[str, ...] = ()


def decide(
    depths: Sequence[DepthAdvice],
    probes: dict[str, Probe],
    logmes: dict[str, float],
    *,
    photos: int,
    epochs: int,
    limit_s: float | None = None,
) -> Decision:
    """Return the depth to train from.

    Args:
        depths: From everything to the head alone, with at least one boundary between.
        probes: By the path of the last frozen layer; under `pixels` that of the photos themselves.
        logmes: LogME by the same names, for where there are no probes.
        photos: Number of photos that were probed.
        epochs: Of the training that follows.
        limit_s: Seconds that it may take; None: no limit.
    """
    head = depths[-1].layer or ""
    if head in probes:
        decision = _by_probes(depths, probes, head, photos)
    elif head in logmes:
        decision = _by_logme(depths, logmes, head)
    else:
        return Decision(None, "open", "nothing could be measured that tells one depth from another")
    return _within(decision, depths, epochs, limit_s)


def compare(worse: Probe, better: Probe) -> float:
    """Return by how many standard errors the squared errors of one probe are above those of another, photo by photo."""
    differences = worse.losses - better.losses
    if len(differences) < 2:
        return 0.0
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return float(differences.mean()) / error if error > 0 else 0.0 if not differences.any() else math.inf


def _by_probes(depths: Sequence[DepthAdvice], probes: dict[str, Probe], head: str, photos: int) -> Decision:
    errors = {layer: float(np.mean(known.losses)) for layer, known in probes.items()}
    best = min((layer for layer in probes if layer != head), key=errors.__getitem__, default=head)
    behind = compare(probes[head], probes[best]) if best != head else -math.inf
    figures = f"squared error {errors[head]:.2f} against {errors[best]:.2f} on photos left out"
    where = "the pixels tell" if best == PIXELS else f"what '{best}' gives tells"
    distance = abs(behind - WORSE)
    certainty: Certainty = "clear" if distance >= CLEAR else "likely" if distance >= LIKELY else "open"
    more = () if certainty == "clear" else (_more_photos(photos, distance),)
    if behind <= WORSE:
        reason = f"no layer before the head tells more than the head's own features ({figures}, of '{best}')"
        return Decision(len(depths) - 1, certainty, reason, more)
    index = _first_to_train(depths, best)
    reason = (
        f"{where} more than the head's features ({figures}, {behind:.1f} standard errors), so the last layers lack "
        f"what this task asks for{_why_from(depths, index)}"
    )
    return Decision(index, certainty, reason, more)


def _by_logme(depths: Sequence[DepthAdvice], logmes: dict[str, float], head: str) -> Decision:
    """Decide without probes."""
    best = max((layer for layer in logmes if layer not in (head, PIXELS)), key=logmes.__getitem__, default=head)
    more = ("Two photos or more of each class: then some can be left out, and every depth can be probed.",)
    if best == head or logmes[head] >= logmes[best]:
        return Decision(
            len(depths) - 1, "open", "LogME, the one measure that needs no photo left out, is highest at the head", more
        )
    index = _first_to_train(depths, best)
    reason = (
        f"LogME, the one measure that needs no photo left out, is higher after '{best}' than at the head "
        f"({logmes[best]:.3f} against {logmes[head]:.3f}){_why_from(depths, index)}"
    )
    return Decision(index, "open", reason, more)


def _first_to_train(depths: Sequence[DepthAdvice], best: str) -> int:
    """Return the index of the depth from which to train, where the head alone will not do."""
    last = next((number for number, depth in enumerate(depths) if depth.layer == best), 0)
    norms = [depth.relative_gradient for depth in depths[:-1]]  # that of the head says nothing about the others
    known = [norm for norm in norms if norm is not None]
    if len(known) < len(norms):
        return last
    first = next(number for number, norm in enumerate(known) if norm >= SHARE_OF_GRADIENT * max(known))
    return min(first, last)


def _why_from(depths: Sequence[DepthAdvice], index: int) -> str:
    norm = depths[index].relative_gradient
    return f"; from there on the relative gradients are large ({norm:.2g} in the first part)" if norm else ""


def _more_photos(photos: int, distance: float) -> str:
    """Say how many photos would make it clear: a difference counts in standard errors with the root of their number."""
    if distance <= 0.5:
        return "More photos: with these the two depths cannot be told apart."
    count = math.ceil(photos * (CLEAR / distance) ** 2 / 10) * 10
    return f"More photos: about {count:,} would make it clear, if it stays so."


def _within(decision: Decision, depths: Sequence[DepthAdvice], epochs: int, limit_s: float | None) -> Decision:
    """Choose a later depth where the training would take longer than the budget, and say what more time would give."""
    if decision.index is None:
        return decision
    costs = [depth.epoch_s * epochs if depth.epoch_s is not None else None for depth in depths]
    wanted = costs[decision.index]
    if limit_s is None or wanted is None or wanted <= limit_s:
        if limit_s is None and wanted is not None and decision.index < len(depths) - 1:
            note = (
                f"Less time: these {epochs} epochs take about {_time(wanted)}; {option('budget', 'TIME')} sets a limit."
            )
            return replace(decision, would_change=(*decision.would_change, note))
        return decision
    name = depths[decision.index].name
    more = f"More time: {option('budget', _time(wanted, up=True))} is what {epochs} epochs of '{name}' take."
    for index in range(decision.index + 1, len(depths)):
        cost = costs[index]
        if cost is not None and cost <= limit_s:
            reason = f"{decision.reason}, but {epochs} epochs of '{name}' exceed the budget"
            return Decision(index, "open", reason, (*decision.would_change, more))
    reason = f"{epochs} epochs exceed the budget at every depth; the head alone takes about {_time(costs[-1] or 0.0)}"
    return Decision(None, "open", reason, (*decision.would_change, more))


def _time(seconds: float, *, up: bool = False) -> str:
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))}s" if up else f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes}m" if up else f"{minutes} min"
