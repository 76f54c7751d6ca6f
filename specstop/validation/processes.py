"""How well the fitted processes do on the other half of the requests: the table of a validation report."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mdp.fit import PERFECT, position_signal
from mdp.fit_processes import MOST_TEXTS, Fitted, beta_cells, fit_hidden, fit_iid, fit_position, held_cells
from mdp.likelihood import Score, cell_score, full_rounds, seen_score
from mdp.trace import Trace
from simulate.estimate import Estimate, ratio
from simulate.on_processes import Processes

__all__ = ["process_entries", "training_scores"]

CLEAR = 2.0  # standard errors
ALIKE = 1e-12  # Beta's flags are iid's: rounding is no evidence


def process_entries(
    trace: Trace, fits: Processes, train: Int[np.ndarray, " R"], test: Int[np.ndarray, " Q"],
    regime_scores: Mapping[int, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """One entry a process: parameters, score per tested candidate on the test half, and what seeing is worth."""
    runs, depth = full_rounds(trace, test), trace.max_candidates
    scores = {name: fitted.score(runs, depth) for name, fitted in fits.whole.items()}
    iid = scores["iid"]
    rows = []
    for name, fitted in fits.whole.items():
        score = scores[name]
        row: dict[str, Any] = {
            "name": name,
            "kind": fitted.acceptance.kind,
            "sees": fitted.signal,
            "parameters": fitted.parameters(),
            "num_parameters": fitted.num_parameters,
            "num_requests": min(len(train), MOST_TEXTS) if name == "markov_modulated" else len(train),
            "num_tested": int(score.num_tested.sum()),
            **_named("heldout_loglik", "se", ratio(*score)),
            "over_iid": _named("value", "se", _difference(score, iid)),
            "seen": None,
            "cells": None,
        }
        if fitted.seen is not None and fitted.model is not None:
            prob = fitted.seen[fitted.model.regime(position_signal(trace, fitted.model.signal))]
            seen = seen_score(prob, np.asarray(trace.accepted, dtype=bool), runs)
            row["seen"] = _named("heldout_loglik", "se", ratio(*seen)) | {
                "over_iid": _named("value", "se", _difference(seen, iid))
            }
        if name == "beta_mixture":
            row["cells"] = _cells(trace, fitted, train, runs)
        if name == "markov_modulated":
            row["training_scores"] = {str(number): value for number, value in regime_scores.items()}
        rows.append(row)
    return rows


def training_scores(trace: Trace, train: Int[np.ndarray, " R"], num_regimes: int) -> tuple[dict[str, float], list[str]]:
    """Score of each process that sees nothing on training requests left out of its fit, and the order of preference.

    First stands the simplest that is not clearly worse than the best, by more than two standard errors of the paired
    difference: more parameters that gain no more than chance only widen what is predicted. The others follow by score.
    """
    ways = {"iid": fit_iid, "position": fit_position,
            "markov_modulated": lambda trace, requests: fit_hidden(trace, requests, num_regimes)}  # fmt: skip
    folds = (train[::2], train[1::2]) if len(train) > 1 else (train, train)
    scores = {}
    for name, way in ways.items():
        parts = [way(trace, one).score(full_rounds(trace, other), trace.max_candidates)
                 for one, other in (folds, folds[::-1])]  # fmt: skip
        scores[name] = Score(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    values = {name: ratio(*score).value for name, score in scores.items()}
    best = scores[max(values, key=lambda name: values[name])]
    behind = {name: _difference(best, score) for name, score in scores.items()}
    first = next(name for name, lost in behind.items() if not lost.value > CLEAR * lost.se)
    return values, [first, *sorted((name for name in values if name != first), key=lambda name: -values[name])]


def _cells(trace: Trace, fitted: Fitted, train: np.ndarray, runs: Any) -> dict[str, Any]:
    """The Beta law against the training half's own histogram, on the recorded acceptance probabilities."""
    values = position_signal(trace, PERFECT)
    beta: Any = fitted.acceptance
    own = cell_score(beta_cells(beta), values, runs)
    histogram = cell_score(held_cells(trace, full_rounds(trace, train)), values, runs)
    return {**_named("heldout_loglik", "se", ratio(*own)),
            "over_histogram": _named("value", "se", _difference(own, histogram))}  # fmt: skip


def _difference(score: Score, base: Score) -> Estimate:
    """Score per candidate minus that of `base` on the same candidates, paired by request."""
    found = ratio(score.log_likelihood - base.log_likelihood, score.num_tested)
    return Estimate(0.0, 0.0) if abs(found.value) < ALIKE else found


def _named(value: str, se: str, estimate: Estimate) -> dict[str, float]:
    return {value: estimate.value, se: estimate.se}
