r"""The best member of a family of stopping rules, exactly: one pass over the round's tree and one sort.

A threshold family has an *index* $x(k, z, S)$ and a member for each level $h$: continue iff $x \ge h$. Call the least
index met on the way to a node its *level*; the member at $h$ gets as far as drafting from that node iff level $\ge h$.
So with nodes in the order of their levels, what a round earns under every member is a running sum of what each node
adds if drafting goes on there, $c_k = t_d + V(k+1) - V(k)$:

$$\Delta \text{emitted} = S\,\bar a_k(z), \quad \Delta \text{time} = c_k, \quad
  \Delta \text{next start} = S\,\{\textstyle\sum_y P(z, y) [(1 - a_y) \text{rejection}_y + a_y \text{bonus}_y]
  - \text{bonus}_z\}.$$

Nodes that agree in regime, survival and level are merged. `optimum` is the family of all rules: backward induction
over the same nodes, Dinkelbach or Howard around it. Like `mdp.reference` it has no grid; unlike it, it merges nodes,
which is what a search over problems needs. Nothing here is rounded to a grid, so a loss of 1e-9 means something.

Where the nodes are too many, those of low level are left out: then only members with a higher threshold are compared,
and `complete` says so.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from mdp.chain import recurrent_classes, stationary_law
from mdp.policy import MERGE
from mdp.problem import FiniteProblem, start_graph

__all__ = [
    "INDEXES", "Ladder", "Lengths", "Optimum", "best_lengths", "goodput", "ladder",
    "lookahead_table", "next_start_gain", "optimum", "start_regimes",
]  # fmt: skip

MAX_NODES = 2_000_000  # numbers kept of all nodes
LOWEST = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6)
SAME = 1e-11  # levels closer than this are one threshold: products that differ by their rounding
FOREVER = 1e18  # the index of a node where drafting on costs no time
MAX_ROUNDS = 100
ROUNDING = 1e-14
MIXING = 1e-3

Index = Callable[[FiniteProblem, int, np.ndarray, np.ndarray], np.ndarray]


def _survival(problem: FiniteProblem, k: int, regime: np.ndarray, survival: np.ndarray) -> np.ndarray:
    return survival


def _lookahead(problem: FiniteProblem, k: int, regime: np.ndarray, survival: np.ndarray) -> np.ndarray:
    return survival * problem.next_accept_prob[k, regime]


def _rate(problem: FiniteProblem, k: int, regime: np.ndarray, survival: np.ndarray) -> np.ndarray:
    price = problem.step_time[k]
    gain = _lookahead(problem, k, regime, survival)
    return np.minimum(gain / price, FOREVER) if price > 0 else np.full(len(regime), FOREVER)


INDEXES: dict[str, Index] = {"survival": _survival, "lookahead": _lookahead, "rate": _rate}
r"""$S$; $S \bar a$; and $S \bar a / c_k$, whose member at $\rho$ is one-step look-ahead at that rate."""


class Ladder(NamedTuple):
    """The members of a threshold family that differ [G], from the one that never drafts on.

    Member g is the rule for every threshold above `low[g]` up to `high[g]`. `complete` is false if members with lower
    thresholds than these were left out.
    """

    low: Float[np.ndarray, " G"]
    high: Float[np.ndarray, " G"]
    throughput: Float[np.ndarray, " G"]
    complete: bool

    @property
    def threshold(self) -> Float[np.ndarray, " G"]:
        """One threshold of each member, as far from its neighbours' as can be."""
        return (self.low + self.high) / 2

    @property
    def best(self) -> tuple[float, float]:
        """Throughput and threshold of the best member."""
        at = int(np.argmax(self.throughput))
        return float(self.throughput[at]), float(self.threshold[at])


class Lengths(NamedTuple):
    """Fixed lengths: throughput of each [K + 1]; and the best choice of a length for each start regime."""

    throughput: Float[np.ndarray, " K+1"]
    by_start: float
    chosen: list[int]


def start_regimes(problem: FiniteProblem) -> Bool[np.ndarray, " Z"]:
    """Where a round can start."""
    return start_graph(problem)[1] if problem.persistent else problem.initial > 0


def next_start_gain(problem: FiniteProblem, k: int) -> Float[np.ndarray, "Z Z"]:
    """Per unit of survival, how candidate k + 1 changes the law of the next start; nothing if rounds renew."""
    if problem.rejection is None or problem.bonus is None:
        return np.zeros((problem.num_regimes, 0))
    accept = problem.accept_prob[k][:, None]
    return problem.transition @ ((1.0 - accept) * problem.rejection + accept * problem.bonus) - problem.bonus


def lookahead_table(problem: FiniteProblem, rate: float, bias: np.ndarray) -> Float[np.ndarray, "K Z"]:
    r"""One-step look-ahead at a rate as survival thresholds: continue iff $S g_k(z) \ge \rho c_k$.

    $g_k = \bar a_k$ if rounds renew; else the bias of the next start is added to it.
    """
    prices = rate * problem.step_time
    table = np.zeros((problem.max_candidates, problem.num_regimes))
    for k, price in enumerate(prices):
        gain = problem.next_accept_prob[k].copy()
        if problem.persistent:
            gain += next_start_gain(problem, k) @ bias
        pays = gain > 0
        table[k] = 0.0 if price <= 0 else np.where(pays, price / np.where(pays, gain, 1.0), np.inf)
    return table


class _Nodes(NamedTuple):
    """One depth of the tree: `mass` [n, B] is the probability of each node under each start law."""

    regime: np.ndarray
    survival: np.ndarray
    level: np.ndarray
    mass: np.ndarray


def _merge(columns: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Representatives of equal rows, and the group of each row."""
    rounded = [column if column.dtype.kind == "i" else np.rint(column * MERGE) for column in columns]
    order = np.lexsort(rounded)
    differs = np.zeros(len(order), dtype=bool)
    for column in rounded:
        differs[1:] |= column[order][1:] != column[order][:-1]
    group = np.empty(len(order), dtype=int)
    group[order] = np.cumsum(differs)
    return order[np.flatnonzero(np.r_[True, differs[1:]])], group


def _grow(problem: FiniteProblem, roots: np.ndarray, index: Index, lowest: float) -> Iterator[_Nodes]:
    """The nodes of depths 0..K-1 at which some member with a threshold of at least `lowest` drafts on."""
    size = problem.num_regimes
    regime, survival, mass = np.arange(size), np.ones(size), roots.T
    level = np.full(size, np.inf)
    moves = problem.transition > 0
    for k in range(problem.max_candidates):
        level = np.minimum(level, index(problem, k, regime, survival))
        kept = (level >= lowest) & (mass > 0).any(axis=1)
        regime, survival, level, mass = regime[kept], survival[kept], level[kept], mass[kept]
        yield _Nodes(regime, survival, level, mass)
        if k + 1 == problem.max_candidates or len(regime) == 0:
            return
        parent, child = np.nonzero(moves[regime])
        below = survival[parent] * problem.accept_prob[k, child]
        first, group = _merge((child, below, level[parent]))
        flow = np.zeros((len(first), mass.shape[1]))
        np.add.at(flow, group, mass[parent] * problem.transition[regime[parent], child][:, None])
        regime, survival, level, mass = child[first], below[first], level[parent][first], flow


def ladder(problem: FiniteProblem, index: str) -> Ladder:
    """Every member of a threshold family that differs from the next, with its throughput.

    Raises:
        ValueError: if even the nodes of the highest levels are too many.
    """
    for lowest in LOWEST:
        found = _ladder(problem, INDEXES[index], lowest)
        if found is not None:
            return found
    raise ValueError(f"the tree of rounds is too large to compare {index} thresholds on it")


def _ladder(problem: FiniteProblem, index: Index, lowest: float) -> Ladder | None:
    starts = np.flatnonzero(start_regimes(problem))
    roots = np.eye(problem.num_regimes)[starts] if problem.persistent else problem.initial[None, :]
    prices, into = problem.step_time, starts if problem.persistent else starts[:0]
    levels, parts, room = [], [], MAX_NODES
    for k, nodes in enumerate(_grow(problem, roots, index, lowest)):
        room -= nodes.mass.size * (2 + len(into)) * (1 + problem.num_regimes)
        if room < 0:
            return None
        alive = nodes.mass * nodes.survival[:, None]
        leads = next_start_gain(problem, k)[:, into][nodes.regime]
        emitted = alive * problem.next_accept_prob[k][nodes.regime][:, None]
        levels.append(nodes.level)
        parts.append(np.concatenate(
            [emitted[..., None], (nodes.mass * prices[k])[..., None], alive[..., None] * leads[:, None, :]], axis=2
        ))  # fmt: skip
    level, part = np.concatenate(levels), np.concatenate(parts)
    if not level.size:
        return None
    order = np.argsort(-level, kind="stable")
    level, part = level[order], part[order]
    first = np.flatnonzero(np.r_[True, -np.diff(level) > SAME * np.maximum(1.0, level[1:])])
    sums = np.concatenate([np.zeros_like(part[:1]), np.cumsum(np.add.reduceat(part, first), axis=0)])
    top, last = level[first], np.r_[level[first[1:] - 1], level[-1]]
    low, high = np.r_[top, min(lowest, last[-1])], np.r_[2.0 * top[0] + 1.0, last]
    leads = sums[..., 2:] + (problem.bonus[np.ix_(starts, starts)] if problem.bonus is not None else 0.0)
    rates = _long_run(problem.initial[starts], 1.0 + sums[..., 0], problem.verify_time[0] + sums[..., 1], leads)
    return Ladder(low, high, rates, lowest == 0.0)


def _long_run(initial: np.ndarray, emitted: np.ndarray, time: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """Throughput [G] of rules with these tokens, times [G, B] and next starts [G, B, B], or [G, 1] if rounds renew.

    A rule with several recurrent classes counts with the worst of them.
    """
    if leads.shape[2] == 0:
        return emitted[:, 0] / time[:, 0]
    rates = np.empty(len(emitted))
    mixing = (leads > MIXING).all(axis=(1, 2))  # one class for certain, and well conditioned: all at once
    system = np.eye(leads.shape[2]) - leads[mixing]
    system[:, :, 0] = time[mixing]
    if mixing.any():
        rates[mixing] = np.linalg.solve(system, emitted[mixing][..., None])[:, 0, 0]
    for g in np.flatnonzero(~mixing):
        chain = np.maximum(leads[g], 0.0)  # differences of equal numbers
        laws = [stationary_law(chain, members) for members in recurrent_classes(chain, initial)]
        rates[g] = min((law @ emitted[g]) / (law @ time[g]) for law in laws)
    return rates


def best_lengths(problem: FiniteProblem) -> Lengths:
    """Every fixed length, and the best length chosen at the round's start, where the start regime is seen."""
    starts = np.flatnonzero(start_regimes(problem))
    depth, into = problem.max_candidates, starts if problem.persistent else starts[:0]
    prices, alive = problem.step_time, np.eye(problem.num_regimes)[starts]
    emitted, time = np.ones((depth + 1, len(starts))), np.zeros((depth + 1, len(starts)))
    leads = np.zeros((depth + 1, len(starts), len(into)))
    if problem.bonus is not None:
        leads[0] = problem.bonus[np.ix_(starts, starts)]
    for k in range(depth):
        emitted[k + 1] = emitted[k] + alive @ problem.next_accept_prob[k]
        leads[k + 1] = leads[k] + alive @ next_start_gain(problem, k)[:, into]
        alive = (alive @ problem.transition) * problem.accept_prob[k]
    time += (problem.verify_time[0] + np.r_[0.0, np.cumsum(prices)])[:, None]
    initial = problem.initial[starts]
    mixed = ((emitted @ initial)[:, None], (time @ initial)[:, None])
    rates = _long_run(initial, *((emitted, time) if problem.persistent else mixed), leads)

    def choose(rate: float, bias: np.ndarray) -> tuple[np.ndarray, ...]:
        worth = emitted - rate * time + (leads @ bias if problem.persistent else 0.0)
        chosen = worth.argmax(axis=0)
        at = (chosen, np.arange(len(starts)))
        return emitted[at], time[at], leads[at], worth[at], chosen

    by_start, _, chosen = _improve(problem, initial, choose)
    return Lengths(rates, by_start, chosen.tolist())


def _improve(
    problem: FiniteProblem, initial: np.ndarray, choose: Callable[[float, np.ndarray], tuple[np.ndarray, ...]]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Dinkelbach, or Howard if rounds persist: rate, bias and choice once no start regime wants another rule.

    `choose` answers a rate and a bias with the tokens, time, next starts and worth of the best rule of each start.

    Raises:
        ValueError: if that is not reached.
    """
    rate, bias = 1.0 / problem.verify_time[0], np.zeros(len(initial))
    for _ in range(MAX_ROUNDS):
        emitted, time, leads, worth, chosen = choose(rate, bias)
        left = worth - bias if problem.persistent else initial @ worth
        if np.abs(left).max() <= ROUNDING * (1.0 + problem.max_candidates) * (1.0 + np.abs(bias).max()):
            return rate, bias, chosen
        if problem.persistent:
            new_rate, bias = _howard(emitted, time, leads)
        else:
            new_rate = float((initial @ emitted) / (initial @ time))
        stands = not problem.persistent and new_rate <= rate * (1.0 + 1e-15)
        rate = new_rate
        if stands:
            return rate, bias, chosen
    raise ValueError("policy iteration did not settle")


def _howard(emitted: np.ndarray, time: np.ndarray, leads: np.ndarray) -> tuple[float, np.ndarray]:
    """Solve e - rho T + M h = h with h = 0 at the first start; a leak joins classes that do not meet."""
    for leak in (0.0, 1e-6):
        matrix = np.eye(len(time)) - (1.0 - leak) * leads - leak / len(time)
        matrix[:, 0] = time
        if np.linalg.cond(matrix) < 1e12:
            break
    answer = np.linalg.solve(matrix, emitted)
    return float(answer[0]), np.r_[0.0, answer[1:]]


class Optimum(NamedTuple):
    """The best throughput of all rules and the bias of each start regime [Z], 0 where no round starts."""

    throughput: float
    bias: Float[np.ndarray, " Z"]


def optimum(problem: FiniteProblem) -> Optimum:
    """The best of all rules, to rounding.

    Raises:
        ValueError: if the tree is too large or policy iteration does not settle.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> from mdp.problem import StoppingProblem
        >>> round(optimum(StoppingProblem(IID(0.8), Affine(0.2, 1.0), max_candidates=12).lower()).throughput, 12)
        1.867555555556
    """
    starts = np.flatnonzero(start_regimes(problem))
    prices, into = problem.step_time, starts if problem.persistent else starts[:0]
    levels = _levels(problem, starts)
    gains = [next_start_gain(problem, k)[:, into] for k in range(problem.max_candidates)]
    verify = problem.verify_time[0]
    after = problem.bonus[np.ix_(starts, starts)] if problem.bonus is not None else np.zeros((len(starts), 0))

    def choose(rate: float, bias: np.ndarray) -> tuple[np.ndarray, ...]:
        below = np.zeros((1, 2 + len(into)))  # tokens, time, next starts above those of STOP
        value = np.r_[1.0, -rate, bias if problem.persistent else bias[:0]]
        for k in range(problem.max_candidates - 1, -1, -1):
            regime, survival, child, weight = levels[k]
            now = (weight[..., None] * below[child]).sum(axis=1)
            now[:, 0] += survival * problem.next_accept_prob[k][regime]
            now[:, 1] += prices[k]
            now[:, 2:] += survival[:, None] * gains[k][regime]
            now[now @ value < 0] = 0.0
            below = now
        emitted, time, leads = 1.0 + below[:, 0], verify + below[:, 1], after + below[:, 2:]
        worth = emitted - rate * time + (leads @ bias if problem.persistent else 0.0)
        return emitted, time, leads, worth, np.zeros(0, dtype=int)

    rate, bias, _ = _improve(problem, problem.initial[starts], choose)
    spread = np.zeros(problem.num_regimes)
    spread[starts] = bias
    return Optimum(rate, spread)


def _levels(problem: FiniteProblem, starts: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """Per depth 0..K-1: regime and survival of each node, its children's numbers and their chances [n, Z]."""
    regime, survival = starts, np.ones(len(starts))
    levels, room = [], MAX_NODES
    for k in range(problem.max_candidates):
        size = problem.num_regimes
        child = np.tile(np.arange(size), len(regime))
        first, group = _merge((child, (survival[:, None] * problem.accept_prob[k]).ravel()))
        room -= len(group)
        if room < 0:
            raise ValueError("the tree of rounds is too large for an exact optimum")
        last = k + 1 == problem.max_candidates
        number = np.zeros((len(regime), size), dtype=int) if last else group.reshape(-1, size)
        levels.append((regime, survival, number, problem.transition[regime]))
        regime, survival = child[first], (survival[:, None] * problem.accept_prob[k]).ravel()[first]
    return levels


def goodput(problem: FiniteProblem) -> float:
    r"""Throughput of the rule that stops where the round's own goodput would fall.

    With $e = 1 + \sum_{i \le k} S_i$ and $T(k)$ it continues iff $(e + S \bar a) / (T(k) + c_k) \ge e / T(k)$: time is
    priced at the rate of this round, not at the long-run rate.

    Raises:
        ValueError: if the tree is too large.
    """
    starts = np.flatnonzero(start_regimes(problem))
    roots = np.eye(problem.num_regimes)[starts] if problem.persistent else problem.initial[None, :]
    into = starts if problem.persistent else starts[:0]
    size, num_starts, prices = problem.num_regimes, len(roots), problem.step_time
    emitted, time = np.ones(num_starts), np.full(num_starts, problem.verify_time[0])
    leads = problem.bonus[np.ix_(starts, starts)] if problem.bonus is not None else np.zeros((num_starts, 0))
    regime, survival, earned, mass = np.arange(size), np.ones(size), np.ones(size), roots.T
    for k in range(problem.max_candidates):
        gain = survival * problem.next_accept_prob[k][regime]
        goes_on = gain * problem.round_time[k] >= earned * prices[k] * (1.0 - SAME)
        kept = goes_on & (mass > 0).any(axis=1)
        regime, survival, earned, mass, gain = regime[kept], survival[kept], earned[kept], mass[kept], gain[kept]
        if len(regime) == 0:
            break
        if mass.size * size > MAX_NODES:
            raise ValueError("the tree of rounds is too large for the goodput rule")
        emitted = emitted + gain @ mass
        time = time + prices[k] * mass.sum(axis=0)
        leads = leads + (mass * survival[:, None]).T @ next_start_gain(problem, k)[:, into][regime]
        parent, child = np.nonzero(problem.transition[regime] > 0)
        below = survival[parent] * problem.accept_prob[k, child]
        first, group = _merge((child, below, earned[parent] + below))
        flow = np.zeros((len(first), num_starts))
        np.add.at(flow, group, mass[parent] * problem.transition[regime[parent], child][:, None])
        regime, survival, earned, mass = child[first], below[first], (earned[parent] + below)[first], flow
    return float(_long_run(problem.initial[starts], emitted[None], time[None], leads[None])[0])
