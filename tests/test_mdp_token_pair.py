"""Draft and target chains over tokens, lowered to regimes: against text that knows of none, and by enumeration."""

import json

import numpy as np
import pytest
from chains import cyclic_pair, random_pair
from hypothesis import given
from hypothesis import strategies as st
from strategies import stochastic_matrices

from mdp.acceptance import IID, TokenPair
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.problem import Persistent, StoppingProblem, loads
from mdp.reference import solve_by_enumeration
from mdp.solve import solve
from simulate.rounds import simulate

COST = Affine(draft_time=0.2, verify_time=1.0, verify_slope=0.02)


def problem_of(pair, depth, prompt_token=0, cost=COST):
    return StoppingProblem(TokenPair(pair.draft, pair.target, prompt_token), cost, depth)


def drawn(rng, laws):
    """One token from each row."""
    return np.minimum((rng.random(len(laws))[:, None] >= np.cumsum(laws, axis=1)).sum(axis=1), laws.shape[1] - 1)


def decode(pair, stops, depth, rounds, texts=400, burn_in=30, seed=0):
    """Speculative decoding of many texts at once, token by token; no regimes, no code of the library.

    Returns:
        counts [texts, 3]: emitted, drafted, discarded; and how often each token followed each [n, n].
    """
    rng = np.random.default_rng(seed)
    q, p = pair.draft, pair.target
    every = np.arange(texts)
    last = np.zeros(texts, dtype=int)
    counts, followed = np.zeros((texts, 3)), np.zeros(q.shape)
    for number in range(rounds + burn_in):
        context, survival, drafting = last.copy(), np.ones(texts), np.ones(texts, dtype=bool)
        tokens, submitted = np.zeros((depth, texts), dtype=int), np.zeros((depth, texts), dtype=bool)
        for k in range(depth):
            drafting &= ~np.broadcast_to(stops(k, survival), texts)
            token = drawn(rng, q[context])
            tokens[k], submitted[k] = token, drafting
            survival = np.where(drafting, survival * np.minimum(1.0, p[context, token] / q[context, token]), survival)
            context = np.where(drafting, token, context)
        good, accepted, correction = np.ones(texts, dtype=bool), np.zeros(texts, dtype=int), np.full(texts, -1)
        for k in range(depth):
            asked = good & submitted[k]
            passed = rng.random(texts) < p[last, tokens[k]] / q[last, tokens[k]]
            rest = np.maximum(p - q, 0.0) + 1e-300
            corrected = drawn(rng, (rest / rest.sum(axis=1, keepdims=True))[last])
            correction = np.where(asked & ~passed, corrected, correction)
            good &= passed | ~submitted[k]
            kept = asked & passed
            if number >= burn_in:
                np.add.at(followed, (last[kept], tokens[k][kept]), 1)
            last, accepted = np.where(kept, tokens[k], last), accepted + kept
        final = np.where(correction >= 0, correction, drawn(rng, p[last]))
        drafted = submitted.sum(axis=0)
        if number >= burn_in:
            np.add.at(followed, (last, final), 1)
            counts[every] += np.stack([accepted + 1, drafted, drafted - accepted], axis=1)
        last = final
    return counts, followed


def agrees(numerator, denominator, exact):
    """A ratio of sums over independent texts within five of its standard errors."""
    ratio = numerator.sum() / denominator.sum()
    se = np.sqrt(((numerator - ratio * denominator) ** 2).sum()) / denominator.sum()
    assert abs(ratio - exact) <= 5 * se + 1e-12


@pytest.mark.parametrize(
    "pair", [random_pair(1, size=2), random_pair(2, size=3), random_pair(5, size=3, sharpness=0.3)]
)
@pytest.mark.parametrize("policy", ["fixed:1", "fixed:3", "rejection:0.3", "rejection:0.7"])
def test_text_decoded_token_by_token_agrees_with_the_regimes(pair, policy):
    depth, rounds = 3, 200
    name, value = policy.split(":")
    stops = (lambda k, s: k >= int(value)) if name == "fixed" else (lambda k, s: 1 - s > float(value) + 1e-12)
    counts, followed = decode(pair, stops, depth, rounds)
    emitted, drafted, discarded = counts.T
    exact = evaluate(problem_of(pair, depth), policy)
    time = rounds * COST.verify_time + (COST.draft_time + COST.verify_slope) * drafted
    agrees(emitted, time, exact.throughput)
    agrees(emitted, np.full(len(emitted), rounds), exact.tally.block_efficiency)
    agrees(discarded, emitted, exact.tally.discard_rate)
    # The text is a path of the target's chain.
    times = followed.sum(axis=1, keepdims=True)
    se = np.sqrt(pair.target * (1 - pair.target) / np.maximum(times, 1))
    assert (np.abs(followed / times - pair.target) <= 5 * se + 1e-12).all()


def test_the_simulator_agrees_too():
    problem = problem_of(random_pair(4, size=2), 3)
    result = simulate(problem, ["fixed:3", "rejection:0.4"], rounds=20_000, key=0)
    for policy in result.policies:
        assert abs(policy.throughput.value - evaluate(problem, policy.policy).throughput) <= 5 * policy.throughput.se


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_two_tokens_against_enumeration(seed, depth):
    problem = problem_of(random_pair(seed, size=2), depth, prompt_token=seed % 2)
    exact, solution = solve_by_enumeration(*problem.lower()).throughput, solve(problem)
    assert solution.status.name == "successful"
    assert solution.bounds[0] * (1 - 1e-9) <= exact <= solution.bounds[1] * (1 + 1e-9)
    assert evaluate(problem, solution.policy).throughput == pytest.approx(exact, rel=1e-9)


def test_the_threshold_depends_on_the_drafted_token_only():
    solution = solve(problem_of(random_pair(3, size=4), 5))
    table = solution.survival_threshold.reshape(5, 4, 4)  # [k, u, v]
    np.testing.assert_array_equal(table, np.repeat(table[:, :1], 4, axis=1))
    assert np.ptp(table[0, 0]) > 0.01


@pytest.mark.parametrize("size", [2, 3])
def test_a_draft_that_is_the_target_is_always_accepted(size):
    pair = random_pair(7, size=size)
    problem = problem_of(pair._replace(draft=pair.target), 4)
    assert (problem.lower().accept_prob == 1).all()
    assert evaluate(problem, "fixed:4").tally.block_efficiency == pytest.approx(5.0, rel=1e-12)
    assert solve(problem).throughput == pytest.approx(5 / COST.round_times(4)[4], rel=1e-9)


def test_greedy_chains_agree_where_they_name_the_same_token():
    """Target 0 -> 1 -> 2 -> 0; the draft errs behind token 2: two candidates right, one wrong, for ever."""
    target, draft = np.eye(3)[[1, 2, 0]], np.eye(3)[[1, 2, 1]]
    problem = StoppingProblem(TokenPair(draft, target), COST, 3)
    # From 0 two candidates are right, and the target adds token 0: every round of two is the same.
    law = evaluate(problem, "fixed:2")
    assert (law.tally.block_efficiency, law.tally.discard_rate) == (pytest.approx(3.0), pytest.approx(0.0))
    assert evaluate(problem, "fixed:3").tally.discard_rate == pytest.approx(1 / 3)
    assert solve(problem).throughput == pytest.approx(3 / COST.round_times(3)[2], rel=1e-9)


def test_contexts_alike_up_to_a_shift_are_iid():
    pair = cyclic_pair([0.5, 0.3, 0.2], [0.3, 0.3, 0.4])
    alpha = 0.3 + 0.3 + 0.2
    for k in range(5):
        ours, iid = (evaluate(p, f"fixed:{k}") for p in (problem_of(pair, 4), StoppingProblem(IID(alpha), COST, 4)))
        assert ours.throughput == pytest.approx(iid.throughput, rel=1e-12)
    # Seeing which token was drafted can only help.
    assert solve(problem_of(pair, 4)).throughput >= solve(StoppingProblem(IID(alpha), COST, 4)).throughput


@given(stochastic_matrices(3), stochastic_matrices(3), st.integers(0, 2))
def test_the_lowered_laws_add_up_to_the_target(draft, target, prompt_token):
    """Accepted or corrected, the token behind u has the law p(.|u)."""
    process = TokenPair(draft, 0.9 * target + 0.1 / 3, prompt_token)
    chain, laws = process.lower(1), process.start_laws()
    for rows in (chain.transition, laws.rejection, laws.bonus):
        np.testing.assert_allclose(rows.sum(axis=1), 1.0, atol=1e-12)
    for u in range(3):
        drafted = chain.transition[u]  # from the start (•, u)
        accept = chain.accept_prob[0]
        emitted = (drafted * accept).reshape(3, 3).sum(axis=0) + ((drafted * (1 - accept)) @ laws.rejection)[:3]
        np.testing.assert_allclose(emitted, process.target[u], atol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(chain.initial), [prompt_token])


GOOD = {"acceptance": {"kind": "token_pair", "draft": [[0.6, 0.4], [0.3, 0.7]], "target": [[0.5, 0.5], [0.4, 0.6]]},
        "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0}, "max_candidates": 3}  # fmt: skip


def test_it_comes_back_from_its_own_dict():
    problem = loads(json.dumps(GOOD))
    assert "coupling" not in problem.to_dict()
    assert loads(json.dumps(problem.to_dict())).to_dict() == problem.to_dict()
    assert problem.lower().persistent and problem.acceptance.num_regimes == 4


BAD = [
    ({"draft": [[1.0]]}, "acceptance.target: must be 1 x 1, got 2 x 2"),
    ({"draft": [[0.5, 0.6], [0.3, 0.7]]}, "acceptance.draft: row 0 must sum to 1"),
    ({"target": [[0.5, 0.5]]}, "acceptance.target: must be 2 x 2"),
    ({"draft": 1}, "acceptance.draft: must be"),
    ({"draft": np.eye(33).tolist(), "target": np.eye(33).tolist()}, "acceptance.draft: at most 32 tokens, got 33"),
    *[({"prompt_token": bad}, "acceptance.prompt_token: must be a whole number in 0..1") for bad in (2, -1, True, 0.0)],
    ({"target": [[1, 0], [0, 1]], "draft": [[1, 0], [0, 1]], "tokens": 2}, "acceptance.tokens: unknown key"),
]


@pytest.mark.parametrize(("parts", "message"), BAD)
def test_bad_pairs_are_refused_in_one_line_that_names_the_field(parts, message):
    with pytest.raises(ValueError) as error:
        loads(json.dumps({**GOOD, "acceptance": {**GOOD["acceptance"], **parts}}))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_it_brings_its_own_coupling():
    for coupling in ({"kind": "renewal"}, {"kind": "persistent", "rejection": [[1.0]], "bonus": [[1.0]]}, {}):
        with pytest.raises(ValueError, match="coupling: token_pair brings its own, leave it out"):
            loads(json.dumps({**GOOD, "coupling": coupling}))
    pair = TokenPair(np.full((2, 2), 0.5), np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="coupling: token_pair brings its own"):
        StoppingProblem(pair, COST, 3, Persistent(np.eye(4), np.eye(4)))


def test_a_text_that_cannot_return_is_refused():
    with pytest.raises(ValueError, match="not communicating"):
        StoppingProblem(TokenPair(np.full((2, 2), 0.5), [[0.5, 0.5], [0.0, 1.0]]), COST, 3)
