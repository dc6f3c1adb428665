"""The rule, on measurements that are made up here."""

from dataclasses import replace

import numpy as np
import pytest

from regraft.advice.activations import PIXELS
from regraft.advice.budget import parse_budget
from regraft.advice.decision import compare, decide
from regraft.advice.probes import Probe
from regraft.advice.ranking import rank
from regraft.advice.result import EVERYTHING, HEAD_ONLY, Advice, DepthAdvice

NORMS = (0.1, 0.2, 0.05, 3.0)  # everything, after a, after b, head only


def depth(number: int, epoch_s: float) -> DepthAdvice:
    name, layer = ((EVERYTHING, None), ("after a", "a"), ("after b", "b"), (HEAD_ONLY, "c"))[number]
    return DepthAdvice(name, layer, None, None, None, NORMS[number], 10, epoch_s, 1, 1)


DEPTHS = [depth(0, 4.0), depth(1, 2.0), depth(2, 1.0), depth(3, 0.1)]


def probes(**means: float) -> dict[str, Probe]:
    """Return probes whose squared errors have these means and differ by photo."""
    noise = np.random.default_rng(0).normal(0, 0.2, 100)
    return {
        name: Probe(1 - mean, 0.03, 0.5, noise + mean + 0.1 * np.cos(np.arange(100) * ord(name[0])), 5, 8)
        for name, mean in means.items()
    }


def decided(**means: float) -> str:
    decision = decide(DEPTHS, probes(**means), {}, photos=100, epochs=10)
    return "nothing" if decision.index is None else DEPTHS[decision.index].name


def test_decide_takes_the_head_unless_an_earlier_layer_tells_more() -> None:
    assert decided(pixels=0.9, a=0.8, b=0.6, c=0.4) == HEAD_ONLY
    assert decided(pixels=0.9, a=0.8, b=0.4, c=0.4) == HEAD_ONLY  # no more than the head: it takes the least time
    assert decided(pixels=0.9, a=0.8, b=0.3, c=0.5) == EVERYTHING  # whose gradient is half of the largest
    assert decided(pixels=0.2, a=0.8, b=0.3, c=0.5) == EVERYTHING


def test_decide_ends_the_frozen_part_before_the_first_large_gradient() -> None:
    flat = [replace(entry, relative_gradient=norm) for entry, norm in zip(DEPTHS, (0.01, 0.02, 0.3, 9), strict=True)]
    assert decide(flat, probes(pixels=0.9, a=0.8, b=0.3, c=0.5), {}, photos=100, epochs=10).index == 2
    assert decide(flat, probes(pixels=0.9, a=0.3, b=0.4, c=0.5), {}, photos=100, epochs=10).index == 1  # 'a' tells most
    blind = [replace(entry, relative_gradient=None) for entry in DEPTHS]
    assert decide(blind, probes(pixels=0.9, a=0.3, b=0.4, c=0.5), {}, photos=100, epochs=10).index == 1


def test_decide_says_how_sure_it_is_and_what_would_change_it() -> None:
    far = decide(DEPTHS, probes(pixels=0.9, a=0.8, b=0.6, c=0.2), {}, photos=100, epochs=10)
    assert (far.certainty, far.would_change) == ("clear", ())
    near = decide(DEPTHS, probes(pixels=0.9, a=0.8, b=0.505, c=0.5), {}, photos=100, epochs=10)
    assert near.certainty in ("open", "likely")
    assert near.would_change[0].startswith("More photos: ")
    lost = decide(DEPTHS, probes(pixels=0.9, a=0.8, b=0.2, c=0.5), {}, photos=100, epochs=10)
    assert "what 'b' gives tells more than the head's features" in lost.reason
    assert "so the last layers lack what this task asks for" in lost.reason
    assert lost.would_change[-1] == "Less time: these 10 epochs take about 40 s; budget=TIME sets a limit."


def test_decide_without_folds_goes_by_logme() -> None:
    head = decide(DEPTHS, {}, {PIXELS: -2, "a": -1.2, "b": -1.1, "c": -1.0}, photos=5, epochs=10)
    deeper = decide(DEPTHS, {}, {PIXELS: -2, "a": -1.2, "b": -0.9, "c": -1.0}, photos=5, epochs=10)
    assert (head.index, head.certainty, deeper.index) == (3, "open", 0)
    assert head.would_change == (
        "Two photos or more of each class: then some can be left out, and every depth can be probed.",
    )
    assert decide(DEPTHS, {}, {}, photos=5, epochs=10).index is None


def test_decide_keeps_to_the_budget() -> None:
    lost = probes(pixels=0.9, a=0.8, b=0.3, c=0.5)
    within = decide(DEPTHS, lost, {}, photos=100, epochs=10, limit_s=41)
    short = decide(DEPTHS, lost, {}, photos=100, epochs=10, limit_s=15)
    none = decide(DEPTHS, lost, {}, photos=100, epochs=10, limit_s=0.5)
    assert (within.index, short.index, none.index) == (0, 2, None)
    assert short.would_change[-1] == "More time: budget='40s' is what 10 epochs of 'everything' take."
    assert "exceed the budget at every depth; the head alone takes about 1 s" in none.reason


def test_compare_counts_in_standard_errors_of_the_differences_by_photo() -> None:
    better, worse = probes(a=0.5)["a"], probes(a=0.5)["a"]
    assert compare(better, worse) == 0.0
    shifted = replace(worse, losses=worse.losses + np.tile([0.1, 0.3], 50))
    assert compare(shifted, better) == pytest.approx(0.2 / (np.tile([0.1, 0.3], 50).std(ddof=1) / 10))


def test_rank_takes_the_faster_of_two_that_cannot_be_told_apart() -> None:
    def network(name: str, score: float | None, pass_s: float) -> Advice:
        last = replace(DEPTHS[3], score=score, error=0.02)
        return Advice(
            name, "", "classification", 9, 2, 0.5, (DEPTHS[0], last), last, "open", "so", (), (), {}, "", 1.0, pass_s
        )

    ranking = rank([network("slow", 0.91, 9.0), network("bad", 0.7, 0.1), network("fast", 0.9, 1.0)])
    assert [advice.model for advice in ranking.advices] == ["fast", "slow", "bad"]
    assert "within one standard error of the best (slow, 91.0%), and its pass takes less time" in ranking.sentence
    unknown = rank([network("one", None, 1.0), network("two", 0.8, 1.0)])
    assert [advice.model for advice in unknown.advices] == ["two", "one"]
    assert unknown.undetermined == ("one could not be ranked: see below.",)


def test_parse_budget_reads_minutes_and_hours() -> None:
    assert [parse_budget(text) for text in ("90s", "10m", "2 h", "7", None)] == [90, 600, 7200, 7, None]
