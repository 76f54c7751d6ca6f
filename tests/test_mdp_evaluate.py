"""Exact evaluation: every rule against a walk over all paths, closed forms, and what cannot be evaluated is refused."""

import inspect
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import affine_costs, problems, tame_probabilities

import mdp.evaluate
from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine, Table
from mdp.evaluate import evaluate
from mdp.metrics import Tally
from mdp.policy import (
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Policy,
    RejectionThreshold,
    ThresholdTable,
    parse,
)
from mdp.problem import Persistent, StoppingProblem
from mdp.solve import solve

CLOSE = 1e-9
FIGURES = ("throughput", "block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
STAY, SWAP = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])

thresholds = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0.0, 1.0)


def mixing(problem):
    """The problem's arrays; persistent rounds may be followed by any start, so that every rule has one long run."""
    finite = problem.lower()
    if not finite.persistent:
        return finite
    even = 0.5 / finite.num_regimes
    return finite._replace(bonus=0.5 * finite.bonus + even, rejection=0.5 * finite.rejection + even)


def row(finite, tokens=0.0, time=0.0, drafted=0.0, next_start=0.0):
    return np.concatenate([[tokens, time, drafted], np.zeros(finite.num_regimes) + next_start])


def walk(finite, rule, z, k=0, survival=1.0):
    """Tokens, time, candidates and next starts still to come behind k candidates that end in z, path by path."""
    depth, onto = finite.max_candidates, finite.transition[z]
    stopped = row(finite, 0.0, finite.verify_time[k], 0.0, survival * finite.bonus[z] if finite.persistent else 0.0)
    if k == depth:
        return stopped
    if isinstance(rule, Oracle):  # here survival is 1: all k were accepted, and the rule knows what comes
        going_on = sum(
            onto[y] * accept * (row(finite, 1.0, finite.draft_time, 1.0) + walk(finite, rule, y, k + 1))
            for y, accept in enumerate(finite.accept_prob[k])
        )
        return going_on + (1.0 - onto @ finite.accept_prob[k]) * stopped
    seen = Observation(k, survival, next_accept_prob=onto @ finite.accept_prob[k], regime=z)
    if rule.stop(rule.init(), seen)[1]:
        return stopped
    total = row(finite, 0.0, finite.draft_time, 1.0)
    for y in np.flatnonzero(onto):
        accept = finite.accept_prob[k, y]
        missed = survival * (1.0 - accept) * finite.rejection[y] if finite.persistent else 0.0
        total += onto[y] * (row(finite, survival * accept, 0.0, 0.0, missed) +
                            walk(finite, rule, y, k + 1, survival * accept))  # fmt: skip
    return total


def long_run(finite, rule):
    """The figures of a rule by walking every path, the next starts followed for a million rounds."""
    rounds = np.array([walk(finite, rule, z) for z in range(finite.num_regimes)])
    law = finite.initial
    if finite.persistent:
        law = law @ np.linalg.matrix_power((np.eye(finite.num_regimes) + rounds[:, 3:]) / 2, 2**20)
    tokens, time, drafted = law @ rounds[:, :3]
    return Tally(1.0, drafted, 1.0 + tokens, drafted - tokens, 0.0, time)


def check(finite, rule):
    ours, theirs = evaluate(finite, rule).tally, long_run(finite, rule)
    for name in FIGURES:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=CLOSE, abs=1e-12)
    assert ours.imbalance == pytest.approx(0.0, abs=1e-12)


@given(problems(), st.sampled_from([RejectionThreshold, LookaheadThreshold]), thresholds)
def test_a_threshold_rule_earns_what_the_walk_over_all_paths_finds(problem, rule, threshold):
    check(mixing(problem), rule(threshold))


@given(problems(), st.data())
def test_a_table_earns_what_the_walk_over_all_paths_finds(problem, data):
    finite = mixing(problem)
    shape = (finite.max_candidates, finite.num_regimes)
    cells = data.draw(
        st.lists(thresholds | st.just(np.inf), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
    )
    check(finite, ThresholdTable(np.array(cells).reshape(shape)))


@given(problems())
def test_the_oracle_earns_what_the_walk_over_all_paths_finds(problem):
    check(mixing(problem), Oracle())


@given(problems(), st.integers(0, 3))
def test_a_fixed_length_earns_what_the_walk_over_all_paths_finds(problem, length):
    check(mixing(problem), FixedLength(length))


@given(tame_probabilities(), affine_costs(), st.integers(0, 8))
def test_fixed_length_on_iid_acceptance_is_the_closed_form(alpha, cost, length):
    answer = evaluate(StoppingProblem(IID(alpha), cost, 8), f"fixed:{length}")
    emitted = (1 - alpha ** (length + 1)) / (1 - alpha)
    time = length * cost.draft_time + cost.verify_time + length * cost.verify_slope
    assert answer.throughput == pytest.approx(emitted / time, rel=1e-12)
    assert float(answer.tally.block_efficiency) == pytest.approx(emitted, rel=1e-12)
    assert float(answer.tally.mean_candidates) == length
    assert answer.speedup == pytest.approx(answer.throughput * cost.verify_time)


def test_long_rounds_merge_instead_of_multiplying():
    # 3^60 paths, at most 1,891 pairs of regime and survival a depth; a fixed length needs only matrix products.
    chain = MarkovModulated([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]], [0.99, 0.9, 0.7], [0.2, 0.5, 0.3])
    problem = StoppingProblem(chain, Affine(0.01, 1.0), 60)
    alive, emitted = chain.initial, 1.0
    for _ in range(60):
        alive = (alive @ chain.transition) * chain.accept_prob
        emitted += alive.sum()
    assert evaluate(problem, "fixed:60").throughput == pytest.approx(emitted / 1.6, rel=1e-10)
    assert evaluate(problem, "rejection:1").throughput == pytest.approx(emitted / 1.6, rel=1e-10)  # merges, never stops


# --- Against the optimum


@given(problems(shapes=[(2, 3)]), thresholds)
def test_no_rule_beats_the_upper_bound_and_the_optimum_meets_it(problem, threshold):
    solution = solve(problem)
    try:
        best = evaluate(problem, "optimal", solution=solution)
        other = evaluate(problem, f"rejection:{threshold}", solution=solution)
    except ValueError as error:
        assert "recurrent classes" in str(error)  # nothing else is wrong with either rule
        return
    below_lower, below_upper = best.gap
    assert -1e-6 <= below_lower <= CLOSE and -1e-12 <= below_upper <= 1e-6
    assert other.gap[1] >= -1e-12
    assert other.gap[0] <= other.gap[1]
    assert best.throughput >= other.throughput * (1 - CLOSE)


def test_without_a_solution_there_is_no_gap():
    problem = StoppingProblem(IID(0.8), Affine(0.2, 1.0), 4)
    assert evaluate(problem, "fixed:2").gap is None
    assert evaluate(problem, "fixed:2").to_dict()["gap"] is None
    # Against bounds above and below it, the gap is not clipped.
    solution = replace(solve(problem), bounds=(1.0, 10.0))
    low, high = evaluate(problem, "fixed:2", solution=solution).gap
    assert low < 0 < high


# --- Persistent rounds


def split_problem(initial=(0.5, 0.5)):
    """Stopping at once stays in the start regime for ever; drafting leads to the other."""
    chain = MarkovModulated(SWAP, [0.9, 0.4], initial)
    return StoppingProblem(chain, Affine(0.2, 1.0), 2, Persistent(STAY, STAY))


def test_a_rule_with_two_equal_long_runs_is_fine():
    assert evaluate(split_problem(), "fixed:0").throughput == 1.0


def test_a_rule_that_does_not_read_survival_is_no_tree():
    size, rng = 40, np.random.default_rng(0)
    chain = MarkovModulated(rng.dirichlet(np.ones(size), size), rng.random(size), rng.dirichlet(np.ones(size)))
    problem = StoppingProblem(chain, Affine(0.1, 1.0), 30)
    mass, emitted = chain.initial, 1.0
    for _ in range(12):
        mass = (mass @ chain.transition) * chain.accept_prob
        emitted += mass.sum()
    assert evaluate(problem, "fixed:12").throughput == pytest.approx(emitted / 2.2, rel=1e-12)
    with pytest.raises(ValueError, match="too large for exact evaluation"):
        evaluate(problem, "rejection:0.9")


def test_a_rule_whose_other_long_run_is_out_of_reach_is_fine():
    assert evaluate(split_problem(initial=(1.0, 0.0)), "fixed:0").throughput == 1.0


def test_starts_that_are_left_for_good_do_not_count():
    # Under plain decoding regime 1 is absorbing; what a round from 0 would earn is of no account.
    toward = np.array([[0.0, 1.0], [0.0, 1.0]])
    back = np.array([[1.0, 0.0], [1.0, 0.0]])
    chain = MarkovModulated(STAY, [0.9, 0.5], [1.0, 0.0])
    problem = StoppingProblem(chain, Affine(0.5, 1.0), 1, Persistent(rejection=back, bonus=toward))
    one_candidate_in_regime_1 = ThresholdTable(np.array([[np.inf, np.inf]]))
    assert evaluate(problem, one_candidate_in_regime_1).throughput == 1.0
    # Fixed length 1: 0 -> 1 with .9, 1 -> 0 with .5, so 9/14 of rounds start in 1.
    law = np.array([5.0, 9.0]) / 14.0
    assert evaluate(problem, "fixed:1").throughput == pytest.approx(law @ [1.9, 1.5] / 1.5, rel=1e-12)


@pytest.mark.parametrize("rare", [1e-3, 1e-9, 1e-13])
def test_regimes_that_hardly_ever_change_lose_no_digits(rare):
    chain = MarkovModulated(STAY, [0.9, 0.1], [1.0, 0.0])
    switch = [[1 - rare, rare], [3 * rare, 1 - 3 * rare]]
    problem = StoppingProblem(chain, Affine(0.5, 1.0), 1, Persistent(switch, switch))
    expected = (0.75 * 1.9 + 0.25 * 1.1) / 1.5
    assert evaluate(problem, "fixed:1").throughput == pytest.approx(expected, rel=1e-12)


# --- What is refused


@dataclass(frozen=True)
class Remembers(Policy):
    def stop(self, state, observation):
        return state, observation.num_candidates >= 1

    def end_round(self, state, outcome):
        return state


@dataclass(frozen=True)
class Counts(Policy):
    def stop(self, state, observation):
        return (*state, 1), observation.num_candidates >= 1


@dataclass(frozen=True)
class Entropy(Policy):
    needs = ("entropy",)

    def stop(self, state, observation):
        return state, observation.entropy > 1


REFUSED = [
    (Remembers(), "remembers past rounds; simulate it instead"),
    (Counts(), "changes its state within a round; simulate it instead"),
    (Entropy(), "needs entropy, which cannot be evaluated exactly"),
    ("optimal", "solve the problem first and pass its solution"),
    ("fixed:3", r"length must be in 0\.\.2 here"),
    ("rejection:0.5,signal=entropy", "signal=entropy is for traces"),
    (ThresholdTable(np.zeros((3, 1))), "its table has 3 rows, rounds here hold at most 2"),
    (ThresholdTable(np.zeros((2, 3))), "its table must have 1 or 2 columns"),
    ("coin", "unknown rule"),
    (3.0, "must be policy strings"),
]


@pytest.mark.parametrize(("policy", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_evaluated_is_refused_in_one_line(policy, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(split_problem(), policy)
    assert "\n" not in str(error.value)


def test_a_tree_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(mdp.evaluate, "MAX_STATES", 3)
    with pytest.raises(ValueError, match=r"too large for exact evaluation .* simulate it instead"):
        evaluate(split_problem(), "rejection:0.5")


def test_a_table_with_fewer_rows_stops_where_they_end():
    problem = split_problem()
    assert evaluate(problem, ThresholdTable(np.zeros((1, 1)))).throughput == evaluate(problem, "fixed:1").throughput


def test_every_way_to_name_a_rule_is_the_same_rule():
    answers = [evaluate(split_problem(), rule) for rule in ("fixed:1", parse("fixed:1"), FixedLength(1))]
    assert {answer.policy for answer in answers} == {"fixed:1"}
    assert len({answer.throughput for answer in answers}) == 1


# --- The laws above are seen to fail

MUTANTS = {
    "V(k) is off by one": ("problem.verify_time[k] * states", "problem.verify_time[k - 1] * states"),
    "survival is reset by each candidate": ("states.survival[parent] * accept[child]", "accept[child]"),
    "the rejected candidate's survival is kept": ("(into * (1.0 - accept))", "into"),
    "the bonus leads where a rejection would": ("@ bonus[states.regime[stops]]", "@ rejection[states.regime[stops]]"),
    "a step behind a stop is paid": ("going_on = states.mass.sum(axis=0)", "going_on = starts.sum(axis=1)"),
    "merged states lose mass": ("np.add.at(mass, group, ", "mass.__setitem__(group, "),
    "the oracle forgets its drafts": ("time += (k * problem.draft_time + ", "time += (0 * k + "),
}  # fmt: skip


@pytest.mark.parametrize(("right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_evaluation_is_caught(right, wrong, monkeypatch):
    source = inspect.getsource(mdp.evaluate)
    assert source.count(right) == 1
    broken = ModuleType("broken")
    # Dataclasses look their module up, and the mutant needs no test of its own module docstring.
    monkeypatch.setitem(sys.modules, "broken", broken)
    exec(compile(source.replace(right, wrong), "broken", "exec"), broken.__dict__)
    monkeypatch.setitem(globals(), "evaluate", broken.evaluate)
    rng = np.random.default_rng(0)
    rows = lambda: rng.dirichlet(np.ones(3), 3)  # noqa: E731
    chain = MarkovModulated(rows(), [0.9, 0.6, 0.9], [0.2, 0.3, 0.5])
    problem = StoppingProblem(chain, Table(0.1, [1.0, 1.0, 1.5, 1.5, 2.0]), 4, Persistent(rows(), rows()))
    with pytest.raises(AssertionError):
        for rule in (RejectionThreshold(0.4), Oracle()):
            check(problem.lower(), rule)
