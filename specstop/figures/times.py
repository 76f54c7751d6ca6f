r"""Figures of time: what a token's time is made of, and the regression of wall time on calls.

SpecDec++'s Eq. 2.1: with N tokens out, every draft step keeps or discards a candidate and every target call adds a
token of its own, so $T = t_d N_{draft} + t_t N_{target}$ and, per token, $t_d (1 + d + x - v) + t_t v$. The paper fits
$(t_d, t_t)$ by linear regression of wall time on the two counts over prompts (R² >= .98 [note]).
"""

import numpy as np

from mdp.policy import parse
from specstop.figures.pair import PAIR, by_policy, systems
from specstop.figures.published import Fitted
from specstop.figures.recipe import Data, Recipe, series
from specstop.figures.store import Store
from specstop.outcome import COST_RATIO
from specstop.paper import DATASETS
from specstop.prediction import HEAD

__all__ = ["RECIPES", "regress"]


def regress(calls: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Least squares without intercept: coefficients, their standard errors, R² about the mean.

    Example:
        >>> calls = np.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [0.0, 4.0]])
        >>> found, errors, r2 = regress(calls, calls @ np.array([0.02, 0.1]))
        >>> found.round(6).tolist(), round(r2, 6)
        ([0.02, 0.1], 1.0)
    """
    found, _, _, _ = np.linalg.lstsq(calls, seconds, rcond=None)
    residual = seconds - calls @ found
    variance = residual @ residual / max(len(seconds) - calls.shape[1], 1)
    errors = np.sqrt(np.diag(variance * np.linalg.inv(calls.T @ calls)))
    return found, errors, 1.0 - float(residual @ residual / np.square(seconds - seconds.mean()).sum())


def _regression(store: Store) -> Data:
    live, out = store.get("live"), []
    runs = by_policy(live)
    calls = np.concatenate([np.stack([run["num_drafted"], run["num_target_calls"]], axis=1) for run in runs.values()])
    seconds = np.concatenate([run["seconds"] for run in runs.values()])
    found, errors, r2 = regress(calls.astype(float), seconds)
    processor = np.concatenate([run["processor_seconds"] for run in runs.values()])
    of_processor, its_errors, its_r2 = regress(calls.astype(float), processor)
    names = {policy: name for name, policy in systems(store.get("replayed")["chosen"]).items()}
    for policy, run in runs.items():
        fitted = found[0] * run["num_drafted"] + found[1] * run["num_target_calls"]
        out.append(series(names[policy], "measured", policy=[policy] * len(fitted), request=run["request"],
                          num_drafted=run["num_drafted"],
                          num_target_calls=run["num_target_calls"], draft_seconds=run["draft_seconds"],
                          verify_seconds=run["verify_seconds"], seconds=run["seconds"],
                          processor_seconds=run["processor_seconds"], fitted=fitted))  # fmt: skip
    drafted, called = calls.sum(axis=0)
    timer = [sum(run[key].sum() for run in runs.values()) for key in ("draft_seconds", "verify_seconds")]
    rows = [("regression of wall time", *found, *errors),
            ("regression of processor time", *of_processor, *its_errors),
            ("timers in the loop", timer[0] / max(drafted, 1), timer[1] / called, None, None)]  # fmt: skip
    measured = live["measured"]
    if measured:
        medians = measured["draft_time"], measured["verify_time"][0]
        rows.append(("medians, recorded with the trace", *medians, None, None))
    keys = ("method", "draft_time", "target_time", "draft_time_se", "target_time_se")
    out.append(series("times", "measured", panel="times", **dict(zip(keys, zip(*rows, strict=True), strict=True))))
    slope = None
    if measured:
        verify = np.array(measured["verify_time"])
        slope = float(np.polyfit(np.arange(len(verify)), verify, 1)[0])
    return {"series": out, "about": {"r2": r2, "processor_r2": its_r2, "num_runs": len(seconds), "verify_slope": slope,
                                     "pair": store.get("replayed")["pair"]}}  # fmt: skip


def _regression_caption(data: Data) -> str:
    about, times = data["about"], data["series"][-1]["columns"]
    slope = about["verify_slope"]
    more = ""
    if slope is not None:
        more = (
            f" The regression charges every candidate with what verifying it adds (V(k) rises by about "
            f"{1000 * slope:.2g} ms a candidate here), so its t_draft is larger than a draft step alone."
        )
    return (
        f"*Measured*: wall time of {about['num_runs']} live runs of {about['pair']['label']} on this machine against "
        f"what a linear regression on the numbers of draft steps and target calls fits: t_draft "
        f"{1000 * times['draft_time'][0]:.2f} ms, t_target {1000 * times['target_time'][0]:.2f} ms, R² "
        f"{about['r2']:.3f} (of processor time, which other programs disturb less: {about['processor_r2']:.3f}). The "
        "paper reports R² of at least .98 for such fits [note]; its own (t_draft, t_target) are not available as "
        f"numbers.{more}"
    )


def _decomposition(store: Store) -> Data:
    prediction, replayed = store.get("prediction"), store.get("replayed")
    fit, out = Fitted(prediction), []

    def parts(rows: list[tuple[str, float, float, float]], draft: float, target: float) -> Data:
        """Time per token in its parts: kept candidates, discarded ones, target calls."""
        v, d, x = (np.array(column) for column in list(zip(*rows, strict=True))[1:])
        return {"rule": [row[0] for row in rows], "kept": draft * (1.0 + x - v), "discarded": draft * d,
                "target": target * v}  # fmt: skip

    for name in DATASETS:
        fixed, rule = prediction["curves"][name]["fixed"], prediction["curves"][name]["rule"]
        at, best = int(np.argmax(fixed["speedup"])), int(np.argmax(rule["speedup"]))
        seen = fit.curve(name, type(HEAD)())
        top = seen.best
        rows = [
            ("no speculation", 1.0, 0.0, 0.0),
            (f"best fixed K = {fixed['length'][at]}", *_rates_at(fixed, at), 0.0),
            (f"SpecDec++, h = {rule['threshold'][best]:.2g}", *_rates_at(rule, best), 0.0),
            ("optimum, same head", float(seen.verification_rate[top]), float(seen.discard_rate[top]), 0.0),
        ]
        out.append(series("model", "predicted", panel=name, **parts(rows, fit.cost_ratio, 1.0)))
    rows = []
    for name, policy in systems(replayed["chosen"]).items():
        row = replayed["policies"][policy]
        label = f"best fixed K = {parse(policy).policy.length}" if name == "best fixed K" else name  # type: ignore[union-attr]
        rows.append((label, row["verification_rate"], row["discard_rate"], row["num_cut"] / row["num_emitted"]))
    out.append(series("trace", "replayed", panel=PAIR, **parts(rows, COST_RATIO, 1.0)))
    names, shares = {policy: name for name, policy in systems(replayed["chosen"]).items()}, []
    for policy, run in by_policy(store.get("live")).items():
        tokens, drafted = run["num_emitted"].sum(), max(run["num_drafted"].sum(), 1)
        step = 1000 * run["draft_seconds"].sum() / drafted
        discarded = step * run["num_discarded"].sum() / tokens
        spent = ("draft_seconds", "verify_seconds", "seconds")
        draft, verify, total = (1000 * run[key].sum() / tokens for key in spent)
        shares.append((names[policy], draft - discarded, discarded, verify, total - draft - verify))
    keys = ("rule", "kept", "discarded", "target", "rest")
    columns = dict(zip(keys, zip(*shares, strict=True), strict=True))
    out.append(series("live", "measured", panel="wall clock", **columns))
    return {"series": out, "about": {"cost_ratio": fit.cost_ratio, "declared": COST_RATIO, "pair": replayed["pair"]}}


def _rates_at(curve: Data, at: int) -> tuple[float, float]:
    return curve["verification_rate"][at], curve["discard_rate"][at]


def _decomposition_caption(data: Data) -> str:
    about = data["about"]
    return (
        "What a token's time is made of (SpecDec++, Eq. 2.1): draft steps whose candidate is kept, draft steps whose "
        "candidate is discarded, and target calls, in target calls per token; the shorter the bar, the faster. "
        f"**Datasets**: *predicted*, cost ratio {about['cost_ratio']:.3f}. **{about['pair']['label']}**: *replayed* on "
        f"the test half, draft step declared {about['declared']:g} target calls; **wall clock**: *measured* in the "
        "live run, milliseconds per token on this machine, the loop's own time included."
    )


RECIPES = (
    Recipe("time_decomposition", "Where the time goes", ("prediction", "replayed", "live"), _decomposition,
           _decomposition_caption),
    Recipe("time_regression", "Wall time is linear in the calls", ("replayed", "live"), _regression,
           _regression_caption),
)  # fmt: skip
