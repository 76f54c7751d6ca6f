"""Figures of the theory: thresholds, the bound of Theorem 3.1, phases, information, counterexamples, self-tuning."""

import itertools
from collections.abc import Iterator

import numpy as np

from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine
from mdp.problem import StoppingProblem
from specstop.figures.pair import PAIR
from specstop.figures.published import Fitted
from specstop.figures.recipe import Data, Recipe, series
from specstop.figures.store import Store
from specstop.paper import DATASETS
from specstop.prediction import MOST
from specstop.studies import DISPERSION, MEAN, PERSISTENCE

__all__ = ["RECIPES"]

ACCEPTANCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
STAYS = 0.7
"""Of the map's chain: a regime is kept with this probability, else another is drawn."""


def _chain() -> MarkovModulated:
    """Ten regimes from hopeless to nearly certain, the easy ones more frequent."""
    law = np.array(ACCEPTANCES) / sum(ACCEPTANCES)
    return MarkovModulated(STAYS * np.eye(len(law)) + (1.0 - STAYS) * law, np.array(ACCEPTANCES), law)


def _thresholds(store: Store) -> Data:
    """S*(k, z) on a grid of depth and regime, and beside it what Theorem 3.1 would allow."""
    from mdp.case import examine

    fit, depth = Fitted(store.get("prediction")), 6 if store.quick else 12
    case = examine(StoppingProblem(_chain(), Affine(fit.cost_ratio, 1.0), depth))
    threshold = np.minimum(case.threshold, np.inf)
    # D(k, z): what drafting on is worth with nothing rejected, in time (theory, F4)
    worth = (case.ahead.lower[..., -1] + case.ahead.upper[..., -1]) / 2 / case.price
    bound = np.maximum(worth, 0.0) / (case.finite.draft_time + np.maximum(worth, 0.0))
    most = max(float(worth[case.met].max()), 0.0)
    cells = list(itertools.product(range(depth), range(len(ACCEPTANCES))))
    shown = [threshold[cell] if np.isfinite(threshold[cell]) else None for cell in cells]
    ahead = case.finite.next_accept_prob[0]
    return {
        "series": [
            series("S*(k, z)", "predicted", k=[k for k, _ in cells], accept_prob=[ACCEPTANCES[z] for _, z in cells],
                   next_accept_prob=[ahead[z] for _, z in cells], threshold=shown,
                   bound=[bound[cell] for cell in cells]),
        ],
        "about": {"cost_ratio": fit.cost_ratio, "stays": STAYS, "max_candidates": depth,
                  "tightest": most / (case.finite.draft_time + most), "speedup": case.rate,
                  "bounds": list(case.bounds)},
    }  # fmt: skip


def _thresholds_caption(data: Data) -> str:
    about = data["about"]
    return (
        f"Left: the optimal thresholds S*(k, z), *predicted* (solved, bounds closed): with k candidates drafted, the "
        "last one in a regime of acceptance a, draft on while survival is at least this. Ten regimes, kept with "
        f"probability {about['stays']:g}; cost ratio {about['cost_ratio']:.3f}, at most {about['max_candidates']} "
        "candidates. One number would do if the next acceptance were the same in every regime; it is not: behind a "
        "hard token drafting on asks for more survival. Right: the rejection probability at which the optimum stops, "
        "1 - S*(k, z), against the bound of Theorem 3.1 with the tightest Δ for that state. No point lies above the "
        "diagonal: the theorem is sufficient for stopping. The optimum stops earlier, by the distance from it; with "
        f"one Δ for all states the bound would be {about['tightest']:.2f}."
    )


def _bound(store: Store) -> Data:
    """Independent acceptance: the true threshold and the theorem's bounds over the mean, and at the paper's pairs."""
    from mdp.theory import check

    fit = Fitted(store.get("prediction"))

    def at(mean: float) -> tuple[float, ...]:
        problem = StoppingProblem(IID(float(mean)), Affine(fit.cost_ratio, 1.0), MOST)
        facts = {fact.id: fact.numbers for fact in check(problem)}
        found, best = facts["F4"], int(facts["F5"]["length"])
        return found["threshold"], 1.0 - float(mean) ** best, found["bound"], found["delta_zero_bound"], found["delta"]

    means = np.round(np.linspace(0.3, 0.96, 8 if store.quick else 67), 4)
    keys = ("threshold", "rejection_at_stop", "tightest_bound", "delta_zero_bound", "delta")
    out = []
    for name, at_means in (("independent acceptance", list(means)), ("SpecDec++'s pairs", list(fit.mean.values()))):
        columns = dict(zip(keys, zip(*map(at, at_means), strict=True), strict=True))
        extra = {} if len(at_means) > 3 else {"dataset": list(DATASETS)}
        out.append(series(name, "predicted", mean=at_means, **extra, **columns))
    return {"series": out, "about": {"cost_ratio": fit.cost_ratio, "max_candidates": MOST}}


def _bound_caption(data: Data) -> str:
    pairs = data["series"][1]["columns"]
    told = "; ".join(
        f"{name} {threshold:.2f} < {tight:.2f} < {zero:.2f}"
        for name, threshold, tight, zero in zip(
            pairs["dataset"], pairs["threshold"], pairs["tightest_bound"], pairs["delta_zero_bound"], strict=True
        )
    )
    return (
        "SpecDec++'s Theorem 3.1 says: stop once the probability of a rejection reaches (c2 + Δ)/(c1 + c2 + Δ). All "
        "*predicted*, for independent acceptance at the fitted cost ratio "
        f"{data['about']['cost_ratio']:.3f}. The true threshold lies well below even the tightest bound (Δ of the "
        "optimum, negative throughout), and that below the bound with Δ = 0: the theorem says when stopping is right, "
        f"not when it is best. True threshold < tightest < Δ = 0: {told}. The saw is where the best fixed length "
        "actually stops."
    )


def _phase(store: Store) -> Data:
    found = store.get("phase")
    axes = (found["dispersion"], found["persistence"], found["cost_ratio"])
    points = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def cells(name: str) -> list[float]:
        values = np.asarray(found[name])
        return [float(values[point]) for point in points]

    names = ("dispersion", "persistence", "cost_ratio")
    columns: Data = {name: [axes[i][point[i]] for point in points] for i, name in enumerate(names)}
    lost = 1.0 - np.array(cells("best_threshold")) / np.array(cells("optimum"))
    return {
        "series": [series("two regimes", "predicted", **columns, gain=cells("gain_of_optimum"), lost=lost,
                          optimum=cells("optimum"), best_fixed=cells("best_fixed"), width=cells("width"))],
        "about": {"mean": found["mean"], "max_candidates": found["max_candidates"], "num_open": found["num_open"]},
    }  # fmt: skip


def _phase_caption(data: Data) -> str:
    about, columns = data["about"], data["series"][0]["columns"]
    return (
        f"Where adapting pays, *predicted*: two regimes with mean acceptance {about['mean']:g}, at most "
        f"{about['max_candidates']} candidates. Across: how long a regime lasts (persistence); up: how much acceptance "
        "differs between regimes (dispersion; 0: not at all, 1: the regime is the answer). Top: what the optimum gains "
        f"over the best fixed length, up to {100 * max(columns['gain']):.0f} %. Bottom: what the best constant "
        f"threshold on survival loses against the optimum, at most {100 * max(columns['lost']):.2g} %. Bounds on the "
        f"optimum closed to {max(columns['width']):.0e}; {about['num_open']} problems left open."
    )


def _information(store: Store) -> Data:
    found = store.get("information")
    rungs = found["rungs"]
    names = [row["name"] if row["accuracy"] is None else f"{row['name']}, {100 * row['accuracy']:.0f} % right"
             for row in rungs]  # fmt: skip
    out = [series("two regimes", "predicted", panel="model", knows=names, speedup=[row["throughput"] for row in rungs],
                  low=[row["bounds"][0] for row in rungs], high=[row["bounds"][1] for row in rungs],
                  extra_time=[row["extra_time_over_position"] for row in rungs])]  # fmt: skip
    audit = store.get("audit")
    out += _ladder(audit)
    return {"series": out, "about": {"world": found["world"], "pair": store.get("replayed")["pair"],
                                     "num_requests": audit["num_requests"], "level": audit["level"]}}  # fmt: skip


def _ladder(audit: Data) -> Iterator[Data]:
    for name, bound in (("best rule found", "lower"), ("ceiling", "upper")):
        rows = [row for row in audit["ladder"] if row["bound"] == bound]
        intervals = [row["throughput"]["interval"] for row in rows]
        yield series(name, "replayed", panel=PAIR, knows=[row["information"] for row in rows],
                     speedup=[row["speedup"] for row in rows], low=[low for low, _ in intervals],
                     high=[high for _, high in intervals], policy=[row["policy"] for row in rows])  # fmt: skip


def _information_caption(data: Data) -> str:
    about = data["about"]
    world = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in about["world"].items())
    return (
        f"What knowing is worth. **Model** (*predicted*, exact or between closed bounds): two regimes, {world}; each "
        "rung knows what those below it know. A number beside a rung is by how much each draft step may take longer, "
        f"in target calls, before its gain over `position` is gone. **{about['pair']['label']}** (*replayed*): the "
        f"best rule found on the training half for each kind of knowledge, scored on {about['num_requests']} other "
        f"requests with luck removed by a control variate, {100 * about['level']:g} % intervals; hollow: ceilings "
        "that no rule exceeds."
    )


def _gallery(store: Store) -> Data:
    from mdp.gallery import gallery
    from mdp.theory import check

    rows = []
    for entry in gallery():
        fact = next(fact for fact in check(entry.problem) if fact.id == entry.fact)
        rows.append((entry.name, entry.fact, entry.number, str(entry.value), float(entry.value),
                     float(fact.numbers[entry.number]), entry.breaks))  # fmt: skip
    keys = ("name", "fact", "number", "exact", "expected", "found", "breaks")
    columns = dict(zip(keys, zip(*rows, strict=True), strict=True))
    return {"series": [series("counterexamples", "predicted", **columns)], "about": {"count": len(rows)}}


def _gallery_caption(data: Data) -> str:
    columns = data["series"][0]["columns"]
    worst = max(abs(a - b) for a, b in zip(columns["expected"], columns["found"], strict=True))
    return (
        f"Where the theory stops: {data['about']['count']} problems in small fractions, each breaking one condition of "
        "one fact. *Predicted*: the exact loss of the best throughput (F4: by how much the bound is exceeded), found "
        f"again by the solver to {worst:.0e}. `specstop check --gallery` tells each story."
    )


FACTS = {"perfect": "perfect head", "biased": "biased head (w = 6)", "de-biased": "de-biased head"}


def _self_tuning(store: Store) -> Data:
    found, out = store.get("self_tuning"), []
    for row in found["rules"]:
        name = f"{row['rule']}, {FACTS.get(row['head'], row['head'])}"
        out += _played(name, "model", row["played"], row["settles_at"])
    worse = found["counterexample"]
    out += _played("look-ahead", "counterexample", worse["played"], worse["settles_at"])
    for panel, optimum, best in (("model", found["optimum"], None),
                                 ("counterexample", worse["optimum"], worse["best_of_family"])):  # fmt: skip
        out.append(series("optimum", "predicted", panel=panel, throughput=[optimum]))
        if best is not None:
            out.append(series("best of its family", "predicted", panel=panel, throughput=[best]))
    return {"series": out, "about": {"accuracy": found["accuracy"], "mean": MEAN, "dispersion": DISPERSION,
                                     "persistence": PERSISTENCE, "weight": found["weight"]}}  # fmt: skip


def _played(name: str, panel: str, played: Data, limit: float) -> Iterator[Data]:
    yield series(name, "simulated", panel=panel, rounds=played["rounds"], throughput=played["mean"],
                 spread=played["spread"])  # fmt: skip
    yield series(name, "predicted", panel=panel, limit=[limit])


def _self_tuning_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Self-tuning: the throughput earned so far in place of the optimal rate that nobody knows. Points: "
        "*simulated*, mean over replicas after so many rounds, bars one standard deviation of a replica; lines to the "
        f"right: the exact limits, *predicted*. Left: two regimes (mean {about['mean']:g}, dispersion "
        f"{about['dispersion']:g}, persistence {about['persistence']:g}); heads read the regime right with "
        f"probability {about['accuracy']:g}. The optimal table as a function of the rate finds its optimum; "
        "look-ahead comes close; a biased head costs more than tuning does. Right: a problem on which self-tuned "
        "look-ahead settles below what look-ahead at another rate would earn."
    )


RECIPES = (
    Recipe("threshold_map", "Optimal thresholds, and what Theorem 3.1 allows", ("prediction",), _thresholds,
           _thresholds_caption),
    Recipe("theorem_bound", "Theorem 3.1's bound against the true threshold", ("prediction",), _bound, _bound_caption),
    Recipe("phase", "Where adapting pays, and where one threshold is enough", ("phase",), _phase, _phase_caption),
    Recipe("information", "The value of information", ("information", "replayed", "audit"), _information,
           _information_caption),
    Recipe("gallery", "Counterexamples", (), _gallery, _gallery_caption),
    Recipe("self_tuning", "Self-tuning", ("self_tuning",), _self_tuning, _self_tuning_caption),
)  # fmt: skip
