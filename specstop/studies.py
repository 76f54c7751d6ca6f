"""What `specstop study NAME` prints: each study is a recipe (`run`: a dict for JSON) and its text for people."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from specstop.output import table

__all__ = ["STUDIES", "Study"]

COST_RATIO, MEAN = 0.211, 0.82
"""Of SpecDec++'s Alpaca pair, as `study paper` fits them: what the other studies take for an ordinary pair."""

DISPERSION, PERSISTENCE, TOKEN_DISPERSION = 0.6, 0.8, 0.5
ACCURACY, WEIGHT = 0.8, 6.0


class Study(NamedTuple):
    """`run(quick)` computes, `text` writes it out."""

    run: Callable[[bool], dict[str, Any]]
    text: Callable[[Mapping[str, Any]], str]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{round(100 * value, 1) + 0.0:+.1f} %"


def _span(interval: Iterable[float]) -> str:
    return "..".join(f"{end:.4g}" for end in interval)


def _paper(quick: bool) -> dict[str, Any]:
    from specstop.prediction import predict

    return predict(curves=not quick)


def _paper_text(result: Mapping[str, Any]) -> str:
    fitted = [row | {"interval": _span(row["interval"])} for row in result["fitted"]]
    rows = [
        row | {"interval": _span(row["interval"]), "error": _percent(row["error"]),
               "within": {True: "yes", False: "MISSED", None: None}[row["within"]]}
        for row in result["predicted"]
    ]  # fmt: skip
    against = [row for row in rows if row["published"] is not None]
    alone = [row for row in rows if row["published"] is None]
    others = [row | {"error": _percent(row["error"])} for row in result["alternatives"]]
    columns = ("quantity", "dataset", "predicted", "interval", "published", "error", "within", "tag")
    largest = result["largest_error"]
    numerical = "numerical error of the rule's speedups {error:.0e}, proven within {proven_width:.0e}".format(
        **result["numerical"]
    )
    return "\n\n".join((
        "SpecDec++ (arXiv 2405.19715): published figures predicted",
        "FITTED (nothing of this is a prediction)\n" + table(fitted),
        "PREDICTED, against published figures\n" + table(against, columns),
        "PREDICTED, nothing published to hold it against\n" + table(alone, columns[:4]),
        "THE SAME with another choice\n" + table(others),
        f"Missed (beyond the interval): {len(result['missed'])} of {len(against)}: {'; '.join(result['missed'])}.\n"
        f"Largest error: {largest['quantity']}, {largest['dataset']}, {_percent(largest['error'])}.",
        "\n".join(f"- {note}" for note in [*result["notes"], numerical, "frontiers (v, d) with intervals: --json"]),
    ))  # fmt: skip


def _phase(quick: bool) -> dict[str, Any]:
    from mdp.phase import phase_diagram

    if quick:
        return phase_diagram(MEAN, [0.0, 0.6], [0.0, 0.9], [0.1, COST_RATIO], max_candidates=8).to_dict()
    return phase_diagram(
        MEAN, [0.0, 0.2, 0.4, 0.6, 0.8, 0.95], [0.0, 0.25, 0.5, 0.75, 0.9, 0.97], [0.05, 0.1, COST_RATIO, 0.4]
    ).to_dict()


def _phase_text(result: Mapping[str, Any]) -> str:
    parts = [
        f"Gain over the best fixed length in %, two regimes, mean acceptance {result['mean']:g}, at most "
        f"{result['max_candidates']} candidates.\nRows: dispersion (0: all candidates alike, 1: the regime is the "
        f"answer). Columns: persistence.\nBounds of the optimum closed to {np.max(result['width']):.1g} (relative); "
        f"{result['num_open']} problems left open."
    ]
    titles = {"gain_of_optimum": "optimum", "gain_of_threshold": "best constant threshold on survival"}
    gains = {name: np.asarray(result[name]) for name in titles}
    for c, ratio in enumerate(result["cost_ratio"]):
        for name, title in titles.items():
            rows = [
                {"dispersion": f"{spread:g}"}
                | {
                    f"{staying:g}": f"{round(100 * gains[name][d, p, c], 2) + 0.0:.2f}"
                    for p, staying in enumerate(result["persistence"])
                }
                for d, spread in enumerate(result["dispersion"])
            ]
            parts.append(f"cost ratio {ratio:g}: {title}\n{table(rows)}")
    return "\n\n".join(parts)


def _information(quick: bool) -> dict[str, Any]:
    from mdp.calibrate import two_regimes
    from mdp.information import World, value_of_information

    chain = two_regimes(MEAN, DISPERSION, PERSISTENCE)
    world = World(chain, TOKEN_DISPERSION, COST_RATIO, 1.0, max_candidates=5 if quick else 12)
    rungs = value_of_information(world, (0.75,) if quick else (0.6, 0.75, 0.9))
    about = {"mean": MEAN, "dispersion": DISPERSION, "persistence": PERSISTENCE, "token_dispersion": TOKEN_DISPERSION,
             "cost_ratio": COST_RATIO, "max_candidates": world.max_candidates}  # fmt: skip
    return {"world": about, "rungs": [rung._asdict() for rung in rungs]}


def _information_text(result: Mapping[str, Any]) -> str:
    rows = [
        {"the stopper knows": row["name"], "accuracy": row["accuracy"], "speedup": row["throughput"],
         "over the rung below": _percent(row["gain"]), "over position": _percent(row["gain_over_position"]),
         "extra time": row["extra_time"], "extra time over position": row["extra_time_over_position"]}
        for row in result["rungs"]
    ]  # fmt: skip
    world = ", ".join(f"{key} {value}" for key, value in result["world"].items())
    return (
        f"What information is worth: two regimes, {world}.\nEach rung knows what those above it know; `head` reads the "
        "regime, right with probability `accuracy` (its AUROC).\nExtra time: by how much each draft step may take "
        f"longer, in target calls, before the gain is gone.\n\n{table(rows)}"
    )


def _self_tuning(quick: bool) -> dict[str, Any]:
    from mdp.calibrate import two_regimes
    from mdp.cost import Affine
    from mdp.problem import StoppingProblem
    from mdp.self_tuning import best_threshold, counterexample, heads, lookahead_family, optimal_family, settle
    from mdp.solve import solve
    from simulate.self_tuning import play

    def grid(best: float) -> np.ndarray:
        return np.linspace(0.5, 1.1 * best, 100 if quick else 600)

    rounds = (10, 30) if quick else (10, 100, 1000, 10000)
    chain, three = heads(two_regimes(MEAN, DISPERSION, PERSISTENCE), ACCURACY, WEIGHT)
    problem = StoppingProblem(chain, Affine(COST_RATIO, 1.0), max_candidates=6 if quick else 12)
    finite = problem.lower()
    optimum = solve(problem)
    entries = [("optimal table", "perfect", optimal_family(finite), finite.accept_prob[0])]
    entries += [("look-ahead", head.name, lookahead_family(finite, head.next_output), head.output) for head in three]
    rules = []
    for rule, head, family, output in entries:
        found = settle(finite, family, output, points=31 if quick else 201)
        path = play(problem, family, output, rounds=rounds, rates=grid(optimum.throughput))
        tuned = best_threshold(finite, output)[1]
        rules.append({
            "rule": rule, "head": head, "settles_at": found.throughput, "share": found.throughput / optimum.throughput,
            "all_limits": found.stable, "best_of_family": found.best,
            "share_of_best_of_family": found.best / optimum.throughput,
            "share_of_tuned_threshold": tuned / optimum.throughput,
            "played": {"rounds": path.rounds, "mean": path.mean, "spread": path.spread},
        })  # fmt: skip
    monotone = StoppingProblem(two_regimes(MEAN, DISPERSION, 0.0), problem.cost, problem.max_candidates)
    worse = counterexample()
    found = settle(worse.lower(), lookahead_family(worse.lower()))
    path = play(worse, lookahead_family(worse.lower()), worse.lower().accept_prob[0], rounds=rounds, rates=grid(2.0))
    return {
        "optimum": optimum.throughput, "bounds": optimum.bounds, "accuracy": ACCURACY, "weight": WEIGHT,
        "rules": rules,
        "monotone": {
            "settles_at": settle(monotone.lower(), lookahead_family(monotone.lower())).throughput,
            "optimum": solve(monotone).throughput,
        },
        "counterexample": {
            "problem": worse.to_dict(), "settles_at": found.throughput, "best_of_family": found.best,
            "optimum": solve(worse).throughput,
            "played": {"rounds": path.rounds, "mean": path.mean, "spread": path.spread},
        },
    }  # fmt: skip


def _self_tuning_text(result: Mapping[str, Any]) -> str:
    rows = [
        {"rule": row["rule"], "head": row["head"], "settles at": row["settles_at"],
         "of the optimum": f"{row['share']:.1%}", "best rate's rule": f"{row['share_of_best_of_family']:.1%}",
         "best constant threshold": f"{row['share_of_tuned_threshold']:.1%}",
         **{f"played {count}": f"{mean:.3f} ± {spread:.3f}" for count, mean, spread in _played(row)}}
        for row in result["rules"]
    ]  # fmt: skip
    worse = result["counterexample"]
    monotone, last = result["monotone"], list(_played(worse))[-1]
    return "\n\n".join((
        f"Self-tuning: throughput so far in place of the optimum's. Optimum {result['optimum']:.6g} (regime seen).\n"
        f"Heads read the regime right with probability {result['accuracy']:g}; `biased` was trained with weight "
        f"{result['weight']:g} on rejections, `de-biased` undoes that,\n`perfect` knows the regime. Limits are exact, "
        "`played n` is throughput after n rounds: mean ± spread over replicas.",
        table(rows),
        f"In the monotone case (persistence 0) look-ahead settles at {monotone['settles_at']:.7g}, the optimum is "
        f"{monotone['optimum']:.7g}.",
        "Where a heuristic fails (one candidate from a hard start pays only for what it reveals):\n"
        f"self-tuned look-ahead settles at {worse['settles_at']:.6g} (played {last[0]} rounds: {last[1]:.4f} ± "
        f"{last[2]:.4f}), look-ahead at a lower rate earns {worse['best_of_family']:.6g},\nthe optimum "
        f"{worse['optimum']:.6g}.",
    ))  # fmt: skip


def _played(row: Mapping[str, Any]) -> Iterable[tuple[int, float, float]]:
    played = row["played"]
    return zip(played["rounds"], played["mean"], played["spread"], strict=True)


STUDIES = {
    "paper": Study(_paper, _paper_text),
    "phase": Study(_phase, _phase_text),
    "information": Study(_information, _information_text),
    "self-tuning": Study(_self_tuning, _self_tuning_text),
}
