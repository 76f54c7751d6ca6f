r"""The value of information: one world, and ever more of it shown to the stopper.

World: regimes as a chain; in regime z each candidate is *sure* with probability a(z), then accepted with
$a + \tau (1 - a)$, else with $a (1 - \tau)$ (`token_dispersion`): the mean stays a(z). Rounds renew. The ladder:

| rung | the stopper knows |
|---|---|
| `nothing` | not even how many it has drafted: stop by a coin, the best one |
| `position` | the number of candidates: the best fixed length |
| `history` | and the regime the round starts from, which verification of the last one revealed: a length for each |
| `head` | and after each candidate a noisy reading of its regime, right with a given probability |
| `regime` | and the regime itself |
| `token_accept_prob` | and the candidate's own acceptance probability |
| `clairvoyant` | which candidates will be accepted |

Each rung can ignore what it knows beyond the one before, and a noisier reading is a garbled sharper one, so
throughput cannot fall. `regime` and `token_accept_prob` are solved with bounds. The others are exact: for `head` all
reading sequences are enumerated (hidden regimes, theory F8, with joint weights in place of beliefs) and Dinkelbach is
run to the end.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.acceptance import MarkovModulated
from mdp.calibrate import least, root
from mdp.cost import Affine
from mdp.head_rule import fixed_curve
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solve import SolveStatus, solve

__all__ = ["Rung", "World", "value_of_information"]

MAX_LEAVES = 2**20
MAX_STEPS = 100
CLOSE = 1e-13


class World(NamedTuple):
    """What happens, whoever watches."""

    chain: MarkovModulated
    token_dispersion: float
    draft_time: float
    verify_time: float
    max_candidates: int

    def regimes(self, draft_time: float | None = None) -> StoppingProblem:
        """The problem whose stopper sees regimes."""
        cost = Affine(self.draft_time if draft_time is None else draft_time, self.verify_time)
        return StoppingProblem(self.chain, cost, self.max_candidates)

    def tokens(self, draft_time: float | None = None) -> StoppingProblem:
        """The problem whose stopper sees each candidate's acceptance probability: regimes (z, sure), (z, unsure)."""
        a, spread = self.chain.accept_prob, self.token_dispersion
        kinds = np.stack([a, 1.0 - a], axis=1)
        accept_prob = np.stack([a + spread * (1.0 - a), a * (1.0 - spread)], axis=1)
        transition = np.repeat(self.chain.transition[:, :, None] * kinds, 2, axis=0).reshape(2 * len(a), -1)
        initial = (self.chain.initial[:, None] * kinds).ravel()
        fine = MarkovModulated(transition, accept_prob.ravel(), initial)
        return StoppingProblem(fine, self.regimes(draft_time).cost, self.max_candidates)


class Rung(NamedTuple):
    """One rung: what it earns with bounds, gains over the rung below and over `position`, and what it may cost.

    `extra_time` is by how much a draft step may take longer before the gain over the rung below is gone,
    `extra_time_over_position` the same against the best fixed length; None where even plain decoding earns as much.
    """

    name: str
    accuracy: float | None
    throughput: float
    bounds: tuple[float, float]
    gain: float
    gain_over_position: float
    extra_time: float | None
    extra_time_over_position: float | None
    closed: bool


Value = Callable[[float], tuple[float, tuple[float, float], bool]]
"""Draft time to throughput, bounds, and whether the bounds closed."""


def value_of_information(
    world: World, accuracies: Sequence[float] = (0.6, 0.75, 0.9), *, tol: float = 1e-7
) -> list[Rung]:
    """All rungs in order, one `head` per accuracy (P(reading = regime); errors fall evenly on the other regimes).

    With two regimes a reading has balanced accuracy, and AUROC, equal to `accuracy`.

    Raises:
        ValueError: if an accuracy is not increasing or outside (1/Z, 1), or readings are too many to enumerate.
    """
    size, depth = world.chain.num_regimes, world.max_candidates
    grid = list(accuracies)
    if any(not 1 / size <= accuracy <= 1 for accuracy in grid) or sorted(set(grid)) != grid:
        raise ValueError(f"accuracies: must increase within [{1 / size:g}, 1], got {grid}")
    if size ** (depth + 1) > MAX_LEAVES:
        raise ValueError(f"max_candidates: {size}^{depth + 1} sequences of readings are too many to enumerate")
    if not 0 <= world.token_dispersion <= 1:
        raise ValueError(f"token_dispersion: must lie in [0, 1], got {world.token_dispersion!r}")
    rungs: list[tuple[str, float | None, Value]] = [
        ("nothing", None, partial(_exact, _coin, world)),
        ("position", None, partial(_exact, lambda problem: float(fixed_curve(problem).max()), world)),
        ("history", None, partial(_exact, partial(_readings, np.ones((size, 1))), world)),
        *(("head", accuracy, partial(_exact, partial(_readings, channel(size, accuracy)), world)) for accuracy in grid),
        ("regime", None, partial(_solved, world.regimes, tol)),
        ("token_accept_prob", None, partial(_solved, world.tokens, tol)),
        ("clairvoyant", None, partial(_exact, _clairvoyant, world)),
    ]
    position = float(fixed_curve(world.regimes()).max())
    found: list[Rung] = []
    for name, accuracy, value in rungs:
        throughput, bounds, closed = value(world.draft_time)
        below = found[-1].throughput if found else throughput
        found.append(Rung(
            name, accuracy, throughput, bounds, throughput / below - 1.0, throughput / position - 1.0,
            _extra(world, value, throughput, below), _extra(world, value, throughput, position), closed,
        ))  # fmt: skip
    return found


def channel(size: int, accuracy: float) -> Float[np.ndarray, "Z Z"]:
    """Law of the reading in each regime."""
    error = (1.0 - accuracy) / max(size - 1, 1)
    return np.full((size, size), error) + (accuracy - error) * np.eye(size)


def _exact(throughput: Callable[[FiniteProblem], float], world: World, draft_time: float):
    value = throughput(world.regimes(draft_time).lower())
    return value, (value, value), True


def _solved(problem: Callable[[float], StoppingProblem], tol: float, draft_time: float):
    solution = solve(problem(draft_time), tol=tol)
    return solution.throughput, solution.bounds, solution.status is SolveStatus.successful


def _extra(world: World, value: Value, throughput: float, goal: float) -> float | None:
    """How much longer a draft step may take until `value` falls to `goal`; at V(0) nobody drafts any more."""
    if throughput <= goal * (1.0 + CLOSE):
        return 0.0
    most = max(world.verify_time - world.draft_time, 0.0)
    if value(world.draft_time + most)[0] >= goal * (1.0 - CLOSE):
        return None
    return root(lambda x: value(world.draft_time + x)[0] - goal, 0.0, most)


def _coin(problem: FiniteProblem) -> float:
    """Continue with one probability before every candidate: the best such probability."""
    alive, survival = problem.initial, []
    for accept_prob in problem.accept_prob:
        alive = (alive @ problem.transition) * accept_prob
        survival.append(float(alive.sum()))
    steps = problem.step_time
    powers = np.arange(1, problem.max_candidates + 1)

    def earned(go: float) -> float:
        return float((1.0 + go**powers @ np.array(survival)) / (problem.verify_time[0] + go**powers @ steps))

    grid = np.linspace(0.0, 1.0, 201)
    near = int(np.argmax([earned(go) for go in grid]))
    around = (grid[max(near - 1, 0)], grid[min(near + 1, 200)])
    return max(earned(least(lambda go: -earned(go), *around)), earned(grid[near]))


def _clairvoyant(problem: FiniteProblem) -> float:
    """Knows how many candidates would be accepted, L, and drafts the best number up to L."""
    depth, alive, law = problem.max_candidates, problem.initial, []
    for k in range(depth):
        going_on = (alive @ problem.transition) * problem.accept_prob[k]
        law.append(float(alive.sum() - going_on.sum()))
        alive = going_on
    law = np.array([*law, float(alive.sum())])
    times, lengths = problem.round_time, np.arange(depth + 1)
    rate = 1.0 / times[0]
    for _ in range(MAX_STEPS):
        worth = 1.0 + lengths - rate * times
        chosen = np.array([int(np.argmax(worth[: most + 1])) for most in lengths])
        better = float(law @ (1.0 + chosen)) / float(law @ times[chosen])
        if better <= rate * (1.0 + CLOSE):
            break
        rate = better
    return rate


def _readings(law: Float[np.ndarray, "Z M"], problem: FiniteProblem) -> float:
    """Start regime seen, then readings: every sequence of them is a node, Dinkelbach over the whole tree."""
    size, num, depth = problem.num_regimes, law.shape[1], problem.max_candidates
    present, alive = np.eye(size)[:, None, :], np.eye(size)[:, None, :]  # [start, node, regime], joint with the start
    layers = []  # probability of a node and of nothing being rejected there, given the start
    for k in range(depth + 1):
        layers.append((present.sum(axis=2), alive.sum(axis=2)))
        if k < depth:
            present, alive = (
                ((part @ problem.transition) * factor)[:, :, None, :] * law.T
                for part, factor in ((present, 1.0), (alive, problem.accept_prob[k]))
            )
            present, alive = (part.reshape(size, -1, size) for part in (present, alive))
    rate = 1.0 / problem.verify_time[0]
    for _ in range(MAX_STEPS):
        emitted, time = np.zeros_like(layers[depth][0]), problem.verify_time[depth] * layers[depth][0]
        for k in reversed(range(depth)):
            there = layers[k][0]
            parts = (emitted + layers[k + 1][1], time + problem.draft_time * layers[k + 1][0])
            more_emitted, more_time = (part.reshape(size, -1, num).sum(axis=2) for part in parts)
            stop_time = problem.verify_time[k] * there
            goes_on = more_emitted - rate * more_time > -rate * stop_time
            emitted, time = np.where(goes_on, more_emitted, 0.0), np.where(goes_on, more_time, stop_time)
        better = float(problem.initial @ (1.0 + emitted[:, 0])) / float(problem.initial @ time[:, 0])
        if better <= rate * (1.0 + CLOSE):
            break
        rate = better
    return rate
