"""The generator behind simulated rounds: published answers, and tests for more than means."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from scipy import stats

from simulate import coins


def _words(lanes, rounds, draws):
    """[lanes, rounds, draws, 2] words as the simulator addresses them."""
    keys = coins.lane_keys(jr.key(20), lanes)[:, :, None, None]
    counter = jnp.arange(rounds, dtype=jnp.uint32)[:, None], jnp.arange(draws, dtype=jnp.uint32)
    return np.stack(jax.jit(coins.words)((keys[0], keys[1]), counter), axis=-1)


@pytest.mark.parametrize(
    ("key", "counter", "answer"),
    [
        ((0, 0), (0, 0), (0x9D1C5EC6, 0x8BD50731)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0xFD36D048, 0x2D17272C)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_known_answers(key, counter, answer):
    """Random123's vectors for threefry2x32 with 13 rounds."""
    found = coins.words(tuple(map(jnp.uint32, key)), tuple(map(jnp.uint32, counter)))
    assert tuple(map(int, found)) == answer


def test_twenty_rounds_are_jaxs_own_generator(monkeypatch):
    monkeypatch.setattr(coins, "ROUNDS", 20)
    key, counter = (jnp.uint32(7), jnp.uint32(11)), (jnp.uint32(3), jnp.uint32(5))
    own = threefry_2x32(jnp.stack(key), jnp.stack(counter))
    assert [int(word) for word in coins.words(key, counter)] == [int(word) for word in own]


def quality(sample):
    """p-values of what a simulation would notice; `sample` [lanes, rounds, draws, 2] of uint32."""
    unit = sample.astype(np.float64) / 2.0**32
    out = {}
    for name, axis in (("lanes", 0), ("rounds", 1), ("draws", 2), ("words", 3)):
        near, next_ = (np.take(unit, range(start, unit.shape[axis] - 1 + start), axis=axis).ravel() for start in (0, 1))
        # neighbours fill the square evenly, not only without correlation
        table = np.histogram2d(near[::2], next_[::2], bins=32, range=((0, 1), (0, 1)))[0]
        out[f"pairs of {name}"] = stats.chisquare(table.ravel()).pvalue
    bits = ((sample.reshape(-1, 1) >> np.arange(32, dtype=np.uint32)) & 1).sum(axis=0)
    half, count = sample.size / 2, sample.size
    out["bits"] = stats.chi2.sf(((bits - half) ** 2 / (count / 4)).sum(), 32)
    # birthdays: equal words among n of 2^32, Poisson with mean n^2 / 2^33
    birthdays = sample.ravel()[: 2**18]
    equal = len(birthdays) - len(np.unique(birthdays))
    mean = len(birthdays) ** 2 / 2.0**33
    out["birthdays"] = min(1.0, 2 * min(stats.poisson.cdf(equal, mean), stats.poisson.sf(equal - 1, mean)))
    # lengths of runs below 1/2: what a geometric law of accepted candidates is made of
    low = (unit[..., 0] < 0.5).reshape(-1, unit.shape[2])
    run = np.cumprod(low, axis=1).sum(axis=1)
    expected = len(run) * np.append(0.5 ** np.arange(1, unit.shape[2] + 1), 0.5 ** unit.shape[2])
    out["runs"] = stats.chisquare(np.bincount(run, minlength=unit.shape[2] + 1), expected).pvalue
    return out


def test_quality():
    assert min(quality(_words(64, 1024, 8)).values()) > 1e-4


@pytest.mark.parametrize("flaw", ["lanes share a key", "counter in the clear", "one word twice", "a bit that sticks"])
def test_quality_is_seen_to_fail(flaw):
    sample = _words(64, 1024, 8)
    if flaw == "lanes share a key":
        sample[1::2] = sample[::2]
    elif flaw == "counter in the clear":
        sample += np.arange(8, dtype=np.uint32)[:, None] - sample[:, :, :1]
    elif flaw == "one word twice":
        sample[..., 1] = sample[..., 0]
    else:
        sample |= np.uint32(4)
    assert min(quality(sample).values()) < 1e-6


def test_one_bit_of_an_address_changes_half_of_the_coin():
    base = np.stack(coins.words((jnp.uint32(1), jnp.uint32(2)), (jnp.arange(512, dtype=jnp.uint32), jnp.uint32(3))))
    for bit in range(32):
        flipped = coins.words(
            (jnp.uint32(1), jnp.uint32(2)), (jnp.arange(512, dtype=jnp.uint32) ^ np.uint32(1 << bit), jnp.uint32(3))
        )
        changed = np.bitwise_count(base ^ np.stack(flipped)).sum(axis=0)
        assert abs(changed.mean() - 32) < 5 * 4 / 512**0.5  # 64 fair bits: standard deviation 4


def test_more_lanes_leave_the_first_ones_alone():
    assert (coins.lane_keys(jr.key(3), 8) == coins.lane_keys(jr.key(3), 32)[:, :8]).all()
