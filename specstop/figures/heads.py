"""Figures of acceptance heads: what their training weight does, the grid of weights and depths, and reliability.

*Weight.* A head trained with weight w on rejections puts out m / (m + w (1 - m)) for a true acceptance m (theory, F6):
each threshold h on its product of outputs means another one on the true probability.

*Grid.* `specstop train-head --grid` trains heads of several depths and weights on the trace's training half and scores
each on the other half: binary KL of its output to the true acceptance, AUROC of the accepted flag, and the throughput
of the rule that stops at its best threshold.

*Reliability* is what an output is worth: candidates of the test half in bins of equal size by predicted acceptance,
each with the mean true acceptance of its candidates.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mdp.fit import PERFECT, fit_signal, position_signal, split_requests
from mdp.head_rule import HeadRule, weighted
from specstop.figures.published import Fitted
from specstop.figures.recipe import Data, Recipe, Unavailable, pluck, series
from specstop.figures.store import Store
from specstop.outcome import COST_RATIO
from specstop.paper import RULE
from specstop.prediction import FIRST, HEAD

__all__ = ["RECIPES", "auroc", "reliability"]

BINS = 10
SHARED_DEPTH = 3
"""Of the one setting that SpecDec++ shares between datasets [note/README]."""

HEAD_KEYS = ("variant", "depth", "weight", "debiased")
CLOSE = 1e-6
"""Probabilities are kept this far from 0 and 1 in a KL."""


def auroc(score: np.ndarray, accepted: np.ndarray) -> float:
    """Probability that an accepted candidate scores higher than a rejected one, ties counted half.

    Example:
        >>> auroc(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
        0.875
    """
    from scipy.stats import rankdata

    good, bad = int(accepted.sum()), int((~accepted).sum())
    if not good or not bad:
        return float("nan")
    return float((rankdata(score)[accepted].sum() - good * (good + 1) / 2) / (good * bad))


def reliability(predicted: np.ndarray, true: np.ndarray) -> Data:
    """Bins of equal size by prediction (mean of either), the expected calibration error, and the mean binary KL."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    means = ([float(values[part].mean()) for part in parts] for values in (predicted, true))
    bins = {**dict(zip(("predicted", "accepted"), means, strict=True)), "count": [len(part) for part in parts]}
    gaps = np.abs(np.array(bins["predicted"]) - bins["accepted"])
    return {"bins": bins, "ece": float(np.average(gaps, weights=bins["count"])), "kl": _kl(true, predicted)}


def _kl(true: np.ndarray, predicted: np.ndarray | float) -> float:
    """Mean KL of Bernoulli laws, true to predicted."""
    p, q = (np.clip(values, CLOSE, 1.0 - CLOSE) for values in (true, predicted))
    return float(np.mean(p * np.log(p / q) + (1.0 - p) * np.log((1.0 - p) / (1.0 - q))))


def _weights(store: Store) -> Data:
    fit, out = Fitted(store.get("prediction")), []
    true = np.linspace(0.0, 1.0, 51)
    for weight in RULE.weights:
        name = f"w = {weight:g}"
        curve = fit.curve(FIRST, HeadRule(weight, HEAD.lag, HEAD.least))
        out.append(series(name, "predicted", panel="throughput", h=curve.threshold, speedup=curve.throughput))
        out.append(series(name, "predicted", panel="output", accept_prob=true, output=weighted(true, weight)))
    shown = 1.0 - RULE.threshold
    means = shown * RULE.weight / (1.0 - shown + RULE.weight * shown)
    return {"series": out, "about": {"cost_ratio": fit.cost_ratio, "threshold": RULE.threshold, "means": 1.0 - means,
                                     "weight": RULE.weight, "lag": HEAD.lag, "least": HEAD.least}}  # fmt: skip


def _weights_caption(data: Data) -> str:
    about = data["about"]
    return (
        "What the weight on rejections does, *predicted* (theory, F6). Left: a head trained with weight w puts out "
        f"less than the true acceptance: at w = {about['weight']:g}, a rejection of {about['threshold']:g} for one "
        f"token means {about['means']:.2f} in truth. Right: speedup of the SpecDec++ rule on {FIRST} against its "
        f"threshold h (lag {about['lag']}, at least {about['least']} candidates): the weight mostly moves the best "
        "threshold, which is why h = .7 at w = 6 is no statement about the theorem's bound."
    )


def _heads(store: Store) -> Data:
    grid, out = store.get("heads"), []
    rows: list[Mapping[str, Any]] = grid["rows"]
    measures = ("kl", "auroc", "ece", "kl_debiased", "ece_debiased", "mean_predicted", "mean_true", "throughput",
                "throughput_se", "best_threshold")  # fmt: skip
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for weight in sorted({row["weight"] for row in rows if row["variant"] == variant}):
            own = sorted((r for r in rows if (r["variant"], r["weight"]) == (variant, weight)), key=_depth)
            out.append(series(f"w = {weight:g}", "replayed", panel=variant, depth=[row["depth"] for row in own],
                              **pluck(own, *measures)))  # fmt: skip
    for name, key in (("constant", "constant_kl"), ("best fixed K", "best_fixed")):
        value = _number(grid.get(key))
        if value is not None:
            column = "kl" if key == "constant_kl" else "throughput"
            out.append(series(name, "replayed", panel="all", **pluck([{column: value}], column)))
    return {"series": out, "about": {"pair": store.get("replayed")["pair"], "declared": COST_RATIO}}


def _depth(row: Mapping[str, Any]) -> int:
    return int(row["depth"])


def _number(value: Any) -> float | None:
    """A number, or the throughput of what `train-head` writes in its place."""
    if isinstance(value, Mapping):
        value = value.get("throughput", value.get("value"))
    return float(value) if isinstance(value, (int, float)) else None


def _heads_caption(data: Data) -> str:
    return (
        f"Acceptance heads trained on the training half of a trace of {data['about']['pair']['label']}, scored on the "
        "other half (*replayed*): binary KL of the output to the true acceptance (lower is better; biased on purpose "
        "where w > 1), AUROC, and the speedup of the best threshold on the head, over the depth of the head and the "
        "weight on rejections. `published`: features and one-token lag as in the released code; `matched`: trained on "
        "what it will see. Dashed: a constant prediction, and the best fixed K. Whiskers: one standard error."
    )


def _reliability(store: Store) -> Data:
    trace = store.trace
    train, test = split_requests(trace)
    positions = np.flatnonzero(np.isin(np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets)), test))
    true = np.clip(position_signal(trace, PERFECT)[positions], 0.0, 1.0)
    accepted = trace.accepted[positions]
    raw = position_signal(trace, "draft_prob")[positions]
    shown = {"draft prob., as it is": raw}
    for signal, name in (("draft_prob", "draft prob., calibrated"), ("entropy", "entropy, calibrated")):
        values = position_signal(trace, signal)[positions]
        shown[name] = np.asarray(fit_signal(trace, signal, train).accept_prob(values))
    out, rows = [], []
    for name, values in shown.items():
        found = reliability(values, true)
        out.append(series(name, "replayed", panel="bins", **found["bins"]))
        rows.append((name, found["kl"], auroc(values, accepted), found["ece"], float(values.mean())))
    mean = float(true.mean())
    rows.append(("constant (its mean)", _kl(true, mean), 0.5, 0.0, mean))
    keys = ("signal", "kl", "auroc", "ece", "mean_predicted")
    scores = series("scores", "replayed", panel="scores", **dict(zip(keys, zip(*rows, strict=True), strict=True)))
    out += _head_bins(store)
    return {"series": [*out, scores], "about": {"pair": store.get("replayed")["pair"], "mean_true": mean,
                                                "num_positions": len(positions)}}  # fmt: skip


def _head_bins(store: Store) -> Iterator[Data]:
    """The bins of heads, if there are any."""
    try:
        grid = store.get("heads")
    except Unavailable:
        return
    best = grid.get("chosen") or {}
    shared = ("published", SHARED_DEPTH, RULE.weight)
    shown = ((*tuple(best.get(key) for key in HEAD_KEYS[:-1]), True), (*shared, False), (*shared, True))
    for head in dict.fromkeys(shown):
        lines = [x for x in grid.get("reliability") or [] if tuple(x[key] for key in HEAD_KEYS) == head]
        if lines:
            variant, depth, weight, debiased = head
            name = f"head {variant}, D = {depth}, w = {weight:g}{', de-biased' if debiased and weight != 1 else ''}"
            yield series(name, "replayed", panel="bins", **pluck(lines, "predicted", "accepted", "count"))


def _reliability_caption(data: Data) -> str:
    about = data["about"]
    scores = next(entry for entry in data["series"] if entry["name"] == "scores")["columns"]
    told = "; ".join(
        f"{name}: KL {kl:.3f}, AUROC {area:.3f}, calibration error {ece:.3f}"
        for name, kl, area, ece in zip(scores["signal"], scores["kl"], scores["auroc"], scores["ece"], strict=True)
    )
    return (
        f"What a prediction of acceptance is worth, *replayed* on {about['num_positions']:,} candidates of the test "
        f"half of {about['pair']['label']}: bins of equal size by predicted acceptance against the mean true "
        "acceptance in each; on the diagonal a prediction means what it says. Calibrated on the training half by "
        f"isotonic regression. {told}."
    )


RECIPES = (
    Recipe("head_weights", "What the weight on rejections does", ("prediction",), _weights, _weights_caption),
    Recipe("heads", "Acceptance heads: weight and depth", ("heads", "replayed"), _heads, _heads_caption),
    Recipe("reliability", "Do predictions of acceptance mean what they say?", ("replayed", "trace"), _reliability,
           _reliability_caption),
)  # fmt: skip
