"""Counts and rates: identities that hold for any counts, and a balance that notices a lost token."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mdp.metrics import Tally, TokenBalanceError

rounds = st.lists(st.integers(0, 8).flatmap(lambda k: st.tuples(st.just(k), st.integers(0, k))), min_size=1)


def tally_of(rounds, time=1.0):
    """Rounds of (drafted, accepted) candidates, none of them cut."""
    drafted, accepted = np.array(rounds).sum(axis=0).tolist()
    calls = len(rounds)
    return Tally(calls, drafted, accepted + calls, drafted - accepted, 0, time)


@given(rounds)
def test_whole_rounds_balance(rounds):
    tally = tally_of(rounds)
    assert tally.imbalance == 0
    assert tally.check_balance() is tally


@given(rounds, st.floats(1e-6, 1e6))
def test_rates_are_ratios_of_sums(rounds, time):
    tally = tally_of(rounds, time)
    assert tally.throughput * time == pytest.approx(tally.num_emitted)
    assert tally.block_efficiency * tally.verification_rate == pytest.approx(1.0)
    assert tally.block_efficiency >= 1.0
    assert tally.discard_rate * tally.num_emitted == pytest.approx(tally.num_discarded)
    assert tally.cut_rate == 0.0
    # Per call: candidates + 1 = emitted + discarded.
    per_call = tally.block_efficiency * (1 + tally.discard_rate + tally.cut_rate)
    assert tally.mean_candidates + 1 == pytest.approx(per_call)
    if tally.num_drafted:
        kept = tally.accept_rate_drafted * tally.num_drafted
        assert kept + tally.num_target_calls == pytest.approx(tally.num_emitted)


@given(rounds, st.integers(1, 3))
def test_cut_tokens_are_neither_emitted_nor_discarded(rounds, cut):
    whole = tally_of(rounds)
    assume(cut < whole.num_emitted)
    tally = Tally(whole.num_target_calls, whole.num_drafted, whole.num_emitted - cut, whole.num_discarded, cut, 1.0)
    tally.check_balance()
    assert tally.discard_rate * tally.num_emitted == pytest.approx(whole.num_discarded)
    assert tally.cut_rate * tally.num_emitted == pytest.approx(cut)


def test_rates_of_one_round_by_hand():
    tally = Tally(num_target_calls=1, num_drafted=4, num_emitted=3, num_discarded=2, num_cut=0, time=2.0)
    assert tally.check_balance().throughput == 1.5
    assert (tally.block_efficiency, tally.verification_rate, tally.discard_rate) == (3.0, 1 / 3, 2 / 3)
    assert (tally.mean_candidates, tally.accept_rate_drafted) == (4.0, 0.5)


@pytest.mark.parametrize("field", ["num_target_calls", "num_drafted", "num_emitted", "num_discarded", "num_cut"])
@pytest.mark.parametrize("change", [-1, 1])
def test_one_token_lost_or_invented_is_noticed(field, change):
    counts = {"num_target_calls": 5, "num_drafted": 9, "num_emitted": 10, "num_discarded": 3, "num_cut": 1}
    Tally(**counts, time=1.0).check_balance()
    with pytest.raises(TokenBalanceError, match=r"token balance is off by -?1$"):
        Tally(**counts | {field: counts[field] + change}, time=1.0).check_balance()


def test_each_entry_of_an_array_must_balance():
    good = Tally(*(np.array([n, 2 * n]) for n in (5, 9, 10, 3, 1)), time=np.ones(2))
    assert good.check_balance().block_efficiency.tolist() == [2.0, 2.0]
    bad = Tally(*(np.array([n, n]) for n in (5, 9, 10, 3)), np.array([1, 2]), time=np.ones(2))
    with pytest.raises(TokenBalanceError):
        bad.check_balance()
    # Errors that cancel between entries do not balance.
    with pytest.raises(TokenBalanceError):
        Tally(*(np.array([n, n]) for n in (5, 9, 10, 3)), np.array([0, 2]), time=np.ones(2)).check_balance()
