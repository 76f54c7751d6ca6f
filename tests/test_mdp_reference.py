"""The enumeration oracle: held against every deterministic rule there is, and against sums done by hand."""

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from strategies import problems, tame_probabilities

import mdp.reference
from mdp.reference import Reference, advantage, solve_by_enumeration

EVEN = np.array([[0.5, 0.5], [0.5, 0.5]])


def outcome_of_round(finite, start, stops):
    """Tokens, time and next-start law of a round that stops at the paths (z_0, ..., z_k) in `stops`."""
    tokens, time, next_start = 1.0, 0.0, np.zeros(finite.num_regimes)
    alive = [((start,), 1.0, 1.0)]
    while alive:
        path, chance, survival = alive.pop()
        k, z = len(path) - 1, path[-1]
        if k == finite.max_candidates or path in stops:
            time += chance * (k * finite.draft_time + finite.verify_time[k])
            if finite.persistent:
                next_start += chance * survival * finite.bonus[z]
            continue
        for y in range(finite.num_regimes):
            branch, accept = chance * finite.transition[z, y], finite.accept_prob[k, y]
            tokens += branch * survival * accept
            if finite.persistent:
                next_start += branch * survival * (1 - accept) * finite.rejection[y]
            alive.append(((*path, y), branch, survival * accept))
    return tokens, time, next_start


def best_of_all_rules(finite):
    """The most any deterministic rule earns per unit time, each evaluated by itself."""
    regimes, best = range(finite.num_regimes), 0.0
    per_start = []
    for start in regimes:
        nodes = [(start, *path) for k in range(finite.max_candidates) for path in itertools.product(regimes, repeat=k)]
        rules = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1))
        per_start.append([outcome_of_round(finite, start, set(stops)) for stops in rules])
    for chosen in itertools.product(*per_start):
        tokens, time, chain = (np.array(part) for part in zip(*chosen, strict=True))
        if not finite.persistent:
            laws = [finite.initial]
        else:  # powers of the lazy chain: a law for every start
            laws = np.linalg.matrix_power((np.eye(len(chain)) + chain) / 2, 2**20)
        best = max(best, *((law @ tokens) / (law @ time) for law in laws))
    return best


@given(problems(accept_prob=tame_probabilities(), shapes=[(1, 3), (2, 2)]))
def test_no_rule_does_better_and_one_does_as_well(problem):
    finite = problem.lower()
    if finite.persistent:  # all starts in reach, so that each rule's classes are classes of the problem
        even = 0.5 / finite.num_regimes
        finite = finite._replace(bonus=0.5 * finite.bonus + even, rejection=0.5 * finite.rejection + even)
    assert solve_by_enumeration(*finite).throughput == pytest.approx(best_of_all_rules(finite), rel=1e-9)


def test_a_renewal_problem_done_by_hand():
    # From either regime the next is 1 or 2 with probability 1/2, accepted with 1 or 0. One more candidate is worth
    # 1/2 of a token at survival 1 and nothing at survival 0.
    # Drafting while nothing was rejected, at most twice: tokens 1 + 1/2 + 1/4, time 1 + 1/4 + 1/8.
    answer = solve_by_enumeration(EVEN, [[1.0, 0.0]] * 2, [1.0, 0.0], 0.25, np.ones(3))
    assert answer.throughput == pytest.approx((7 / 4) / (11 / 8), rel=1e-14)
    np.testing.assert_allclose(answer.emitted, 7 / 4)
    np.testing.assert_allclose(answer.time, 11 / 8)


def test_a_persistent_problem_done_by_hand():
    # Regime 0 accepts all, regime 1 nothing, both last; each round moves to the other. K = 1, t_d = 1/2, V = 1.
    # A round from 0 pays 3/2 for 2 tokens, one from 1 pays 1 for 1: 3 tokens in 5/2.
    swap = np.array([[0.0, 1.0], [1.0, 0.0]])
    answer = solve_by_enumeration(np.eye(2), [[1.0, 0.0]], [1.0, 0.0], 0.5, np.ones(2), swap, swap)
    assert answer.throughput == pytest.approx(6 / 5, rel=1e-14)
    # h(0) - h(1) solves 2 - 6/5 * 3/2 + h(1) = h(0).
    assert answer.bias[0] - answer.bias[1] == pytest.approx(1 / 5, rel=1e-12)


def test_ties_continue():
    # Drafting one candidate, always accepted, doubles tokens and time: a tie with plain decoding.
    answer = solve_by_enumeration([[1.0]], [[1.0]], [1.0], 1.0, np.ones(2))
    assert answer.throughput == 1.0
    assert answer.emitted.tolist() == [2.0]


@pytest.mark.parametrize("survival", [0.0, 0.3, 0.7, 1.0])
def test_the_advantage_of_the_last_candidate_is_its_chance_less_its_price(survival):
    arrays = {"transition": EVEN, "accept_prob": np.tile([0.9, 0.2], (2, 1)), "initial": [1.0, 0.0],
              "draft_time": 0.3, "verify_time": np.array([1.0, 1.0, 1.5])}  # fmt: skip
    solved = solve_by_enumeration(**arrays)
    expected = survival * 0.55 - solved.throughput * (0.3 + 0.5)
    assert advantage(arrays, solved, 1, 0, survival) == pytest.approx(expected, abs=1e-14)


def test_the_advantage_counts_where_the_next_round_starts():
    arrays = {"transition": np.eye(2), "accept_prob": [[0.8, 0.3]], "initial": [1.0, 0.0], "draft_time": 0.1,
              "verify_time": np.ones(2), "rejection": EVEN, "bonus": np.eye(2) * 0.5 + 0.25}  # fmt: skip
    solved = solve_by_enumeration(**arrays)
    after_bonus, after_rejection = arrays["bonus"] @ solved.bias, EVEN @ solved.bias
    expected = 0.5 * (0.8 + 0.2 * after_rejection[0] + 0.8 * after_bonus[0] - after_bonus[0]) - 0.1 * solved.throughput
    assert advantage(arrays, solved, 0, 0, 0.5) == pytest.approx(expected, abs=1e-14)


def test_too_many_paths_are_refused():
    with pytest.raises(ValueError, match="too many to enumerate"):
        solve_by_enumeration(np.eye(3), np.full((12, 3), 0.5), [1.0, 0.0, 0.0], 0.1, np.ones(13))


def test_what_did_not_converge_is_refused(monkeypatch):
    monkeypatch.setattr(mdp.reference, "MAX_ROUNDS", 1)
    with pytest.raises(ValueError, match="did not converge"):
        solve_by_enumeration([[1.0]], [[0.9]] * 4, [1.0], 0.1, np.ones(5))


def test_the_oracle_shares_no_code_with_what_it_checks():
    tree = ast.parse(Path(mdp.reference.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"numpy", "typing"}


def always(verdict):
    """A `numpy.where` in which the rule's own choice counts for nothing."""

    def where(condition, yes, no):
        return np.broadcast_to(yes if verdict else no, np.broadcast_shapes(np.shape(yes), np.shape(no)))

    return where


@pytest.mark.parametrize("verdict", [True, False], ids=["always continues", "never continues"])
def test_an_oracle_that_does_not_choose_is_caught(monkeypatch, verdict):
    from types import SimpleNamespace

    problem = (EVEN, [[1.0, 0.0]] * 2, [1.0, 0.0], 0.25, np.ones(3))
    broken = SimpleNamespace(**{name: getattr(np, name) for name in dir(np) if not name.startswith("__")})
    broken.where = always(verdict)
    monkeypatch.setattr(mdp.reference, "np", broken)
    answer = solve_by_enumeration(*problem)
    assert isinstance(answer, Reference)
    assert answer.throughput < (7 / 4) / (11 / 8) - 1e-3
