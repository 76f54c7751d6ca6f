r"""Rounds step by step, for any rule: ask it, draft, ask again, verify.

Rounds follow one another in a `scan`, independent *replicas* in a `vmap`, so a rule may keep a state from round to
round and a world may draw what it likes. Where neither is needed, `simulate.walk` is faster.

*Coins.* Round r of replica b owns one key, from which all regime and acceptance uniforms of the round and one for the
next start are drawn whether or not the policy stops; so every policy meets the same coins in the same round.

*Continuous processes* draw their own rounds (`AcceptanceProcess.sample`), outside of `jit`: the regime coins become
acceptances and what the stopper sees, and the step reads both. So do hidden regimes, of which a rule sees the symbols
and the survival that follows from them, never the regime.

*Requests.* A text ends at the maximum length, with the candidates of its last rounds clamped to the tokens left minus
one, or behind an end-of-text token: any token is one with a given probability, whoever chose it. A drafted one forces
the stop; an accepted one has no bonus behind it, which is a cut token. The next request starts afresh.

*Compilation.* Problem and rule are pytrees of arrays: one compilation per class of rule and shape of problem,
whatever the parameters.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from mdp import entrants
from mdp.metrics import Tally
from mdp.policy import Observation, Outcome, Policy, ThresholdTable
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.process import AcceptanceProcess, Sampled
from simulate.requests import Requests

__all__ = ["MAX_REPLICAS", "MIN_BURN_IN", "pilot", "play"]

MAX_REPLICAS = 256
MIN_BURN_IN = 100
PILOT_ROUNDS, PILOT_LANES = 2**16, 64
START, PILOT = 2**31, 2**31 + 1
"""Addresses that no round has, counted (0, 1, ..) or burnt in (-1, -2, ..)."""

SHORT_CHUNK, LONG_CHUNK, COINS_PER_CHUNK = 32, 512, 2**22


class _World(NamedTuple):
    """The problem as the step reads it: laws as cumulative rows, flattened; `after_*` are None if rounds renew.

    `max_new_tokens` and `end_prob` are None if text never ends.
    """

    transition: Float[Array, " ZZ"]
    initial: Float[Array, " Z"]
    accept_prob: Float[Array, "K Z"]
    next_accept_prob: Float[Array, "K Z"]
    after_rejection: Float[Array, " ZZ"] | None
    after_bonus: Float[Array, " ZZ"] | None
    draft_time: Float[Array, ""]
    verify_time: Float[Array, " K+1"]
    features: dict[str, Float[Array, " Z"]]
    max_new_tokens: Int[Array, ""] | None
    end_prob: Float[Array, ""] | None


class _Drawn(NamedTuple):
    """Rounds that the process drew itself, [R, K, B]: acceptance of candidate k + 1, and what is seen at k.

    A field that the rule does not read is None; without `survival` the acceptances themselves are seen.
    """

    accept_prob: Any
    next_accept_prob: Any
    regime: Any
    survival: Any = None
    symbol: Any = None


class _Drafting(NamedTuple):
    """A round in the making. `last_kept` is the regime of the first rejected candidate, else of the last one; `ended`:
    the last candidate is an end-of-text token."""

    state: Any
    regime: Int[Array, ""]
    last_kept: Int[Array, ""]
    survival: Float[Array, ""]
    token_accept_prob: Float[Array, ""]
    drafting: Array
    rejected: Array
    ended: Array
    num_drafted: Int[Array, ""]
    num_accepted: Int[Array, ""]


def play(
    problem: StoppingProblem,
    rules: list[Policy],
    starts: list[tuple[np.ndarray, bool]],
    key: Any,
    quota: np.ndarray,
    requests: Requests | None,
) -> list[Tally]:
    """All rules through all rounds, chunk by chunk, so that a chunk's coins are drawn once for all of them.

    Args:
        starts: law of the first start regime, and whether rounds are burnt in, for each rule.
        quota: [B] rounds that each replica counts.
    """
    finite, process = problem.unseen(), problem.acceptance
    depth, size, needed = finite.max_candidates, len(quota), int(quota.max())
    world = _world(finite, process.features(), requests)
    num_coins = 2 * depth + 1 if requests is None else 3 * depth + 3
    # Two sizes of chunk, so that another number of rounds seldom means another compilation.
    affordable = max(COINS_PER_CHUNK // (num_coins * MAX_REPLICAS), 1)
    chunk = min(SHORT_CHUNK if needed <= SHORT_CHUNK else LONG_CHUNK, affordable)
    before = -(-max(MIN_BURN_IN, needed // 5) // chunk)
    replica_keys = jax.vmap(partial(jr.fold_in, key))(jnp.arange(size, dtype=jnp.uint32))
    columns = [rule.survival_threshold.shape[1] if isinstance(rule, ThresholdTable) else 1 for rule in rules]
    reads = [entrants.needs(rule) for rule in rules]
    rules = [jax.tree_util.tree_map(jnp.asarray, rule) for rule in rules]
    carries = [
        _begin(world, rule, _cumulative(law), replica_keys) for rule, (law, _) in zip(rules, starts, strict=True)
    ]
    counts = [jnp.zeros((4, size), dtype=jnp.int64)] * len(rules)
    times = [jnp.zeros(size, dtype=jnp.float64)] * len(rules)
    round_time, quota_array = jnp.asarray(finite.round_time), jnp.asarray(quota)
    for index in range(-before if any(burn_in for _, burn_in in starts) else 0, -(-needed // chunk)):
        first = jnp.asarray(index * chunk, dtype=jnp.int64)
        coins = _coins(replica_keys, first, chunk, num_coins)
        by_candidate = np.moveaxis(np.asarray(coins), 1, 0)
        sampled = process.sample(by_candidate[:depth], by_candidate[2 * depth])
        for p, (rule, (_, burn_in)) in enumerate(zip(rules, starts, strict=True)):
            if index >= 0 or burn_in:
                drawn = None if sampled is None else _drawn(process, sampled, columns[p], reads[p])
                carries[p], count, time = _chunk(
                    world, rule, carries[p], (coins, drawn), first, quota_array, round_time
                )
                counts[p], times[p] = counts[p] + count, times[p] + time
    return [_tally(np.asarray(count), np.asarray(time), quota) for count, time in zip(counts, times, strict=True)]


def _drawn(process: AcceptanceProcess, sampled: Sampled, columns: int, reads: frozenset[str]) -> _Drawn:
    """The sampled rounds as one rule sees them; a table says by its columns how finely it tells states apart."""
    seen = _Drawn(
        sampled.accept_prob,
        process.expected_next(sampled.state) if "next_accept_prob" in reads else None,
        process.regimes(sampled.state, columns) if "regime" in reads else None,
        sampled.survival,
        sampled.symbol if "symbol" in reads else None,
    )
    return jax.tree_util.tree_map(lambda part: jnp.asarray(np.moveaxis(part, 0, 1)), seen)


def _tally(count: np.ndarray, time: np.ndarray, quota: np.ndarray) -> Tally:
    drafted, accepted, cut, calls = count
    assert (calls == quota).all(), "rounds were lost or invented"
    return Tally(calls, drafted, accepted + calls - cut, drafted - accepted, cut, time)


def _cumulative(law: np.ndarray) -> np.ndarray:
    """Cumulative rows that end in exactly 1, regimes of probability 0 behind the last possible one included."""
    rows = np.cumsum(law, axis=-1)
    return rows / rows[..., -1:]


def _world(finite: FiniteProblem, features: dict[str, np.ndarray], requests: Requests | None) -> _World:
    def rows(law: Any) -> Any:
        return None if law is None else jnp.asarray(_cumulative(law).ravel())

    return _World(
        rows(finite.transition), jnp.asarray(_cumulative(finite.initial)),
        jnp.asarray(finite.accept_prob), jnp.asarray(finite.next_accept_prob),
        rows(finite.rejection), rows(finite.bonus),
        jnp.asarray(finite.draft_time), jnp.asarray(finite.verify_time),
        {name: jnp.asarray(values) for name, values in features.items()},
        None if requests is None else jnp.asarray(requests.max_new_tokens, dtype=jnp.int64),
        None if requests is None else jnp.asarray(requests.end_prob, dtype=jnp.float64),
    )  # fmt: skip


@partial(jax.jit, static_argnums=(2, 3))
def _coins(replica_keys: Any, first: Any, chunk: int, num_coins: int) -> Float[Array, "R C B"]:
    """Uniforms of `chunk` rounds from round `first` on: [round, coin, replica]."""

    def draw(round_: Any, replica_key: Any) -> Any:
        address = jr.fold_in(replica_key, round_.astype(jnp.uint32))  # -1 becomes 2^32 - 1, and so on
        return jr.uniform(address, (num_coins,), dtype=jnp.float64)

    over_replicas = jax.vmap(draw, in_axes=(None, 0), out_axes=1)
    return jax.vmap(over_replicas, in_axes=(0, None))(first + jnp.arange(chunk, dtype=jnp.int64), replica_keys)


@jax.jit
def _begin(world: _World, rule: Any, law: Any, replica_keys: Any) -> Any:
    """State, start regime and tokens left (None: without end) of every replica."""

    def one(replica_key: Any) -> Any:
        coin = jr.uniform(jr.fold_in(replica_key, np.uint32(START)), dtype=jnp.float64)
        return _initial_state(rule), _pick(law, jnp.zeros((), jnp.int64), len(law), coin), world.max_new_tokens

    return jax.vmap(one)(replica_keys)


def _initial_state(rule: Any) -> Any:
    """`rule.init()` as arrays, of the types that a round turns them into: a mean that starts as 0 is no integer."""
    state = jax.tree_util.tree_map(jnp.asarray, rule.init())
    no, whole, real = jnp.zeros((), bool), jnp.zeros((), jnp.int64), jnp.zeros((), jnp.float64)
    others = {
        name: real
        for name in Observation._fields
        if name not in ("num_candidates", "regime", "symbol", "next_accepted")
    }
    seen = Observation(
        whole, regime=whole, symbol=whole, next_accepted=no if "next_accepted" in rule.needs else None, **others
    )
    end = Outcome(whole, whole, real, real)
    after = jax.eval_shape(lambda now: rule.end_round(rule.stop(now, seen)[0], end), state)
    return jax.tree_util.tree_map(lambda now, then: now.astype(jnp.promote_types(now.dtype, then.dtype)), state, after)


@jax.jit
def _chunk(world: _World, rule: Any, carry: Any, chance: Any, first: Any, quota: Any, round_time: Any) -> Any:
    """The next rounds of one policy: new carry, then counts [drafted, accepted, cut, rounds] and time per replica.

    `chance` is the rounds' coins and what the process made of them itself (`_Drawn`), or None.
    """
    step = jax.vmap(partial(_round, world, rule), in_axes=(0, 1))
    carry, (drafted, accepted, cut) = jax.lax.scan(step, carry, chance)
    rounds = first + jnp.arange(len(chance[0]), dtype=jnp.int64)[:, None]
    counted = (rounds >= 0) & (rounds < quota)
    counts = jnp.stack([jnp.sum(x * counted, axis=0) for x in (drafted, accepted, cut, jnp.ones_like(drafted))])
    return carry, counts, jnp.sum(round_time[drafted] * counted, axis=0)


def pilot(finite: FiniteProblem, features: dict[str, np.ndarray], rule: Policy, key: Any) -> np.ndarray:
    """The start-regime chain [Z, Z] of a rule, estimated from `PILOT_ROUNDS` rounds spread over all starts."""
    assert finite.rejection is not None and finite.bonus is not None
    repeats = max(PILOT_ROUNDS // (finite.num_regimes * PILOT_LANES), 1)
    counts = _pilot(_world(finite, features, None), rule, jr.fold_in(key, np.uint32(PILOT)), repeats)
    rejected, kept = (np.asarray(count) / (repeats * PILOT_LANES) for count in counts)
    return rejected @ finite.rejection + kept @ finite.bonus


@partial(jax.jit, static_argnums=3)
def _pilot(world: _World, rule: Any, key: Any, repeats: int) -> Any:
    """`repeats` x `PILOT_LANES` rounds from every start: counts [start, last_kept], rejected there and all accepted."""
    depth, size = world.accept_prob.shape
    starts = jnp.tile(jnp.arange(size, dtype=jnp.int64), PILOT_LANES)

    def one(start: Any, lane_key: Any) -> Any:
        coins = jr.uniform(lane_key, (2 * depth,), dtype=jnp.float64)
        return _draft(world, rule, _initial_state(rule), start, None, coins, None)

    def repeat(total: Any, repeat_key: Any) -> Any:
        end = jax.vmap(one)(starts, jr.split(repeat_key, len(starts)))
        hits = end.rejected.astype(jnp.float64)
        return tuple(t.at[starts, end.last_kept].add(x) for t, x in zip(total, (hits, 1.0 - hits), strict=True)), None

    none = jnp.zeros((size, size), dtype=jnp.float64)
    return jax.lax.scan(repeat, (none, none), jr.split(key, repeats))[0]


def _round(world: _World, rule: Any, carry: Any, chance: tuple[Float[Array, " C"], _Drawn | None]) -> Any:
    """One round of one replica: carry and chance in, carry for the next round and what happened out."""
    (state, start, left), (coins, drawn) = carry, chance
    depth, size = world.accept_prob.shape
    origin, start_coin = jnp.zeros((), jnp.int64), coins[2 * depth]
    if world.after_bonus is None:
        start = _pick(world.initial, origin, size, start_coin)
    end = _draft(world, rule, state, start, left, coins, drawn)
    times = end.num_drafted * world.draft_time, world.verify_time[end.num_drafted]
    state = rule.end_round(end.state, Outcome(end.num_drafted, end.num_accepted, *times))
    state = jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), state, end.state)
    if world.after_rejection is not None and world.after_bonus is not None:
        rejected, kept = (_pick(rows, end.last_kept, size, start_coin)
                          for rows in (world.after_rejection, world.after_bonus))  # fmt: skip
        start = jnp.where(end.rejected, rejected, kept)
    cut = jnp.zeros((), jnp.int64)
    if world.end_prob is not None:
        # behind an accepted end of text there is no bonus; else the correction or bonus may be one
        cut = (end.ended & ~end.rejected).astype(jnp.int64)
        left = left - (end.num_accepted + 1 - cut)
        over = (cut == 1) | (coins[3 * depth + 1] < world.end_prob) | (left == 0)
        left = jnp.where(over, jnp.asarray(world.max_new_tokens), left)
        start = jnp.where(over, _pick(world.initial, origin, size, coins[3 * depth + 2]), start)
        if not rule.persists:
            fresh = _initial_state(rule)
            state = jax.tree_util.tree_map(lambda new, old: jnp.where(over, new, old), fresh, state)
    return (state, start, left), (end.num_drafted, end.num_accepted, cut)


def _draft(
    world: _World, rule: Any, state: Any, start: Any, left: Any, coins: Float[Array, " C"], drawn: _Drawn | None
) -> _Drafting:
    """Ask the rule and draft, up to K times; coins: K for regimes, K for acceptances, one; then K for ends of text."""
    depth = world.accept_prob.shape[0]
    no, zero = jnp.zeros((), dtype=bool), jnp.zeros((), jnp.int64)
    one, nothing = jnp.ones((), jnp.float64), jnp.full((), jnp.nan, jnp.float64)
    begin = _Drafting(state, start, start, one, nothing, ~no, no, no, zero, zero)
    ends = None if world.end_prob is None else coins[2 * depth + 1 : 3 * depth + 1] < world.end_prob
    by_candidate = (jnp.arange(depth, dtype=jnp.int64), coins[:depth], coins[depth : 2 * depth], ends, drawn)
    return jax.lax.scan(lambda now, x: (_candidate(world, rule, left, now, *x), None), begin, by_candidate)[0]


def _candidate(
    world: _World, rule: Any, left: Any, now: _Drafting,
    k: Any, regime_coin: Any, accept_coin: Any, ends: Any, drawn: _Drawn | None,
) -> _Drafting:  # fmt: skip
    """Ask the rule with k candidates drafted, and draft one more unless it stops (or has stopped before).

    Behind a drafted end of text, and one short of the tokens that are `left`, the world stops.
    """
    if drawn is None:
        regime = _pick(world.transition, now.regime, world.accept_prob.shape[1], regime_coin)
        drawn = _Drawn(world.accept_prob[k, regime], world.next_accept_prob[k, now.regime], now.regime)
    else:
        regime = now.regime
    accept_prob = drawn.accept_prob
    accepted = accept_coin < accept_prob
    seen = Observation(
        num_candidates=k,
        survival=now.survival if drawn.survival is None else drawn.survival,
        next_accept_prob=drawn.next_accept_prob,
        regime=drawn.regime,
        token_accept_prob=now.token_accept_prob if drawn.survival is None else None,
        symbol=drawn.symbol,
        # clairvoyance is shown to those only who say that they use it
        next_accepted=accepted & ~now.rejected if "next_accepted" in rule.needs else None,
        verify_time=world.verify_time[k],
        step_time=world.draft_time + world.verify_time[k + 1] - world.verify_time[k],
        **{name: jnp.where(k > 0, values[now.regime], jnp.nan) for name, values in world.features.items()},
    )
    asked, stop = rule.stop(now.state, seen)
    keep = now.drafting
    state = jax.tree_util.tree_map(lambda new, old: jnp.where(keep, jnp.asarray(new, old.dtype), old), asked, now.state)
    go = keep & ~jnp.asarray(stop, dtype=bool)
    if left is not None:
        go = go & ~now.ended & (k < left - 1)
    return _Drafting(
        state=state,
        regime=jnp.where(go, regime, now.regime),
        last_kept=jnp.where(go & ~now.rejected, regime, now.last_kept),
        survival=jnp.where(go, now.survival * accept_prob, now.survival),
        token_accept_prob=jnp.where(go, accept_prob, now.token_accept_prob),
        drafting=go,
        rejected=now.rejected | (go & ~accepted),
        ended=now.ended if ends is None else now.ended | (go & ends),
        num_drafted=now.num_drafted + go,
        num_accepted=now.num_accepted + (go & accepted & ~now.rejected),
    )


def _pick(rows: Float[Array, " ZZ"], row: Int[Array, ""], size: int, coin: Float[Array, ""]) -> Int[Array, ""]:
    """Inverse-CDF draw from one cumulative row: how many of its entries are at most the coin, by bisection."""
    found = jnp.zeros((), jnp.int64)
    step = 1 << max(size - 1, 0).bit_length() >> 1
    while step:
        probe = found + step
        below = rows[row * size + jnp.minimum(probe, size) - 1] <= coin
        found = jnp.where((probe < size) & below, probe, found)
        step >>= 1
    return found
