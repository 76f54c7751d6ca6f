r"""The best stopping rule with hidden regimes, and a proof.

The points of belief (`mdp.belief`) that symbols can lead to form a tree, histories that agree merged. At a trial rate
it is grown forwards and valued backwards, from both sides, with what `mdp.envelope` knows of any point:

* A point where even the regime's being shown from the next candidate on would not make CONTINUE worth it stops.
  That is exact, and keeps most trees small; then the bounds agree up to rounding.
* Where a depth holds more points than allowed, those are *opened* that stand for most: similar ones fall into one
  cell, whose heaviest by probability x gap is opened. The others are closed: from below they follow the best
  rule of the opened points near them or one that does not look, from above they take `hull`. Points whose gaps sum
  to nothing that matters are closed first.
* Backwards, a rule is its pair (e, t) of tokens and time, each linear in the belief, so what the lower bound
  promises is earned by a real rule, evaluated exactly. The rate moves to that rule's throughput (Dinkelbach) until it
  stands still, first on small trees.

The certificate is that of `mdp.certificate`, the upper side widened by what merging can do.

The rule handed out (`mdp.policy.BeliefRule`) continues iff one of the stored CONTINUE pairs beats STOP. It decides as
the tree does at every point in it; where the tree was opened throughout, that is the optimum, and its rates are those
of the rule found. Otherwise the rates are those of the rule behind the lower bound.

References: Smallwood and Sondik (1973) for piecewise linear values; Hauskrecht (2000) for the fast informed bound,
of which `relaxed` is a convex relative; Dinkelbach (1967).
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial import KDTree

from mdp.belief import MERGE, branch, cells, merge
from mdp.certificate import certificate
from mdp.envelope import Seen, blind, hull, relaxed, seen
from mdp.policy import TIE, BeliefRule
from mdp.problem import FiniteProblem

__all__ = ["Found", "solve_hidden"]

FIRST_LIMIT = 1024
MAX_POINTS, MAX_BRANCHED = 2**19, 2**25
"""Opened points in all depths together, and numbers in the points that they lead to."""

MAX_STEPS, NEIGHBOURS = 40, 6
FINEST_CELL = 16
"""Cells have sides 2^-16 at the finest."""

NEGLIGIBLE_GAP = 1e-13
MAX_PAIRS, MAX_NUMBERS, WORTH_A_PAIR = 256, 2**18, 1e-12
"""Pairs kept per depth, and numbers in all of them; the gain, probability included, for which one more is kept."""


class Found(NamedTuple):
    """`tally`: tokens, time and candidates of a round under the rule found. `opened`: most points of a depth."""

    rate: float
    bounds: tuple[float, float]
    tally: tuple[float, float, float]
    rule: BeliefRule
    closed: bool
    num_steps: int
    opened: int


class _Layer(NamedTuple):
    """The points [n] of one depth; of the m opened ones, where each symbol leads [m, O]."""

    points: Float[np.ndarray, "n 2Z"]
    mass: Float[np.ndarray, " n"]
    ceiling: Float[np.ndarray, " n"]
    opened: np.ndarray
    gain: np.ndarray
    chance: np.ndarray
    child: np.ndarray


class _Valued(NamedTuple):
    """The start of a round at one rate: the rule from below, the worth from above, and the pairs of each depth."""

    rate: float
    emitted: float
    time: float
    drafted: float
    ceiling: float
    pairs: list[np.ndarray]


def solve_hidden(
    problem: FiniteProblem, observation: Float[np.ndarray, "Z O"], *, tol: float, limit: int, max_steps: int = MAX_STEPS
) -> Found:
    """Bounds of relative width `tol` on the best throughput, if at most `limit` points per depth will do.

    Args:
        problem: the chain of regimes, rounds renewing, times in units of about the longest round.
        observation: [Z, O] law of the symbol in each regime.
    """

    def affordable(depth: int) -> int:
        return max(1, min(limit, MAX_POINTS // depth, MAX_BRANCHED // (depth * 2 * observation.size)))

    unseen = blind(problem, 0)
    emitted = np.append(1.0, 1.0 + unseen.emitted @ problem.initial)
    rate = float((emitted / (problem.verify_time[0] + np.append(0.0, unseen.time))).max())
    best = _Valued(rate, 0.0, 1.0, 0.0, 0.0, [])
    lower, upper, steps, most = 0.0, np.inf, 0, 0
    allowed = min(affordable(problem.max_candidates), FIRST_LIMIT)
    while True:
        layers, short = _grow(problem, observation, rate, allowed, tol * rate * problem.round_time.min() / 4)
        valued = _value(problem, observation, layers, rate)
        steps += 1
        most = max(most, *(len(layer.opened) for layer in layers))
        found = valued.emitted / valued.time
        if found * best.time > best.emitted or not best.pairs:
            best = valued
        lower = max(lower, certificate(found, 0.0, 0.0, problem.round_time, 0.0, problem.num_regimes)[0])
        ceiling = valued.ceiling + _merging(problem, rate)
        upper = min(upper, certificate(rate, 0.0, ceiling, problem.round_time, 0.0, problem.num_regimes)[1])
        still = found <= rate * (1.0 + 1e-15)
        finest = affordable(len(layers))  # most trees end long before K
        # What is closed stays so; a small tree is worth another step, it may end exact.
        if (
            steps >= max_steps
            or (still and (not short or allowed >= finest))
            or (short and upper - lower <= tol * lower)
        ):
            break
        if short and found - rate <= 1e-4 * rate:  # a finer tree will move the rate more than another step
            allowed = max(allowed, min(finest, 8 * allowed))
        rate = max(found, rate)
    return Found(
        best.emitted / best.time, (float(lower), float(upper)), (best.emitted, best.time, best.drafted),
        _rule(problem, observation, best), bool(upper - lower <= tol * lower), steps, most,
    )  # fmt: skip


def _merging(problem: FiniteProblem, rate: float) -> float:
    """What moving points by 1 / MERGE, once a depth, can do to the worth of a round."""
    depth, size = problem.accept_prob.shape
    return depth * 2 * size / MERGE * (depth + rate * np.abs(problem.step_time).sum())


def _grow(problem: FiniteProblem, observation: np.ndarray, rate: float, limit: int, slack: float):
    """The tree at a rate, with at most `limit` points opened per depth; and whether more were wanted."""
    depth, size = problem.accept_prob.shape
    visible = seen(problem, rate)
    points, mass = np.tile(problem.initial, 2)[None], np.ones(1)
    layers: list[_Layer] = []
    none, short = np.zeros(0, dtype=np.int64), False
    for k in range(depth + 1):
        ceiling = np.maximum(relaxed(problem, visible, k, points), 0.0) if k < depth else np.zeros(len(points))
        opened = np.flatnonzero(ceiling > 0)
        if len(opened) > limit:
            bare = blind(problem, k)
            floor = (points[opened, :size] @ bare.emitted.T - rate * bare.time).max(axis=1)
            gap = mass[opened] * (ceiling[opened] - np.maximum(floor, 0.0))
            chosen, represents, cut = _choose(points[opened], mass[opened], gap, limit, slack / depth)
            mass = mass.copy()
            mass[opened[chosen]] = represents
            opened, short = opened[chosen], short | cut
        if len(opened) == 0:
            layers.append(_Layer(points, mass, ceiling, none, none, none, none))
            break
        grown = branch(problem, observation, k, points[opened])
        flat = grown.point.reshape(-1, 2 * size)
        first, group = merge(flat)
        weights = (mass[opened][:, None] * grown.chance).ravel()
        layers.append(
            _Layer(points, mass, ceiling, opened, grown.gain, grown.chance, group.reshape(grown.chance.shape))
        )
        points, mass = flat[first], np.bincount(group, weights, minlength=len(first))
    return layers, short


def _choose(points: np.ndarray, mass: np.ndarray, gap: np.ndarray, limit: int, slack: float) -> tuple[Any, Any, bool]:
    """Which points to open, sorted, the mass that each stands for, and whether more were wanted.

    Gaps that sum to `slack` are left.
    """
    order = np.argsort(-gap)
    left = np.cumsum(gap[order][::-1])[::-1]
    order = order[: max(1, int(np.count_nonzero(left > slack)))]
    cut = len(order) > limit
    if cut:
        for bits in range(FINEST_CELL, -1, -1):
            _, first, group = np.unique(cells(points[order], bits), return_index=True, return_inverse=True)
            if len(first) <= limit:
                break
        pick = np.argsort(-np.bincount(group, gap[order]))[:limit]
        represents = np.bincount(group, mass[order])[pick]
        chosen = order[first[pick]]
    else:
        chosen, represents = order, mass[order]
    sort = np.argsort(chosen)
    return chosen[sort], represents[sort], cut


def _value(problem: FiniteProblem, observation: np.ndarray, layers: list[_Layer], rate: float) -> _Valued:
    """Backward induction from both sides."""
    depth, size = problem.accept_prob.shape
    visible, step_time = seen(problem, rate), problem.step_time
    later, above = np.zeros((0, 3, size)), np.zeros(0)
    pairs: list[np.ndarray] = []
    for k in range(len(layers) - 1, -1, -1):
        layer = layers[k]
        rules, worth = _without_looking(problem, k, layer.points, rate)
        ceiling = layer.ceiling.copy()
        opened = layer.opened
        if len(opened):
            onward = np.einsum("moaz,zo->maz", later[layer.child], observation)
            onward[:, 0] = problem.accept_prob[k] * (1.0 + onward[:, 0])
            onward[:, 1] += step_time[k]
            onward[:, 2] += 1.0
            onward = onward @ problem.transition.T
            earned = _worth(onward, layer.points[opened], rate)
            better = earned >= worth[opened]
            rules[opened[better]], worth[opened[better]] = onward[better], earned[better]
            hope = layer.gain - rate * step_time[k] + (layer.chance * above[layer.child]).sum(axis=1)
            ceiling[opened] = np.minimum(ceiling[opened], np.maximum(hope, 0.0))
            _close_up(problem, visible, k, layer, rules, worth, ceiling)
        pairs.append(_cover(rules, worth, layer, rate, min(MAX_PAIRS, max(MAX_NUMBERS // (depth * size), 1))))
        stops = worth < 0
        rules[stops] = 0.0
        later, above = rules, ceiling
    root = layers[0].points[0]
    tokens, duration, candidates = later[0]
    emitted, time, drafted = float(tokens @ root[:size]), float(duration @ root[size:]), float(candidates @ root[size:])
    start = problem.verify_time[0]
    return _Valued(rate, 1.0 + emitted, start + time, drafted, 1.0 + float(above[0]) - rate * start, pairs[::-1])


def _worth(rules: np.ndarray, points: np.ndarray, rate: float) -> np.ndarray:
    """Of each rule at its own point: tokens minus priced time above STOP."""
    size = points.shape[1] // 2
    return (rules[:, 0] * points[:, :size]).sum(axis=1) - rate * (rules[:, 1] * points[:, size:]).sum(axis=1)


def _without_looking(problem: FiniteProblem, k: int, points: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """The best rule [n, 3, Z] (tokens, time, candidates) that drafts more and does not look; at k = K there is none."""
    size, bare = problem.num_regimes, blind(problem, k)
    if len(bare.time) == 0:
        return np.zeros((len(points), 3, size)), np.full(len(points), -np.inf)
    worth = points[:, :size] @ bare.emitted.T - rate * bare.time
    best = worth.argmax(axis=1)
    rules = np.stack(np.broadcast_arrays(bare.emitted[best], bare.time[best, None], best[:, None] + 1.0), axis=1)
    return rules, worth[np.arange(len(points)), best]


def _close_up(problem, visible: Seen, k: int, layer: _Layer, rules, worth, ceiling) -> None:
    """Bound the closed points by the opened ones near them, in place."""
    opened, points = layer.opened, layer.points
    shut = np.ones(len(points), dtype=bool)
    shut[opened] = False
    todo = np.flatnonzero(shut & (ceiling > np.maximum(worth, 0.0) + NEGLIGIBLE_GAP))
    if len(todo) == 0:
        return
    near = KDTree(points[opened]).query(points[todo], k=min(NEIGHBOURS, len(opened)))[1]
    near = opened[near.reshape(len(todo), -1)]
    over = hull(problem, visible, k, points[todo], points[near], ceiling[near])
    ceiling[todo] = np.minimum(ceiling[todo], over)
    for one in near.T:
        earned = _worth(rules[one], points[todo], visible.rate)
        better = earned > worth[todo]
        rules[todo[better]], worth[todo[better]] = rules[one[better]], earned[better]


def _cover(rules: np.ndarray, worth: np.ndarray, layer: _Layer, rate: float, most: int) -> np.ndarray:
    """Few of the rules [p, 3, Z] that are worth as much as each point's own, or at least continue where it does."""
    on = np.flatnonzero(worth >= 0)
    rules, worth, points, mass = rules[on], worth[on], layer.points[on], layer.mass[on]
    size = points.shape[1] // 2
    best, chosen = np.full(len(on), -np.inf), []
    while len(chosen) < most and len(on):
        missing = mass * (worth - np.maximum(best, 0.0))
        pick = int(missing.argmax())
        if missing[pick] <= WORTH_A_PAIR:
            undecided = mass * (best < -TIE)
            pick = int(undecided.argmax())
            if undecided[pick] <= 0:
                break
        chosen.append(rules[pick])
        best = np.maximum(best, points[:, :size] @ rules[pick, 0] - rate * (points[:, size:] @ rules[pick, 1]))
        best[pick] = max(best[pick], worth[pick], 0.0)
    return np.reshape(chosen, (-1, 3, size))


def _rule(problem: FiniteProblem, observation: np.ndarray, best: _Valued) -> BeliefRule:
    """The rule that the pairs make; where a depth has none, one that is worth -1 stands in."""
    depth, size = problem.accept_prob.shape
    width = max(1, *(len(part) for part in best.pairs))
    emitted, price = np.zeros((depth, width, size)), np.ones((depth, width, size))
    for k, part in enumerate(best.pairs[:depth]):
        emitted[k, : len(part)], price[k, : len(part)] = part[:, 0], best.rate * part[:, 1]
    nothing = np.ones((1, size))
    seen_then = np.concatenate([observation.T, nothing])
    kept_then = np.concatenate([observation.T * problem.accept_prob[0], nothing])
    return BeliefRule(problem.initial, problem.transition, seen_then, kept_then, emitted, price)
