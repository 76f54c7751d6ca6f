r"""Simulated rounds of a stopping problem, the same coins for every policy.

One round is a pure step: ask the rule, draft, ask again, verify (theory, §1). Rounds follow one another in a `scan`,
independent *replicas* in a `vmap`. Exactly `rounds` rounds are counted per policy, shared out evenly over at most
`MAX_REPLICAS` replicas.

*Coins.* Draws are addressed, not streamed: round r of replica b owns one key, from which all K regime uniforms, all K
acceptance uniforms and one for the next start are drawn whether or not the policy stops. So every policy meets the
same coins in the same round, and the standard error of a difference, taken over replicas, profits from it.

*Continuous acceptances* are drawn by inverse CDF: each regime coin becomes the acceptance itself, outside of `jit`.

*Start.* A persistent problem is asked for its long run, so replicas should start from the stationary law of the
policy's start-regime chain M. (i) Where M is cheap to know exactly (`mdp.evaluate.round_law`) they do: there is no
start bias to discard, however slowly the chain mixes and whether or not it is periodic, so the burn-in that keeps the
bias under a tenth of a standard error is no round at all. (ii) In larger problems M is estimated from `PILOT_ROUNDS`
rounds spread over all start regimes, with the laws of the next start in place of draws from them; replicas start from
its stationary law *and* discard a fifth of their rounds, at least `MIN_BURN_IN`. What survives is the pilot's error in
modes slower than that burn-in; the same modes dominate the spread between replicas, hence the standard error.
(iii) A rule with a state has no such M: replicas start from `initial` with the same burn-in; so they do in renewal
problems, because the rule itself starts cold. Burn-in rounds own addresses -1, -2, ..., so policies with and without
them still share the coins of counted rounds.

*Compilation.* Problem and rule are pytrees of arrays: one compilation per class of rule and shape of problem,
whatever the parameters.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mdp import entrants
from mdp.acceptance import BetaMixture
from mdp.chain import recurrent_classes, stationary_law
from mdp.evaluate import long_run, round_law
from mdp.metrics import Tally
from mdp.policy import Observation, Outcome, Policy, PolicySpec
from mdp.problem import FiniteProblem, StoppingProblem
from simulate.estimate import Comparison, PolicyResult

__all__ = ["MAX_REPLICAS", "MIN_BURN_IN", "simulate"]

MAX_REPLICAS = 256
MIN_BURN_IN = 100
MAX_ROUNDS = 2**40
MAX_EXACT_STATES = 200_000
PILOT_ROUNDS, PILOT_LANES = 2**16, 64
START, PILOT = 2**31, 2**31 + 1
"""Addresses that no round has, counted (0, 1, ..) or burnt in (-1, -2, ..)."""

SHORT_CHUNK, LONG_CHUNK, COINS_PER_CHUNK = 32, 512, 2**22
SHOWN = frozenset({"num_candidates", "survival", "next_accept_prob", "regime", "token_accept_prob", "next_accepted",
                   "verify_time", "step_time"})  # fmt: skip


class _World(NamedTuple):
    """The problem as the step reads it: laws as cumulative rows, flattened; `after_*` are None if rounds renew.

    `transition` is None if acceptances are continuous: then the regime coins are acceptances.
    """

    transition: Float[Array, " ZZ"] | None
    initial: Float[Array, " Z"]
    accept_prob: Float[Array, "K Z"]
    next_accept_prob: Float[Array, "K Z"]
    after_rejection: Float[Array, " ZZ"] | None
    after_bonus: Float[Array, " ZZ"] | None
    draft_time: Float[Array, ""]
    verify_time: Float[Array, " K+1"]
    features: dict[str, Float[Array, " Z"]]


class _Drafting(NamedTuple):
    """A round in the making. `last_kept` is the regime of the first rejected candidate, else of the last one."""

    state: Any
    regime: Int[Array, ""]
    last_kept: Int[Array, ""]
    survival: Float[Array, ""]
    token_accept_prob: Float[Array, ""]
    drafting: Array
    rejected: Array
    num_drafted: Int[Array, ""]
    num_accepted: Int[Array, ""]


def simulate(
    problem: StoppingProblem,
    policies: Iterable[str | Policy | PolicySpec],
    *,
    rounds: int,
    key: Key[Array, ""] | int,
) -> Comparison:
    """Monte Carlo estimate of what each policy earns on a problem, paired over replicas.

    Args:
        problem: renewal or persistent.
        policies: policy strings, or rules of one's own; a bare `optimal` is solved first.
        rounds: counted rounds per policy.
        key: a jax random key, or a whole number that seeds one (and is then kept in the result).

    Raises:
        ValueError: if a policy looks at what a problem does not show, or is made for another one; one line.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, (int, np.integer)) or not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds: must be a whole number in 1..{MAX_ROUNDS}, got {rounds!r}")
    seed = int(key) if isinstance(key, (int, np.integer)) else None
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed: must be a whole number in 0..2**63 - 1, got {seed}")
    finite = problem.unseen()
    specs = entrants.read(policies)
    rules = [_rule(problem, spec) for spec in specs]
    replicas = min(int(rounds), MAX_REPLICAS)
    quota = rounds // replicas + (np.arange(replicas) < rounds % replicas)
    with jax.enable_x64(True):
        tallies = _play(problem, specs, rules, key if seed is None else jr.key(seed), quota)
    results = (
        PolicyResult(spec.text, tally, plain_time=float(finite.verify_time[0]))
        for spec, tally in zip(specs, tallies, strict=True)
    )
    return Comparison(tuple(results), rounds=int(rounds), seed=seed)


def check(problem: StoppingProblem, spec: PolicySpec) -> None:
    """Whether the problem shows all that a rule reads.

    Raises:
        Lacking: if not.
    """
    hidden = entrants.needs(spec.policy) - SHOWN - set(problem.acceptance.features()) if spec.policy else None
    if hidden:
        raise entrants.Lacking(spec.text, min(hidden), "which a problem does not show")


def _rule(problem: StoppingProblem, spec: PolicySpec) -> Policy:
    """The rule as a pytree of arrays, checked against what a problem shows; a bare `optimal` is solved."""
    if spec.signal is not None:
        raise ValueError(f"policy {spec.text!r}: signal= applies to traces, a problem shows its survival")
    if spec.fit:
        raise ValueError(f"policy {spec.text!r}: fit=1 applies to traces, a problem has no training half")
    policy = spec.policy
    if policy is None:
        from mdp.solve import solve

        policy = solve(problem).policy
    check(problem, PolicySpec(spec.text, policy))
    finite = problem.unseen()
    policy = entrants.fit_depth(spec.text, policy, finite.max_candidates, finite.num_regimes)
    _register(type(policy))
    for f in fields(policy):  # type: ignore[arg-type]
        if np.asarray(getattr(policy, f.name)).dtype.kind not in "biuf":
            raise ValueError(f"policy {spec.text!r}: field {f.name} must be a number or an array of numbers")
    return policy


_registered: set[type] = set()


def _register(cls: type) -> None:
    """Make a class of rules a pytree whose every field is data, so that its values are traced, not compiled in."""
    if cls in _registered:
        return
    names = [f.name for f in fields(cls)]

    def rebuild(_: None, leaves: Iterable[Any]) -> Any:
        # Not through __init__: under tracing the fields are no numbers that a rule could check.
        rule = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(rule, name, leaf)
        return rule

    jax.tree_util.register_pytree_node(cls, lambda rule: ([getattr(rule, name) for name in names], None), rebuild)
    _registered.add(cls)


def _start(
    world: "_World", finite: FiniteProblem, features: dict[str, np.ndarray], text: str, rule: Policy, key: Any
) -> tuple[np.ndarray, bool]:
    """Law of the first start regime, and whether it needs a burn-in: the three cases of the module docstring."""
    if not _stateless(rule):
        return finite.initial, True
    if not finite.persistent:
        return finite.initial, False
    assert finite.rejection is not None and finite.bonus is not None
    size, depth = finite.num_regimes, finite.max_candidates
    if size**3 * math.comb(depth + size - 2, size - 1) <= MAX_EXACT_STATES:
        try:
            law = round_law(finite, rule, features)
        except ValueError:  # a rule that only the simulator can play
            pass
        else:
            return long_run(law, finite.initial, text), False
    repeats = max(PILOT_ROUNDS // (size * PILOT_LANES), 1)
    counts = _pilot(world, rule, jr.fold_in(key, np.uint32(PILOT)), repeats)
    rejected, kept = (np.asarray(count) / (repeats * PILOT_LANES) for count in counts)
    chain = rejected @ finite.rejection + kept @ finite.bonus
    classes = recurrent_classes(chain, finite.initial)
    # Several classes: the pilot may have missed a rare way from one to another.
    return (stationary_law(chain, classes[0]) if len(classes) == 1 else finite.initial), True


def _stateless(rule: Policy) -> bool:
    return not jax.tree_util.tree_leaves(rule.init())


def _play(problem: StoppingProblem, specs: list, rules: list, key: Any, quota: np.ndarray) -> list[Tally]:
    """All policies through all rounds, chunk by chunk, so that a chunk's coins are drawn once for all of them."""
    finite, process = problem.unseen(), problem.acceptance
    features = process.features()
    world, size, needed = _world(finite, features, process.finite), len(quota), int(quota.max())
    # Two sizes of chunk, so that another number of rounds seldom means another compilation.
    affordable = COINS_PER_CHUNK // ((2 * finite.max_candidates + 1) * MAX_REPLICAS)
    chunk = min(SHORT_CHUNK if needed <= SHORT_CHUNK else LONG_CHUNK, affordable)
    before = -(-max(MIN_BURN_IN, needed // 5) // chunk)
    replica_keys = jax.vmap(partial(jr.fold_in, key))(jnp.arange(size, dtype=jnp.uint32))
    starts = [_start(world, finite, features, spec.text, rule, key) for spec, rule in zip(specs, rules, strict=True)]
    rules = [jax.tree_util.tree_map(jnp.asarray, rule) for rule in rules]
    carries = [_begin(rule, _cumulative(law), replica_keys) for rule, (law, _) in zip(rules, starts, strict=True)]
    counts = [jnp.zeros((3, size), dtype=jnp.int64)] * len(rules)
    times = [jnp.zeros(size, dtype=jnp.float64)] * len(rules)
    round_time, quota_array = jnp.asarray(finite.round_time), jnp.asarray(quota)
    for index in range(-before if any(burn_in for _, burn_in in starts) else 0, -(-needed // chunk)):
        first = jnp.asarray(index * chunk, dtype=jnp.int64)
        coins = _coins(replica_keys, first, chunk, finite.max_candidates)
        if isinstance(process, BetaMixture):
            regime_coins, others = np.split(np.asarray(coins), [finite.max_candidates], axis=1)
            coins = jnp.asarray(np.concatenate([process.quantile(regime_coins), others], axis=1))
        for p, (rule, (_, burn_in)) in enumerate(zip(rules, starts, strict=True)):
            if index >= 0 or burn_in:
                carries[p], count, time = _chunk(world, rule, carries[p], coins, first, quota_array, round_time)
                counts[p], times[p] = counts[p] + count, times[p] + time
    return [_tally(np.asarray(count), np.asarray(time), quota) for count, time in zip(counts, times, strict=True)]


def _tally(count: np.ndarray, time: np.ndarray, quota: np.ndarray) -> Tally:
    drafted, accepted, calls = count
    assert (calls == quota).all(), "rounds were lost or invented"
    return Tally(calls, drafted, accepted + calls, drafted - accepted, np.zeros_like(calls), time)


def _cumulative(law: np.ndarray) -> np.ndarray:
    """Cumulative rows that end in exactly 1, regimes of probability 0 behind the last possible one included."""
    rows = np.cumsum(law, axis=-1)
    return rows / rows[..., -1:]


def _world(finite: FiniteProblem, features: dict[str, np.ndarray], visible: bool = True) -> _World:
    def rows(law: Any) -> Any:
        return None if law is None else jnp.asarray(_cumulative(law).ravel())

    return _World(
        rows(finite.transition if visible else None), jnp.asarray(_cumulative(finite.initial)),
        jnp.asarray(finite.accept_prob), jnp.asarray(finite.next_accept_prob),
        rows(finite.rejection), rows(finite.bonus),
        jnp.asarray(finite.draft_time), jnp.asarray(finite.verify_time),
        {name: jnp.asarray(values) for name, values in features.items()},
    )  # fmt: skip


@partial(jax.jit, static_argnums=(2, 3))
def _coins(replica_keys: Any, first: Any, chunk: int, max_candidates: int) -> Float[Array, "R C B"]:
    """Uniforms of `chunk` rounds from round `first` on: [round, coin, replica], 2 K + 1 coins a round."""

    def draw(round_: Any, replica_key: Any) -> Any:
        address = jr.fold_in(replica_key, round_.astype(jnp.uint32))  # -1 becomes 2^32 - 1, and so on
        return jr.uniform(address, (2 * max_candidates + 1,), dtype=jnp.float64)

    over_replicas = jax.vmap(draw, in_axes=(None, 0), out_axes=1)
    return jax.vmap(over_replicas, in_axes=(0, None))(first + jnp.arange(chunk, dtype=jnp.int64), replica_keys)


@jax.jit
def _begin(rule: Any, law: Any, replica_keys: Any) -> Any:
    """State and start regime of every replica."""

    def one(replica_key: Any) -> Any:
        coin = jr.uniform(jr.fold_in(replica_key, np.uint32(START)), dtype=jnp.float64)
        return _initial_state(rule), _pick(law, jnp.zeros((), jnp.int64), len(law), coin)

    return jax.vmap(one)(replica_keys)


def _initial_state(rule: Any) -> Any:
    """`rule.init()` as arrays, of the types that a round turns them into: a mean that starts as 0 is no integer."""
    state = jax.tree_util.tree_map(jnp.asarray, rule.init())
    no, whole, real = jnp.zeros((), bool), jnp.zeros((), jnp.int64), jnp.zeros((), jnp.float64)
    seen = Observation(whole, **dict.fromkeys(Observation._fields[1:], real))._replace(
        regime=whole, next_accepted=no if "next_accepted" in rule.needs else None
    )
    end = Outcome(whole, whole, real, real)
    after = jax.eval_shape(lambda now: rule.end_round(rule.stop(now, seen)[0], end), state)
    return jax.tree_util.tree_map(lambda now, then: now.astype(jnp.promote_types(now.dtype, then.dtype)), state, after)


@jax.jit
def _chunk(world: _World, rule: Any, carry: Any, coins: Any, first: Any, quota: Any, round_time: Any) -> Any:
    """The next rounds of one policy: new carry, then counts [drafted, accepted, rounds] and time per replica."""
    step = jax.vmap(partial(_round, world, rule), in_axes=(0, 1))
    carry, (drafted, accepted) = jax.lax.scan(step, carry, coins)
    rounds = first + jnp.arange(len(coins), dtype=jnp.int64)[:, None]
    counted = (rounds >= 0) & (rounds < quota)
    counts = jnp.stack([jnp.sum(x * counted, axis=0) for x in (drafted, accepted, jnp.ones_like(drafted))])
    return carry, counts, jnp.sum(round_time[drafted] * counted, axis=0)


@partial(jax.jit, static_argnums=3)
def _pilot(world: _World, rule: Any, key: Any, repeats: int) -> Any:
    """`repeats` x `PILOT_LANES` rounds from every start: counts [start, last_kept], rejected there and all accepted."""
    depth, size = world.accept_prob.shape
    starts = jnp.tile(jnp.arange(size, dtype=jnp.int64), PILOT_LANES)

    def one(start: Any, lane_key: Any) -> Any:
        return _draft(world, rule, _initial_state(rule), start, jr.uniform(lane_key, (2 * depth,), dtype=jnp.float64))

    def repeat(total: Any, repeat_key: Any) -> Any:
        end = jax.vmap(one)(starts, jr.split(repeat_key, len(starts)))
        hits = end.rejected.astype(jnp.float64)
        return tuple(t.at[starts, end.last_kept].add(x) for t, x in zip(total, (hits, 1.0 - hits), strict=True)), None

    none = jnp.zeros((size, size), dtype=jnp.float64)
    return jax.lax.scan(repeat, (none, none), jr.split(key, repeats))[0]


def _round(world: _World, rule: Any, carry: Any, coins: Float[Array, " C"]) -> Any:
    """One round of one replica: (state, start regime), coins -> the same for the next round, and what happened."""
    state, start = carry
    size = world.accept_prob.shape[1]
    if world.after_bonus is None:
        start = _pick(world.initial, jnp.zeros((), jnp.int64), size, coins[-1])
    end = _draft(world, rule, state, start, coins)
    times = end.num_drafted * world.draft_time, world.verify_time[end.num_drafted]
    state = rule.end_round(end.state, Outcome(end.num_drafted, end.num_accepted, *times))
    state = jax.tree_util.tree_map(lambda new, old: jnp.asarray(new, old.dtype), state, end.state)
    if world.after_rejection is not None and world.after_bonus is not None:
        rejected, kept = (_pick(rows, end.last_kept, size, coins[-1])
                          for rows in (world.after_rejection, world.after_bonus))  # fmt: skip
        start = jnp.where(end.rejected, rejected, kept)
    return (state, start), (end.num_drafted, end.num_accepted)


def _draft(world: _World, rule: Any, state: Any, start: Any, coins: Float[Array, " C"]) -> _Drafting:
    """Ask the rule and draft, up to K times; coins: K for regimes, K for acceptances, any others."""
    depth = world.accept_prob.shape[0]
    no, zero = jnp.zeros((), dtype=bool), jnp.zeros((), jnp.int64)
    one, nothing = jnp.ones((), jnp.float64), jnp.full((), jnp.nan, jnp.float64)
    begin = _Drafting(state, start, start, one, nothing, ~no, no, zero, zero)
    coin_pairs = (jnp.arange(depth, dtype=jnp.int64), coins[:depth], coins[depth : 2 * depth])
    return jax.lax.scan(lambda now, x: (_candidate(world, rule, now, *x), None), begin, coin_pairs)[0]


def _candidate(world: _World, rule: Any, now: _Drafting, k: Any, regime_coin: Any, accept_coin: Any) -> _Drafting:
    """Ask the rule with k candidates drafted, and draft one more unless it stops (or has stopped before)."""
    if world.transition is None:
        regime, accept_prob = now.regime, regime_coin
    else:
        regime = _pick(world.transition, now.regime, world.accept_prob.shape[1], regime_coin)
        accept_prob = world.accept_prob[k, regime]
    accepted = accept_coin < accept_prob
    seen = Observation(
        num_candidates=k,
        survival=now.survival,
        next_accept_prob=world.next_accept_prob[k, now.regime],
        regime=now.regime,
        token_accept_prob=now.token_accept_prob,
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
    return _Drafting(
        state=state,
        regime=jnp.where(go, regime, now.regime),
        last_kept=jnp.where(go & ~now.rejected, regime, now.last_kept),
        survival=jnp.where(go, now.survival * accept_prob, now.survival),
        token_accept_prob=jnp.where(go, accept_prob, now.token_accept_prob),
        drafting=go,
        rejected=now.rejected | (go & ~accepted),
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
