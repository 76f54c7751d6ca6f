"""Times from hardware and from overlap: what they come to, what is refused, and the solver on them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems, tame_probabilities

from mdp.acceptance import IID
from mdp.cost import Affine, Overlapped, Roofline
from mdp.evaluate import evaluate
from mdp.problem import StoppingProblem, cost_from_dict, loads, schema
from mdp.reference import solve_by_enumeration
from mdp.solve import solve

# About a 1B draft and a 7B target in half precision on 2 TB/s and 200 Tflop/s.
HARDWARE = {"draft_weight_bytes": 2e9, "draft_kv_bytes": 3e4, "draft_flops": 2e9, "target_weight_bytes": 1.4e10,
            "target_kv_bytes": 5e5, "target_flops": 1.4e10, "memory_bandwidth": 2e12, "peak_flops": 2e14}  # fmt: skip
KINDS = {
    "roofline": {"kind": "roofline", **HARDWARE},
    "roofline, served": {"kind": "roofline", **HARDWARE, "batch_size": 32, "context_length": 2000,
                         "draft_overhead": 1e-4, "target_overhead": 2e-4},
    "overlapped": {"kind": "overlapped", "draft_time": 0.4, "verify_time": 1.0},
    "overlapped in part": {"kind": "overlapped", "draft_time": 0.3, "verify_time": 1.0, "verify_slope": 0.1,
                           "overlap": 0.75},
}  # fmt: skip


@pytest.mark.parametrize("cost", KINDS.values(), ids=KINDS)
def test_a_problem_with_these_times_comes_back_from_its_own_dict(cost):
    data = {"acceptance": {"kind": "iid", "accept_prob": 0.8}, "cost": cost, "max_candidates": 5}
    problem = loads(json.dumps(data))
    again = loads(json.dumps(problem.to_dict()))
    assert again == problem
    assert set(cost) <= {"kind", *schema()["cost"][cost["kind"]]}


def test_a_pass_takes_the_longer_of_moving_and_computing():
    cost = Roofline(**HARDWARE, batch_size=4, context_length=1000, draft_overhead=1e-4, target_overhead=2e-4)
    assert cost.draft_time == pytest.approx(1e-4 + (2e9 + 4 * 1000 * 3e4) / 2e12, rel=1e-12)
    k = np.arange(101)
    moving, computing = (1.4e10 + 4 * 1000 * 5e5) / 2e12, 4 * (k + 1) * 1.4e10 / 2e14
    assert computing[0] < moving < computing[-1]
    np.testing.assert_allclose(cost.verify_times(100), 2e-4 + np.maximum(moving, computing), rtol=1e-12)
    np.testing.assert_allclose(cost.round_times(100), k * cost.draft_time + cost.verify_times(100), rtol=1e-12)


def test_large_batches_make_drafting_not_worth_it():
    lengths = []
    for batch in (1, 16, 64, 512):
        problem = StoppingProblem(IID(0.7), Roofline(**HARDWARE, batch_size=batch), 8)
        lengths.append(solve(problem).mean_candidates)
    assert lengths == sorted(lengths, reverse=True) and lengths[0] >= 2 and lengths[-1] == 0


amounts = st.floats(1e-3, 1e3)


@given(st.builds(Roofline, *[amounts] * 8, st.integers(1, 1000), st.integers(0, 1000), amounts, amounts))
def test_roofline_times_are_positive_non_decreasing_and_convex(cost):
    times = cost.verify_times(20)
    slack = 1e-12 * times[-1]
    assert (times > 0).all() and cost.draft_time > 0
    assert (np.diff(times) >= -slack).all() and (np.diff(times, 2) >= -slack).all()


overlapped = st.builds(
    Overlapped, st.floats(0.01, 2.0), st.floats(0.5, 2.0), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.5, 1.0])
)


@given(overlapped)
def test_overlapped_rounds(cost):
    k = np.arange(21)
    draft, alone = k * cost.draft_time, cost.verify_time + cost.verify_slope * k
    longer, times = np.maximum(draft, alone), cost.round_times(20)
    np.testing.assert_allclose(times, (1 - cost.overlap) * (draft + alone) + cost.overlap * longer, rtol=1e-12)
    assert (np.diff(times) >= -1e-12).all() and (np.diff(times, 2) >= -1e-12).all()
    assert (cost.verify_times(20) >= 0).all() and cost.verify_times(20)[0] == cost.verify_time


@given(problems(costs=overlapped, accept_prob=tame_probabilities(), shapes=[(2, 3), (3, 6)]))
def test_the_solver_on_overlapped_rounds_against_enumeration(problem):
    """V(k) is what drafting leaves over of the verification, 0 where it hides all of it."""
    exact = solve_by_enumeration(*problem.lower()).throughput
    solution = solve(problem)
    assert solution.status.name == "successful"
    assert solution.bounds[0] * (1 - 1e-9) <= exact <= solution.bounds[1] * (1 + 1e-9)
    assert solution.throughput == pytest.approx(exact, rel=1e-9)
    assert solution.speedup == pytest.approx(exact * problem.cost.verify_time, rel=1e-9)
    assert evaluate(problem, solution.policy).throughput == pytest.approx(exact, rel=1e-6)


def test_no_overlap_is_the_serial_round():
    serial = solve(StoppingProblem(IID(0.8), Affine(0.2, 1.0, 0.05), 8))
    none = solve(StoppingProblem(IID(0.8), Overlapped(0.2, 1.0, 0.05, overlap=0.0), 8))
    assert none.throughput == serial.throughput
    np.testing.assert_array_equal(none.survival_threshold, serial.survival_threshold)


def test_full_overlap_has_its_closed_form():
    """Candidates are free until they take as long as the target; then each costs t_d."""
    alpha, cost = 0.8, Overlapped(0.25, 1.0)
    rates = [sum(alpha**i for i in range(k + 1)) / max(0.25 * k, 1.0) for k in range(13)]
    assert int(np.argmax(rates)) == 4
    assert solve(StoppingProblem(IID(alpha), cost, 12)).throughput == pytest.approx(max(rates), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 0.8, 0.95])
def test_full_overlap_is_a_ceiling_for_pearl(alpha):
    for k in range(1, 9):
        pearl = (1 - alpha**k) / ((1 - alpha) * (1 + alpha - alpha**k)) / max(0.25 * k, 1.0)
        ours = evaluate(StoppingProblem(IID(alpha), Overlapped(0.25, 1.0), 8), f"fixed:{k}").throughput
        assert pearl < ours


ROOFLINE, OVERLAPPED = KINDS["roofline"], KINDS["overlapped"]
BAD = [
    *[({**ROOFLINE, name: bad}, f"cost.{name}: must be a finite number > 0")
      for name in ("draft_weight_bytes", "draft_flops", "target_weight_bytes", "target_flops", "memory_bandwidth",
                   "peak_flops") for bad in (0, -1, True, "1", None)],
    *[({**ROOFLINE, name: bad}, f"cost.{name}: must be a finite number >= 0")
      for name in ("draft_kv_bytes", "target_kv_bytes", "draft_overhead", "target_overhead") for bad in (-1, "1")],
    *[({**ROOFLINE, "batch_size": bad}, "cost.batch_size: must be a whole number in 1..")
      for bad in (0, -1, 1.5, True, "1", 10**30)],
    *[({**ROOFLINE, "context_length": bad}, "cost.context_length: must be a whole number in 0..")
      for bad in (-1, 1.5, False, None)],
    ({**ROOFLINE, "memory_bandwidth": 1e-90, "draft_weight_bytes": 1e90}, "cost: the time of a draft step must be"),
    ({**ROOFLINE, "target_weight_bytes": 1e90, "memory_bandwidth": 1e-90}, "cost: the time of a"),
    ({**ROOFLINE, "memory_bandwidth": 1e90, "peak_flops": 1e90, "draft_weight_bytes": 1e-90,
      "draft_kv_bytes": 0, "draft_flops": 1e-90}, "cost: the time of a draft step must be"),
    ({"kind": "roofline"}, "cost.draft_weight_bytes: missing"),
    ({**ROOFLINE, "flops": 1}, "cost.flops: unknown key"),
    *[({**OVERLAPPED, "overlap": bad}, "cost.overlap: must") for bad in (-0.1, 1.1, True, "1", None)],
    ({**OVERLAPPED, "draft_time": 0}, "cost.draft_time: must be a finite number > 0"),
    ({**OVERLAPPED, "verify_time": [1, 1]}, "cost.verify_time: must be a finite number > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("cost", "message"), BAD)
def test_bad_times_are_refused_in_one_line_that_names_the_field(cost, message):
    with pytest.raises(ValueError) as error:
        cost_from_dict(cost)
    assert message in str(error.value) and "\n" not in str(error.value)
