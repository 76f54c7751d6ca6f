"""Where texts end: the accounting at the end of a request, and what it does to the identity of fixed lengths."""

import numpy as np
import pytest
from chains import OneMore

from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine
from mdp.problem import Persistent, StoppingProblem
from simulate.requests import Requests
from simulate.rounds import simulate

COST = Affine(0.2, 1.0)


def deviation(total, length):
    """d + x - ((K + 1) v - 1): 0 where every round drafts K."""
    return total.discard_rate + total.cut_rate - ((length + 1) * total.verification_rate - 1)


def test_without_ends_the_identity_is_exact_and_with_them_it_deviates():
    problem = StoppingProblem(IID(0.8), COST, 8)
    (endless,) = simulate(problem, ["fixed:4"], rounds=20_000, key=0).policies
    assert abs(deviation(endless.total, 4)) < 1e-12
    (short,) = simulate(problem, ["fixed:4"], rounds=20_000, key=0, requests=Requests(12)).policies
    assert deviation(short.total, 4) < -0.02  # last rounds draft less than K
    (long,) = simulate(problem, ["fixed:4"], rounds=20_000, key=0, requests=Requests(2000)).policies
    assert -0.01 < deviation(long.total, 4) < 0.0


def test_requests_by_hand_where_all_is_accepted():
    """Ten tokens in rounds of four candidates: 5, 5; nine: 5 and then 4, of three candidates."""
    problem = StoppingProblem(IID(1.0), COST, 4)
    for most, drafted, calls in ((10, 8, 2), (9, 7, 2), (6, 4, 2), (1, 0, 1)):
        (found,) = simulate(problem, ["fixed:4"], rounds=10_240, key=1, requests=Requests(most)).policies
        total = found.total
        assert total.num_drafted / total.num_target_calls == drafted / calls
        assert total.num_emitted / total.num_target_calls == most / calls
        assert total.num_cut == 0


def test_length_law_of_texts_does_not_depend_on_the_policy():
    """Every emitted token ends the text with probability e: texts are geometric, cut at the maximum length."""
    chain = MarkovModulated([[0.9, 0.1], [0.3, 0.7]], [0.95, 0.4], [0.8, 0.2])
    start = [[0.5, 0.5], [0.2, 0.8]]
    problem = StoppingProblem(chain, COST, 6, Persistent(start, start))
    policies = ["fixed:0", "fixed:6", "rejection:0.3", OneMore(1), "oracle"]
    result = simulate(problem, policies, rounds=40_960, key=2, requests=Requests(30, end_prob=0.05))
    for found in result.policies:
        total = found.total
        assert total.num_drafted + total.num_target_calls == total.num_emitted + total.num_discarded + total.num_cut
    cuts = [float(found.total.num_cut) for found in result.policies]
    assert cuts[0] == 0  # without candidates none of them ends the text
    assert cuts[1] > 0


def test_plain_decoding_counts_requests():
    """Nothing drafted: one token a call, whatever ends when."""
    problem = StoppingProblem(IID(0.5), COST, 4)
    (found,) = simulate(problem, ["fixed:0"], rounds=1000, key=0, requests=Requests(3, end_prob=0.5)).policies
    assert found.throughput.value == 1.0


def test_end_of_text_in_the_first_candidate_by_hand():
    """a = 1, every token ends the text: one candidate, accepted, its bonus cut; one token for T(1)."""
    problem = StoppingProblem(IID(1.0), COST, 4)
    (found,) = simulate(problem, ["fixed:3"], rounds=1000, key=0, requests=Requests(100, end_prob=1.0)).policies
    total = found.total
    assert total.num_drafted == total.num_emitted == total.num_cut == total.num_target_calls
    np.testing.assert_allclose(found.throughput.value, 1 / 1.2)


@pytest.mark.parametrize(
    ("most", "end"), [(0, 0.0), (True, 0.0), (2.5, 0.0), (5, -0.1), (5, 2), (5, True), (5, np.nan)]
)
def test_bad_requests(most, end):
    with pytest.raises(ValueError, match=r"^(max_new_tokens|end_prob): must be"):
        Requests(most, end)
