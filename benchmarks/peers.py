"""General MDP solvers on the tabular form, each in the form it takes, built before the clock starts.

Traps: mdpsolver goes on from its last answer, so that each turn gets a model of its own; so does pymdptoolbox, which
stops on the span of a step as well, so that its values are off by a constant; jaxdp is dense and has single steps only,
whose loop, to the same tolerance, is ours. QuantEcon starts anew by itself.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from measure import optional

from mdp.tabular import TabularProblem

__all__ = ["Peer", "peers"]


class Peer(NamedTuple):
    """`solve` on what `prepare` returns (on nothing if that is None) gives something that `values` turns into V.

    `slow`: one run is enough. `solve` is None where the package is missing or the size is beyond it: `why`.
    """

    name: str
    solve: Callable | None
    values: Callable = np.asarray
    prepare: Callable | None = None
    slow: bool = False
    why: str = ""


class Pairs(NamedTuple):
    """State-action pairs in order of state, then action (STOP 0, CONTINUE 1; at k = K STOP alone)."""

    reward: np.ndarray
    law: Any
    state: np.ndarray
    action: np.ndarray


def pairs(problem: TabularProblem, depth: int, rate: float) -> Pairs:
    """T as reward [L], sparse law [L, S], state and action of each of the L pairs."""
    from scipy.sparse import csr_matrix

    size, knots = len(problem.initial), len(problem.survival)
    states = (depth + 1) * size * knots
    k, z, j = (part.ravel() for part in np.indices((depth + 1, size, knots)))
    onward = np.minimum(j[:, None] + problem.steps, knots - 1)
    goes = k < depth
    to = ((k[:, None] + 1) * size + np.arange(size)) * knots + onward
    again = np.broadcast_to(np.arange(size) * knots, (states, size))
    earned = (problem.transition[z] * problem.survival[onward]).sum(axis=1) - rate * problem.draft_cost
    state, action = np.concatenate([np.arange(states), np.flatnonzero(goes)]), np.repeat([0, 1], [states, goes.sum()])
    order = np.lexsort((action, state))
    columns = np.concatenate([again, to[goes]])[order]
    chances = np.concatenate([np.broadcast_to(problem.initial, (states, size)), problem.transition[z[goes]]])[order]
    reward = np.concatenate([np.full(states, 1 - rate * problem.verify_cost), earned[goes]])[order]
    law = csr_matrix((chances.ravel(), columns.ravel(), np.arange(len(order) + 1) * size), shape=(len(order), states))
    return Pairs(reward, law, state[order], action[order])


def peers(
    problem: TabularProblem, depth: int, rate: float, discount: float, tolerance: float, quick: bool
) -> Iterator[Peer]:
    """All of them at this size, the strongest first."""
    given = pairs(problem, depth, rate)
    most = 1e4 if quick else 1e5
    yield from _quantecon(given, discount, tolerance, most)
    yield from _mdpsolver(given, discount, tolerance, 2e3 if quick else 1e5)
    yield from _mdptoolbox(given, discount, tolerance, most)
    yield from _jaxdp(given, discount, tolerance, 0 if quick else 2e3)


def _left_out(name: str, module: Any, package: str, states: int, most: float, reason: str) -> Peer | None:
    if module is None:
        return Peer(name, None, why=f"{package} is not installed")
    return Peer(name, None, why=f"left out: {reason}") if states > most else None


def _quantecon(given: Pairs, discount: float, tolerance: float, most: float) -> Iterator[Peer]:
    quantecon, states = optional("quantecon"), given.law.shape[1]
    model = quantecon and quantecon.markov.DiscreteDP(given.reward, given.law, discount, given.state, given.action)
    limits = {"modified_policy_iteration": 1e9, "policy_iteration": 1.1e4, "value_iteration": 1.1 * most}
    for method, limit in limits.items():
        name = f"QuantEcon {method}"

        def solve(method=method):
            return model.solve(method=method, epsilon=tolerance, max_iter=100_000)

        none = _left_out(name, quantecon, "quantecon", states, limit, "takes too long")
        yield none or Peer(name, solve, lambda found: found.v, slow=method == "value_iteration")


def _mdpsolver(given: Pairs, discount: float, tolerance: float, most: float) -> Iterator[Peer]:
    mdpsolver, states = optional("mdpsolver"), given.law.shape[1]
    name = "mdpsolver value iteration"  # its modified policy iteration took longer at both small sizes
    if none := _left_out(name, mdpsolver, "mdpsolver", states, 1.1 * most, "its lists of lists take too long to build"):
        yield none
        return
    width = given.law.indptr[1]
    first = np.searchsorted(given.state, np.arange(states + 1)).tolist()
    chances, columns = (part.reshape(-1, width).tolist() for part in (given.law.data, given.law.indices))
    reward = given.reward.tolist()
    spans = list(pairwise(first))
    model = {
        "rewards": [reward[a:b] for a, b in spans],
        "tranMatProbs": [chances[a:b] for a, b in spans],
        "tranMatColumns": [columns[a:b] for a, b in spans],
    }

    def prepare():
        fresh = mdpsolver.model()
        fresh.mdp(discount=discount, **model)
        return fresh

    def solve(fresh):
        fresh.solve(algorithm="vi", tolerance=tolerance)
        return fresh

    yield Peer(name, solve, lambda solved: np.array(solved.getValueVector()), prepare)


def _mdptoolbox(given: Pairs, discount: float, tolerance: float, most: float) -> Iterator[Peer]:
    toolbox, states = optional("mdptoolbox.mdp"), given.law.shape[1]
    name = "pymdptoolbox ValueIteration"  # its modified policy iteration takes minutes at 1e3 states
    if none := _left_out(name, toolbox, "pymdptoolbox", states, 1.1 * most, "takes too long"):
        yield none
        return
    from scipy.sparse import vstack

    goes, stops = given.action == 1, given.action == 0
    barred = states - int(goes.sum())  # at k = K CONTINUE is a STOP that earns one less
    laws = [given.law[stops], vstack([given.law[goes], given.law[stops][-barred:]]).tocsr()]
    reward = np.repeat(given.reward[stops][:, None], 2, axis=1) - [0.0, 1.0]
    reward[given.state[goes], 1] = given.reward[goes]

    def prepare():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return toolbox.ValueIteration(laws, reward, discount, tolerance, 100_000)

    def solve(model):
        model.run()
        return model

    yield Peer(name, solve, lambda model: np.array(model.V), prepare)


def _jaxdp(given: Pairs, discount: float, tolerance: float, most: float) -> Iterator[Peer]:
    jaxdp, states = optional("jaxdp"), given.law.shape[1]
    name = "jaxdp ValueIteration"
    if none := _left_out(name, jaxdp, "jaxdp", states, most, "dense, S squared of memory"):
        yield none
        return
    import chex
    import jax
    import jax.numpy as jnp

    goes, stops = given.action == 1, given.action == 0
    law, reward = np.zeros((2, states, states)), np.zeros((2, states, states))  # [action, next, state], [.., next]
    law[:] = given.law[stops].toarray().T
    law[1][:, given.state[goes]] = given.law[goes].toarray().T
    reward[:] = given.reward[stops][:, None]
    reward[1] -= 1.0
    reward[1][given.state[goes]] = given.reward[goes][:, None]
    enough = tolerance * (1 - discount) / discount
    step = jaxdp.ValueIteration(discount)
    with jax.enable_x64(True):
        parts = (law, reward, np.full(states, 1.0 / states), np.zeros(states))
        model = jaxdp.MDP(
            **dict(zip(("transition", "reward", "initial", "terminal"), map(jnp.asarray, parts), strict=True))
        )

        @jax.jit
        def loop(model):
            def body(carry):
                state, _ = carry
                after = step.update(model, state)
                return after, jnp.abs(after.v_val - state.v_val).max()

            start = (step.init(model), jnp.asarray(jnp.inf))
            return jax.lax.while_loop(lambda carry: carry[1] > enough, body, start)[0].v_val

    def solve():
        chex.disable_asserts()  # its checks of values do not trace under a plain jit, and would cost it time
        try:
            with jax.enable_x64(True):
                return np.asarray(loop(model))
        finally:
            chex.enable_asserts()

    yield Peer(name, solve, slow=True)
