r"""Many rounds at once: lanes that walk automata, one coin a candidate.

A lane plays its quota of rounds one after another, and each step of the loop takes every lane one candidate further,
whatever depth it is at: no lane waits for the longest round of the others, and none is cut off in the middle of one,
which would favour short rounds. The coin of a step lies at the address (lane, round, candidates so far), so all
policies meet the same ones. Per step and lane: a hash, two look-ups, a few whole-number operations.

With one regime even that is too much. The rule then stops after a number of candidates that is fixed, or fixed given
how many would be accepted (a clairvoyant), and a round is that number L, drawn by one coin: L >= k iff the coin is
below $S_k$. Counting L per lane serves all policies of a comparison.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from mdp.evaluate import observer
from mdp.policy import Observation, Policy
from mdp.problem import FiniteProblem
from simulate.automaton import ALIAS_BITS, NODE_BITS, ROW_BITS, Automaton, Flag, asked
from simulate.coins import words

__all__ = ["Counts", "one_regime", "walk"]

STEPS = 16  # between two looks at whether all lanes are done
BATCH = 2**20  # rounds of a lane in one call, so that its counts fit 32 bits
BURN_IN = np.uint32(2**31)  # the address of the first round that is burnt in


class Counts(NamedTuple):
    """Per lane: candidates drafted and accepted, and the time of all rounds."""

    drafted: Int[np.ndarray, " B"]
    accepted: Int[np.ndarray, " B"]
    time: Float[np.ndarray, " B"]


class _Tables(NamedTuple):
    """An `Automaton` flattened and padded; `columns` n and `slots` n / 2 are the true widths."""

    chance: Any
    table: Any
    regime: Any
    columns: Any
    slots: Any
    first_row: Any
    round_time: Any


class _Lane(NamedTuple):
    """`whole`: none of this round's candidates is rejected so far; `last`: regime of the first that was, or of all."""

    node: Any
    row: Any
    rounds: Any
    num_candidates: Any
    whole: Any
    last: Any
    drafted: Any
    accepted: Any
    time: Any


def walk(
    problem: FiniteProblem, found: Automaton, keys: UInt32[Array, "2 B"], quota: Int[np.ndarray, " B"], burn_in: int
) -> Counts:
    """Each lane's quota of rounds, after `burn_in` rounds that are not counted."""
    num_lanes = len(quota)
    tables = _Tables(
        _padded(found.chance), _padded(found.table), _padded(found.regime.astype(np.uint32)),
        np.uint32(found.chance.shape[1]), np.uint32(found.table.shape[1]), np.uint32(found.first_row),
        jnp.asarray(problem.round_time),
    )  # fmt: skip
    steps = np.diff(problem.round_time)
    even = bool(np.ptp(steps) <= 1e-12 * problem.round_time.max())
    zeros = jnp.zeros(num_lanes, dtype=jnp.uint32)
    lane = _Lane(zeros, zeros + np.uint32(found.begin_row), zeros, zeros, zeros + np.uint32(1), zeros, zeros, zeros,
                 None if even else jnp.zeros(num_lanes, dtype=jnp.float64))  # fmt: skip
    static = {"persistent": problem.persistent, "clairvoyant": found.clairvoyant}
    if burn_in:  # at addresses of its own, so that counted rounds are the same for rules with and without it
        until = jnp.full(num_lanes, BURN_IN + np.uint32(burn_in), dtype=jnp.uint32)
        lane = _walk(tables, lane._replace(rounds=zeros + BURN_IN), keys, until, **static)._replace(rounds=zeros)
    drafted, accepted, time = (np.zeros(num_lanes, dtype=kind) for kind in (np.int64, np.int64, np.float64))
    for done in range(0, int(quota.max()), BATCH):
        until = np.minimum(quota, done + BATCH)
        lane = lane._replace(drafted=zeros, accepted=zeros, time=lane.time if even else 0.0 * lane.time)
        if done and not problem.persistent:  # lanes that were done have walked on, uncounted
            fresh = zeros + np.uint32(found.first_row)
            lane = lane._replace(node=zeros, row=fresh, num_candidates=zeros, whole=zeros + np.uint32(1))
        lane = _walk(tables, lane, keys, jnp.asarray(until, dtype=jnp.uint32), **static)
        drafted, accepted = drafted + np.asarray(lane.drafted), accepted + np.asarray(lane.accepted)
        time = time if even else time + np.asarray(lane.time)
    if even:
        time = quota * problem.round_time[0] + drafted * (problem.round_time[-1] - problem.round_time[0]) / len(steps)
    return Counts(drafted, accepted, time)


@partial(jax.jit, static_argnames=("persistent", "clairvoyant"))
def _walk(tables: _Tables, lane: _Lane, keys: Any, until: Any, persistent: bool, clairvoyant: bool) -> _Lane:
    """Go on until every lane has played so many rounds."""

    def step(now: _Lane, _: None) -> tuple[_Lane, None]:
        active = now.rounds < until
        first, second = words((keys[0], keys[1]), (now.rounds, now.num_candidates))
        # coin * columns, as a whole number and a fraction of 64 bits
        low = second.astype(jnp.uint64) * tables.columns
        scaled = first.astype(jnp.uint64) * tables.columns + (low >> 32)
        column = (scaled >> 32).astype(jnp.uint32)
        rest = (scaled << 32) | (low & np.uint64(0xFFFFFFFF))
        entry = tables.chance[now.row * tables.columns + column]
        stays = (rest >> ALIAS_BITS) < (entry >> ALIAS_BITS)
        outcome = jnp.where(stays, column, (entry & np.uint64(2**ALIAS_BITS - 1)).astype(jnp.uint32))
        place = now.node * tables.slots + (outcome >> 1)
        entry, kept = tables.table[place], now.whole & outcome
        drafts, ends = (_flag(entry, flag) for flag in (Flag.DRAFTS, Flag.ENDS))
        drops = np.uint32(0)
        if clairvoyant:
            drops = jnp.where(kept == 1, _flag(entry, Flag.DROPS_ACCEPTED), _flag(entry, Flag.DROPS_REJECTED))
            drafts, ends = drafts & ~drops, ends | drops
        whole = jnp.where(drafts == 1, kept, now.whole)
        drafted = now.num_candidates + drafts
        row = (entry >> NODE_BITS).astype(jnp.uint32) & np.uint32(2**ROW_BITS - 1)
        start, last = tables.first_row, now.last
        if persistent:
            last = jnp.where((now.whole == 1) & (drops == 0), tables.regime[place], now.last)
            start = tables.first_row + 2 * last + whole
        ended, counts = ends == 1, active.astype(jnp.uint32)
        after = _Lane(
            node=jnp.where(ended, np.uint32(0), entry.astype(jnp.uint32) & np.uint32(2**NODE_BITS - 1)),
            row=jnp.where(ended, start, row),
            rounds=now.rounds + (ends & counts),
            num_candidates=jnp.where(ended, np.uint32(0), drafted),
            whole=jnp.where(ended, np.uint32(1), whole),
            last=last,
            drafted=now.drafted + (drafts & counts),
            accepted=now.accepted + (kept & drafts & counts),
            time=None if now.time is None else now.time + jnp.where(ended & active, tables.round_time[drafted], 0.0),
        )
        # where rounds persist, a lane that is done stands still, so that it can go on later
        hold = (
            after
            if not persistent
            else jax.tree_util.tree_map(lambda new, old: jnp.where(active, new, old), after, now)
        )
        return hold, None

    def steps(now: _Lane) -> _Lane:
        return jax.lax.scan(step, now, None, length=STEPS)[0]

    return jax.lax.while_loop(lambda now: (now.rounds < until).any(), steps, lane)


def _flag(entry: Any, flag: np.uint64) -> Any:
    return ((entry >> np.uint64(int(flag).bit_length() - 1)) & np.uint64(1)).astype(jnp.uint32)


def _padded(array: np.ndarray) -> Array:
    """Flattened, and filled up to a power of two, so that another rule or problem seldom means another compilation."""
    flat = array.ravel()
    return jnp.asarray(np.pad(flat, (0, 2 ** max(8, (len(flat) - 1).bit_length()) - len(flat))))


def one_regime(
    problem: FiniteProblem,
    rules: list[Policy],
    keys: UInt32[Array, "2 B"],
    quota: Int[np.ndarray, " B"],
    features: Mapping[str, np.ndarray],
) -> list[Counts]:
    """Each lane's quota of rounds under every rule, in a world where all rounds look alike.

    Raises:
        ValueError: if there is more than one regime.
    """
    if problem.num_regimes != 1:
        raise ValueError(f"problem: must have one regime, has {problem.num_regimes}")
    survival = np.cumprod(problem.accept_prob[:, 0])
    at_least = np.zeros((len(survival) + 1, len(quota)), dtype=np.int64)
    at_least[0] = quota
    for done in range(0, int(quota.max()), BATCH):
        until = jnp.asarray(np.minimum(quota, done + BATCH), dtype=jnp.uint32)
        at_least[1:] += np.asarray(_accepted(jnp.asarray(survival), keys, jnp.asarray(done, dtype=jnp.uint32), until))
    exactly = at_least - np.append(at_least[1:], 0 * at_least[:1], axis=0)  # [K + 1, B] rounds with L = k
    could = np.arange(len(exactly))
    counts, observe = [], observer(problem, features)
    for rule in rules:
        length = _lengths(observe, rule, survival)
        drafted, accepted, time = (
            part @ exactly for part in (length, np.minimum(length, could), problem.round_time[length])
        )
        counts.append(Counts(drafted, accepted, time))
    return counts


@jax.jit
def _accepted(survival: Any, keys: Any, first: Any, until: Any) -> Any:
    """[K, B] how many of the lanes' rounds from `first` on would accept k candidates or more."""

    def play(now: tuple[Any, Any]) -> tuple[Any, Any]:
        round_, count = now
        high, low = words((keys[0], keys[1]), (round_ + jnp.zeros_like(until), jnp.zeros_like(until)))
        coin = ((high.astype(jnp.uint64) << 21) | (low >> 11).astype(jnp.uint64)).astype(jnp.float64) * 2.0**-53
        coin = jnp.where(round_ < until, coin, 1.0)
        return round_ + np.uint32(1), count + (coin < survival[:, None]).astype(jnp.uint32)

    none = jnp.zeros((len(survival), len(until)), dtype=jnp.uint32)
    return jax.lax.while_loop(lambda now: now[0] < until.max(), play, (first, none))[1]


def _lengths(
    observe: Callable[..., Observation], rule: Policy, survival: Float[np.ndarray, " K"]
) -> Int[np.ndarray, " K+1"]:
    """Candidates that the rule drafts in a round in which exactly L = 0..K would be accepted."""
    depth, regime, so_far = len(survival), np.zeros(1, dtype=np.int64), np.append(1.0, survival)
    length, drafting = np.zeros(depth + 1, dtype=np.int64), np.ones(depth + 1, dtype=bool)
    for k in range(depth):
        seen = observe(k, regime, so_far[k : k + 1])
        if_not, if_so = (asked(rule, seen, hit)[0] for hit in (False, True))
        drafting &= ~np.where(np.arange(depth + 1) > k, if_so, if_not)
        length += drafting
    return length
