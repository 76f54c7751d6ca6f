"""Hidden regimes: likelihood by enumeration, a known chain found again, and what cannot be told is said."""

import itertools

import chains
import numpy as np
import pytest

from mdp.acceptance import MarkovModulated
from mdp.regimes import fit_regimes, flag_sequences

TRUTH = MarkovModulated([[0.95, 0.05], [0.1, 0.9]], [0.9, 0.3], [0.5, 0.5])


def sample(process, rng, requests, length, symbols=None):
    rows, shown = [], []
    size = process.num_regimes
    for _ in range(requests):
        regime, flags, codes = rng.choice(size, p=process.initial), [], []
        for _ in range(length):
            regime = rng.choice(size, p=process.transition[regime])
            flags.append(rng.random() < process.accept_prob[regime])
            codes.append(0 if symbols is None else rng.choice(len(symbols[regime]), p=symbols[regime]))
        rows.append(np.array(flags))
        shown.append(np.array(codes))
    return rows, shown


def likelihood(process, flags, symbols=None, codes=None):
    """Summed over all paths of regimes."""
    total = 0.0
    for path in itertools.product(range(process.num_regimes), repeat=len(flags) + 1):
        chance = process.initial[path[0]]
        for i, (before, now) in enumerate(itertools.pairwise(path)):
            a = process.accept_prob[now]
            chance *= process.transition[before, now] * (a if flags[i] else 1 - a)
            chance *= 1.0 if symbols is None else symbols[now][codes[i]]
        total += chance
    return total


@pytest.mark.parametrize("with_symbols", [False, True])
def test_the_likelihood_is_the_sum_over_all_paths(with_symbols):
    rng = np.random.default_rng(0)
    rows = [rng.random(n) < 0.6 for n in (5, 1, 3)]  # of unequal lengths
    codes = [rng.integers(0, 3, len(row)) for row in rows] if with_symbols else None
    fit = fit_regimes(rows, 2, symbols=codes, restarts=3, max_steps=400, tol=1e-13)
    brute = sum(
        np.log(likelihood(fit.process, row, fit.symbols, None if codes is None else codes[r]))
        for r, row in enumerate(rows)
    )
    # the likelihood reported is that before the last step, which gained less than the tolerance
    assert fit.log_likelihood == pytest.approx(brute, abs=1e-6)


def test_every_step_gains():
    rows, _ = sample(TRUTH, np.random.default_rng(1), 20, 30)
    ends = [fit_regimes(rows, 3, restarts=1, max_steps=steps, tol=0.0).log_likelihood for steps in range(1, 30)]
    assert (np.diff(ends) >= -1e-9).all() and ends[-1] > ends[0] + 1


def test_a_known_chain_is_found_again():
    rows, _ = sample(TRUTH, np.random.default_rng(2), 100, 60)
    fit = fit_regimes(rows, 2, key=3, restarts=4)
    assert fit.process.accept_prob == pytest.approx(TRUTH.accept_prob, abs=0.03)
    assert fit.process.transition == pytest.approx(TRUTH.transition, abs=0.04)
    assert fit.converged and fit.identifiability["weak"] == [] and fit.bic_gain > 100
    assert fit.occupancy == pytest.approx([2 / 3, 1 / 3], abs=0.06)
    again = fit_regimes(rows, 2, key=3, restarts=4)
    assert (again.process.transition == fit.process.transition).all()
    three = fit_regimes(rows, 3, restarts=2, max_steps=200)
    assert three.log_likelihood >= fit.log_likelihood - 1e-3 and three.bic_gain < 0
    assert any("one regime fewer is as good" in why for why in three.identifiability["weak"])


def test_one_regime_is_the_mean():
    rows, _ = sample(TRUTH, np.random.default_rng(4), 10, 50)
    fit = fit_regimes(rows, 1)
    assert fit.process.accept_prob[0] == pytest.approx(np.mean(rows))
    assert np.isnan(fit.bic_gain) and fit.identifiability["weak"] == []


def test_independent_flags_have_no_regimes_and_it_says_so():
    rng = np.random.default_rng(5)
    fit = fit_regimes([rng.random(60) < 0.7 for _ in range(40)], 2, restarts=3)
    assert fit.bic_gain < 0 and any("one regime fewer" in why for why in fit.identifiability["weak"])


def test_a_signal_tells_regimes_apart_that_flags_alone_do_not():
    alike = MarkovModulated([[0.9, 0.1], [0.2, 0.8]], [0.7, 0.65], [0.5, 0.5])
    symbols = np.array([[0.8, 0.15, 0.05], [0.1, 0.2, 0.7]])
    rows, codes = sample(alike, np.random.default_rng(6), 60, 80, symbols)
    flags_only, both = (fit_regimes(rows, 2, symbols=s, restarts=3) for s in (None, codes))
    assert flags_only.identifiability["weak"] and both.identifiability["weak"] == []
    assert both.process.accept_prob == pytest.approx(alike.accept_prob, abs=0.04)
    assert both.symbols == pytest.approx(symbols, abs=0.05)


def test_running_out_of_steps_is_said():
    rows, _ = sample(TRUTH, np.random.default_rng(7), 10, 30)
    fit = fit_regimes(rows, 2, max_steps=2)
    assert not fit.converged and "EM ran out of steps" in fit.identifiability["weak"]


def test_from_a_trace():
    trace = chains.record(chains.random_pair(3, end=3), 0, num_requests=30, limit=20, depth=4)
    assert sum(map(len, flag_sequences(trace))) == trace.num_positions
    fit = fit_regimes(trace, 2, restarts=4)
    assert fit.num_observations == trace.num_positions and fit.process.num_regimes == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "at least one"),
        (([np.array([])], 2), "none of them empty"),
        (([np.array([0, 2])], 2), "every flag must be 0 or 1"),
        (([np.array([0, 1])], 0), r"num_regimes: must be a whole number in 1\.\.16, got 0"),
        (([np.array([0, 1])], True), "num_regimes: must be a whole number"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_regimes(*arguments)
    with pytest.raises(ValueError, match="symbols: must be one row per sequence"):
        fit_regimes([np.array([0, 1])], 2, symbols=[np.array([0])])
    with pytest.raises(ValueError, match=r"symbols: must be whole numbers in 0\.\.255"):
        fit_regimes([np.array([0, 1])], 2, symbols=[np.array([0.5, 1])])
