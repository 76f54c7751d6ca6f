r"""The counts of a round, exactly, and samples of any size from that law at once.

For a rule without memory on a renewing finite problem the pair (drafted, accepted) has a law on (K + 1)^2 points that
follows from the rule's tree of states (`simulate.automaton`): mass flows forward, that of rounds with no rejection so
far beside that of rounds whose accepted prefix is already decided. A thousand rounds or a billion are then one
multinomial draw per cluster.

It is fast, and it is no evidence: the law is computed from the same problem as every exact value, so samples from it
can only confirm the arithmetic. To check a solver or an evaluation use `simulate.rounds`, which plays candidates. Here
policies draw independently of each other: differences are not paired.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from mdp import entrants
from mdp.metrics import Tally
from mdp.policy import Policy, PolicySpec
from mdp.problem import FiniteProblem, StoppingProblem
from simulate.automaton import levels, successors
from simulate.estimate import Comparison, PolicyResult

__all__ = ["counts_law", "sample_law"]

CLUSTERS = 256


def counts_law(
    problem: FiniteProblem, rule: Policy, features: Mapping[str, np.ndarray] | None = None
) -> Float[np.ndarray, "K+1 K+1"]:
    """Probability that a round drafts n and has m accepted, [n, m].

    Raises:
        ValueError: if rounds are persistent, or the tree is too large.
    """
    if problem.persistent:
        raise ValueError("problem: rounds are persistent, one round alone has no long-run law; simulate them")
    depth = problem.max_candidates
    slot = successors(problem.transition)
    tree = levels(problem, rule, slot, features or {})
    if tree is None:
        raise ValueError("problem: the rule's tree of states is too large for an exact law; simulate it")
    law = np.zeros((depth + 1, depth + 1))
    whole, decided = problem.initial.copy(), np.zeros((problem.num_regimes, depth + 1))
    for k, level in enumerate(tree):
        if k == depth:
            law[k] += decided.sum(axis=0)
            law[k, k] += whole.sum()
            break
        if_not, if_so = level.drops.T  # what the rule does if the next candidate would be rejected, or accepted
        children = tree[k + 1].regime if k + 1 < len(tree) else np.zeros(0, dtype=int)
        into = slot[level.regime]  # [n, slots] next regimes
        chance = np.take_along_axis(problem.transition[level.regime], into, axis=1)
        accept = problem.accept_prob[k][into]
        law[k] += (decided * if_not[:, None]).sum(axis=0)
        law[k, k] += (
            whole * ((chance * accept).sum(axis=1) * if_so + (chance * (1 - accept)).sum(axis=1) * if_not)
        ).sum()
        next_whole, next_decided = np.zeros(len(children)), np.zeros((len(children), depth + 1))
        if len(children):
            goes_on = whole[:, None] * chance
            np.add.at(next_whole, level.child, goes_on * accept * ~if_so[:, None])
            broken = decided[:, None, :] * chance[..., None] * ~if_not[:, None, None]
            broken[..., k] += goes_on * (1 - accept) * ~if_not[:, None]
            np.add.at(next_decided, level.child, broken)
        whole, decided = next_whole, next_decided
    return law


def sample_law(
    problem: StoppingProblem,
    policies: Iterable[str | Policy | PolicySpec],
    *,
    rounds: int,
    key: Key[Array, ""] | int,
) -> Comparison:
    """What `rounds` rounds of each policy earn, drawn from the exact law of their counts.

    Raises:
        ValueError: as `counts_law`, if a policy keeps state, or if acceptances are continuous.
    """
    finite, features = problem.lower(), problem.acceptance.features()
    seed = int(key) if isinstance(key, (int, np.integer)) else None
    bits = np.asarray(jr.key_data(jr.key(seed) if seed is not None else key)).ravel()
    clusters = min(rounds, CLUSTERS)
    quota = rounds // clusters + (np.arange(clusters) < rounds % clusters)
    results = []
    for index, spec in enumerate(entrants.read(policies)):
        rule = spec.policy
        if rule is None:
            from mdp.solve import solve

            rule = solve(problem).policy
        if jax.tree_util.tree_leaves(rule.init()):
            raise ValueError(f"policy {spec.text!r} keeps a state; simulate it")
        rule = entrants.fit_depth(spec.text, rule, finite.max_candidates, finite.num_regimes)
        law = counts_law(finite, rule, features)
        rng = np.random.default_rng([index, *(int(word) for word in bits)])
        counts = rng.multinomial(quota, law.ravel() / law.sum()).reshape(clusters, *law.shape)
        could = np.arange(finite.max_candidates + 1)
        drafted, accepted = counts.sum(axis=2) @ could, counts.sum(axis=1) @ could
        time = counts.sum(axis=2) @ finite.round_time
        tally = Tally(quota, drafted, accepted + quota, drafted - accepted, np.zeros_like(quota), time)
        results.append(PolicyResult(spec.text, tally, plain_time=float(finite.verify_time[0])))
    return Comparison(tuple(results), rounds=int(rounds), seed=seed)
