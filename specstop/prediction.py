"""The paper's table predicted from three fitted numbers, each prediction beside what was published.

Fitted: each dataset's mean acceptance (to its fixed-K verification rates), one cost ratio (to Alpaca's best fixed-K
speedup) and one dispersion, what the head can see (to Alpaca's SpecDec++ speedup). All else is predicted.

Intervals are the extremes over all roundings and digitising errors of the figures that the fits used, moved together
within a dataset. They hold what the published digits leave open, not sampling error, nor what the model leaves out:
acceptances independent within a round, endless text, verification time constant in k, a head without cost.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from mdp.calibrate import (
    CELLS,
    best_fixed,
    dispersed,
    fit_cost_ratio,
    fit_dispersion,
    fit_mean_acceptance,
    fixed_speedup,
    root,
    rule_curve,
)
from mdp.cost import Affine
from mdp.head_rule import HeadCurve, HeadRule, best_seen_threshold
from mdp.problem import StoppingProblem
from specstop.paper import DATASETS, FIXED_LENGTHS, MISSING, ORACLE, RULE, Figure

__all__ = ["predict"]

FIRST = "Alpaca"
OTHERS = tuple(name for name in DATASETS if name != FIRST)
LEAST, MOST = RULE.bounds
HEAD = HeadRule(RULE.weight, RULE.lag, LEAST)
FRONTIER = tuple(np.round(np.arange(0.02, 0.981, 0.02), 2).tolist())
SIGNS = (0, -1, 1)
SHARE = "share of the best w, h at w = 6, h = .7 (at least)"

NOTES = (
    "intervals: extremes over the rounding of the published figures that were fitted and over the digitising error of "
    "the fixed-K points; neither sampling error nor error of the model",
    "the dispersion is fitted at the best h of the published grid, whichever that is; the speedups hardly depend on "
    "the form of dispersion, but the best h and the share at h = .7 do: with two_point they come out wrong",
    "best fixed-K speedups of HumanEval and GSM8K were not read in the paper itself; headline / (1 + gain) agrees",
    "the oracle decodes greedily, the rest at temperature 1: its own row from Alpaca's acceptance tests that too",
    "with one number to fit, a noisy head and a less dispersed acceptance are the same thing: no noise was fitted",
    "not available as numbers, hence compared with nothing: " + "; ".join(MISSING),
)


class _Fit:
    """The three fitted numbers, with every input moved to one end of what its digits allow (signs -1, 0, 1)."""

    def __init__(self, form: str, rates: int = 0, fixed: int = 0, specdec: int = 0) -> None:
        first = DATASETS[FIRST]
        self.form = form
        self._on_grid: dict[float, HeadCurve] = {}
        self.mean = _mean(FIRST, rates)
        self.cost_ratio = fit_cost_ratio(self.mean, _end(first.best_fixed, fixed), FIXED_LENGTHS)
        self.number = fit_dispersion(
            form, self.mean, self.cost_ratio, _end(first.specdec, specdec), HEAD, MOST, RULE.thresholds
        )

    def means(self, name: str, ends: Iterable[int] = (-1, 1)) -> list[float]:
        """Mean acceptances of a dataset at these ends of its points; the fitted dataset has moved already."""
        return [self.mean] if name == FIRST else [_mean(name, sign) for sign in ends]

    def on_grid(self, mean: float) -> HeadCurve:
        """The released rule at the thresholds that were searched."""
        if mean not in self._on_grid:
            self._on_grid[mean] = self.curve(mean)
        return self._on_grid[mean]

    def curve(
        self, mean: float, thresholds: Iterable[float] = RULE.thresholds, rule: HeadRule = HEAD, **fineness: int
    ) -> HeadCurve:
        return rule_curve(self.form, mean, self.number, self.cost_ratio, rule, MOST, list(thresholds), **fineness)


def _end(figure: Figure, sign: int) -> float:
    return figure.value + sign * figure.rounding


@cache
def _mean(name: str, sign: int) -> float:
    data = DATASETS[name]
    rates = [v + sign * data.rate_error[0] for v in data.verification_rate.values()]
    return fit_mean_acceptance(list(data.verification_rate), rates).mean


def predict(*, curves: bool = True) -> dict[str, Any]:
    """All rows: `fitted`, `predicted` (`published` and `error` where there is such a figure), frontiers, notes."""
    fit = _Fit("beta")
    corners = [_Fit("beta", *signs) for signs in itertools.product((-1, 1), repeat=3)]
    other = _Fit("two_point")
    rows = list(_predictions(fit, corners))
    published = [row for row in rows if row["error"] is not None]
    missed = [row for row in published if not row["within"]]
    return {
        "fitted": list(_fitted(fit, corners)),
        "predicted": rows,
        "missed": [f"{row['quantity']}, {row['dataset']}" for row in missed],
        "largest_error": max(published, key=lambda row: abs(row["error"])),
        "alternatives": list(_alternatives(fit, other)),
        "curves": {name: _curves(name, fit, corners) for name in DATASETS} if curves else None,
        "numerical": _numerical(fit),
        "notes": list(NOTES),
    }


def _numerical(fit: _Fit) -> dict[str, float]:
    """Relative error of the table's speedups of the rule: against a finer grid, and that one's proven width."""
    error = width = 0.0
    for name in DATASETS:
        mean = _mean(name, 0)
        fine = fit.curve(mean, cells=16 * CELLS)
        error = max(error, float(np.abs(fit.on_grid(mean).throughput / fine.throughput - 1.0).max()))
        width = max(width, float((fine.upper / fine.lower - 1.0).max()))
    return {"error": error, "proven_width": width}


def _fitted(fit: _Fit, corners: list[_Fit]) -> Iterable[dict[str, Any]]:
    for name, data in DATASETS.items():
        found = fit_mean_acceptance(list(data.verification_rate), list(data.verification_rate.values()))
        ends = sorted(_mean(name, sign) for sign in (-1, 1))
        single = f"single K: {found.spread[0]:.4f}..{found.spread[1]:.4f}"
        to = f"v of {len(data.verification_rate)} fixed K ({single}; worst misfit {found.worst_misfit:.1%})"
        yield _fit_row("mean acceptance", name, found.mean, ends, to, data.rate_tag)
    first = DATASETS[FIRST]
    by_name: dict[str, Callable[[_Fit], float]] = {
        "cost ratio t_draft / t_target": lambda one: one.cost_ratio,
        "concentration of what the head sees": lambda one: float(np.exp(one.number)),
    }
    goals = (first.best_fixed, "best fixed-K speedup"), (first.specdec, "SpecDec++ speedup")
    for (quantity, value), (goal, what) in zip(by_name.items(), goals, strict=True):
        ends = sorted(map(value, corners))
        yield _fit_row(quantity, FIRST, value(fit), [ends[0], ends[-1]], f"{what} {goal.value:.2f}", goal.tag)


def _fit_row(quantity: str, dataset: str, value: float, interval: list[float], to: str, tag: str) -> dict[str, Any]:
    return {"quantity": quantity, "dataset": dataset, "fitted": value, "interval": list(interval), "to": to, "tag": tag}


def _row(
    quantity: str, dataset: str, value: float, others: Iterable[float], published: Figure | None, at_least: bool = False
) -> dict[str, Any]:
    """One prediction; `within`: the interval and the published figure's rounding meet (or the least is reached)."""
    values = [value, *others]
    low, high = min(values), max(values)
    row: dict[str, Any] = {"quantity": quantity, "dataset": dataset, "predicted": value, "interval": [low, high],
                           "published": None, "error": None, "within": None, "tag": None, "source": None}  # fmt: skip
    if published is not None:
        error = value / published.value - 1.0
        within = (at_least or low <= _end(published, 1)) and high >= _end(published, -1)
        row |= {"published": published.value, "error": min(error, 0.0) if at_least else error, "within": within,
                "tag": published.tag, "source": published.source}  # fmt: skip
    return row


def _predictions(fit: _Fit, corners: list[_Fit]) -> Iterable[dict[str, Any]]:
    def over(name: str, value: Callable[[_Fit, float], float]) -> tuple[float, list[float]]:
        """The prediction of a dataset, and its values at all corners."""
        at = [value(corner, mean) for corner in corners for mean in corner.means(name)]
        return value(fit, _mean(name, 0)), at

    for name in OTHERS:
        yield _row("best fixed-K speedup", name,
                   *over(name, lambda one, mean: best_fixed(mean, one.cost_ratio, FIXED_LENGTHS)[1]),
                   DATASETS[name].best_fixed)  # fmt: skip
    yield _row("oracle speedup at the published v", FIRST, _oracle(fit.cost_ratio, ORACLE.verification_rate.value),
               [_oracle(one.cost_ratio, _end(ORACLE.verification_rate, sign)) for one in corners for sign in SIGNS],
               ORACLE.speedup)  # fmt: skip
    value, at = over(FIRST, lambda one, mean: 1.0 - mean)
    yield _row("oracle verification rate 1 - mean", FIRST, value, at, ORACLE.verification_rate)
    value, at = over(FIRST, lambda one, mean: _oracle(one.cost_ratio, 1.0 - mean))
    yield _row("oracle speedup from the mean", FIRST, value, at, ORACLE.speedup)
    for name in OTHERS:
        yield _row("SpecDec++ speedup", name, *over(name, lambda one, mean: float(one.on_grid(mean).throughput.max())),
                   DATASETS[name].specdec)  # fmt: skip
    for name in OTHERS:
        yield _row("gain over best fixed K", name, *over(name, _gain), DATASETS[name].gain)
    tuned = Figure(RULE.threshold, 0.0, RULE.tag, RULE.source)
    for name in DATASETS:
        yield _row("best threshold h of the grid", name,
                   *over(name, lambda one, mean: RULE.thresholds[one.on_grid(mean).best]), tuned)  # fmt: skip
    for name in DATASETS:
        yield _row(SHARE, name, *over(name, _share), RULE.share_of_best,
                   at_least=True)  # fmt: skip
    for name in DATASETS:
        yield _row("best threshold h, any", name, *over(name, _finest), None)
    for name in DATASETS:
        yield _row("optimum with the same head, no lag, no bias", name, *over(name, _optimum), None)
    for name, data in DATASETS.items():
        length = FIXED_LENGTHS[1]
        yield _row(f"discard rate of K = {length}", name,
                   *over(name, lambda one, mean: _discard_rate(mean, length)),  # noqa: B023
                   Figure(data.discard_rate[length], data.rate_error[1], data.rate_tag, data.rate_source))  # fmt: skip


def _oracle(cost_ratio: float, verification_rate: float) -> float:
    return 1.0 / (cost_ratio * (1.0 + ORACLE.discard_rate) + (1.0 - cost_ratio) * verification_rate)


def _gain(one: _Fit, mean: float) -> float:
    return float(one.on_grid(mean).throughput.max()) / best_fixed(mean, one.cost_ratio, FIXED_LENGTHS)[1] - 1.0


def _share(one: _Fit, mean: float) -> float:
    """Of the best weight and threshold of the grids, what the published setting reaches."""
    of_weight = {w: one.curve(mean, rule=replace(HEAD, weight=w)).throughput for w in RULE.weights}
    best = max(float(speedups.max()) for speedups in of_weight.values())
    return float(of_weight[RULE.weight][RULE.thresholds.index(RULE.threshold)]) / best


def _finest(one: _Fit, mean: float) -> float:
    curve = one.curve(mean, np.linspace(0.4, 0.98, 59))
    return float(curve.threshold[curve.best])


def _optimum(one: _Fit, mean: float) -> float:
    problem = StoppingProblem(dispersed("beta", mean, one.number), Affine(one.cost_ratio, 1.0), MOST)
    return float(best_seen_threshold(problem, cells=1024).throughput[0])


def _discard_rate(mean: float, length: int) -> float:
    """Endless text: d = (K + 1) v - 1."""
    return (length + 1) / (mean ** np.arange(length + 1)).sum() - 1.0


def _alternatives(fit: _Fit, other: _Fit) -> Iterable[dict[str, Any]]:
    """The same predictions where something that was chosen is chosen otherwise: how much rests on the choice."""
    instead = f"{other.form} dispersion in place of {fit.form}"
    tuned = Figure(RULE.threshold, 0.0, RULE.tag, RULE.source)
    for name in OTHERS:
        best = float(other.on_grid(_mean(name, 0)).throughput.max())
        yield _alternative("SpecDec++ speedup", name, instead, best, DATASETS[name].specdec)
    for name in DATASETS:
        best = RULE.thresholds[other.on_grid(_mean(name, 0)).best]
        yield _alternative("best threshold h of the grid", name, instead, best, tuned)
    for name in DATASETS:
        yield _alternative(SHARE, name, instead, _share(other, _mean(name, 0)), RULE.share_of_best)
    first = DATASETS[FIRST]
    ratio = _measured_ratio(first.best_fixed.value)
    measured = "time from the digitised v and d, end of text included"
    for name in OTHERS:
        yield _alternative("best fixed-K speedup", name, measured, _measured_speedup(name, ratio),
                           DATASETS[name].best_fixed)  # fmt: skip
    yield _alternative("oracle speedup at the published v", FIRST, measured,
                       _oracle(ratio, ORACLE.verification_rate.value), ORACLE.speedup)  # fmt: skip


def _alternative(quantity: str, dataset: str, instead: str, value: float, published: Figure) -> dict[str, Any]:
    return {"quantity": quantity, "dataset": dataset, "predicted": value, "published": published.value,
            "error": value / published.value - 1.0, "instead": instead}  # fmt: skip


def _measured_speedup(name: str, cost_ratio: float) -> float:
    data = DATASETS[name]
    v, d = (np.array(list(rates.values())) for rates in (data.verification_rate, data.discard_rate))
    return float((1.0 / (cost_ratio * (1.0 + d) + (1.0 - cost_ratio) * v)).max())


def _measured_ratio(speedup: float) -> float:
    return root(lambda ratio: _measured_speedup(FIRST, ratio) - speedup, 1e-3, 1.0)


def _curves(name: str, fit: _Fit, corners: list[_Fit]) -> dict[str, Any]:
    """Predicted frontiers with the same intervals as the table, and the published fixed-K points."""
    data, mean = DATASETS[name], _mean(name, 0)
    curve = fit.curve(mean, FRONTIER, cells=4096)
    at_corners = [one.curve(moved, FRONTIER) for one in corners for moved in one.means(name)]
    columns = ("verification_rate", "discard_rate", "throughput")
    intervals = {
        column: [function([getattr(c, column) for c in (curve, *at_corners)], axis=0) for function in (np.min, np.max)]
        for column in columns
    }
    lengths = np.array(FIXED_LENGTHS)
    speedup = fixed_speedup(mean, fit.cost_ratio, FIXED_LENGTHS)
    rate = 1.0 / (speedup * (1.0 + lengths * fit.cost_ratio))
    return {
        "rule": {"origin": "predicted", "threshold": curve.threshold, "verification_rate": curve.verification_rate,
                 "discard_rate": curve.discard_rate, "speedup": curve.throughput,
                 "intervals": {"speedup": intervals.pop("throughput"), **intervals},
                 "numerical_bounds": [curve.lower, curve.upper]},
        "fixed": {"origin": "predicted", "length": lengths, "verification_rate": rate,
                  "discard_rate": (lengths + 1) * rate - 1.0, "speedup": speedup},
        "fixed_published": {"origin": data.rate_tag, "length": list(data.verification_rate),
                            "verification_rate": list(data.verification_rate.values()),
                            "discard_rate": list(data.discard_rate.values())},
        "rule_published": None,
    }  # fmt: skip
