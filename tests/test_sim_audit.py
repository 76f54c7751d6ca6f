"""The referee: fair charges, bounds around an optimum that is known, the ladder's order, one path for fast and slow."""

import json
from dataclasses import replace
from functools import cache

import chains
import numpy as np
import pytest

from mdp.acceptance import TokenPair
from mdp.cost import Affine
from mdp.entrants import needs
from mdp.fit import SignalModel, fit_signal, split_requests
from mdp.policy import parse
from mdp.problem import StoppingProblem
from mdp.solve import solve
from simulate.audit import CEILING, CLAIRVOYANT, audit
from simulate.estimate import interval
from simulate.ladder import INFORMATION, fixed_rounds, halves, share
from simulate.relaxation import COINS, Penalty, charge, fit_penalty, least_times
from simulate.replay import replay_rounds
from simulate.starts import lengths_chosen, play, unroll
from specstop.output import jsonable

COST = Affine(draft_time=0.2, verify_time=1.0)
DEPTH, LIMIT = 4, 30
TIMES = COST.round_times(DEPTH)
PERFECT = SignalModel()


def finite_optimum(pair, limit, depth, times, rule=None):
    """Least expected time until `limit` tokens are out, tokens and acceptances seen; or that of a threshold rule.

    With k candidates drafted, S their survival and v the last of them, stopping costs V(k) and what is left after a
    bonus; a rejection of candidate i, known to come with probability S_{i-1} (1 - a), leaves limit - i tokens.
    """
    size = len(pair.draft)
    accept = np.minimum(1.0, pair.target / np.where(pair.draft > 0, pair.draft, 1.0))
    residual = np.maximum(pair.target - pair.draft, 0.0)
    mass = residual.sum(axis=1, keepdims=True)
    residual = np.where(mass > 0, residual / np.where(mass > 0, mass, 1.0), 0.0)

    @cache
    def left(count):
        """[size] least time with `count` tokens to go, by the last token."""
        if count == 0:
            return np.zeros(size)
        return np.array([drafting(count, context, 0, 1.0) for context in range(size)])

    def drafting(count, last, k, survival):
        stop = times[k] + survival * pair.target[last] @ left(count - k - 1)
        if k == min(depth, count - 1) or (rule is not None and rule(survival)):
            return stop
        go_on = 0.0
        for token in range(size):
            a = accept[last, token]
            rejected = survival * (1 - a) * residual[last] @ left(count - k - 1)
            go_on += pair.draft[last, token] * (rejected + drafting(count, token, k + 1, survival * a))
        return go_on if rule is not None else min(stop, go_on)

    return [left(count)[chains.FIRST] for count in range(limit + 1)]


@pytest.fixture(scope="module")
def pair():
    return chains.random_pair(5, size=3, sharpness=0.6)


@pytest.fixture(scope="module")
def trace(pair):
    return chains.record(pair, 3, num_requests=600, limit=LIMIT, depth=DEPTH)


def rounds_of(trace, policy, starts, requests, **options):
    log = replay_rounds(trace, policy, requests=requests.tolist(), **options)
    return starts.offsets[np.searchsorted(requests, log.request)] + log.start, log.num_drafted


# --- one path for fast and slow ---


@pytest.mark.parametrize("end", [None, 3])
def test_rules_played_on_unrolled_rounds_are_rules_replayed(end):
    trace = chains.record(chains.random_pair(4, end=end), 7, num_requests=40, limit=18, depth=5)
    train, test = split_requests(trace)
    model = fit_signal(trace, "entropy", train)
    starts = unroll(trace, test, [*COINS, "entropy"])
    for policy, signal in (("rejection:0.4", PERFECT), ("rejection:0.4", model), ("lookahead:0.5", model)):
        chosen = lengths_chosen(starts, parse(policy).policy, signal)
        fast = play(starts, lambda at, drafted, accepted, chosen=chosen: chosen[at])
        slow = rounds_of(trace, policy, starts, test, model=signal)
        assert sorted(zip(*fast, strict=True)) == sorted(zip(*slow, strict=True))
    fast = play(starts, lambda at, drafted, accepted: np.where(drafted < 0, 2, accepted + 1))
    slow = rounds_of(trace, chains.OneMore(2), starts, test)
    assert sorted(zip(*fast, strict=True)) == sorted(zip(*slow, strict=True))


def test_every_path_emits_the_same_text():
    trace = chains.record(chains.random_pair(4, end=3), 7, num_requests=40, limit=18, depth=5)
    starts = unroll(trace, np.arange(40))
    rng = np.random.default_rng(0)
    at, length = play(starts, lambda at, drafted, accepted: rng.integers(0, 6, len(at)))
    assert starts.emitted(length, at).sum() == starts.lengths.sum() == trace.num_positions


# --- the charges are fair, and the bound is a bound ---


def charges_of(trace, policy, weights):
    every = np.arange(trace.num_requests)
    starts = unroll(trace, every, COINS)
    at, length = rounds_of(trace, policy, starts, every)
    paid = charge(starts, Penalty(weights))[at, length]
    return np.bincount(np.repeat(every, starts.lengths)[at], weights=paid, minlength=len(every))


@pytest.mark.parametrize("policy", ["fixed:4", "rejection:0.3", "rejection:0.8", chains.OneMore(2)])
@pytest.mark.parametrize("which", range(6))
def test_each_charge_has_mean_zero_under_rules_that_do_not_foresee(trace, policy, which):
    paid = charges_of(trace, policy, tuple(np.eye(6)[which]))
    assert paid.std() > 0
    assert abs(paid.mean()) < 4.5 * paid.std() / np.sqrt(len(paid))


def test_foresight_is_charged(trace):
    """The oracle knows the coins, so its charge is not 0 on average: the test above can fail."""
    paid = charges_of(trace, "oracle", (1.0, 0, 0, 0, 0, 0))
    assert paid.mean() > 20 * paid.std() / np.sqrt(len(paid))


def test_no_charged_path_is_shorter_than_the_bound(trace):
    every = np.arange(trace.num_requests)
    starts = unroll(trace, every, COINS)
    penalty = Penalty((0.5, 0.4, 0.1, -0.1, 0.2, 0.1))
    owed = TIMES + charge(starts, penalty)
    least = least_times(starts, TIMES, penalty)
    for policy in ("fixed:2", "rejection:0.5", "oracle", chains.OneMore(1)):
        at, length = rounds_of(trace, policy, starts, every)
        paid = np.bincount(np.repeat(every, starts.lengths)[at], weights=owed[at, length])
        assert (paid >= least - 1e-9).all()


def test_the_clairvoyant_is_the_shortest_path():
    """By enumeration of all lengths of all rounds of short texts."""
    trace = chains.record(chains.random_pair(4, end=3), 1, num_requests=30, limit=7, depth=3)
    starts = unroll(trace, np.arange(30))
    times = np.array([1.0, 1.1, 1.9, 2.0])

    def shortest(cursor, end):
        if cursor == end:
            return 0.0
        options = np.arange(starts.depth[cursor] + 1)
        onward = cursor + starts.emitted(options, np.full(len(options), cursor))
        return min(times[k] + shortest(next_, end) for k, next_ in zip(options, onward, strict=True))

    brute = [shortest(a, b) for a, b in zip(starts.offsets[:-1], starts.offsets[1:], strict=True)]
    assert least_times(starts, times) == pytest.approx(brute)


def test_the_relaxation_encloses_the_known_optimum_tightly(pair, trace):
    exact = finite_optimum(pair, LIMIT, DEPTH, TIMES)
    endless = solve(StoppingProblem(TokenPair(pair.draft, pair.target), COST, DEPTH))
    assert exact[LIMIT] - exact[LIMIT - 1] == pytest.approx(1 / endless.throughput, rel=1e-4)
    train, test = split_requests(trace)
    first, second = (unroll(trace, requests, COINS) for requests in (train, test))
    penalty = fit_penalty(first, TIMES, endless.throughput)
    least = least_times(second, TIMES, penalty)
    se = least.std() / np.sqrt(len(least))
    assert least.mean() - 4 * se < exact[LIMIT]
    assert least.mean() > 0.97 * exact[LIMIT]  # and says something
    free = least_times(second, TIMES)
    assert free.mean() < 0.9 * exact[LIMIT]  # the clairvoyant says far less
    # A charge that is not fair gives no bound, and this is seen here.
    unfair = least_times(second, TIMES + 0.1, penalty)
    assert unfair.mean() - 4 * se > exact[LIMIT]


# --- the audit ---


def test_the_bounds_enclose_what_is_known_to_be_left(pair, trace):
    best = finite_optimum(pair, LIMIT, DEPTH, TIMES)[LIMIT]
    for threshold in (0.1, 0.9):
        time = finite_optimum(pair, LIMIT, DEPTH, TIMES, rule=lambda s, h=threshold: 1 - s > h)[LIMIT]
        result = audit(trace, f"rejection:{threshold}", cost=COST)
        low, high = result.between
        assert low <= 1 - best / time <= high
        assert high - low < 0.05 and result.ceiling == CEILING
        assert low > 0.01 and result.left > 0.01  # both thresholds are bad ones
        rungs = {rung.information: rung for rung in result.ladder}
        for rung, sign in ((rungs["token acceptance"], -1), (rungs[CEILING], 1)):
            assert sign * (rung.throughput.value - LIMIT / best) > -4 * rung.throughput.se


def test_the_ladder_is_in_order_within_its_intervals(trace):
    result = audit(trace, "fixed:2", cost=COST)
    assert [rung.information for rung in result.ladder] == [*INFORMATION, CEILING, CLAIRVOYANT]
    assert [rung.bound for rung in result.ladder] == [*["lower"] * 4, "needs head", "lower", "upper", "upper"]
    steps = [rung.step for rung in result.ladder if rung.step is not None]
    assert len(steps) == 6
    for step in steps:
        assert interval(step, result.num_requests)[1] >= 0
    assert steps[-1].value > 0 and steps[-2].value > 0
    assert result.ceiling == "every fixed length" and 0 <= result.left <= result.between[1]
    # a perfect head is worth having here, and the clairvoyant far more
    left = {rung.information: rung.left.value for rung in result.ladder if rung.left}
    assert left["nothing"] < left["token acceptance"] < left[CEILING] < left[CLAIRVOYANT]


def test_a_setting_is_advised_only_if_it_is_clear_of_zero(trace):
    bad = audit(trace, "fixed:0", cost=COST)
    assert bad.change and bad.setting != "fixed:0" and interval(bad.gain, bad.num_requests)[0] > 0
    again = audit(trace, bad.setting, cost=COST)
    assert not again.change and again.setting == bad.setting and again.gain.value == 0
    dear = audit(trace, "fixed:0", cost=Affine(draft_time=5.0, verify_time=1.0))
    assert not dear.change and dear.setting == "fixed:0"


def test_the_limit_of_every_fixed_length_holds_for_all_of_them_together(trace):
    result = audit(trace, "fixed:1", cost=COST, level=0.9)
    _, test, _ = halves(trace, COST, *split_requests(trace))
    times = [test.times(fixed_rounds(test.starts, k)) for k in range(DEPTH + 1)]
    each_end = 0.05 / (DEPTH + 1)
    limits = [interval(share(time, times[1]), len(times[1]), 1 - 2 * each_end)[1] for time in times]
    assert result.between[1] == pytest.approx(max(*limits, 0.0))
    assert result.between[1] > max(interval(share(time, times[1]), len(times[1]), 0.9)[1] for time in times)


def test_luck_is_removed_without_bias(trace):
    rung = audit(trace, "fixed:3", cost=COST).deployed
    assert rung.throughput.se < 0.8 * rung.replayed.se
    assert abs(rung.throughput.value - rung.replayed.value) < 4 * rung.replayed.se


def test_modelled_is_for_rules_that_read_a_fitted_signal(trace):
    assert audit(trace, "fixed:3", cost=COST).modelled is None
    result = audit(trace, "rejection:0.9,signal=entropy", cost=COST)
    assert result.modelled is not None and 0 < result.modelled.value < result.between[1]


def test_a_trace_without_rollouts_has_the_clairvoyant_alone(trace):
    bare = replace(trace, rollout_offsets=None, rollout_drafts_end=None, rollout_features={})
    result = audit(bare, "fixed:2", cost=COST)
    assert [rung.bound for rung in result.ladder] == ["lower"] * 3 + ["needs rollouts"] * 3 + ["upper"]
    whole = audit(trace, "fixed:2", cost=COST)
    assert result.deployed.throughput == whole.deployed.replayed
    history = audit(bare, chains.OneMore(2), cost=COST)
    assert history.ceiling == CLAIRVOYANT and history.deployed.information == "history"
    assert any("clairvoyant" in note for note in history.notes)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("oracle", "policy 'oracle' foresees: audit a rule that can be run"),
        ("fixed:9", "length must be in 0..4 here"),
        ("rejection:0.4,signal=head", "needs head, which this trace does not hold"),
    ],
)
def test_refusals(trace, policy, message):
    with pytest.raises(ValueError, match=message):
        audit(trace, policy, cost=COST)
    assert needs(parse("fixed:1").policy) == frozenset()


def test_too_few_requests():
    trace = chains.record(chains.random_pair(1), 0, num_requests=3, limit=6, depth=2)
    with pytest.raises(ValueError, match="needs at least 4 different prompts, got 3 requests"):
        audit(trace, "fixed:1", cost=COST)


def test_its_own_rounds_tell_acceptance_as_deep_as_it_drafts(pair, trace):
    result = audit(trace, "fixed:2", cost=COST)
    assert result.acceptance.unidentified == [3, 4] and not result.selected
    assert any("nothing of acceptance at depths 3 to 4" in note for note in result.notes)
    first, se = result.acceptance.accept_prob[0], result.acceptance.accept_prob_se[0]
    starts = unroll(trace, split_requests(trace)[1], COINS)
    at, _ = play(starts, lambda at, drafted, accepted: np.full(len(at), 2))
    assert abs(first - np.nanmean(starts.features["token_accept_prob"][at, 0])) < 5 * se
    assert audit(trace, "rejection:0.4", cost=COST).selected


def test_json_has_no_nan(trace):
    data = jsonable(audit(trace, "rejection:0.4,signal=top_prob", cost=COST).to_dict())
    json.dumps(data, allow_nan=False)
    assert data["headline"].endswith(f"{100 * data['between'][1]:.1f}")
    assert data["deployed"]["information"] == "draft features"


def test_a_recorded_head_has_its_rung(trace):
    rng = np.random.default_rng(1)
    head, along = (
        np.clip(features["token_accept_prob"] + 0.1 * rng.normal(size=len(features["token_accept_prob"])), 0, 1)
        for features in (trace.features, trace.rollout_features)
    )
    result = audit(replace(trace, optional={"head": head, "rollout_head": along}), "fixed:3", cost=COST)
    rungs = {rung.information: rung for rung in result.ladder}
    assert rungs["head"].bound == "lower" and "signal=head" in rungs["head"].policy
    left = [rungs[name].left.value for name in ("draft features", "head", "token acceptance")]
    assert left == sorted(left) and "signal=head" in result.setting
