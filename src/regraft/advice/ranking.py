"""Rank several networks for the same data by what their heads reach on photos left out."""

from collections.abc import Sequence

from regraft.advice.result import Advice, Ranking


def rank(advices: Sequence[Advice]) -> Ranking:
    """Return the advices, ranked by the cross-validated score of a head; within one standard error, the faster first.

    All scores are of the same photos in the same folds, so each network has cost its one pass and nothing more.
    """
    known = [advice for advice in advices if advice.head_score is not None]
    unknown = [advice for advice in advices if advice.head_score is None]
    undetermined = tuple(f"{advice.model} could not be ranked: see below." for advice in unknown)
    if not known:
        return Ranking(tuple(advices), "no network could be probed, so the order is that of the call", undetermined)
    best = max(known, key=lambda advice: advice.head_score or 0.0)
    limit = (best.head_score or 0.0) - (best.depths[-1].error or 0.0)
    ranked = sorted(
        known,
        key=lambda advice: (
            (advice.head_score or 0.0) < limit,
            advice.pass_s if (advice.head_score or 0.0) >= limit else -(advice.head_score or 0.0),
        ),
    )
    first = ranked[0]
    if len(known) == 1:
        reason = "it is the only one that could be probed"
    elif first is best:
        reason = f"a head on it gets {_share(first)} of the photos left out, the best of {len(known)}"
    else:
        reason = (
            f"a head on it gets {_share(first)} of the photos left out, within one standard error of the best "
            f"({best.model}, {_share(best)}), and its pass takes less time"
        )
    return Ranking((*ranked, *unknown), reason, undetermined)


def _share(advice: Advice) -> str:
    return (
        f"{advice.head_score or 0.0:.1%}" if advice.task == "classification" else f"R² {advice.head_score or 0.0:.3f}"
    )
