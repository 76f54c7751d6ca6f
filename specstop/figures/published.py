"""The paper's own figures: speedups, frontiers, and throughput against K and h, for its datasets and for a real pair.

Published numbers come from `specstop.paper` and keep their evidence tags. Predictions come from `specstop.prediction`:
three fitted numbers, nothing else. The real pair is predicted from the training half of its trace and scored on the
other half; its draft step is declared to take .22 target calls, as the paper's pairs do, unless wall time is said.
"""

from collections.abc import Iterator

import numpy as np

from mdp.calibrate import rule_curve
from mdp.head_rule import HeadRule
from specstop.figures.pair import PAIR, live_speedups, predicted_systems, replayed_row, systems, wall_speedups
from specstop.figures.recipe import Data, Recipe, pluck, published, series
from specstop.figures.sources import GRID, SIGNALS
from specstop.figures.store import Store
from specstop.outcome import COST_RATIO
from specstop.paper import DATASETS, FIXED_LENGTHS, ORACLE, RULE, Figure
from specstop.prediction import FIRST, MOST

__all__ = ["RECIPES", "Fitted"]

THRESHOLDS = np.round(np.arange(0.02, 0.981, 0.02), 2)
UNBIASED = HeadRule()


class Fitted:
    """The three numbers that `study paper` fits."""

    def __init__(self, prediction: Data) -> None:
        rows = prediction["fitted"]
        self.mean = {row["dataset"]: row["fitted"] for row in rows if row["quantity"] == "mean acceptance"}
        self.cost_ratio = next(row["fitted"] for row in rows if row["quantity"].startswith("cost ratio"))
        concentration = next(row["fitted"] for row in rows if row["quantity"].startswith("concentration"))
        self.number = float(np.log(concentration))

    def curve(self, name: str, rule: HeadRule, thresholds: np.ndarray = THRESHOLDS, cells: int = 2048):
        """A rule on what the head sees, at many thresholds, times in target calls."""
        return rule_curve(
            "beta", self.mean[name], self.number, self.cost_ratio, rule, MOST, thresholds.tolist(), cells=cells
        )


def _read(name: str, panel: str, rows: list[tuple[str, Figure]], key: str, value: str) -> Iterator[Data]:
    """Published figures as series, one for each evidence tag."""
    for tag in dict.fromkeys(figure.tag for _, figure in rows):
        own = [(label, figure) for label, figure in rows if figure.tag == tag]
        columns = {key: [label for label, _ in own], value: [figure.value for _, figure in own],
                   "rounding": [figure.rounding for _, figure in own]}  # fmt: skip
        source = "; ".join(dict.fromkeys(figure.source for _, figure in own))
        yield series(name, published(tag), panel=panel, tag=tag, source=source, **columns)


def predicted_row(prediction: Data, quantity: str, dataset: str) -> Data | None:
    """A row of the paper's prediction table."""
    rows = prediction["predicted"]
    return next((row for row in rows if row["quantity"] == quantity and row["dataset"] == dataset), None)


def _speedups(store: Store) -> Data:
    prediction, out = store.get("prediction"), []
    fit = Fitted(prediction)
    for name, data in DATASETS.items():
        rows = [("best fixed K", data.best_fixed), ("SpecDec++", data.specdec)]
        rows += [("oracle", ORACLE.speedup)] if name == FIRST else []
        out += _read("published", name, rows, "system", "speedup")
        predicted = [("no speculation", 1.0, 1.0, 1.0, False)]
        for system, quantity, fitted in (("best fixed K", "best fixed-K speedup", data.best_fixed.value),
                                         ("SpecDec++", "SpecDec++ speedup", data.specdec.value),
                                         ("optimum, same head", "optimum with the same head, no lag, no bias", None),
                                         ("oracle", "oracle speedup from the mean", None)):  # fmt: skip
            row = predicted_row(prediction, quantity, name)
            if row is not None:
                predicted.append((system, row["predicted"], *row["interval"], False))
            elif fitted is not None:
                predicted.append((system, fitted, fitted, fitted, True))
        columns = zip(*predicted, strict=True)
        keys = ("system", "speedup", "low", "high", "fitted")
        out.append(series("predicted", "predicted", panel=name, **dict(zip(keys, columns, strict=True))))
    out += predicted_systems(store, PAIR)
    replayed = store.get("replayed")
    named = systems(replayed["chosen"])
    rows = [replayed_row(replayed["policies"][policy]) for policy in named.values()]
    out.append(series("replayed", "replayed", panel=PAIR, system=list(named), policy=list(named.values()),
                      **pluck(rows, "speedup", "low", "high")))  # fmt: skip
    out += live_speedups(store, PAIR)
    out += wall_speedups(store, "wall clock")
    about = {"cost_ratio": fit.cost_ratio, "declared": COST_RATIO, "pair": replayed["pair"], "level": replayed["level"],
             "num_requests": replayed["num_requests"]}  # fmt: skip
    return {"series": out, "about": about}


def _speedups_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Speedup over plain decoding. **Llama-2 7B drafts for 70B** (top): published headlines [README, note], "
        "HumanEval's and GSM8K's best fixed K derived from them; predictions from fits to Alpaca alone, where best "
        "fixed K and SpecDec++ are fitted, not predicted (open bars). Lines on bars: what the rounding of the fitted "
        f"figures leaves open. **{about['pair']['label']}** (bottom): predicted from the training half of the trace, "
        f"replayed on {about['num_requests']} other requests and decoded live on some of them, all with a draft step "
        f"*declared* to take {about['declared']:g} target calls; on the right the wall clock, where this draft takes "
        "the target's own time: replayed at the times recorded with the trace, live with whatever else the machine was "
        f"doing. Whiskers: {100 * about['level']:g} % intervals clustered by request. `perfect head` "
        "sees true acceptance and `oracle` the future: ceilings, not rules."
    )


def _frontiers(store: Store) -> Data:
    prediction, out = store.get("prediction"), []
    fit = Fitted(prediction)
    for name, data in DATASETS.items():
        curves = prediction["curves"][name]
        out.append(series("fixed K, digitised", published(data.rate_tag), panel=name, tag=data.rate_tag,
                          source=data.rate_source, K=list(data.verification_rate),
                          verification_rate=list(data.verification_rate.values()),
                          discard_rate=list(data.discard_rate.values())))  # fmt: skip
        out.append(_rates_series("fixed K, fitted", name, curves["fixed"], K=curves["fixed"]["length"]))
        rule = curves["rule"]
        low, high = rule["intervals"]["discard_rate"]
        out.append(_rates_series("SpecDec++ rule", name, rule, h=rule["threshold"], low=low, high=high))
        best = fit.curve(name, UNBIASED)
        out.append(series("optimum, same head", "predicted", panel=name, h=best.threshold,
                          verification_rate=best.verification_rate, discard_rate=best.discard_rate))  # fmt: skip
        if name == FIRST:
            rate = ORACLE.verification_rate
            out.append(series("oracle", published(rate.tag), panel=name, tag=rate.tag, source=rate.source,
                              verification_rate=[rate.value], discard_rate=[ORACLE.discard_rate]))  # fmt: skip
    out += _pair_frontiers(store)
    return {"series": out, "about": {"cost_ratio": fit.cost_ratio, "declared": COST_RATIO,
                                     "pair": store.get("replayed")["pair"]}}  # fmt: skip


def _rates_series(name: str, panel: str, curve: Data, **columns) -> Data:
    return series(name, "predicted", panel=panel, verification_rate=curve["verification_rate"],
                  discard_rate=curve["discard_rate"], **columns)  # fmt: skip


def _pair_frontiers(store: Store) -> Iterator[Data]:
    replayed, modelled = store.get("replayed"), store.get("modelled")
    policies, depth = replayed["policies"], replayed["pair"]["max_candidates"]
    yield _rates_series("fixed K, fitted", PAIR, {k: v[1:] for k, v in modelled["fixed"].items()},
                        K=modelled["fixed"]["K"][1:])  # fmt: skip
    fixed = [policies[f"fixed:{k}"] for k in range(1, depth + 1)]
    yield _replayed_rates("fixed K", fixed, K=range(1, depth + 1))
    names = {"draft_prob": "threshold on draft prob.", "token_accept_prob": "threshold, perfect head"}
    for signal, name in names.items():
        rows = [(h, policies[f"rejection:{h},signal={signal}"]) for h in GRID]
        rows = [(h, row) for h, row in rows if row["num_drafted"]]
        yield _replayed_rates(name, [row for _, row in rows], h=[float(h) for h, _ in rows])
    for signal, name in {"draft_prob": "optimum of its chain", "token_accept_prob": "optimum, perfect head"}.items():
        rows = [(price, row) for price, found in replayed["prices"].items() for row in found
                if row["policy"] == f"optimal:signal={signal}" and row["num_drafted"]]  # fmt: skip
        yield _replayed_rates(name, [row for _, row in rows], price=[float(price) for price, _ in rows])
    yield _replayed_rates("oracle", [policies["oracle"]])


def _replayed_rates(name: str, rows: list[Data], **columns) -> Data:
    return series(name, "replayed", panel=PAIR, **columns,
                  **pluck(rows, "policy", "verification_rate", "discard_rate", "speedup"))  # fmt: skip


def _frontiers_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Verification rate (target calls per token) against discard rate (thrown-away candidates per token): nearer "
        f"the lower left corner is cheaper at any price. Grey lines: equal speedup at a cost ratio of "
        f"{about['cost_ratio']:.3f}, fitted (pair: {about['declared']:g}, declared). **Datasets**: fixed K = 4..14 "
        "*derived*, digitised from the published plot, K labels assumed; *predicted* curves of fixed K (fitted to the "
        "verification rates, endless text) and of the SpecDec++ rule with its weight 6, lag 1 and at least 2 "
        "candidates; the optimum reads the same head without bias and lag: no rule that does can lie "
        f"below its curve. **{about['pair']['label']}**: *predicted* for fixed K, all else *replayed* on the test "
        "half. The paper's own SpecDec++ points are not available as numbers."
    )


def _by_length(store: Store) -> Data:
    prediction, out = store.get("prediction"), []
    fit = Fitted(prediction)
    c = fit.cost_ratio
    for name, data in DATASETS.items():
        fixed = prediction["curves"][name]["fixed"]
        out.append(series("fitted", "predicted", panel=name, K=fixed["length"], speedup=fixed["speedup"]))
        lengths = list(data.verification_rate)
        rates = [(data.verification_rate[k], data.discard_rate[k]) for k in lengths]
        out.append(series("digitised rates, priced", "derived", panel=name, tag=data.rate_tag,
                          source=f"{data.rate_source}; at the fitted cost ratio {c:.3f}", K=lengths,
                          speedup=[1.0 / (c * (1.0 + d) + (1.0 - c) * v) for v, d in rates]))  # fmt: skip
        best = data.best_fixed
        out.append(series("best fixed K", published(best.tag), panel=name, tag=best.tag, source=best.source,
                          speedup=[best.value], rounding=[best.rounding]))  # fmt: skip
    replayed, modelled = store.get("replayed"), store.get("modelled")
    fixed = modelled["fixed"]
    out.append(series("fitted", "predicted", panel=PAIR, K=fixed["K"], speedup=fixed["speedup"]))
    lengths = range(replayed["pair"]["max_candidates"] + 1)
    rows = [replayed_row(replayed["policies"][f"fixed:{k}"]) for k in lengths]
    out.append(series("replayed", "replayed", panel=PAIR, K=lengths,
                      **pluck(rows, "speedup", "low", "high")))  # fmt: skip
    return {"series": out, "about": {"cost_ratio": c, "declared": COST_RATIO, "lengths": FIXED_LENGTHS,
                                     "pair": replayed["pair"], "level": replayed["level"],
                                     "num_requests": replayed["num_requests"]}}  # fmt: skip


def _by_length_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Throughput, as speedup over plain decoding, against a fixed candidate length K. **Datasets**: *predicted* by "
        f"independent acceptance with the fitted means and cost ratio {about['cost_ratio']:.3f}; *derived* points are "
        "the digitised verification and discard rates at that cost ratio, end of text included; the level is the best "
        "fixed K that was published (Alpaca: fitted to it) or derived. Throughput per K was not published as numbers. "
        f"**{about['pair']['label']}**: *predicted* from the training half's mean acceptance, *replayed* on "
        f"{about['num_requests']} other requests with {100 * about['level']:g} % intervals, draft step "
        f"{about['declared']:g} target calls, declared."
    )


def _by_threshold(store: Store) -> Data:
    prediction, out = store.get("prediction"), []
    fit = Fitted(prediction)
    for name, data in DATASETS.items():
        rule = prediction["curves"][name]["rule"]
        low, high = rule["intervals"]["speedup"]
        out.append(series("SpecDec++ rule", "predicted", panel=name, h=rule["threshold"], speedup=rule["speedup"],
                          low=low, high=high))  # fmt: skip
        best = fit.curve(name, UNBIASED)
        out.append(series("unbiased head, no lag", "predicted", panel=name, h=best.threshold,
                          speedup=best.throughput))  # fmt: skip
        fixed = prediction["curves"][name]["fixed"]["speedup"]
        out.append(series("best fixed K", "predicted", panel=name, speedup=[max(fixed)]))
        tuned = data.specdec
        out.append(series("SpecDec++, tuned h", published(tuned.tag), panel=name, tag=tuned.tag,
                          source=f"{tuned.source}; h: {RULE.source} [{RULE.tag}]", h=[RULE.threshold],
                          speedup=[tuned.value], rounding=[tuned.rounding]))  # fmt: skip
    replayed, modelled = store.get("replayed"), store.get("modelled")
    for signal in SIGNALS:
        rows = [replayed_row(replayed["policies"][f"rejection:{h},signal={signal}"]) for h in GRID]
        out.append(series(signal, "replayed", panel=PAIR, h=[float(h) for h in GRID],
                          **pluck(rows, "speedup", "low", "high")))  # fmt: skip
        curve = modelled["signals"][signal]
        out.append(series(signal, "predicted", panel=PAIR, h=curve["h"], speedup=curve["speedup"]))
    base = replayed_row(replayed["policies"][replayed["baseline"]])
    out.append(series("best fixed K", "replayed", panel=PAIR, speedup=[base["speedup"]]))
    return {"series": out, "about": {"cost_ratio": fit.cost_ratio, "declared": COST_RATIO, "weight": RULE.weight,
                                     "pair": replayed["pair"], "num_requests": replayed["num_requests"]}}  # fmt: skip


def _by_threshold_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Throughput, as speedup, against the threshold h (stop once the estimated probability of a rejection exceeds "
        f"h). **Datasets**: all curves *predicted*. The SpecDec++ rule reads a head that was trained with weight "
        f"{about['weight']:g} on rejections, which inflates their odds by as much, so its best h is large; without "
        "bias and lag the same head does better, at a smaller h. The star is *published*: the tuned rule's headline "
        "at the shared h = .7 (Alpaca: fitted to it). Throughput per h was not published as numbers. "
        f"**{about['pair']['label']}**: *replayed* on the test half (solid), *predicted* from a chain of eight bins "
        "fitted to the training half (dashed); signals are calibrated, `token_accept_prob` is a perfect head."
    )


NEEDS = ("prediction", "replayed", "modelled", "live")
RECIPES = (
    Recipe("speedups", "Speedup of the systems", NEEDS, _speedups, _speedups_caption),
    Recipe("frontiers", "What a speedup is made of: verification against discard rate", NEEDS[:3], _frontiers,
           _frontiers_caption),
    Recipe("throughput_by_length", "Throughput against the candidate length K", NEEDS[:3], _by_length,
           _by_length_caption),
    Recipe("throughput_by_threshold", "Throughput against the stopping threshold h", NEEDS[:3], _by_threshold,
           _by_threshold_caption),
)  # fmt: skip
