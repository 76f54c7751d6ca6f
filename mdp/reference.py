r"""The oracle for tests: optimal throughput by enumerating every regime path. Plain NumPy, no shared code, no grid.

A round from start regime $z_0$ is a tree: its node at depth $k$ is a path $z_1..z_k$, with survival
$S = \prod a_i(z_i)$ and path probability under the draft's own law. At trial rate $\rho$ and bias $h$ the value of
every node is computed backwards, STOP against CONTINUE, which gives a real policy, its tokens, time and next-start
law exactly. The outer loop (Dinkelbach; Howard's policy iteration on the bias for persistent rounds) ends when the
rate stands still and *no node wants to change*, which proves optimality up to rounding. Where that is not reached, or
a persistent problem is not communicating, it refuses instead of answering.

Meant for $Z^K$ up to about 20,000. It imports nothing of this project, so agreement with `mdp.solve` means something.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["Reference", "advantage", "solve_by_enumeration"]

MAX_NODES = 200_000
MAX_ROUNDS = 200


class Reference(NamedTuple):
    """Optimal throughput, the bias of each start regime, and per start regime the expected tokens and time."""

    throughput: float
    bias: np.ndarray
    emitted: np.ndarray
    time: np.ndarray


class _Value(NamedTuple):
    value: np.ndarray
    emitted: np.ndarray
    time: np.ndarray
    next_start: np.ndarray


def solve_by_enumeration(
    transition, accept_prob, initial, draft_time, verify_time, rejection=None, bonus=None
) -> Reference:
    """Optimal throughput of the problem with these arrays.

    Args:
        transition: [Z, Z] row-stochastic.
        accept_prob: [K, Z], acceptance of candidate k + 1 in each regime.
        initial: [Z] law of the start regime.
        draft_time: time of a draft step.
        verify_time: [K + 1] time of a target call on k candidates.
        rejection, bonus: [Z, Z] next-start laws of a persistent problem, None if rounds renew.

    Raises:
        ValueError: if the tree is too large, the problem is multichain, or the iteration did not converge.
    """
    transition, accept_prob, initial = (np.asarray(x, dtype=float) for x in (transition, accept_prob, initial))
    verify_time = np.asarray(verify_time, dtype=float)
    depth, size = accept_prob.shape
    if size ** (depth + 1) > MAX_NODES:
        raise ValueError(f"reference: {size}^{depth + 1} paths are too many to enumerate (limit {MAX_NODES})")
    persistent = bonus is not None
    if persistent:
        rejection, bonus = np.asarray(rejection, dtype=float), np.asarray(bonus, dtype=float)
        _refuse_multichain(transition, accept_prob, initial, rejection, bonus)
    else:
        rejection = bonus = np.zeros((size, size))
    rate, bias = 1.0 / verify_time[0], np.zeros(size)
    for _ in range(MAX_ROUNDS):
        priced = _backward(transition, accept_prob, draft_time, verify_time, rejection, bonus, rate, bias)
        residual = priced.value - bias if persistent else initial @ priced.value
        if np.abs(residual).max() <= 1e-12 * (1.0 + np.abs(bias).max()):
            return Reference(float(rate), bias, priced.emitted, priced.time)
        if persistent:
            rate, bias = _howard(priced)
        else:
            rate = (initial @ priced.emitted) / (initial @ priced.time)
    raise ValueError("reference: policy iteration did not converge")


def advantage(problem_arrays: dict, solved: Reference, k: int, regime: int, survival: float) -> float:
    """CONTINUE minus STOP, in tokens, at any (k, regime, survival), reached by the optimum or not."""
    arrays = {name: np.asarray(value, dtype=float) for name, value in problem_arrays.items() if value is not None}
    size = len(arrays["initial"])
    zeros = np.zeros((size, size))
    rejection, bonus = arrays.get("rejection", zeros), arrays.get("bonus", zeros)
    accept_prob, verify_time = arrays["accept_prob"], arrays["verify_time"]
    stop = survival * (bonus @ solved.bias)[regime] - solved.throughput * verify_time[k]
    rest = _tree(
        arrays["transition"], accept_prob[k:], float(arrays["draft_time"]), verify_time[k:], rejection, bonus,
        solved.throughput, solved.bias, np.array([survival]), np.array([regime]), force_first=True,
    )  # fmt: skip
    return float(rest.value[0] - stop)


def _backward(transition, accept_prob, draft_time, verify_time, rejection, bonus, rate, bias) -> _Value:
    size = len(transition)
    out = _tree(
        transition, accept_prob, draft_time, verify_time, rejection, bonus, rate, bias, np.ones(size), np.arange(size)
    )
    return out._replace(value=out.value + 1.0, emitted=out.emitted + 1.0)


def _tree(
    transition, accept_prob, draft_time, verify_time, rejection, bonus, rate, bias, survival, regime, force_first=False
) -> _Value:
    """Best value of the subtree under each root (survival, regime), and the tokens, time, next starts it earns."""
    stop = survival * (bonus @ bias)[regime] - rate * verify_time[0]
    nothing = np.zeros(len(regime))
    stopped = _Value(stop, nothing, np.full(len(regime), verify_time[0]), survival[:, None] * bonus[regime])
    if len(accept_prob) == 0:
        return stopped
    size = len(transition)
    child = np.tile(np.arange(size), len(regime))
    chance = transition[regime].ravel()
    parent_survival = np.repeat(survival, size)
    accept = accept_prob[0][child]
    below = _tree(
        transition, accept_prob[1:], draft_time, verify_time[1:], rejection, bonus, rate, bias,
        parent_survival * accept, child,
    )  # fmt: skip
    rejected = (parent_survival * (1.0 - accept))[:, None] * rejection[child]

    def over_children(values):
        weighted = values * (chance if values.ndim == 1 else chance[:, None])
        return weighted.reshape(len(regime), size, *values.shape[1:]).sum(axis=1)

    going_on = _Value(
        over_children(below.value + parent_survival * accept + rejected @ bias) - rate * draft_time,
        over_children(below.emitted + parent_survival * accept),
        over_children(below.time) + draft_time,
        over_children(below.next_start + rejected),
    )
    keep = np.ones(len(regime), dtype=bool) if force_first else going_on.value >= stopped.value
    return _Value(
        *(np.where(keep if a.ndim == 1 else keep[:, None], a, b) for a, b in zip(going_on, stopped, strict=True))
    )


def _howard(priced: _Value) -> tuple[float, np.ndarray]:
    """Solve e - rho T + M h = h with h = 0 at the first regime; refuse if several classes make it singular."""
    size = len(priced.time)
    matrix = np.eye(size) - priced.next_start
    matrix[:, 0] = priced.time
    if np.linalg.cond(matrix) > 1e12:
        # several recurrent classes under this policy: let a little probability leak between them for one step
        matrix = np.eye(size) - (1 - 1e-4) * priced.next_start - 1e-4 / size
        matrix[:, 0] = priced.time
    answer = np.linalg.solve(matrix, priced.emitted)
    return float(answer[0]), np.concatenate([[0.0], answer[1:]])


def _refuse_multichain(transition, accept_prob, initial, rejection, bonus) -> None:
    """Follow every action from every start regime by matrix powers; all reachable pairs must connect."""
    size = len(initial)
    move = bonus.copy()
    alive = np.eye(size)
    for accept in accept_prob:
        drafted = alive @ transition
        move += drafted @ ((1 - accept)[:, None] * rejection)
        alive = drafted * accept
        move += alive @ bonus
    connected = np.linalg.matrix_power(np.eye(size) + (move > 0), size) > 0
    starts = (initial @ connected) > 0
    if not connected[np.ix_(starts, starts)].all():
        raise ValueError("reference: the start regimes do not all reach each other (multichain)")
