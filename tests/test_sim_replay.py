"""Replay: decisions worked out by hand, refusals, and agreement with live decoding on token chains."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import chains
import numpy as np
import pytest

from mdp.cost import Affine, Table
from mdp.fit import SignalModel, fit_signal, split_requests
from mdp.policy import FixedLength, Policy, ThresholdTable, parse
from simulate.replay import replay, replay_rounds

COST = Affine(draft_time=0.2, verify_time=1.0)


def step(accepted, accept_prob, end=False, rollout=(), **features):
    shown = {"token_accept_prob": accept_prob, "step_accept_prob": 0.5, "draft_prob": 0.5, "top_prob": 0.5,
             "entropy": 1.0, **features}  # fmt: skip
    rolled = [{**shown, "token_accept_prob": prob, "end": bool(ends)} for prob, ends in rollout]
    return {"accepted": accepted, "end": end, "rollout": rolled, **shown}


def plain_request():
    """Eight tokens of eight; the drafted ones at 2 and 6 fail."""
    return [
        step(True, 0.9), step(True, 0.8), step(False, 0.5, rollout=[(0.9, 0), (0.5, 0), (0.9, 0), (0.9, 0)]),
        step(True, 1.0), step(True, 0.9), step(True, 0.6), step(False, 0.9), step(True, 0.5),
    ]  # fmt: skip


def one(request, depth=5, limit=8, ends=False):
    return chains.assemble([request], [limit], depth, [ends])


def rounds(trace, policy, **options):
    log = replay_rounds(trace, policy, **options)
    columns = (log.start, log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fixed:0", [(s, 0, 0, 1, 0) for s in range(8)]),
        ("fixed:2", [(0, 2, 2, 3, 0), (3, 2, 2, 3, 0), (6, 1, 0, 1, 0), (7, 0, 0, 1, 0)]),
        ("fixed:4", [(0, 4, 2, 3, 0), (3, 4, 3, 4, 0), (7, 0, 0, 1, 0)]),
        ("fixed:5", [(0, 5, 2, 3, 0), (3, 4, 3, 4, 0), (7, 0, 0, 1, 0)]),  # 4 at the second: maximum length
        ("oracle", [(0, 2, 2, 3, 0), (3, 3, 3, 4, 0), (7, 0, 0, 1, 0)]),
        # S = .9, .72, .36 and 1, .9, .54
        ("rejection:0.4", [(0, 3, 2, 3, 0), (3, 3, 3, 4, 0), (7, 0, 0, 1, 0)]),
        # .36 continues past the unseen rejection at 2; its rollout then shows .9: S = .324
        ("rejection:0.67", [(0, 4, 2, 3, 0), (3, 4, 3, 4, 0), (7, 0, 0, 1, 0)]),
        ("rejection:0.7", [(0, 5, 2, 3, 0), (3, 4, 3, 4, 0), (7, 0, 0, 1, 0)]),
        ("rejection:0", [(0, 1, 1, 2, 0), (2, 1, 0, 1, 0), (3, 2, 2, 3, 0), (6, 1, 0, 1, 0), (7, 0, 0, 1, 0)]),
    ],
)
def test_decisions_by_hand(policy, expected):
    assert rounds(one(plain_request()), policy) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # S * next: .65 | .9 * .8 = .72 | .72 * .8 = .576 | .36 * .5 and .65 | .8 | .72 | .54 * .5
        ("lookahead:0.45", [(0, 3, 2, 3, 0), (3, 3, 3, 4, 0), (7, 0, 0, 1, 0)]),
        ("lookahead:0.4", [(0, 2, 2, 3, 0), (3, 3, 3, 4, 0), (7, 0, 0, 1, 0)]),
        ("lookahead:0.3", [(s, 0, 0, 1, 0) for s in range(8)]),
    ],
)
def test_lookahead_by_hand(policy, expected):
    transition = np.array([[0, 0.5, 0.5], [0, 0.8, 0.2], [0, 0.2, 0.8]])
    model = SignalModel(edges=np.array([0.7]), transition=transition, regime_accept_prob=np.array([0.5, 0.4, 0.9]))
    assert rounds(one(plain_request()), policy, model=model) == expected


def test_table_stops_where_its_rows_end():
    table = ThresholdTable(np.zeros((2, 1)))
    assert rounds(one(plain_request()), table) == rounds(one(plain_request()), "fixed:2")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fixed:4", [(0, 3, 3, 3, 1)]),  # forced stop behind the end-of-text, no bonus
        ("fixed:3", [(0, 3, 3, 3, 1)]),
        ("fixed:2", [(0, 2, 2, 3, 0)]),  # end-of-text is the bonus
        ("fixed:1", [(0, 1, 1, 2, 0), (2, 1, 1, 1, 1)]),
        ("oracle", [(0, 3, 3, 3, 1)]),
    ],
)
def test_accepted_end_of_text(policy, expected):
    request = [step(True, 0.9), step(True, 0.9), step(True, 0.9, end=True)]
    assert rounds(one(request, ends=True), policy) == expected


def test_rejected_end_of_text_stops_drafting():
    request = [step(True, 0.9), step(False, 0.1, end=True), step(True, 0.9), step(True, 0.9)]
    assert rounds(one(request, limit=4), "fixed:3") == [(0, 2, 1, 2, 0), (2, 1, 1, 2, 0)]


def test_end_of_text_in_a_rollout_stops_drafting():
    request = [step(False, 0.1, rollout=[(0.9, False), (0.9, True)]), step(True, 0.9), *plain_request()[:6]]
    request[4]["rollout"] = request[4]["rollout"][:2]
    assert rounds(one(request), "fixed:5")[0] == (0, 3, 0, 1, 0)


def test_end_of_text_as_correction_ends_the_request():
    request = [step(True, 0.9), step(False, 0.2, rollout=[(0.9, 0)] * 4)]
    assert rounds(one(request, ends=True), "fixed:4") == [(0, 4, 1, 2, 0)]


def test_balance_and_totals_by_hand():
    result = replay(one(plain_request()), ["fixed:4", "oracle"], cost=COST).to_dict()
    entry = result["policies"][0]
    assert (entry["num_emitted"], entry["num_drafted"], entry["num_discarded"]) == (8, 8, 3)
    assert entry["throughput"] == pytest.approx(8 / (8 * 0.2 + 3))
    assert (result["num_requests"], result["cost_origin"], result["scored_on"]) == (1, "declared", "all")
    assert (result["draft_time"], result["verify_time"], result["rounds"]) == (0.2, [1.0] * 6, None)
    json.dumps(result, allow_nan=False)


def test_measured_times_are_the_default():
    measured = {"draft_time": 0.5, "verify_time": [1.0, 0.9, 1.5, 2.0, 2.0, 3.0]}
    trace = chains.assemble([plain_request()], [8], 5, [False], measured)
    result = replay(trace, ["fixed:4"])
    assert result.cost_origin == "measured"
    assert result.policies[0].clusters.time[0] == pytest.approx(8 * 0.5 + 2.0 + 2.0 + 1.0)
    assert result.policies[0].speedup.value == result.policies[0].throughput.value * 1.0


# --- rules with a state, and rules that read raw features ---


@dataclass(frozen=True)
class LeastProb(Policy):
    floor: float
    needs = ("draft_prob",)

    def stop(self, state, observation):
        return state, (observation.num_candidates > 0) & (observation.draft_prob < self.floor)


@dataclass(frozen=True)
class Nested(Policy):
    """The same as `OneMore`, its state a tuple with an axis of its own."""

    def init(self):
        return {"last": np.array([2, 0]), "asked": (0,)}

    def stop(self, state, observation):
        return {"last": state["last"], "asked": (state["asked"][0] + 1,)}, observation.num_candidates >= state["last"][
            0
        ]

    def end_round(self, state, outcome):
        return {"last": np.stack([outcome.num_accepted + 1, state["asked"][0]]), "asked": state["asked"]}


def test_rule_with_a_state():
    expected = [(0, 2, 2, 3, 0), (3, 3, 3, 4, 0), (7, 0, 0, 1, 0)]
    assert rounds(one(plain_request()), chains.OneMore(2)) == expected
    assert rounds(one(plain_request()), Nested()) == expected


def test_states_of_requests_do_not_mix():
    pair = chains.random_pair(3, end=3)
    trace = chains.record(pair, 5, num_requests=30, limit=15, depth=5)
    together = replay_rounds(trace, chains.OneMore(2))
    for r in range(30):
        alone = replay_rounds(trace, chains.OneMore(2), requests=[r])
        mine = together.request == r
        assert (together.num_drafted[mine] == alone.num_drafted).all()


def test_rule_that_reads_a_raw_feature():
    request = plain_request()
    request[1]["draft_prob"] = 0.1
    assert rounds(one(request), LeastProb(0.2))[0] == (0, 2, 2, 3, 0)


# --- refusals: one line each ---


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("fixed:6", r"policy 'fixed:6': length must be in 0..5 here"),
        (ThresholdTable(np.zeros((6, 1))), r"policy 'table': its table has 6 rows, rounds here hold at most 5"),
        (ThresholdTable(np.zeros((5, 3))), r"policy 'table': its table must have one column here|needs at least 2"),
        ("rejection:0.4,signal=head", r"policy 'rejection:0.4,signal=head' needs head"),
        ("lookahead:0.4", r"at least 2 different prompts"),
        ("nonsense", r"unknown rule 'nonsense'"),
        (3, r"policies: must be policy strings or frozen dataclasses"),
    ],
)
def test_refusals(policy, message):
    with pytest.raises(ValueError, match=message) as caught:
        replay(one(plain_request()), [policy], cost=COST)
    assert "\n" not in str(caught.value)


def test_no_measured_times_asks_for_a_cost():
    with pytest.raises(ValueError, match="holds no measured times; declare a cost"):
        replay(one(plain_request()), ["fixed:1"])


def test_cost_table_of_another_depth():
    with pytest.raises(ValueError, match=r"must have max_candidates \+ 1 = 6 entries"):
        replay(one(plain_request()), ["fixed:1"], cost=Table(0.2, [1.0, 1.0]))


def test_saved_table_with_columns_is_refused(tmp_path):
    path = tmp_path / "solution.json"
    path.write_text(json.dumps({"survival_threshold": [[0.1, 0.2]]}))
    with pytest.raises(ValueError, match="must have one column"):
        replay(chains.record(chains.random_pair(0), 0, 4, 10, 5), [f"optimal:{path}"], cost=COST)
    path.write_text(json.dumps({"survival_threshold": [[0.6], [0.6], [0.6], [0.6], [0.6]]}))
    result = replay(one(plain_request()), [f"optimal:{path}", "rejection:0.4"], cost=COST)
    assert result.policies[0].throughput == result.policies[1].throughput
    assert result.scored_on == "all"


def test_trace_without_rollouts_or_without_their_target_side():
    trace = one(plain_request())
    bare = replace(trace, rollout_offsets=None, rollout_drafts_end=None, rollout_features={})
    assert rounds(bare, "fixed:4") == rounds(trace, "fixed:4")
    assert rounds(bare, "oracle") == rounds(trace, "oracle")
    with pytest.raises(ValueError, match="this trace has no rollouts"):
        replay(bare, ["rejection:0.4"], cost=COST)
    unscored = {k: v for k, v in trace.rollout_features.items() if not k.endswith("accept_prob")}
    with pytest.raises(ValueError, match="needs token_accept_prob, which this trace does not hold along its rollouts"):
        replay(replace(trace, rollout_features=unscored), ["rejection:0.4"], cost=COST)
    assert rounds(replace(trace, rollout_features=unscored), LeastProb(0.2)) == rounds(trace, LeastProb(0.2))


def test_a_given_model_decides_what_is_read():
    trace = one(plain_request())
    unscored = replace(
        trace, rollout_features={k: v for k, v in trace.rollout_features.items() if not k.endswith("accept_prob")}
    )
    flat = SignalModel("entropy", knots=np.array([0.0, 2.0]), levels=np.array([0.8, 0.8]))
    # S = .8, .64: stops at two candidates
    assert rounds(unscored, "rejection:0.3", model=flat) == rounds(trace, "fixed:2")
    with pytest.raises(ValueError, match="looks ahead, and the signal model given has no chain"):
        rounds(trace, "lookahead:0.3", model=flat)
    assert rounds(trace, "fixed:2", model=flat) == rounds(trace, "fixed:2")


# --- fitted signals: halves ---


def test_all_policies_are_scored_on_the_same_requests():
    trace = chains.record(chains.random_pair(2, end=3), 0, num_requests=41, limit=12, depth=5)
    whole = replay(trace, ["fixed:3", "rejection:0.4"], cost=COST)
    assert (whole.num_requests, whole.scored_on) == (41, "all")
    half = replay(trace, ["fixed:3", "rejection:0.4", "rejection:0.4,signal=entropy", "lookahead:0.5"], cost=COST)
    assert (half.num_requests, half.scored_on) == (21, "test half")
    assert [x.signal for x in half.policies] == [None, "token_accept_prob", "entropy", "token_accept_prob"]
    assert len({x.total.num_emitted for x in half.policies}) == 1  # every policy emits the same text


def test_optimal_on_a_trace_is_good_and_shallow_files_need_no_jax():
    trace = chains.record(chains.random_pair(2), 0, num_requests=200, limit=24, depth=5)
    result = replay(trace, ["optimal", *[f"fixed:{k}" for k in range(6)]], cost=COST)
    best = max(x.throughput.value for x in result.policies[1:])
    assert result.policies[0].throughput.value > best - 3 * result.differences[0].throughput_difference.se


def test_replay_does_not_import_jax():
    code = "import sys, simulate.replay, mdp.fit; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- agreement with closed forms and with live decoding ---


def expected_run(accept_prob, length, limit):
    """Expected (calls, drafted, discarded) of fixed K until `limit` tokens are out: iid, clamped at the end."""
    calls, drafted, discarded = np.zeros(limit + 1), np.zeros(limit + 1), np.zeros(limit + 1)
    for left in range(1, limit + 1):
        cap = min(length, left - 1)
        calls[left], drafted[left] = 1.0, cap
        for accepted in range(cap + 1):
            prob = accept_prob**accepted * (1.0 if accepted == cap else 1 - accept_prob)
            rest = left - accepted - 1
            calls[left] += prob * calls[rest]
            drafted[left] += prob * drafted[rest]
            discarded[left] += prob * (cap - accepted + discarded[rest])
    return calls[limit], drafted[limit], discarded[limit]


def test_fixed_lengths_match_the_closed_form():
    draft, target = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.3, 0.3, 0.1, 0.3])
    trace = chains.record(chains.cyclic_pair(draft, target), 11, num_requests=1500, limit=20, depth=6)
    result = replay(trace, [f"fixed:{k}" for k in range(7)], cost=COST)
    for k, policy in enumerate(result.policies):
        tally, expected = policy.clusters, expected_run(np.minimum(draft, target).sum(), k, 20)
        for sums, mean in zip((tally.num_target_calls, tally.num_drafted, tally.num_discarded), expected, strict=True):
            assert abs(sums.mean() - mean) <= 5 * sums.std() / np.sqrt(len(sums))


def live_and_replayed(rule, pair, model=None, signal=None, requests=1500, limit=20, depth=6):
    trace = chains.record(pair, 21, requests, limit, depth)
    if signal:
        model = fit_signal(trace, signal, split_requests(trace)[0])
    log = replay_rounds(trace, rule, model=model)
    rows = chains.decode(pair, rule, 22, requests, limit, depth, model)
    replayed = np.stack([log.request, log.start, log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut], 1)
    return rows, replayed


def per_request(rows, values):
    return np.bincount(rows[:, 0], weights=values, minlength=rows[:, 0].max() + 1)


@pytest.mark.parametrize(
    ("rule", "signal"),
    [
        (parse("rejection:0.4").policy, None),
        (parse("rejection:0.3").policy, "entropy"),
        (parse("lookahead:0.5").policy, "draft_prob"),
        (chains.OneMore(2), None),
        (FixedLength(4), None),
    ],
)
def test_replay_has_the_law_of_a_live_run(rule, signal):
    live, replayed = live_and_replayed(rule, chains.random_pair(8, end=3), signal=signal)
    statistics = {
        "rounds": lambda rows: np.ones(len(rows)),
        "drafted": lambda rows: rows[:, 2],
        "drafted squared": lambda rows: rows[:, 2] ** 2,
        "accepted": lambda rows: rows[:, 3],
        "emitted": lambda rows: rows[:, 4],
        "cut": lambda rows: rows[:, 5],
    }
    for name, statistic in statistics.items():
        a, b = per_request(live, statistic(live)), per_request(replayed, statistic(replayed))
        se = np.hypot(a.std() / np.sqrt(len(a)), b.std() / np.sqrt(len(b)))
        assert abs(a.mean() - b.mean()) <= 5 * se, name


def test_balance_in_every_request():
    trace = chains.record(chains.random_pair(9, end=3), 1, num_requests=60, limit=15, depth=5)
    for policy in ("fixed:5", "rejection:0.5", chains.OneMore(2), "oracle"):
        (result,) = replay(trace, [policy], cost=COST).policies
        assert (result.clusters.imbalance == 0).all()
        assert (result.clusters.num_emitted == np.diff(trace.offsets)).all()
