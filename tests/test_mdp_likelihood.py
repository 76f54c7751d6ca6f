"""Scores of processes on run lengths: by enumeration, by hand, and fits that find what made the data."""

import itertools

import chains
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdp.acceptance import IID, BetaMixture, MarkovModulated, Position, StartLaws
from mdp.fit import position_signal
from mdp.fit_processes import (
    beta_cells,
    choose_regimes,
    fit_beta,
    fit_chain,
    fit_hidden,
    fit_iid,
    fit_position,
    held_cells,
)
from mdp.likelihood import Runs, cell_score, full_rounds, run_score, seen_score
from tests.strategies import probabilities, stochastic_matrices

DEPTH = 3


def by_paths(process, rounds, laws):
    """Probability of the rounds (depth, length), summed over every path of regimes."""
    size = process.num_regimes

    def rest(start, later):
        if not later:
            return 1.0
        (depth, length), *after = later
        total = 0.0
        seen = length + (length < depth)
        for path in itertools.product(range(size), repeat=seen):
            chance, here = 1.0, start
            for i, regime in enumerate(path):
                a = process.accept_prob[regime]
                chance *= process.transition[here, regime] * (a if i < length else 1.0 - a)
                here = regime
            following = process.initial if laws is None else (laws.rejection if length < depth else laws.bonus)[here]
            total += chance * sum(following[y] * rest(y, after) for y in range(size))
        return total

    return sum(process.initial[z] * rest(z, rounds) for z in range(size))


def one_text(rounds):
    depth, length = np.array(rounds).T
    starts = np.cumsum(np.append(0, length + 1))[:-1]
    return Runs(np.zeros(len(rounds), dtype=int), starts, depth, length, 1)


ROUNDS = st.lists(
    st.integers(0, DEPTH).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), min_size=1, max_size=3
)


@given(st.data())
def test_the_score_is_the_sum_over_all_paths(data):
    size = data.draw(st.sampled_from((1, 2)))
    transition, rejection, bonus = (data.draw(stochastic_matrices(size)) for _ in range(3))
    accept = np.array([data.draw(probabilities()) for _ in range(size)])
    process = MarkovModulated(transition, accept, np.full(size, 1 / size))
    laws = data.draw(st.sampled_from((None, StartLaws(np.asarray(rejection), np.asarray(bonus)))))
    rounds = data.draw(ROUNDS)
    found = run_score(process.lower(DEPTH), one_text(rounds), laws).log_likelihood[0]
    assert np.exp(found) == pytest.approx(by_paths(process, rounds, laws), abs=1e-12, rel=1e-9)


def test_a_wrong_coupling_is_another_score():
    """The check above can fail: starting in the regime behind the correction is not starting in its own."""
    process = MarkovModulated([[0.9, 0.1], [0.2, 0.8]], [0.9, 0.3], [0.5, 0.5])
    rounds = [(3, 1), (3, 3), (2, 0)]
    right = StartLaws(np.eye(2), process.transition)
    wrong = StartLaws(process.transition, process.transition)
    found = run_score(process.lower(DEPTH), one_text(rounds), wrong).log_likelihood[0]
    assert abs(np.exp(found) - by_paths(process, rounds, right)) > 1e-4


def test_all_lengths_of_a_round_have_probability_one():
    process = MarkovModulated([[0.9, 0.1], [0.2, 0.8]], [0.9, 0.3], [0.5, 0.5])
    for depth in range(DEPTH + 1):
        runs = Runs(*(np.arange(depth + 1),) * 2, np.full(depth + 1, depth), np.arange(depth + 1), depth + 1)
        assert np.exp(run_score(process.lower(DEPTH), runs).log_likelihood).sum() == pytest.approx(1.0, abs=1e-14)


def test_scores_by_hand():
    runs = one_text([(3, 1), (3, 3), (0, 0)])
    iid = run_score(IID(0.8).lower(3), runs)
    assert iid.num_tested.tolist() == [5]
    assert iid.log_likelihood[0] == pytest.approx(4 * np.log(0.8) + np.log(0.2))
    place = run_score(Position([0.9, 0.5, 0.7]).lower(3), runs)
    assert place.log_likelihood[0] == pytest.approx(np.log(0.9 * 0.5) + np.log(0.9 * 0.5 * 0.7))
    assert run_score(Position([1.0, 1.0, 1.0]).lower(3), runs).log_likelihood[0] == -np.inf
    seen = seen_score(np.linspace(0.1, 0.6, 6), np.array([1, 0, 1, 1, 1, 0], dtype=bool), runs)
    assert seen.log_likelihood[0] == pytest.approx(np.log([0.1, 0.8, 0.3, 0.4, 0.5]).sum())
    cells = cell_score(np.array([0.25, 0.75]), np.array([0.1, 0.6, 1.0, 0.5, 0.2, 0.0]), runs)
    assert cells.log_likelihood[0] == pytest.approx(2 * np.log(0.25) + 3 * np.log(0.75))


def step(accepted, accept_prob=0.5, end=False, rollout=()):
    shown = {"token_accept_prob": accept_prob, "step_accept_prob": 0.5, "draft_prob": accept_prob, "top_prob": 0.5,
             "entropy": 1.0}  # fmt: skip
    return {"accepted": accepted, "end": end, "rollout": [{**shown, "end": False} for _ in rollout], **shown}


def test_rounds_of_full_depth_by_hand():
    fails = [step(False, rollout=range(min(2, 6 - 2 - j))) for j in range(6)]
    first = [step(True), fails[1], step(True), step(True), step(True), step(True)]
    second = [step(True), step(True, end=True)]
    trace = chains.assemble([first, second], [6, 6], 3, [False, True])
    runs = full_rounds(trace, np.array([0, 1]))
    # at 2 three candidates and a bonus; the end-of-text of the second is accepted, nothing is drafted behind it
    assert list(zip(*(part.tolist() for part in runs[:4]), strict=True)) == [(0, 0, 3, 1), (0, 2, 3, 3), (1, 6, 2, 2)]
    assert [part.tolist() for part in runs.tested()] == [
        [0, 1, 2, 3, 4, 6, 7],
        [1, 2, 1, 2, 3, 1, 2],
        [0] * 5 + [1] * 2,
    ]


def sample(process, persistent, texts=150, length=40, depth=4, seed=0):
    """Texts whose flags come from a chain along the text, or are drawn afresh."""
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(texts):
        regime, rows = rng.choice(process.num_regimes, p=process.initial), []
        for j in range(length):
            regime = rng.choice(process.num_regimes, p=process.transition[regime])
            a = process.accept_prob[regime]
            kept = bool(rng.random() < a)
            rows.append(step(kept, float(a), rollout=() if kept else range(min(depth - 1, max(length - 2 - j, 0)))))
        requests.append(rows)
    return chains.assemble(requests, [length] * texts, depth, [False] * texts)


TWO = MarkovModulated([[0.95, 0.05], [0.1, 0.9]], [0.9, 0.3], [2 / 3, 1 / 3])


@pytest.fixture(scope="module")
def regimes():
    return sample(TWO, True)


def mean(score):
    return score.log_likelihood.sum() / score.num_tested.sum()


def test_the_process_that_made_the_texts_scores_best(regimes):
    train, test = np.arange(75), np.arange(75, 150)
    runs = full_rounds(regimes, test)
    scores = {f.name: mean(f.score(runs, 4)) for f in (fit_iid(regimes, train), fit_position(regimes, train))}
    number, of_numbers = choose_regimes(regimes, train, (2, 3))
    hidden = fit_hidden(regimes, train, number)
    truth = run_score(TWO.lower(4), runs, StartLaws(np.eye(2), TWO.transition))
    assert number == 2 or of_numbers[3] - of_numbers[2] < 1e-3
    assert mean(hidden.score(runs, 4)) > max(scores.values()) + 0.01
    assert abs(mean(hidden.score(runs, 4)) - mean(truth)) < 0.003


def test_independent_flags_are_best_told_by_iid():
    trace = sample(MarkovModulated([[0.5, 0.5], [0.5, 0.5]], [0.7, 0.7], [0.5, 0.5]), False, texts=80)
    train, runs = np.arange(40), full_rounds(trace, np.arange(40, 80))
    iid = fit_iid(trace, train)
    assert iid.acceptance.accept_prob == pytest.approx(0.7, abs=0.03)
    assert mean(iid.score(runs, 4)) > mean(fit_hidden(trace, train, 2).score(runs, 4)) - 0.002
    beta = fit_beta(trace, train)
    assert mean(beta.score(runs, 4)) == pytest.approx(mean(iid.score(runs, 4)), abs=1e-12)


def test_beta_laws_concentration_is_found():
    rng = np.random.default_rng(3)
    requests = []
    for _ in range(150):
        values = rng.beta(6.0, 2.0, 30)
        kept = rng.random(30) < values
        requests.append([step(bool(k), float(a), rollout=() if k else range(min(3, max(28 - j, 0))))
                         for j, (k, a) in enumerate(zip(kept, values, strict=True))])  # fmt: skip
    trace = chains.assemble(requests, [30] * 150, 4, [False] * 150)
    fitted = fit_beta(trace, np.arange(150))
    assert (fitted.acceptance.mean, fitted.acceptance.concentration) == pytest.approx((0.75, 8.0), rel=0.1)
    runs = full_rounds(trace, np.arange(150))
    values = position_signal(trace, "token_accept_prob")
    of = {name: mean(cell_score(law, values, runs)) for name, law in (
        ("fitted", beta_cells(fitted.acceptance)), ("other", beta_cells(BetaMixture(0.75, 1.0))),
        ("histogram", held_cells(trace, runs)))}  # fmt: skip
    assert of["other"] < of["fitted"] - 0.1 and abs(of["histogram"] - of["fitted"]) < 0.02


def test_a_chain_shows_what_its_bins_hold(regimes):
    fitted = fit_chain(regimes, "draft_prob", np.arange(75))
    shown = fitted.acceptance.features()["draft_prob"]
    assert fitted.signal == "draft_prob" and shown[1:].tolist() == pytest.approx([0.3, 0.9], rel=1e-6)
    assert fitted.acceptance.accept_prob[1:] == pytest.approx([0.3, 0.9], rel=1e-6)
    assert fitted.num_parameters == 3 * 1 + 2  # three laws over two bins, two acceptances


def test_counts_have_no_run_lengths(regimes):
    from dataclasses import replace

    counts = np.ones(regimes.num_positions, dtype=int)
    bad = replace(regimes, optional={"run_length": counts, "tested": counts})
    with pytest.raises(ValueError, match="it holds counts"):
        full_rounds(bad, np.arange(2))
