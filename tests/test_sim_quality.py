"""Predicted acceptance: figures of merit against brute force, and scores that come late are shown late."""

import dataclasses

import chains
import numpy as np
import pytest

from mdp.cost import Affine
from mdp.fit import SignalModel, fit_signal, split_requests
from mdp.policy import RejectionThreshold
from mdp.rules.heads import SpecDecPP
from simulate.quality import best_of, best_on, earned, on_path, quality, reliability
from simulate.replay import replay, replay_rounds


def with_head(trace, lag, seed=0, noise=0.15):
    """The trace with a noisy head whose scores come `lag` candidates late."""
    rng = np.random.default_rng(seed)

    def noisy(values):
        return np.clip(values + rng.normal(0, noise, len(values)), 0.01, 0.99)

    columns = {
        "head": noisy(trace.features["token_accept_prob"]),
        "rollout_head": noisy(trace.rollout_features["token_accept_prob"]),
    }
    manifest = {**trace.manifest, "head": {"lag": lag}}
    return dataclasses.replace(trace, optional={**trace.optional, **columns}, manifest=manifest).validate()


@pytest.fixture(scope="module")
def recorded():
    return chains.record(chains.random_pair(3, size=6, end=5), 1, 40, 30, 8)


def rounds(log):
    return [getattr(log, name).tolist() for name in ("request", "start", "num_drafted", "num_accepted")]


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_late_head_and_a_rule_that_waits_are_the_same_rounds(recorded, threshold):
    """Released code: product to k - 1. The world may hold the score back, or the rule; not both."""
    early, late = with_head(recorded, 0), with_head(recorded, 1)
    waiting = SpecDecPP(threshold=threshold, lag=1)
    wanted = rounds(replay_rounds(early, waiting))
    assert rounds(replay_rounds(late, waiting)) == wanted
    assert rounds(replay_rounds(late, SpecDecPP(threshold=threshold, lag=0))) == wanted
    assert rounds(replay_rounds(early, SpecDecPP(threshold=threshold, lag=0))) != wanted  # it does make a difference


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_survival_of_a_late_signal_leaves_the_last_candidate_out(recorded, threshold):
    early, late = with_head(recorded, 0), with_head(recorded, 1)
    raw = SignalModel("head", lag=1)
    wanted = rounds(replay_rounds(early, SpecDecPP(threshold=threshold, lag=1, least=0, most=1024)))
    assert rounds(replay_rounds(late, RejectionThreshold(threshold), model=raw)) == wanted
    forgetful = dataclasses.replace(raw, lag=0)  # takes the first candidate's missing score for a calibrated one
    curved = dataclasses.replace(forgetful, knots=np.array([0.0, 1.0]), levels=np.array([0.0, 0.7]))
    assert rounds(replay_rounds(late, RejectionThreshold(threshold), model=curved)) != wanted


def test_what_looks_ahead_is_refused_a_late_head(recorded):
    late = with_head(recorded, 1)
    with pytest.raises(ValueError, match="scores come late"):
        replay(late, ["lookahead:0.5,signal=head"], cost=Affine(0.2, 1.0))
    assert fit_signal(late, "head", split_requests(late)[0]).transition is None
    assert fit_signal(with_head(recorded, 0), "head", split_requests(late)[0]).transition is not None


def test_a_late_model_survives_its_json(recorded):
    model = fit_signal(with_head(recorded, 1), "head", split_requests(recorded)[0])
    again = SignalModel.from_dict(model.to_dict())
    assert again.lag == 1 and again.knots.tolist() == model.knots.tolist()


@pytest.mark.parametrize("lag", [2, "soon", None])
def test_a_lag_is_checked(recorded, lag):
    with pytest.raises(ValueError, match="head must be an object with a lag of 0 or 1"):
        dataclasses.replace(recorded, manifest={**recorded.manifest, "head": {"lag": lag}}).validate()


def test_scores_that_were_not_recorded_are_left_out(recorded):
    late = with_head(recorded, 1)
    head = late.optional["head"].copy()
    head[late.offsets[1:] - 1] = np.nan
    late = dataclasses.replace(late, optional={**late.optional, "head": head})
    predicted, accepted, request = on_path(late, np.arange(40), head)
    assert len(predicted) == len(accepted) == late.num_positions - 40 and set(request) <= set(range(40))
    assert np.isfinite(fit_signal(late, "head", np.arange(40)).levels).all()


def brute(m, a):
    m_safe = np.clip(m, 1e-6, 1 - 1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.nan_to_num(a * np.log(a / m_safe)) + np.nan_to_num((1 - a) * np.log((1 - a) / (1 - m_safe)))
    above = (m[:, None] > m[None]) + 0.5 * (m[:, None] == m[None])
    pairs = a[:, None] * (1 - a)[None]
    return kl.mean(), (above * pairs).sum() / pairs.sum(), (a * (1 - m) ** 2 + (1 - a) * m**2).mean()


def test_figures_equal_brute_force():
    rng = np.random.default_rng(0)
    a = np.where(rng.random(300) < 0.3, 1.0, rng.random(300))
    m = np.round(np.clip(a + rng.normal(0, 0.3, 300), 0, 1), 1)  # with ties, zeros and ones
    found = quality(m, a, np.arange(300) // 10)
    kl, auroc, brier = brute(m, a)
    assert found.kl.value == pytest.approx(kl) and found.auroc.value == pytest.approx(auroc)
    assert found.brier.value == pytest.approx(brier)
    assert all(0 < estimate.se < 0.5 for estimate in found)
    mirrored = quality(1 - m, a, np.arange(300) // 10)
    assert mirrored.auroc.value == pytest.approx(1 - auroc) and mirrored.kl.value > kl


def test_calibration_error_of_the_right_and_of_a_shifted_prediction():
    a = np.linspace(0.2, 0.8, 1000)
    right, shifted = (quality(m, a, np.arange(1000) % 7) for m in (a, a + 0.1))
    assert right.ece.value == pytest.approx(0) and right.kl.value == pytest.approx(0, abs=1e-12)
    assert shifted.ece.value == pytest.approx(0.1) and shifted.auroc.value == pytest.approx(right.auroc.value)
    lines = reliability(a + 0.1, a)
    assert [line["count"] for line in lines] == [100] * 10
    assert all(line["predicted"] - line["accepted"] == pytest.approx(0.1) for line in lines)


@pytest.mark.parametrize("m", [np.array([]), np.array([0.5, 1.1]), np.array([0.5, np.nan])])
def test_what_is_no_probability_is_refused(m):
    with pytest.raises(ValueError, match="must be probabilities"):
        quality(m, np.full(len(m), 0.5), np.arange(len(m)))


def test_the_signals_model_may_be_given(recorded):
    train, test = split_requests(recorded)
    cost, rule = Affine(0.2, 1.0), "rejection:0.4,signal=draft_prob"
    model = fit_signal(recorded, "draft_prob", train)
    own, given = (earned(recorded, rule, test, cost, m).tally.num_drafted for m in (None, model))
    assert own.tolist() == given.tolist()
    trusting = SignalModel("draft_prob", knots=np.array([0.0, 1.0]), levels=np.array([1.0, 1.0]))
    assert earned(recorded, rule, test, cost, trusting).tally.num_drafted.sum() > given.sum()


def test_the_best_is_chosen_on_one_half_and_judged_on_the_other(recorded):
    train, test = split_requests(recorded)
    cost, lengths = Affine(0.2, 1.0), [f"fixed:{k}" for k in range(9)]
    best = best_on(recorded, lengths, train, test, cost)
    on_train = [earned(recorded, text, train, cost).throughput.value for text in lengths]
    assert best.policy == lengths[int(np.argmax(on_train))]
    wanted = replay(recorded, [best.policy], cost=cost).policies[0]
    assert len(best.tally.time) == len(test)
    assert best_of(recorded, lengths, train, cost).throughput.value == max(on_train)
    alone = earned(recorded, best.policy, np.arange(recorded.num_requests), cost)
    assert alone.throughput.value == pytest.approx(wanted.throughput.value)
