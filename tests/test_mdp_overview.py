"""Exact thresholds by crossings, and the overview behind the explorer's sliders, against solver and oracle."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdp import families
from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine, Table
from mdp.crossings import crossings
from mdp.evaluate import evaluate
from mdp.overview import RANGES, Settings, overview
from mdp.policy import ThresholdTable
from mdp.problem import Persistent, StoppingProblem
from mdp.solve import solve


@st.composite
def settings(draw):
    """Any settings, the ends of their ranges often among them."""
    values = {}
    for name, (low, high) in RANGES.items():
        inside = st.integers(low, 12) if name == "max_candidates" else st.floats(low, high)
        values[name] = draw(st.sampled_from([low, high]) | inside if name != "max_candidates" else inside)
    return Settings(**values)


def three_regimes(cost=None):
    chain = MarkovModulated([[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.5, 0.0, 0.5]], [0.95, 0.5, 0.0], [0.6, 0.4, 0.0])
    return StoppingProblem(chain, cost or Affine(0.2, 1.0, 0.03), max_candidates=5)


def same(first, second, within=1e-9):
    np.testing.assert_allclose(np.minimum(first, 2.0), np.minimum(second, 2.0), atol=within)


@given(settings())
@example(Settings(mean=0.99, dispersion=1.0, persistence=0.99))
@example(Settings(dispersion=0.0))
def test_the_crossings_table_earns_the_exact_optimum(chosen):
    finite = chosen.problem.lower()
    best = families.optimum(finite).throughput
    assert evaluate(finite, ThresholdTable(crossings(finite, best))).throughput == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("chosen", [Settings(), Settings(mean=0.6, verify_slope=2.0), Settings(persistence=0.0)])
def test_thresholds_and_throughput_are_the_solvers(chosen):
    found, solved = overview(chosen), solve(chosen.problem)
    same(found.survival_threshold, solved.survival_threshold)
    assert solved.bounds[0] * (1 - 1e-12) <= found.optimum.throughput <= solved.bounds[1] * (1 + 1e-12)


def test_more_regimes_impossible_acceptance_and_falling_times():
    for cost in (None, Table(0.2, [1.0, 1.0, 0.7, 0.7, 1.5, 1.5])):
        finite = three_regimes(cost).lower()
        same(crossings(finite, families.optimum(finite).throughput), solve(finite).survival_threshold, 1e-6)


def test_a_wrong_rate_gives_another_table():
    """That the comparison above can fail."""
    finite = three_regimes().lower()
    with pytest.raises(AssertionError):
        same(crossings(finite, 1.01 * families.optimum(finite).throughput), solve(finite).survival_threshold, 1e-6)


def test_crossings_refuse_persistent_rounds():
    both = np.full((2, 2), 0.5)
    chain = MarkovModulated(both, [0.9, 0.4], [0.5, 0.5])
    problem = StoppingProblem(chain, Affine(0.2, 1.0), 4, Persistent(both, both))
    with pytest.raises(ValueError, match="persist"):
        crossings(problem.lower(), 1.0)


@given(settings())
def test_nothing_beats_the_optimum_and_equal_speed_is_a_line(chosen):
    found = overview(chosen)
    best = found.optimum.speedup * (1 + 1e-12)
    assert found.best_fixed[0] <= best and found.best_threshold[0] <= best
    assert found.rejection.speedup.max() <= found.best_threshold[0] * (1 + 1e-12)
    tally = found.optimum.tally
    assert found.discard_rate_at(tally.verification_rate) == pytest.approx(float(tally.discard_rate), abs=1e-9)
    for family in (found.fixed, found.rejection):  # slower rules lie beyond the line
        beyond = family.discard_rate - found.discard_rate_at(family.verification_rate)
        assert (beyond >= -1e-9).all()


def test_independent_acceptance_needs_no_adapting():
    found = overview(Settings(dispersion=0.0, draft_time=10.0, verify_time=50.0))
    alike = solve(StoppingProblem(IID(0.8), Affine(0.2, 1.0), 12))
    assert found.optimum.speedup == pytest.approx(alike.speedup, rel=1e-12)
    assert found.best_fixed[0] == pytest.approx(alike.speedup, rel=1e-12)


def test_times_have_no_unit():
    one, ten = (overview(Settings(draft_time=x, verify_time=5 * x, verify_slope=x / 10)) for x in (4.0, 40.0))
    assert one.optimum.speedup == pytest.approx(ten.optimum.speedup, rel=1e-12)
    assert one.optimum.throughput == pytest.approx(10 * ten.optimum.throughput, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", 1.2), ("mean", np.nan), ("draft_time", 0.0), ("draft_time", "ten"), ("max_candidates", 2.5),
     ("max_candidates", True), ("max_candidates", 25), ("persistence", -0.1)],
)  # fmt: skip
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: must be a .*, got {value!r}$"):
        Settings(**{name: value})
