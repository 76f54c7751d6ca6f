r"""Counterexamples: where a family of rules loses most against the optimum, and the simplest problem that shows it.

Random problems of a given size, the best few improved one change at a time: a row of $P$ moved towards another law or
onto one regime, an acceptance moved or set to 0 or 1, a time scaled, a candidate more or less. What was found is then
*shrunk*: regimes dropped, rounds shortened, every number put on the smallest denominator, as long as most of the loss
stays. All losses are exact (`mdp.families`); the report adds the solver's independent bounds. A search proves no
largest loss: it says what was found, and the same seed finds the same again.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from mdp import families
from mdp.acceptance import MarkovModulated
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.policy import ThresholdTable
from mdp.problem import FiniteProblem, Persistent, StoppingProblem
from mdp.solve import solve

__all__ = ["FAMILIES", "Found", "loss", "search", "shrink"]

DRAFT_TIMES, SLOPES = (0.01, 2.0), (0.0, 0.5)
DENOMINATORS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
KEPT = 0.9
"""Share of the loss that must stay while a problem is made simpler."""


def _one_step(problem: FiniteProblem, best: families.Optimum) -> float:
    table = families.lookahead_table(problem, best.throughput, best.bias) * (1.0 - 1e-9)  # ties continue
    return evaluate(problem, ThresholdTable(table)).throughput


FAMILIES: dict[str, Callable[[FiniteProblem, families.Optimum], float]] = {
    "threshold": lambda problem, _: families.ladder(problem, "survival").best[0],
    "lookahead": lambda problem, _: families.ladder(problem, "lookahead").best[0],
    "fixed": lambda problem, _: float(families.best_lengths(problem).throughput.max()),
    "one_step": _one_step,
    "goodput": lambda problem, _: families.goodput(problem),
}
"""Best constant threshold on 1 - S; best constant threshold on 1 - S a-bar; best fixed length; one-step look-ahead at
rho*; stopping where the round's own goodput would fall."""


@dataclass(frozen=True)
class Point:
    """A problem of the search space: rounds start in regime 0, V(k) = 1 + slope k, renewal where `rejection` is None.

    One known start: where a random one is seen, rules that do not look at regimes lose for that reason alone.
    """

    transition: np.ndarray
    accept_prob: np.ndarray
    draft_time: float
    slope: float
    depth: int
    rejection: np.ndarray | None = None
    bonus: np.ndarray | None = None

    def problem(self) -> StoppingProblem:
        coupling = None
        if self.rejection is not None and self.bonus is not None:
            coupling = Persistent(self.rejection, self.bonus)
        chain = MarkovModulated(self.transition, self.accept_prob, np.eye(len(self.accept_prob))[0])
        return StoppingProblem(chain, Affine(float(self.draft_time), 1.0, float(self.slope)), self.depth, coupling)

    def change(self, **parts: Any) -> "Point":
        return Point(**{**vars(self), **parts})


@dataclass(frozen=True)
class Found:
    """What a search found for one family and size.

    Attributes:
        family, num_regimes: what was searched.
        loss: the largest 1 - throughput / rho* found, exact.
        certificate: the same loss against the solver's proven lower and upper bound on rho*.
        problem: where.
        simple, simple_loss: a simpler problem that keeps most of the loss, and what is lost there.
        evaluated: problems looked at.
    """

    family: str
    num_regimes: int
    loss: float
    certificate: tuple[float, float]
    problem: StoppingProblem
    simple: StoppingProblem
    simple_loss: float
    evaluated: int

    def to_dict(self) -> dict[str, Any]:
        """One JSON line of `specstop check --search`."""
        return {"family": self.family, "num_regimes": self.num_regimes, "loss": self.loss,
                "certificate": list(self.certificate), "problem": self.problem.to_dict(),
                "simple_loss": self.simple_loss, "simple": self.simple.to_dict(),
                "evaluated": self.evaluated}  # fmt: skip


def loss(problem: FiniteProblem, family: str) -> float:
    r"""What the best member of a family loses of $\rho^*$ on this problem.

    Raises:
        ValueError: if the tree of rounds is too large.

    Example:
        >>> from mdp.acceptance import IID
        >>> loss(StoppingProblem(IID(0.8), Affine(0.2, 1.0), max_candidates=12).lower(), "fixed") < 1e-12
        True
    """
    best = families.optimum(problem)
    return 1.0 - FAMILIES[family](problem, best) / best.throughput


def search(
    family: str,
    num_regimes: int,
    *,
    max_candidates: int = 12,
    steps: int = 400,
    seed: int = 0,
    persistent: bool = False,
    also: Sequence[Found] = (),
) -> Found:
    """Look for the problem on which a family loses most.

    Args:
        family: one of `FAMILIES`.
        num_regimes: Z.
        max_candidates: the longest round allowed.
        steps: problems to look at before shrinking: a quarter at random, the others near the best of these.
        seed: the same seed and steps find the same.
        persistent: rounds persist rather than renew.
        also: what was found for fewer regimes, to start from too; so a larger size is never reported to lose less.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: must be one of {', '.join(FAMILIES)}, got {family!r}")
    for name, value, least in (
        ("num_regimes", num_regimes, 1),
        ("max_candidates", max_candidates, 1),
        ("steps", steps, 8),
    ):
        if not value >= least:
            raise ValueError(f"{name}: must be at least {least}, got {value!r}")
    rng = np.random.default_rng([seed, num_regimes, max_candidates, persistent, list(FAMILIES).index(family)])
    pool = sorted(
        ((_loss(point, family), number, point) for number, point in
         enumerate(_random(rng, num_regimes, max_candidates, persistent) for _ in range(max(steps // 4, 1)))),
        key=lambda entry: (-entry[0], entry[1]),
    )[:3]  # fmt: skip
    begun = [_padded(found.problem, num_regimes) for found in also if found.family == family]
    pool += [(_loss(point, family), -number, point) for number, point in enumerate(begun)]
    share = (steps - steps // 4) // len(pool)
    best_loss, best = max(
        (_climb(rng, point, value, family, max_candidates, share) for value, _, point in pool), key=lambda end: end[0]
    )
    simple = shrink(best, family, KEPT * best_loss)
    if (simple_loss := _loss(simple, family)) > best_loss:  # rounding numbers happened to lose more
        best_loss, best = simple_loss, simple
    return _report(family, num_regimes, best, best_loss, simple, steps)


def _report(family: str, size: int, best: Point, best_loss: float, simple: Point, steps: int) -> Found:
    problem = best.problem()
    earned = FAMILIES[family](problem.lower(), families.optimum(problem.lower()))
    lower, upper = solve(problem).bounds
    return Found(family, size, best_loss, (1.0 - earned / lower, 1.0 - earned / upper), problem, simple.problem(),
                 _loss(simple, family), steps)  # fmt: skip


def _padded(problem: StoppingProblem, size: int) -> Point:
    """The problem with copies of its last regime that nothing leads to."""
    finite = problem.lower()
    more = size - finite.num_regimes

    def rows(law: np.ndarray | None) -> Any:
        return None if law is None else np.pad(np.pad(law, ((0, 0), (0, more))), ((0, more), (0, 0)), mode="edge")

    return Point(
        rows(finite.transition), np.pad(finite.accept_prob[0], (0, more), mode="edge"), finite.draft_time,
        float(np.diff(finite.verify_time)[0]), finite.max_candidates, rows(finite.rejection), rows(finite.bonus),
    )  # fmt: skip


def _loss(point: Point, family: str) -> float:
    try:
        return loss(point.problem().lower(), family)
    except ValueError:  # not communicating, or too large: not in the search space
        return -1.0


def _law(rng: np.random.Generator, size: int) -> np.ndarray:
    if rng.random() < 0.3:
        return np.eye(size)[rng.integers(size)]
    return rng.dirichlet(np.full(size, rng.choice([0.2, 0.5, 1.0])))


def _chance(rng: np.random.Generator) -> float:
    return float(rng.choice([0.0, 1.0, rng.uniform(), rng.uniform()]))


def _random(rng: np.random.Generator, size: int, depth: int, persistent: bool) -> Point:
    def laws() -> np.ndarray:
        return np.array([_law(rng, size) for _ in range(size)])

    low, high = np.log(DRAFT_TIMES)
    return Point(
        laws(), np.array([_chance(rng) for _ in range(size)]), float(np.exp(rng.uniform(low, high))),
        float(rng.choice([0.0, rng.uniform(*SLOPES)])), int(rng.integers(min(2, depth), depth + 1)),
        *((laws(), laws()) if persistent else (None, None)),
    )  # fmt: skip


def _climb(
    rng: np.random.Generator, point: Point, value: float, family: str, depth: int, steps: int
) -> tuple[float, Point]:
    for step in range(steps):
        scale = 0.5 ** (1 + 5 * step / steps)  # ever smaller changes
        trial = _moved(rng, point, depth, scale)
        if rng.random() < 0.5:
            trial = _moved(rng, trial, depth, scale)
        got = _loss(trial, family)
        if got > value:
            value, point = got, trial
    return value, point


def _moved(rng: np.random.Generator, point: Point, depth: int, scale: float) -> Point:
    size = len(point.accept_prob)
    names = ["transition", "transition", "accept_prob", "draft_time", "slope", "depth"]
    name = str(rng.choice(names + (["rejection", "bonus"] if point.rejection is not None else [])))
    if name == "depth":
        return point.change(depth=int(np.clip(point.depth + rng.choice([-1, 1]), 1, depth)))
    if name == "draft_time":
        return point.change(draft_time=float(np.clip(point.draft_time * np.exp(scale * rng.normal()), *DRAFT_TIMES)))
    if name == "slope":
        return point.change(slope=float(np.clip(point.slope + 0.3 * scale * rng.normal(), *SLOPES)))
    part = np.array(getattr(point, name))
    at = int(rng.integers(size))
    if name == "accept_prob":
        part[at] = _chance(rng) if rng.random() < 0.3 else np.clip(part[at] + scale * rng.normal(), 0.0, 1.0)
    else:
        step = 1.0 if rng.random() < 0.1 else scale * rng.uniform()
        part[at] = (1.0 - step) * part[at] + step * _law(rng, size)
        part[at] /= part[at].sum()
    return point.change(**{name: part})


def shrink(point: Point, family: str, least: float) -> Point:
    """A simpler problem on which the family still loses at least `least`: smaller, and in small fractions."""
    best, changed = point, True
    while changed:
        changed = False
        for simpler in _simpler(best):
            if _complexity(simpler) < _complexity(best) and _loss(simpler, family) >= least:
                best, changed = simpler, True
                break
    return best


def _simpler(point: Point) -> Iterator[Point]:
    size = len(point.accept_prob)
    for gone in range(1, size):
        if (smaller := _without(point, gone)) is not None:
            yield smaller
    for depth in range(1, point.depth):
        yield point.change(depth=depth)
    for denominator in DENOMINATORS:
        yield _rounded(point, denominator)
    yield point.change(slope=0.0)
    names = ["transition"] + (["rejection", "bonus"] if point.rejection is not None else [])
    for denominator in DENOMINATORS:
        for name, at in itertools.product(names, range(size)):
            row = getattr(point, name)[at]
            for law in (_round_law(row, denominator), *np.eye(size)):
                part = np.array(getattr(point, name))
                part[at] = law
                yield point.change(**{name: part})
        for at in range(size):
            for new in (round(point.accept_prob[at] * denominator) / denominator, 0.0, 1.0):
                part = point.accept_prob.copy()
                part[at] = new
                yield point.change(accept_prob=part)
        for name in ("draft_time", "slope"):
            value = round(getattr(point, name) * denominator) / denominator
            if name == "slope" or value > 0:
                yield point.change(**{name: value})


def _without(point: Point, gone: int) -> Point | None:
    """The problem without a regime, what led there spread over the others; None if all of it led there."""
    kept = np.delete(np.arange(len(point.accept_prob)), gone)
    parts: dict[str, Any] = {"accept_prob": point.accept_prob[kept]}
    for name in ("transition", "rejection", "bonus"):
        if getattr(point, name) is not None:
            part = getattr(point, name)[np.ix_(kept, kept)]
            sums = part.sum(axis=1, keepdims=True)
            if (sums <= 0).any():
                return None
            parts[name] = part / sums
    return point.change(**parts)


def _round_law(law: np.ndarray, denominator: int) -> np.ndarray:
    """The law in whole parts of 1 / denominator, the largest remainders rounded up."""
    parts = np.floor(law * denominator + 1e-9)
    rest = law * denominator - parts
    for at in np.argsort(-rest)[: round(denominator - parts.sum())]:
        parts[at] += 1
    return parts / denominator


def _rounded(point: Point, denominator: int) -> Point:
    def law(part: np.ndarray | None) -> Any:
        return None if part is None else np.array([_round_law(row, denominator) for row in part])

    return point.change(
        transition=law(point.transition),
        accept_prob=np.round(point.accept_prob * denominator) / denominator,
        draft_time=max(round(point.draft_time * denominator), 1) / denominator,
        slope=round(point.slope * denominator) / denominator, rejection=law(point.rejection), bonus=law(point.bonus),
    )  # fmt: skip


def _complexity(point: Point) -> tuple[int, int, float]:
    """Regimes, candidates, and how long the numbers are: what shrinking makes less."""
    names = ("transition", "accept_prob", "draft_time", "slope", "rejection", "bonus")
    values = [np.ravel(part) for name in names if (part := getattr(point, name)) is not None]
    return len(point.accept_prob), point.depth, sum(_length(value) for value in np.concatenate(values).tolist())


def _length(value: float) -> float:
    """0 for 0 and 1, and the more the larger the denominator."""
    fraction = Fraction(value).limit_denominator(1000)
    if abs(value - float(fraction)) > 1e-12:
        return 1e4
    return 0.0 if fraction.denominator == 1 else float(fraction.denominator) + 0.01 * fraction.numerator
