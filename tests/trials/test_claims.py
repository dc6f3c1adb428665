"""The two claims, from points that are written out."""

import numpy as np
import pytest

from regraft.trials.claims import Point, difference, images_claim, seconds_claim

PHOTOS, CHANCE = 100, 0.5


def point(
    images: str, count: int, *accuracies: float, curves: tuple[tuple[tuple[float, float], ...], ...] = ()
) -> Point:
    right = tuple("1" * round(PHOTOS * accuracy) + "0" * round(PHOTOS * (1 - accuracy)) for accuracy in accuracies)
    return Point(images, count, accuracies, right, curves)


SCRATCH = point("all", 200, 0.70, 0.72, 0.71)


def ask(*points: Point, scratch: Point = SCRATCH) -> tuple[str, float | None, str]:
    claim = images_claim("linear probe", points, scratch, CHANCE)
    return claim.verdict, claim.value, claim.text


def test_difference_adds_the_variances_of_seeds_and_of_photos() -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, (2, 3, PHOTOS))
    one, other = (
        Point("5", 10, tuple(rows.mean(1)), tuple("".join(map(str, row)) for row in rows), ()) for rows in right
    )
    mean, error = difference(one, other)
    apart = right[0] - right[1]
    assert mean == pytest.approx(apart.mean())
    assert error**2 == pytest.approx(np.var(apart.mean(1), ddof=1) / 3 + np.var(apart.mean(0), ddof=1) / PHOTOS)


def test_images_claim_names_the_fewest_images_that_are_clearly_enough() -> None:
    assert ask(
        point("5", 10, 0.65, 0.66, 0.64), point("10", 20, 0.85, 0.86, 0.87), point("all", 200, 0.9, 0.9, 0.9)
    ) == (
        "yes",
        20,
        "Linear probe reaches the from-scratch accuracy of all 200 images (0.710) with 20 images (10 a class): 0.860, "
        "a difference of +0.150 ± 0.070. That is 1/10 of the images.",
    )
    assert "with 10 images (5 a class), the fewest that were measured:" in ask(point("5", 10, 0.9, 0.9, 0.9))[2]


def test_images_claim_counts_no_crossing_that_is_undone() -> None:
    verdict, value, text = ask(
        point("5", 10, 0.9, 0.9, 0.9), point("20", 40, 0.5, 0.5, 0.5), point("all", 200, 0.9, 0.9, 0.9)
    )
    assert (verdict, value) == ("no", 200)
    assert text.startswith("Linear probe needs as many images to reach the from-scratch accuracy")


def test_images_claim_says_that_it_is_never_reached() -> None:
    verdict, value, text = ask(point("5", 10, 0.4, 0.4, 0.4), point("all", 200, 0.5, 0.5, 0.5))
    assert (verdict, value) == ("no", None)
    assert text.startswith(
        "Linear probe does not reach the from-scratch accuracy of all 200 images (0.710). It has 0.500 with all 200 "
        "images, a difference of -0.210 ±"
    )


def test_images_claim_leaves_open_what_is_within_the_error() -> None:
    verdict, value, text = ask(point("all", 200, 0.69, 0.70, 0.71))
    assert (verdict, value) == ("undetermined", None)
    assert text.startswith("Linear probe: cannot be determined whether it reaches the from-scratch accuracy")
    verdict, value, text = ask(point("5", 10, 0.71, 0.73, 0.72), point("10", 20, 0.9, 0.9, 0.9))
    assert (verdict, value) == ("yes", 20)
    assert "with 10 images (5 a class) (0.720), but that difference is within the error" in text
    assert text.endswith("It is clearly above with 20 images (10 a class).")
    assert ask(point("5", 10, 0.71, 0.73, 0.72), point("all", 200, 0.9, 0.9, 0.9))[0] == "undetermined"


def test_images_claim_stays_clear_where_more_images_are_above_within_the_error() -> None:
    verdict, value, text = ask(point("5", 10, 0.9, 0.9, 0.9), point("10", 20, 0.71, 0.73, 0.72))
    assert (verdict, value) == ("yes", 10)
    assert "reaches the from-scratch accuracy" in text


def test_images_claim_of_one_seed_says_what_is_unknown() -> None:
    verdict, _, text = ask(point("5", 10, 0.95), scratch=point("all", 200, 0.7))
    assert verdict == "yes"
    assert text.endswith("With one seed, how much another draw of photos would change this is unknown.")


def test_images_claim_means_nothing_beside_a_scratch_at_chance() -> None:
    verdict, value, text = ask(point("5", 10, 0.9, 0.9, 0.9), scratch=point("all", 200, 0.55, 0.56, 0.54))
    assert (verdict, value) == ("undetermined", None)
    assert "not clearly more than always answering the most frequent class (0.500): to reach that means nothing" in text


def timed(*runs: tuple[float, ...]) -> Point:
    """Return a point whose runs reach 0.5, 0.7 and 0.9 after these seconds; a run of one second stays at 0.6."""
    heights = (0.5, 0.7, 0.9)
    curves = tuple(tuple(zip(run, heights if len(run) > 1 else (0.6,), strict=True)) for run in runs)
    return point("all", 200, *(curve[-1][1] for curve in curves), curves=curves)


SLOW = point("all", 200, 0.7, 0.7, curves=(((10.0, 0.6), (20.0, 0.7), (30.0, 0.7)), ((10.0, 0.7), (30.0, 0.7))))


@pytest.mark.parametrize(
    ("runs", "verdict", "value", "part"),
    [
        (
            ((1.0, 2.0, 3.0), (1.0, 5.0, 9.0)),
            "yes",
            20**0.5,
            "is 4.47× faster to the same accuracy (from 2 to 10 over 2",
        ),
        (((1.0, 40.0, 50.0), (1.0, 20.0, 30.0)), "no", 0.5, "is 2× slower to the same accuracy"),
        (((1.0, 10.0, 20.0), (1.0, 20.0, 30.0)), "undetermined", 1.0, "no difference in time is shown (from 0.5 to 2"),
        (((1.0, 2.0, 3.0), (1.0,)), "undetermined", None, "with 1 of 2 seeds, and is then 10× as fast"),
        (((1.0,), (1.0,)), "no", None, "does not reach the from-scratch accuracy (0.700) with all 200 images"),
    ],
)
def test_seconds_claim_compares_the_first_epochs_that_have_the_accuracy(
    runs: tuple[tuple[float, ...], ...], verdict: str, value: float | None, part: str
) -> None:
    claim = seconds_claim("LP-FT", timed(*runs), SLOW, CHANCE)
    assert claim.verdict == verdict
    assert claim.value == (None if value is None else pytest.approx(value))
    assert part in claim.text


def test_seconds_claim_means_nothing_beside_a_scratch_at_chance() -> None:
    claim = seconds_claim("LP-FT", timed((1.0, 2.0, 3.0)), point("all", 200, 0.51, curves=(((1.0, 0.51),),)), CHANCE)
    assert claim.verdict == "undetermined"
    assert "not clearly better than chance (0.500). With one seed" in claim.text
