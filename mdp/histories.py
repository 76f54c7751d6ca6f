r"""Exact value of a stopping rule with hidden regimes, without sampling.

A round is a tree of symbol histories, walked down to where the rule stops. Histories that agree in what can be known
(`mdp.belief`) and in what the rule keeps of them are one; mass flows forward as in `mdp.evaluate`.
"""

import numpy as np
from jaxtyping import Float

from mdp import belief
from mdp.entrants import check_symbols, label, needs
from mdp.policy import BeliefRule, Observation, Policy
from mdp.problem import FiniteProblem

__all__ = ["histories_law"]

MAX_NUMBERS = 20_000_000
"""In the points that one depth leads to."""


def histories_law(
    problem: FiniteProblem, observation: Float[np.ndarray, "Z O"], policy: Policy
) -> tuple[Float[np.ndarray, " 1"], Float[np.ndarray, " 1"], Float[np.ndarray, " 1"]]:
    """Expected tokens, time and candidates of one round under a rule, exactly.

    Raises:
        ValueError: if the rule keeps state, needs what a problem with hidden regimes does not show, is made for other
            symbols, or goes on along too many histories.
    """
    name, follows = label(policy), isinstance(policy, BeliefRule)
    check_symbols(name, policy, observation.shape[1])
    missing = needs(policy) - {"survival", "next_accept_prob", "symbol"}
    if missing:
        raise ValueError(f"policy {name!r} needs {min(missing)}, which a problem with hidden regimes does not show")
    if type(policy).end_round is not Policy.end_round and not follows:
        raise ValueError(f"policy {name!r} remembers past rounds; simulate it instead")
    state, depth = policy.init(), problem.max_candidates
    points, mass, symbol = np.tile(problem.initial, 2)[None], np.ones(1), np.full(1, -1)
    emitted, time, drafted = 1.0, 0.0, 0.0
    for k in range(depth + 1):
        stops = np.ones(len(mass), dtype=bool)
        if k < depth:
            shown = Observation(
                num_candidates=k,
                survival=belief.survival(points),
                next_accept_prob=belief.next_accept_prob(problem, k, points),
                symbol=symbol,
            )
            new_state, answer = policy.stop(state, shown)
            if new_state is not state and not follows:
                raise ValueError(f"policy {name!r} changes its state within a round; simulate it instead")
            state, stops = new_state, np.broadcast_to(np.asarray(answer, dtype=bool), stops.shape)
        time += problem.verify_time[k] * mass[stops].sum()
        on = np.flatnonzero(~stops)
        if len(on) == 0:
            break
        if len(on) * observation.shape[1] * points.shape[1] > MAX_NUMBERS:
            raise ValueError(
                f"policy {name!r}: drafts on along too many histories for exact evaluation ({len(on)} at k = {k}); "
                "simulate it instead"
            )
        grown = belief.branch(problem, observation, k, points[on])
        time += problem.draft_time * mass[on].sum()
        drafted += mass[on].sum()
        emitted += mass[on] @ grown.gain
        parent, symbol = np.nonzero(grown.chance)
        points, mass = grown.point[parent, symbol], mass[on][parent] * grown.chance[parent, symbol]
        # What the rule keeps of the history, or reads of its end, may not be mixed up either.
        kept = [part[on][parent] for part in state] if follows else []
        last = [symbol[:, None]] if "symbol" in needs(policy) else []
        first, group = belief.merge(np.concatenate([points, *kept, *last], axis=1))
        points, symbol, mass = points[first], symbol[first], np.bincount(group, mass)
        state = tuple(part[first] for part in kept) if follows else state
    return np.array([emitted]), np.array([time]), np.array([drafted])
