"""The phase diagram: each cell is what solving and evaluating it alone gives, and the families are in order."""

import numpy as np
import pytest

from mdp.calibrate import two_regimes
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.phase import phase_diagram
from mdp.problem import StoppingProblem
from mdp.solve import solve

AXES = ([0.0, 0.6, 1.0], [0.0, 0.8], [0.1, 0.3])


@pytest.fixture(scope="module")
def diagram():
    return phase_diagram(0.75, *AXES, max_candidates=6)


def test_every_cell_is_its_problem(diagram):
    for at in np.ndindex(diagram.optimum.shape):
        spread, staying, ratio = (axis[i] for axis, i in zip(AXES, at, strict=True))
        problem = StoppingProblem(two_regimes(0.75, spread, staying), Affine(ratio, 1.0), 6)
        lower, upper = solve(problem).bounds
        assert diagram.bounds[at][0] <= upper and lower <= diagram.bounds[at][1]
        lengths = [evaluate(problem, f"fixed:{k}").throughput for k in range(7)]
        assert diagram.best_fixed[at] == pytest.approx(max(lengths), rel=1e-12)
        assert lengths[diagram.best_length[at]] == pytest.approx(max(lengths), rel=1e-12)
        grid = [evaluate(problem, f"rejection:{h}").throughput for h in np.linspace(0, 1, 101)]
        assert diagram.best_threshold[at] >= max(grid) * (1 - 1e-9)
        if diagram.threshold[at] >= 0:
            tuned = evaluate(problem, f"rejection:{diagram.threshold[at]:.17g}").throughput
            assert diagram.best_threshold[at] == pytest.approx(tuned, rel=1e-9)


def test_the_optimum_is_above_both_families(diagram):
    slack = diagram.width + 1e-12
    assert diagram.num_open == 0 and (diagram.width <= 1e-6).all()
    assert (diagram.gain_of_optimum >= -slack).all()
    assert (diagram.best_threshold <= diagram.bounds[..., 1] * (1 + 1e-12)).all()


def test_nothing_to_see_nothing_to_gain(diagram):
    np.testing.assert_allclose(diagram.gain_of_optimum[0], 0.0, atol=1e-6)
    assert (diagram.gain_of_optimum[1:] > 0.01).all()


def test_one_threshold_is_enough_without_persistence_but_not_with_it():
    # the next acceptance is then the same everywhere (F2); with persistence the regime says more than survival does
    diagram = phase_diagram(0.82, [0.8], [0.0, 0.97], [0.4], max_candidates=8)
    np.testing.assert_allclose(diagram.gain_of_threshold[:, 0], diagram.gain_of_optimum[:, 0], atol=1e-6)
    assert (diagram.gain_of_threshold[:, 1] < diagram.gain_of_optimum[:, 1] - 0.005).all()


def test_never_drafting_belongs_to_both_families():
    diagram = phase_diagram(0.3, [0.5], [0.0], [2.0], max_candidates=3)
    assert diagram.best_length.item() == 0 and diagram.threshold.item() == -1.0
    assert diagram.best_fixed.item() == diagram.best_threshold.item() == 1.0


def test_an_empty_axis_is_refused():
    with pytest.raises(ValueError, match="persistence: must be a list"):
        phase_diagram(0.8, [0.1], [], [0.2])
