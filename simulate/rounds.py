r"""Simulated rounds of a stopping problem, the same coins for every policy.

One round is a pure step: ask the rule, draft, ask again, verify (theory, §1). Exactly `rounds` rounds are counted per
policy, shared out evenly over independent replicas, which are the clusters of every standard error. Draws are
addressed, not streamed: what a policy meets in round r of replica b depends on nothing that happened before, so all
policies of a comparison meet the same coins, and the standard error of a difference profits from it.

Two engines play them. Where all rules are without memory and the process is finite, rounds are walked
(`simulate.walk`): tens of millions a second. Else they are stepped through (`simulate.steps`). A comparison is played
by one engine as a whole.

*Start.* A persistent problem is asked for its long run, so replicas should start from the stationary law of the
policy's start-regime chain M. (i) Where M is cheap to know exactly (`mdp.evaluate.round_law`) they do: there is no
start bias to discard, however slowly the chain mixes and whether or not it is periodic, so the burn-in that keeps the
bias under a tenth of a standard error is no round at all. (ii) In larger problems M is estimated from `PILOT_ROUNDS`
rounds spread over all start regimes, with the laws of the next start in place of draws from them; replicas start from
its stationary law *and* discard a fifth of their rounds, at least `MIN_BURN_IN`. What survives is the pilot's error in
modes slower than that burn-in; the same modes dominate the spread between replicas, hence the standard error.
(iii) A rule with a state has no such M: replicas start from `initial` with the same burn-in; so they do in renewal
problems, because the rule itself starts cold, and wherever texts end (`Requests`). Burn-in rounds own addresses of
their own, so policies with and without them still share the coins of counted rounds.
"""

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Key

from mdp import entrants, evaluate
from mdp.acceptance import Observed
from mdp.chain import recurrent_classes, stationary_law
from mdp.evaluate import long_run, round_law
from mdp.metrics import Tally
from mdp.policy import Policy, PolicySpec, ThresholdTable
from mdp.problem import StoppingProblem
from simulate import steps
from simulate.automaton import automaton
from simulate.coins import lane_keys
from simulate.estimate import Comparison, PolicyResult
from simulate.requests import Requests
from simulate.walk import Counts, one_regime, walk

__all__ = ["simulate"]

MAX_ROUNDS = 2**38
MAX_EXACT_STATES = 200_000
LANES, ROUNDS_PER_LANE = (steps.MAX_REPLICAS, 2**11, 2**14), 32
"""How many lanes there may be, and how many rounds each must have for it to pay."""
SHOWN = evaluate.SHOWN | {"num_candidates", "next_accepted", "symbol"}


def simulate(
    problem: StoppingProblem,
    policies: Iterable[str | Policy | PolicySpec],
    *,
    rounds: int,
    key: Key[Array, ""] | int,
    requests: Requests | None = None,
) -> Comparison:
    """Monte Carlo estimate of what each policy earns on a problem, paired over replicas.

    Args:
        problem: renewal or persistent.
        policies: policy strings, or rules of one's own; a bare `optimal` is solved first.
        rounds: counted rounds per policy.
        key: a jax random key, or a whole number that seeds one (and is then kept in the result).
        requests: where texts end; None: never, which is what the theory is about.

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
    with jax.enable_x64(True):
        key = key if seed is None else jr.key(seed)
        starts = [_start(problem, spec.text, rule, key, requests) for spec, rule in zip(specs, rules, strict=True)]
        tallies = None if requests else _walked(problem, rules, starts, key, int(rounds))
        if tallies is None:
            quota = _shared_out(int(rounds), steps.MAX_REPLICAS)
            tallies = steps.play(problem, rules, starts, key, quota, requests)
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
    process = problem.acceptance
    shown = SHOWN - process.hides | set(process.features())
    hidden = entrants.needs(spec.policy) - shown if spec.policy else None
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
    num_regimes = problem.acceptance.num_regimes
    if num_regimes is None and "regime" in entrants.needs(policy) and not isinstance(policy, ThresholdTable):
        raise ValueError(f"policy {spec.text!r} needs regime, but {problem.acceptance.kind} has a continuum of them")
    policy = entrants.fit_depth(spec.text, policy, finite.max_candidates, num_regimes)
    if isinstance(problem.acceptance, Observed):
        entrants.check_symbols(spec.text, policy, problem.acceptance.num_symbols)
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
    problem: StoppingProblem, text: str, rule: Policy, key: Any, requests: Requests | None
) -> tuple[np.ndarray, bool]:
    """Law of the first start regime, and whether it needs a burn-in: the three cases of the module docstring."""
    finite, features = problem.unseen(), problem.acceptance.features()
    if requests or not _stateless(rule):
        return finite.initial, True
    if not finite.persistent:
        return finite.initial, False
    size, depth = finite.num_regimes, finite.max_candidates
    if size**3 * math.comb(depth + size - 2, size - 1) <= MAX_EXACT_STATES:
        try:
            law = round_law(finite, rule, features)
        except ValueError:  # a rule that only the simulator can play
            pass
        else:
            return long_run(law, finite.initial, text), False
    chain = steps.pilot(finite, features, rule, key)
    classes = recurrent_classes(chain, finite.initial)
    # Several classes: the pilot may have missed a rare way from one to another.
    return (stationary_law(chain, classes[0]) if len(classes) == 1 else finite.initial), True


def _stateless(rule: Policy) -> bool:
    return not jax.tree_util.tree_leaves(rule.init())


def _shared_out(rounds: int, replicas: int) -> Int[np.ndarray, " B"]:
    """Rounds of each replica."""
    replicas = min(rounds, replicas)
    return rounds // replicas + (np.arange(replicas) < rounds % replicas)


def _walked(
    problem: StoppingProblem, rules: list[Policy], starts: list[tuple[np.ndarray, bool]], key: Any, rounds: int
) -> list[Tally] | None:
    """What the rules earn, walked; None where they have to be stepped through."""
    if not problem.acceptance.finite or not all(map(_stateless, rules)):
        return None
    finite, features = problem.lower(), problem.acceptance.features()
    quota = _shared_out(rounds, max(size for size in LANES if size == LANES[0] or rounds >= size * ROUNDS_PER_LANE))
    keys = lane_keys(key, len(quota))
    if finite.num_regimes == 1:
        return [_tally(counts, quota) for counts in one_regime(finite, rules, keys, quota, features)]
    found = []
    for rule, (start, _) in zip(rules, starts, strict=True):
        found.append(automaton(finite, rule, start, features))
        if found[-1] is None:
            return None
    burn_in = max(steps.MIN_BURN_IN, int(quota.max()) // 5)
    return [
        _tally(walk(finite, rounds_, keys, quota, burn_in * burnt), quota)
        for rounds_, (_, burnt) in zip(found, starts, strict=True)
    ]


def _tally(counts: Counts, quota: Int[np.ndarray, " B"]) -> Tally:
    drafted, accepted, time = counts
    return Tally(quota, drafted, accepted + quota, drafted - accepted, np.zeros_like(quota), time)
