"""What must be true of every problem of a kind: laws that the property tests and the mutation meta-test share.

A law takes an examined case and asserts. `holds` runs it over a batch and names the problem that broke it.
"""

import json

import numpy as np
import pytest

from mdp import conditions, families, theory
from mdp.case import Case
from mdp.evaluate import evaluate
from mdp.policy import LookaheadThreshold, RejectionThreshold, ThresholdTable
from mdp.reference import Reference, advantage, solve_by_enumeration
from mdp.solve import SolveStatus, solve

CLOSE = 1e-9
TOKENS = 1e-5  # CONTINUE - STOP closer to 0 than this is a tie: thresholds are known to 1e-6 tokens


def holds(law, cases):
    """The law on each case; a failure names the problem."""
    for case in cases:
        try:
            law(case)
        except AssertionError as error:
            raise AssertionError(f"{law.__name__}: {error}\n{json.dumps(case.problem.to_dict())}") from error


def oracle(case: Case):
    """CONTINUE - STOP at any (k, z, S), by enumeration."""
    best = families.optimum(case.finite)
    solved = Reference(best.throughput, best.bias, np.zeros(0), np.zeros(0))
    arrays = case.finite._asdict()
    return lambda k, z, survival: advantage(arrays, solved, k, z, survival)


# The optimum


def optimum_is_enumerated(case):
    """Merged nodes, the solver's bounds and plain enumeration agree."""
    best = families.optimum(case.finite).throughput
    lower, upper = case.solution.bounds
    assert lower * (1 - 1e-12) <= best <= upper * (1 + 1e-12)
    assert best == pytest.approx(solve_by_enumeration(*case.finite).throughput, rel=CLOSE)


def optimum_is_enclosed(problem):
    """The solver's bounds hold the optimum of the merged nodes, and close."""
    found = solve(problem, max_knots=2**9, max_sweeps=8)
    lower, upper = found.bounds
    assert lower * (1 - 1e-12) <= families.optimum(problem.lower()).throughput <= upper * (1 + 1e-12)
    assert found.status is SolveStatus.successful


def optimal_table_earns_the_optimum(case):
    earned = evaluate(case.finite, ThresholdTable(case.threshold)).throughput
    assert earned == pytest.approx(case.rate, rel=1e-6)
    assert earned <= case.rate * (1 + CLOSE)


# F1


def value_changes_sign_once(case):
    """F1: below S* STOP, from S* on CONTINUE, at every (k, z) that can be met."""
    worth = oracle(case)
    for k, z in np.argwhere(case.met)[::3]:
        values = np.array([worth(k, z, s) for s in np.linspace(0.0, 1.0, 9)])
        go = np.flatnonzero(values > TOKENS)
        assert not go.size or (values[go[0] :] > -TOKENS).all(), f"k {k}, z {z}: {values}"
        for survival, value in zip(np.linspace(0.0, 1.0, 9)[1:], values[1:], strict=True):
            if abs(value) > TOKENS:
                assert (value > 0) == (survival >= case.threshold[k, z]), f"k {k}, z {z}, S {survival}: {value}"


def threshold_rises_with_depth(case):
    """F1: where V is convex and acceptance does not depend on the place."""
    if conditions.concave(case.finite):
        return
    capped = np.minimum(case.threshold, 1.0)
    for k in range(len(capped) - 1):
        both = case.met[k] & case.met[k + 1]
        assert (capped[k][both] <= capped[k + 1][both] + 1e-5).all()


# Families of rules


def ladders_are_evaluated(case):
    """Members of both threshold families earn what `evaluate` says, and none more than the optimum."""
    for index, rule in (("survival", RejectionThreshold), ("lookahead", LookaheadThreshold)):
        found = families.ladder(case.finite, index)
        assert found.complete and found.throughput.max() <= case.rate * (1 + CLOSE)
        for at in np.unique(np.linspace(0, len(found.low) - 1, 4).astype(int)):
            try:
                earned = evaluate(case.finite, rule(1.0 - found.threshold[at])).throughput
            except ValueError as error:
                assert "recurrent classes" in str(error)  # then the ladder has the worst of them
                continue
            assert found.throughput[at] == pytest.approx(earned, rel=CLOSE), f"{index}, member {at}"


def lengths_are_evaluated(case):
    found = families.best_lengths(case.finite)
    for k in (0, 1, case.finite.max_candidates):
        assert found.throughput[k] == pytest.approx(evaluate(case.finite, f"fixed:{k}").throughput, rel=CLOSE)
    assert found.throughput.max() <= found.by_start * (1 + CLOSE) <= case.rate * (1 + 2 * CLOSE)


def goodput_is_walked(case):
    """The goodput rule path by path, where rounds renew."""
    finite = case.finite
    tokens = time = 0.0

    def walk(k, z, survival, earned, chance):
        nonlocal tokens, time
        gain = survival * finite.next_accept_prob[k, z] if k < finite.max_candidates else 0.0
        spent = k * finite.draft_time + finite.verify_time[k]
        after = (
            spent + finite.draft_time + finite.verify_time[k + 1] - finite.verify_time[k]
            if gain or k < finite.max_candidates
            else 0.0
        )
        if k == finite.max_candidates or (earned + gain) / after < earned / spent * (1 - 1e-12):
            tokens, time = tokens + chance * earned, time + chance * spent
            return
        for y in np.flatnonzero(finite.transition[z]):
            below = survival * finite.accept_prob[k, y]
            walk(k + 1, y, below, earned + below, chance * finite.transition[z, y])

    for z in np.flatnonzero(finite.initial):
        walk(0, z, 1.0, 1.0, finite.initial[z])
    assert families.goodput(finite) == pytest.approx(tokens / time, rel=CLOSE)


# Reports


def reports_are_sound(case):
    """F1 holds; a family whose condition is met loses nothing; F4 needs a V that never falls and nothing else."""
    facts = {fact.id: fact for fact in theory.check(case)}
    for fact in facts.values():
        assert fact.status in ("holds", "fails", "not applicable")
        assert "condition is met and yet" not in fact.why, fact
        assert "\n" not in fact.why
    assert facts["F1"].status == "holds", facts["F1"]
    assert facts["F6"].status == "holds", facts["F6"]
    assert facts["F8"].status == ("not applicable" if case.finite.persistent else "holds"), facts["F8"]
    if not conditions.falling(case.finite):
        assert facts["F4"].status == "holds", facts["F4"]
    assert facts["F4"].numbers.get("equality_error", 0.0) <= 1e-5, facts["F4"]
    for fact in (facts["F2"], facts["F3"], facts["F5"]):
        assert (fact.status == "fails") == (fact.numbers["loss"] > 1e-9), fact


def bound_is_the_tightest(case):
    r"""F4: $c_2 + \Delta = \max D$; 1 - S* below each state's bound; equal at K - 1 where V is constant."""
    finite, worth = case.finite, oracle(case)
    found = {(k, z): worth(k, z, 1.0) / case.rate for k, z in np.argwhere(case.met)}
    most = max(max(found.values()), 0.0)
    numbers = theory.sufficient_bound(case).numbers
    assert numbers["bound"] == pytest.approx(most / (finite.draft_time + most), abs=1e-6)
    assert numbers["delta"] == pytest.approx(
        max(found.values()) - (finite.verify_time[0] - finite.draft_time), abs=1e-6
    )
    if conditions.falling(finite):
        return
    for (k, z), value in found.items():
        own = max(value, 0.0) / (finite.draft_time + max(value, 0.0))
        assert 1.0 - case.threshold[k, z] <= own + 1e-5
        if k == finite.max_candidates - 1 and value > 1e-6 and not np.ptp(finite.verify_time):
            assert 1.0 - case.threshold[k, z] == pytest.approx(own, abs=1e-5)


# F2, F3, F5, F7 under their conditions


def one_threshold_is_optimal(case):
    r"""F2: the best constant threshold loses nothing, and $\rho^* (t_d + s) / \bar\alpha$ is one."""
    best, _ = families.ladder(case.finite, "survival").best
    assert best == pytest.approx(families.optimum(case.finite).throughput, rel=CLOSE)
    if conditions.varying_next_accept(case.finite) or conditions.bent(case.finite):
        return
    step = case.finite.draft_time + case.finite.verify_time[1] - case.finite.verify_time[0]
    predicted = case.rate * step / case.finite.next_accept_prob[0, 0]
    np.testing.assert_allclose(np.minimum(case.threshold, 1.0), min(predicted, 1.0), atol=1e-5)
    rule = RejectionThreshold(1.0 - predicted * (1 - 1e-9))
    assert evaluate(case.finite, rule).throughput == pytest.approx(best, rel=CLOSE)


def look_ahead_is_optimal(case):
    """F3 in the monotone case, and F7: self-tuned it settles at the optimum."""
    assert theory.one_step(case).status == "holds"
    tuned = theory.self_tuned(case)
    assert tuned.status == "holds"
    assert tuned.numbers["settles_at"] == pytest.approx([case.rate] * 2, rel=CLOSE)


def continue_is_right(case):
    """F3: where one more candidate pays by itself, the optimum drafts it (rounds renew, any times)."""
    table = families.lookahead_table(case.finite, case.rate, np.zeros(case.finite.num_regimes))
    assert (np.minimum(case.threshold, 1.0)[case.met] <= np.minimum(table, 1.0)[case.met] + 1e-5).all()


def length_by_start_is_optimal(case):
    """F5: acceptances known from the start regime on."""
    fact = theory.fixed_length(case)
    assert fact.status == "holds"
    assert fact.numbers["throughput"] == pytest.approx(case.rate, rel=CLOSE)


# How rho* moves


def scales(case):
    """Times in another unit: rho* in that unit."""
    finite = case.finite
    for unit in (2.0, 1e-3):
        other = finite._replace(draft_time=unit * finite.draft_time, verify_time=unit * finite.verify_time)
        assert families.optimum(other).throughput * unit == pytest.approx(case.rate, rel=1e-10)


def slower_is_never_better(case):
    """rho* falls in the draft time and in every V(k)."""
    finite = case.finite
    slower = [finite._replace(draft_time=1.1 * finite.draft_time)]
    slower += [finite._replace(verify_time=finite.verify_time + 0.1 * step) for step in np.eye(len(finite.verify_time))]
    for problem in slower:
        assert families.optimum(problem).throughput <= case.rate * (1 + 1e-12)
