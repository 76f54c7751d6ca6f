r"""What richer inputs buy an acceptance head: a ladder of logistic regressions on one trace.

Each rung predicts the acceptance of a candidate from more than the one below, by $\sigma(w \cdot f + b)$ on
standardised inputs (log-odds of probabilities, the log of an entropy, hidden states as they are), least cross-entropy
on `token_accept_prob` (a soft label) over the training half's positions, with a quadratic penalty that the training
half chooses between two halves of itself. Linear on purpose: what is compared are inputs, and requests are few; the two
rungs at the top are the residual heads of `realmodels.head_training` for comparison. Scores are of the judging half:
log score per tested candidate (`mdp.likelihood`), and what `rejection` earns when it reads this head, threshold chosen
on the training half.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mdp.cost import Cost
from mdp.fit import PERFECT, fit_signal, position_signal
from mdp.likelihood import full_rounds, seen_score
from mdp.metrics import Tally
from mdp.trace import Trace
from simulate.estimate import paired, ratio
from simulate.quality import best_on
from specstop.validation.policies import THRESHOLDS, with_interval

__all__ = ["LADDER", "ladder"]

LADDER: dict[str, tuple[str, ...]] = {
    "draft probability": ("draft_prob",),
    "+ entropy": ("draft_prob", "entropy"),
    "+ top probability": ("draft_prob", "entropy", "top_prob"),
    "hidden state alone": ("hidden",),
    "hidden state and all of these": ("draft_prob", "entropy", "top_prob", "hidden"),
}
TRAINED: dict[str, tuple[str, ...]] = {
    "residual head on the hidden state": ("hidden",),
    "residual head on it, draft probability, entropy": ("hidden", "draft_prob", "entropy"),
}
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NONE = "nothing (a constant)"
TINY = 1e-6  # a probability or entropy nearer to 0, or a probability nearer to 1, counts as this far


def ladder(
    trace: Trace, cost: Cost, train: Int[np.ndarray, " R"], test: Int[np.ndarray, " Q"], level: float
) -> dict[str, Any]:
    """The question's entry: a row a rung, those that need what the trace does not hold left out and named."""
    runs, accepted = full_rounds(trace, test), np.asarray(trace.accepted, dtype=bool)
    label = np.clip(position_signal(trace, PERFECT), 0.0, 1.0)
    on_train = np.repeat(np.isin(np.arange(trace.num_requests), train), np.diff(trace.offsets))
    rows, lacking = [], []
    base = seen_score(np.full(trace.num_positions, label[on_train].mean()), accepted, runs)
    rows.append({"inputs": NONE, **_score(base, base, level), "throughput": None, "over draft probability": None})
    first = None
    for name, inputs in {**LADDER, **TRAINED}.items():
        along, rolled = (_columns(trace, inputs, rollout) for rollout in (False, True))
        if along is None or rolled is None:
            lacking.append(name)
            continue
        if name in TRAINED:
            told = _residual(trace, inputs, train)
        else:
            path, steps = _head(trace, (along, rolled), label, on_train, train)
            told = replace(trace, optional={**trace.optional, "head": path, "rollout_head": steps})
        scored = seen_score(np.asarray(told.optional["head"], dtype=float), accepted, runs)
        tally = _earned(told, cost, train, test)
        first = tally if first is None else first
        rows.append({
            "inputs": name,
            **_score(scored, base, level),
            "throughput": with_interval(ratio(tally.num_emitted, tally.time), len(test), level),
            "over draft probability": None if tally is first else with_interval(paired(tally, first), len(test), level),
        })  # fmt: skip
    return {"question": "What do richer inputs of an acceptance head buy?", "answer": _sentence(rows, lacking),
            "rows": rows}  # fmt: skip


def _columns(trace: Trace, inputs: Sequence[str], rollout: bool) -> Float[np.ndarray, "N F"] | None:
    """The inputs side by side at every position, or rollout step; None if the trace lacks one."""
    parts = []
    for name in inputs:
        if name == "hidden":
            values = trace.optional.get("rollout_hidden" if rollout else "hidden")
            if values is None:
                return None
            parts.append(np.asarray(values, dtype=float))
            continue
        values = np.maximum(position_signal(trace, name, rollout), TINY)
        scale = 1.0 if name == "entropy" else 1.0 + TINY - np.minimum(values, 1.0)  # log of an entropy, else log-odds
        parts.append(np.log(values / scale)[:, None])
    return np.concatenate(parts, axis=1)


def _head(
    trace: Trace, columns: tuple[np.ndarray, np.ndarray], label: np.ndarray, on_train: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted acceptance at every position and every rollout step."""
    path, steps = columns
    centre, spread = path[on_train].mean(axis=0), path[on_train].std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    path, steps = ((part - centre) / spread for part in (path, steps))
    half = np.repeat(np.isin(np.arange(trace.num_requests), train[::2]), np.diff(trace.offsets))
    folds = (on_train & half, on_train & ~half)

    def lost(penalty: float) -> float:
        total = 0.0
        for one, other in (folds, folds[::-1]):
            weights = logistic(path[one], label[one], penalty)
            score = path[other] @ weights[:-1] + weights[-1]
            total += float((np.logaddexp(0.0, score) - label[other] * score).sum())
        return total

    weights = logistic(path[on_train], label[on_train], min(PENALTIES, key=lost))
    return tuple(1.0 / (1.0 + np.exp(-(part @ weights[:-1] + weights[-1]))) for part in (path, steps))  # type: ignore[return-value]


def _residual(trace: Trace, inputs: tuple[str, ...], train: np.ndarray) -> Trace:
    """The trace with the scores of a residual head that was trained on the training half."""
    from realmodels.head import apply_head
    from realmodels.head_data import matched_examples
    from realmodels.head_training import Recipe, train_head

    recipe = Recipe(inputs=inputs)
    head = train_head(trace, matched_examples(trace, train.tolist(), recipe.reads), recipe, progress=False)
    return apply_head(head, trace)


def logistic(
    inputs: Float[np.ndarray, "N F"], label: Float[np.ndarray, " N"], penalty: float
) -> Float[np.ndarray, " F+1"]:
    """Weights and intercept with the least mean cross-entropy plus penalty |w|^2 / 2.

    Example:
        >>> logistic(np.zeros((4, 1)), np.array([1.0, 1.0, 1.0, 0.0]), 0.1)[1].round(4)  # the log-odds of 3/4
        np.float64(1.0986)
    """
    from scipy.optimize import minimize

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        score = inputs @ weights[:-1] + weights[-1]
        error = 1.0 / (1.0 + np.exp(-score)) - label
        value = float(np.mean(np.logaddexp(0.0, score) - label * score)) + penalty / 2 * float(
            weights[:-1] @ weights[:-1]
        )
        gradient = np.append(inputs.T @ error / len(label) + penalty * weights[:-1], error.mean())
        return value, gradient

    options = {"maxiter": 500, "gtol": 1e-8, "ftol": 1e-15}
    return minimize(loss, np.zeros(inputs.shape[1] + 1), jac=True, method="L-BFGS-B", options=options).x


def _earned(trace: Trace, cost: Cost, train: np.ndarray, test: np.ndarray) -> Tally:
    """Sums by request of `rejection` on this head, its threshold the best on the training half."""
    rules = [f"rejection:{h},signal=head" for h in THRESHOLDS]
    return best_on(trace, rules, train, test, cost, fit_signal(trace, "head", train)).tally


def _score(score: Any, base: Any, level: float) -> dict[str, Any]:
    count = len(score.num_tested)
    over = ratio(score.log_likelihood - base.log_likelihood, score.num_tested)
    return {
        "log score per candidate": with_interval(ratio(*score), count, level),
        "over a constant": with_interval(over, count, level),
    }


def _sentence(rows: Sequence[dict[str, Any]], lacking: Sequence[str]) -> str:
    heads = rows[1:]
    best = max(heads, key=lambda row: row["log score per candidate"]["value"])
    first = heads[0]
    more = best["log score per candidate"]["value"] - first["log score per candidate"]["value"]
    text = (
        f"By log score `{best['inputs']}` is the best of {len(heads)} rungs, {more:+.4f} nats a candidate over the "
        "draft probability alone."
    )
    gained = [row for row in heads if row["over draft probability"] is not None]
    if gained:
        top = max(gained, key=lambda row: row["over draft probability"]["value"])
        low, high = top["over draft probability"]["interval"]
        clear = "clear of zero" if low > 0 else "not clear of zero"
        text += (
            f" In throughput the most is gained by `{top['inputs']}`: {top['over draft probability']['value']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}], {clear}."
        )
    if lacking:
        text += f" Not tried, for want of recorded hidden states: {', '.join(lacking)}."
    return text
