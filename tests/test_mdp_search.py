"""The search for counterexamples: what it reports is true, small, and found again."""

import numpy as np
import pytest

from mdp.families import optimum
from mdp.search import FAMILIES, Point, loss, search, shrink

TWO_REGIMES = Point(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([1.0, 0.5]), 0.25, 0.0, 3)


def test_known_losses():
    found = {family: loss(TWO_REGIMES.problem().lower(), family) for family in FAMILIES}
    expected = {"threshold": 2 / 301, "lookahead": 0.0, "fixed": 2 / 301, "one_step": 0.0, "goodput": 2 / 301}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("family", "persistent"), [*((family, False) for family in FAMILIES), ("threshold", True), ("one_step", True)]
)
def test_what_is_found_is_true(family, persistent):
    found = search(family, 2, max_candidates=3, steps=24, seed=5, persistent=persistent)
    assert found.loss == pytest.approx(loss(found.problem.lower(), family), abs=1e-12)
    assert found.simple_loss == pytest.approx(loss(found.simple.lower(), family), abs=1e-12)
    assert found.simple_loss >= 0.9 * found.loss
    low, high = found.certificate
    assert low - 1e-12 <= found.loss <= high + 1e-12


def test_the_same_seed_finds_the_same():
    first, again = (search("fixed", 2, max_candidates=4, steps=24, seed=5).to_dict() for _ in range(2))
    assert first == again


def test_more_steps_find_more():
    few, many = (search("fixed", 2, max_candidates=6, steps=steps, seed=1).loss for steps in (8, 200))
    assert many > few


def test_more_regimes_never_lose_less():
    two = search("fixed", 2, max_candidates=6, steps=100, seed=1)
    three = search("fixed", 3, max_candidates=6, steps=8, seed=1, also=[two])
    assert three.loss >= two.loss - 1e-12


def test_shrinking_keeps_the_loss_and_simplifies():
    rough = Point(
        np.array([[0.48, 0.49, 0.03], [0.97, 0.01, 0.02], [0.3, 0.3, 0.4]]), np.array([0.99, 0.48, 0.31]),
        0.2613, 0.0, 5,
    )  # fmt: skip
    least = 0.8 * loss(rough.problem().lower(), "threshold")
    simple = shrink(rough, "threshold", least)
    finite = simple.problem().lower()
    assert loss(finite, "threshold") >= least > 0
    assert finite.num_regimes == 2 and finite.max_candidates <= 5
    assert finite.transition.max() <= 1.0 and optimum(finite).throughput > 1.0
    for value in [*finite.transition.ravel(), *finite.accept_prob[0], finite.draft_time]:
        assert min(abs(value * parts - round(value * parts)) for parts in range(1, 21)) < 1e-9


@pytest.mark.parametrize(
    ("argument", "message"),
    [({"family": "best"}, "family: must be one of"), ({"num_regimes": 0}, "num_regimes"), ({"steps": 0}, "steps")],
)
def test_arguments_are_checked(argument, message):
    with pytest.raises(ValueError, match=message):
        search(**{"family": "fixed", "num_regimes": 2, **argument})
