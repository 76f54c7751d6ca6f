"""Ratio estimates, their errors, and the JSON they end in."""

import json
import math

import numpy as np
import pytest

from mdp.metrics import Tally, TokenBalanceError
from simulate.estimate import Comparison, PolicyResult, TraceComparison, interval, paired, ratio


def tally(emitted, time):
    """Rounds without candidates: one token a call."""
    emitted = np.asarray(emitted)
    nothing = np.zeros_like(emitted)
    return Tally(emitted, nothing, emitted, nothing, nothing, np.asarray(time, dtype=float))


def test_ratio_by_hand():
    # rho = 6/4; residuals 2 - 1.5 = .5 and 4 - 4.5 = -.5; se^2 = 2/1 * (.25 + .25) / 16
    estimate = ratio(np.array([2, 4]), np.array([1.0, 3.0]))
    assert estimate.value == 1.5
    assert estimate.se == pytest.approx(0.25)


def test_ratio_se_is_the_spread_of_repeated_estimates():
    rng = np.random.default_rng(0)
    time = rng.gamma(5.0, size=(4000, 40))
    emitted = time * rng.gamma(3.0, size=(4000, 40))
    estimates = [ratio(e, t) for e, t in zip(emitted, time, strict=True)]
    spread = np.std([e.value for e in estimates])
    assert np.sqrt(np.mean([e.se**2 for e in estimates])) == pytest.approx(spread, rel=0.05)


def test_paired_difference_cancels_what_clusters_share():
    rng = np.random.default_rng(1)
    emitted, time = rng.integers(50, 100, 30), rng.uniform(10, 30, 30)
    same = paired(tally(emitted, time), tally(emitted, time))
    assert same == (0.0, 0.0)
    slower = paired(tally(emitted, 1.01 * time), tally(emitted, time))
    assert slower.se == pytest.approx(ratio(emitted, time).se * (1 - 1 / 1.01))


def test_interval_is_students():
    low, high = interval(ratio(np.array([2, 4]), np.array([1.0, 3.0])), 2)
    assert (low, high) == pytest.approx((1.5 - 12.706205 * 0.25, 1.5 + 12.706205 * 0.25), rel=1e-6)
    with pytest.raises(ValueError, match=r"level: must lie strictly between 0 and 1, got 95"):
        interval(ratio(np.ones(2), np.ones(2)), 2, level=95)


def test_one_cluster_has_no_error_and_null_in_json():
    result = PolicyResult("fixed:0", tally([5], [5.0]), plain_time=1.0)
    assert math.isnan(result.throughput.se)
    comparison = TraceComparison((result, result), draft_time=0.2, verify_time=(1.0, 1.0))
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["policies"][0]["throughput_se"] is None
    assert data["policies"][0]["throughput_interval"] == [None, None]
    assert data["differences"][0]["se"] is None
    assert data["num_requests"] == 1


def test_json_keys_are_the_contract():
    result = PolicyResult("fixed:0", tally([5, 6], [5.0, 6.0]), plain_time=2.0)
    data = Comparison((result, result), rounds=11, seed=3).to_dict()
    assert list(data) == ["rounds", "seed", "policies", "differences"]
    assert list(data["policies"][0]) == [
        "policy", "throughput", "throughput_se", "speedup", "block_efficiency", "verification_rate", "discard_rate",
        "num_emitted", "num_drafted", "num_discarded", "num_cut", "num_target_calls",
    ]  # fmt: skip
    assert list(data["differences"][0]) == ["policy", "baseline", "throughput_difference", "se"]
    assert data["policies"][0]["speedup"] == 2.0
    assert all(type(data["policies"][0][key]) is int for key in data["policies"][0] if key.startswith("num_"))


def test_lost_tokens_are_never_reported():
    with pytest.raises(TokenBalanceError, match="off by"):
        PolicyResult("x", Tally(*(np.ones(2) for _ in range(6))), plain_time=1.0)
