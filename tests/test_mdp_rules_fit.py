"""Rules fitted to a trace: the threshold by ROC against enumeration, the classifier against a law it must recover."""

from dataclasses import replace

import chains
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from mdp.fit_rules import _samples, fit_rule, roc_threshold
from mdp.policy import parse

ALL = np.arange(4)


def loss(prob, accepted, threshold):
    """FPR + 3 FNR of "accepted iff prob >= threshold"."""
    taken = prob >= threshold
    return (taken & ~accepted).sum() / (~accepted).sum() + 3 * (~taken & accepted).sum() / accepted.sum()


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.4, 0.5, 0.8, 0.9]), st.booleans()), min_size=2, max_size=30))
def test_the_threshold_is_the_best_of_all_and_the_greatest_of_equals(samples):
    prob, accepted = (np.array(column) for column in zip(*samples, strict=True))
    found = roc_threshold(prob, accepted, 0.37)
    if accepted.all() or not accepted.any():
        assert found == 0.37
        return
    losses = {t: loss(prob, accepted, t) for t in np.unique(prob)}
    best = min(losses.values())
    assert found == max(t for t, value in losses.items() if value <= best + 1e-9)


def test_a_threshold_by_hand():
    # at .6: no false alarm, one match of two lost: 1.5; at .4: one of two: .5; at .2: both: 1
    prob, accepted = np.array([0.2, 0.4, 0.6, 0.5]), np.array([False, True, True, False])
    assert roc_threshold(prob, accepted, 0.5) == 0.4
    # at .2: the only false alarm, 1; at .5: one match of three lost, 1 too: the greater one
    prob, accepted = np.array([0.2, 0.3, 0.5, 0.6]), np.array([True, False, True, True])
    assert roc_threshold(prob, accepted, 0.4) == 0.5


def request(flags, **features):
    """Positions with given flags, and features by name as lists."""
    shown = {"step_accept_prob": 0.5, "token_accept_prob": 0.5, "draft_prob": 0.5, "top_prob": 0.5, "entropy": 1.0}
    steps = []
    for j, flag in enumerate(flags):
        own = shown | {name: values[j] for name, values in features.items()}
        room = max(0, min(2, len(flags) - 2 - j))
        steps.append({"accepted": flag, "end": False, "rollout": [] if flag else [own | {"end": False}] * room, **own})
    return steps


def test_samples_are_the_tested_candidates_at_every_place_they_can_have():
    flags = [True, True, False, True, True, True, True, True]
    trace = chains.assemble([request(flags, entropy=list(range(8)))], [8], 3, [False])
    features, labels = _samples(trace, np.array([0]))
    rows = [(int(entropy), int(place)) for _, _, entropy, place in features]
    # position 2 failed: position 3 can only start a round; at most 3 candidates
    assert rows == [(0, 1), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (5, 3),
                    (6, 1), (6, 2), (6, 3), (7, 1), (7, 2), (7, 3)]  # fmt: skip
    assert [bool(label) for label in labels] == [flags[entropy] for entropy, _ in rows]


def learnable(seed=0, count=1500):
    """Acceptance that depends on the features by a known law: more of max q, less of entropy, a dent in between."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(4):
        top, draft, entropy = rng.uniform(0.1, 1, count), rng.uniform(0.1, 1, count), rng.exponential(1.0, count)
        truth = expit(4 * top - 2 * entropy - 3 * np.maximum(0, draft - 0.6) + 0.5)
        flags = (rng.random(count) < truth).tolist()
        requests.append(request(flags, top_prob=top, draft_prob=draft, entropy=entropy, token_accept_prob=truth))
    return chains.assemble(requests, [count] * 4, 3, [False] * 4)


def test_the_classifier_recovers_a_law():
    trace = learnable()
    rule = fit_rule(trace, parse("disco").policy, ALL[:2], lambda rule: -abs(rule.threshold - 0.3))
    assert rule.threshold == 0.3
    held_out = slice(trace.offsets[2], trace.offsets[4])
    shown = [trace.features[name][held_out] for name in ("top_prob", "draft_prob", "entropy")]
    predicted = expit(rule.score([*shown, np.ones(3000)]))
    truth = trace.features["token_accept_prob"][held_out]
    assert np.abs(predicted - truth).mean() < 0.05
    unfitted = expit(parse("disco").policy.score([*shown, np.ones(3000)]))
    assert np.abs(unfitted - truth).mean() > 0.15


def test_only_the_given_requests_count():
    trace = learnable(count=200)
    spoilt = trace.features | {"draft_prob": trace.features["draft_prob"].copy()}
    spoilt["draft_prob"][trace.offsets[2] :] = 0.5
    for text in ("hf_confidence", "disco"):
        policy = parse(text).policy
        one, other = (
            fit_rule(data, policy, ALL[:2], lambda rule: -rule.threshold)
            for data in (trace, replace(trace, features=spoilt))
        )
        assert one == other != fit_rule(trace, policy, ALL[2:], lambda rule: -rule.threshold)


def test_one_kind_of_label_leaves_the_rule_as_it_is():
    trace = chains.assemble([request([True] * 5)], [5], 2, [False])
    for text in ("hf_confidence", "disco"):
        policy = parse(f"{text}:threshold=0.5").policy
        assert fit_rule(trace, policy, np.array([0]), lambda rule: -abs(rule.threshold - 0.5)) == policy


def test_a_rule_without_a_fit_is_refused():
    with pytest.raises(ValueError, match="policy SVIP: cannot be fitted"):
        fit_rule(learnable(count=5), parse("svip").policy, ALL, lambda rule: 0.0)


def test_the_climb_finds_a_hidden_best():
    wanted = (0, 1, 3, 2, 4)

    def throughput(rule):
        return 10.0 - sum(abs(a - b) for a, b in zip(rule.lengths, wanted, strict=True))

    trace = chains.assemble([request([True] * 6)], [6], 4, [False])
    assert fit_rule(trace, parse("last_round").policy, np.array([0]), throughput).lengths == wanted
