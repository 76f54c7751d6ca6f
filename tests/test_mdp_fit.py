"""Signals: split, calibration, bins, chain."""

import hashlib
import json
from dataclasses import replace

import chains
import numpy as np
import pytest

from mdp.fit import SignalModel, fit_signal, split_requests

SIGNALS = ("token_accept_prob", "draft_prob", "top_prob", "entropy")


@pytest.fixture(scope="module")
def trace():
    return chains.record(chains.random_pair(4, size=5, end=4), 0, num_requests=300, limit=16, depth=5)


def test_split_is_by_hash_and_covers_everything(trace):
    train, test = split_requests(trace)
    assert sorted([*train, *test]) == list(range(300))
    assert len(train) == 150
    assert (split_requests(trace)[0] == train).all()
    assert not (train < 150).all()
    one = chains.record(chains.random_pair(0), 0, num_requests=1, limit=5, depth=2)
    with pytest.raises(ValueError, match="at least 2 different prompts to split, got 1"):
        split_requests(one)


def test_equal_prompts_stay_on_one_side(trace):
    names = [hashlib.sha256(str(r // 2).encode()).hexdigest() + f"-{r % 2}" for r in range(300)]
    train, test = split_requests(replace(trace, manifest={**trace.manifest, "request_ids": names}))
    assert not {r // 2 for r in train} & {r // 2 for r in test}
    assert len(train) == 150


@pytest.mark.parametrize("signal", SIGNALS)
def test_chain_is_a_valid_process_without_empty_regimes(trace, signal):
    model = fit_signal(trace, signal, split_requests(trace)[0])
    process = model.process()
    assert process.initial[0] == 1
    assert (process.transition[:, 0] == 0).all()
    assert (process.transition[0, 1:] > 0).all()  # the start's row is the marginal law: no bin is empty
    assert 2 <= process.num_regimes <= 9


def test_calibration_is_monotone_and_unbiased(trace):
    everything = np.arange(trace.num_requests)
    for signal in SIGNALS:
        model = fit_signal(trace, signal, everything)
        values = trace.features[signal]
        predicted = model.accept_prob(values)
        assert predicted.mean() == pytest.approx(trace.features["token_accept_prob"].mean(), abs=1e-9)
        assert ((predicted >= 0) & (predicted <= 1)).all()
        ordered = model.accept_prob(np.sort(values))
        change = np.diff(ordered)
        assert (change <= 1e-12).all() if signal == "entropy" else (change >= -1e-12).all()


def test_token_accept_prob_is_used_as_it_is(trace):
    model = fit_signal(trace, "token_accept_prob", split_requests(trace)[0])
    values = np.array([0.0, 0.3, 1.0, 1.0 + 1e-6])
    assert model.accept_prob(values).tolist() == [0.0, 0.3, 1.0, 1.0]


def test_bins_by_hand():
    """Half the candidates show .2, the rest 1: two regimes, whatever the quantiles say."""
    shown = {"step_accept_prob": 0.5, "draft_prob": 0.5, "top_prob": 0.5, "entropy": 1.0, "end": False}
    low, high = {**shown, "token_accept_prob": 0.2}, {**shown, "token_accept_prob": 1.0}
    request = [
        {**high, "accepted": True, "rollout": []},
        {**low, "accepted": False, "rollout": [high]},
        {**high, "accepted": True, "rollout": []},
        {**low, "accepted": True, "rollout": []},
    ]
    trace = chains.assemble([request], [4], 2, [False])
    model = fit_signal(trace, "token_accept_prob", np.array([0]))
    assert model.edges.tolist() == [1.0]
    assert model.regime(np.array([0.2, 0.99, 1.0])).tolist() == [1, 1, 2]
    # high -> low twice, low -> high once (the rollout); the last position leads nowhere
    assert model.transition.tolist() == [[0, 0.5, 0.5], [0, 0, 1], [0, 1, 0]]
    assert model.regime_accept_prob[1:].tolist() == [0.2, 1.0]
    assert model.next_accept_prob.tolist() == [0.6, 1.0, 0.2]


def test_a_constant_signal_is_one_regime():
    pair = chains.cyclic_pair(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    trace = chains.record(pair, 0, num_requests=3, limit=6, depth=3)
    model = fit_signal(trace, "entropy", np.arange(3))
    assert model.process().num_regimes == 2
    assert model.accept_prob(0.3) == 1.0


def test_floats_and_arrays_agree(trace):
    model = fit_signal(trace, "entropy", split_requests(trace)[0])
    values = trace.features["entropy"][:60].reshape(20, 3)
    state = model.start(20)
    singles = [model.start() for _ in range(20)]
    for k in range(3):
        state = model.update(state, {"entropy": values[:, k]})
        singles = [model.update(s, {"entropy": float(v)}) for s, v in zip(singles, values[:, k], strict=True)]
        seen = model.observation(state, k + 1, {"entropy": values[:, k]})
        for i, single in enumerate(singles):
            alone = model.observation(single, k + 1, {"entropy": float(values[i, k]), "token": 7})
            assert (alone.survival, alone.regime) == (seen.survival[i], seen.regime[i])
            assert alone.next_accept_prob == seen.next_accept_prob[i]


def test_json_round_trip(trace):
    for signal in SIGNALS:
        model = fit_signal(trace, signal, split_requests(trace)[0])
        again = SignalModel.from_dict(json.loads(json.dumps(model.to_dict(), allow_nan=False)))
        values = trace.features[signal]
        assert (again.accept_prob(values) == model.accept_prob(values)).all()
        assert (again.regime(values) == model.regime(values)).all()
        assert (again.next_accept_prob == model.next_accept_prob).all()
    assert SignalModel.from_dict(SignalModel().to_dict()).process.__name__ == "process"
    with pytest.raises(ValueError, match="no chain was fitted"):
        SignalModel().process()
    with pytest.raises(ValueError, match="signal must be one of"):
        SignalModel.from_dict({"signal": "colour"})
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        SignalModel.from_dict({"signal": "entropy", "colour": 1})


def test_survival_is_calibrated_on_the_other_half(trace):
    """The product of two calibrated candidates against how often both were accepted, on requests not fitted on."""
    train, test = split_requests(trace)
    model = fit_signal(trace, "token_accept_prob", train)
    pairs = np.concatenate([np.arange(trace.offsets[r], trace.offsets[r + 1] - 1) for r in test])
    first, second = (model.accept_prob(trace.features["token_accept_prob"][pairs + i]) for i in (0, 1))
    both = trace.accepted[pairs] & trace.accepted[pairs + 1]
    # the second factor is a candidate's only where the first was accepted
    error = both - trace.accepted[pairs] * second
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(error))
    error = trace.accepted[pairs] - first
    assert abs(error.mean()) < 5 * error.std() / np.sqrt(len(error))
