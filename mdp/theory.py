r"""What theory says of one problem: each fact as a function from the solved problem to a report.

A fact *holds*, *fails* or is *not applicable* here; `why` names the condition that decided. Facts about a family of
rules (F2 one constant threshold, F3 one-step look-ahead, F5 a fixed length, F7 self-tuned look-ahead) fail where the
best member of the family loses more than `LOSS` of $\rho^*$, whatever their conditions say: the conditions are
sufficient, and `why` says which of them is broken. Facts about every problem (F1, F4, F6, F8) are checked by number.

Losses are exact: `mdp.families` compares all members on the tree of rounds and `families.optimum` is $\rho^*$ to
rounding. Where the tree is too large, $\rho^*$ is known between the solver's bounds, and a verdict is given only if it
is the same at both of them. Continuous processes are checked on the finite chain that bounds them from below.

    F1  the optimum is a threshold in survival for each (k, z)
    F2  one constant threshold on 1 - S_k is optimal
    F3  one-step look-ahead at rho* is optimal
    F4  the tightest bound of SpecDec++ Theorem 3.1 is sufficient for stopping
    F5  a length fixed at the round's start is optimal
    F6  the weighted acceptance head is biased by a known formula
    F7  self-tuned look-ahead settles at the best of its family
    F8  the more is seen of the regime, the more is earned
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from mdp import conditions, families
from mdp.acceptance import Observed
from mdp.case import ROUNDING, Case, examine
from mdp.evaluate import evaluate
from mdp.head_rule import unweighted
from mdp.policy import ThresholdTable
from mdp.policy_iteration import THRESHOLD_TOLERANCE
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.solve import solve

__all__ = ["CLAIMS", "Fact", "check"]

LOSS = 1e-9
"""A family of rules that loses more of the best throughput than this is not optimal."""

SIDES = 1e-9  # one-step look-ahead continues where its two sides are this close, relatively: rho* is rounded
WEIGHT, PUBLISHED = 6.0, 0.7  # of SpecDec++'s acceptance head: weight on rejections, and its tuned threshold

HOLDS, FAILS, OUT = "holds", "fails", "not applicable"

CLAIMS = {
    "F1": "the optimum is a threshold in survival for each (k, z)",
    "F2": "one constant threshold on 1 - S is optimal",
    "F3": "one-step look-ahead at rho* is optimal",
    "F4": "the tightest bound of SpecDec++ Theorem 3.1 is sufficient for stopping",
    "F5": "a length fixed at the round's start is optimal",
    "F6": "the weighted acceptance head is biased by a known formula",
    "F7": "self-tuned look-ahead settles at the best of its family",
    "F8": "the more is seen of the regime, the more is earned",
}


class Fact(NamedTuple):
    """One fact on one problem: its status, the numbers behind it and the condition that decided, in one line."""

    id: str
    status: str
    numbers: dict[str, Any]
    why: str


def check(problem: StoppingProblem | FiniteProblem | Case) -> list[Fact]:
    """All facts on one problem, F1 to F8.

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> facts = check(StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=12))
        >>> [fact.status for fact in facts if fact.id in ("F1", "F2", "F3", "F5")]
        ['holds', 'holds', 'holds', 'holds']
    """
    if isinstance(problem, StoppingProblem) and isinstance(problem.acceptance, Observed):
        return _hidden(problem, problem.acceptance)
    case = problem if isinstance(problem, Case) else examine(problem)
    return [fact(case) for fact in FACTS]


def _hidden(problem: StoppingProblem, process: Observed) -> list[Fact]:
    """Facts where the stopper sees symbols rather than regimes: F8, with the regimes seen, as given, and unseen."""
    why = "regimes are hidden: what decides is the belief, not survival in a regime"
    facts = [Fact(name, OUT, {}, why) for name in CLAIMS if name != "F8"]
    shown = StoppingProblem(process.visible, problem.cost, problem.max_candidates)
    seen, observed = solve(shown).bounds, solve(problem).bounds
    nothing = float(families.best_lengths(shown.lower()).throughput.max())
    holds = nothing <= observed[1] * (1 + ROUNDING) and observed[0] <= seen[1] * (1 + ROUNDING)
    numbers = {"seen": list(seen), "observed": list(observed), "nothing": nothing, "gain": observed[0] / nothing - 1.0}
    said = "seen is worth no less than observed, observed no less than nothing"
    return [*facts, Fact("F8", HOLDS if holds else FAILS, numbers, said if holds else "the order is broken")]


def _broken(case: Case, *names: Callable[[FiniteProblem], str | None]) -> list[str]:
    return [said for condition in names if (said := condition(case.finite))]


def _family(case: Case, fact: str, best: float, broken: list[str], met: str, complete: bool = True, **numbers) -> Fact:
    """The report on a family of rules whose best member earns `best`; `met` is the condition that makes it optimal."""
    least, most = (1.0 - best / bound for bound in case.bounds)
    numbers = {"loss": 1.0 - best / case.rate, "throughput": best, **numbers}
    if most <= LOSS:
        return Fact(fact, HOLDS, numbers, met if not broken else f"nothing is lost here, although {'; '.join(broken)}")
    if least <= LOSS:
        return Fact(fact, OUT, numbers, "the optimum is not known well enough to tell")
    if not complete:
        return Fact(fact, OUT, numbers, "too many nodes: members with lower thresholds were not compared")
    return Fact(fact, FAILS, numbers, "; ".join(broken) or f"its condition is met and yet it loses: {met}")


def threshold_form(case: Case) -> Fact:
    """F1: CONTINUE - STOP is negative below S*(k, z) and not negative from there on."""
    ahead, at = case.ahead, np.minimum(case.threshold, 2.0)[..., None]
    knots = ahead.knots[:, None, :]
    early = np.where(knots < at, ahead.lower, -np.inf)  # worth drafting on, below the threshold
    late = np.where(knots > at, -ahead.upper, -np.inf)  # not worth it, above
    counts = case.met if case.finite.persistent else np.ones_like(case.met)
    wrong = np.where(counts[..., None], np.maximum(early, late), -np.inf)
    k, z, n = np.unravel_index(wrong.argmax(), wrong.shape)
    numbers: dict[str, Any] = {"violation": max(float(wrong.max()), 0.0), "state": [int(k), int(z)],
                               "survival": float(ahead.knots[k, n])}  # fmt: skip
    holds = numbers["violation"] <= THRESHOLD_TOLERANCE
    if not holds:
        return Fact("F1", FAILS, numbers, f"CONTINUE and STOP change places more than once at k {k}, regime {z}")
    if np.ptp(case.finite.accept_prob, axis=0).max() <= ROUNDING and not conditions.concave(case.finite):
        capped = np.where(counts, np.minimum(case.threshold, 1.0), np.nan)
        fall = float(np.nanmax(capped[:-1] - capped[1:], initial=0.0))
        numbers["largest_fall_in_depth"] = max(fall, 0.0)
    why = "rounds renew" if not case.finite.persistent else "k t_d + V(k) never falls"
    return Fact("F1", HOLDS, numbers, why)


def constant_threshold(case: Case) -> Fact:
    """F2: the best constant threshold on 1 - S."""
    broken = _broken(case, conditions.varying_next_accept, conditions.persists, conditions.bent)
    steps = np.diff(case.finite.verify_time)
    accept = float(case.finite.next_accept_prob[0][case.met[0]].max())
    predicted = case.price * (case.finite.draft_time + float(steps.mean())) / accept if accept > 0 else np.inf
    if not case.exact:
        if broken:
            return Fact("F2", OUT, {}, f"{case.name}: no threshold has an exact value, and {'; '.join(broken)}")
        error = float(np.abs(np.minimum(case.threshold, 1.0) - min(predicted, 1.0)).max())
        numbers = {"loss": None, "threshold": 1.0 - predicted, "threshold_error": error}
        held = error <= 1e-3
        return Fact(
            "F2", HOLDS if held else FAILS, numbers, "the next acceptance is constant, rounds renew, V is affine"
        )
    try:
        found = families.ladder(case.finite, "survival")
    except ValueError as error:
        return Fact("F2", OUT, {}, str(error))
    met = "the next acceptance is constant, rounds renew, V is affine"
    numbers: dict[str, Any] = {}
    if not broken:
        numbers["predicted_threshold"] = 1.0 - predicted
    elif not conditions.many_survivals(case.finite) and not case.finite.persistent:
        broken, met = [], "survival is known in advance and falls with every candidate"
    best, at = found.best
    return _family(case, "F2", best, broken, met, found.complete, threshold=1.0 - at, members=len(found.low), **numbers)


def one_step(case: Case) -> Fact:
    r"""F3: continue iff one more candidate alone pays at rho*.

    Beside it the best constant threshold on $1 - S \bar a$, and the rule that prices time at its own round's rate.
    """
    broken = _broken(case, conditions.persists, conditions.concave, conditions.revealing)
    bias = case.solution.bias if case.exact else np.zeros(case.finite.num_regimes)
    table = families.lookahead_table(case.finite, case.price, bias) * (1.0 - SIDES)
    gap = np.where(case.met, np.minimum(table, 1.0) - np.minimum(case.threshold, 1.0), 0.0)
    off = np.abs(gap) > 1e-6
    k, z = np.unravel_index(np.abs(gap).argmax(), gap.shape)
    numbers: dict[str, Any] = {
        "stops_too_soon": int((off & (gap > 0)).sum()), "continues_too_long": int((off & (gap < 0)).sum()),
        "state": [int(k), int(z)],
    }  # fmt: skip
    met = "rounds renew, V is convex and the case is monotone"
    if not case.exact:
        if broken:
            return Fact("F3", OUT, numbers, f"{case.name}: no look-ahead has an exact value, and {'; '.join(broken)}")
        error = float(np.abs(gap).max())
        return Fact("F3", HOLDS if error <= 1e-3 else FAILS, {"loss": None, "threshold_error": error}, met)
    try:
        best = evaluate(case.finite, ThresholdTable(table)).throughput
        lookahead, at = families.ladder(case.finite, "lookahead").best
        numbers |= {"lookahead_loss": 1.0 - lookahead / case.rate, "lookahead_threshold": 1.0 - at,
                    "goodput_loss": 1.0 - families.goodput(case.finite) / case.rate}  # fmt: skip
    except ValueError as error:
        return Fact("F3", OUT, numbers, str(error))
    return _family(case, "F3", best, broken, met, **numbers)


def sufficient_bound(case: Case) -> Fact:
    r"""F4: 1 - S*(k, z) <= D(k, z) / (t_d + D(k, z)) <= the bound at the largest D = c_2 + Delta."""
    finite, ahead = case.finite, case.ahead
    worth = (ahead.lower[..., -1] + ahead.upper[..., -1]) / 2 / case.price  # D(k, z), in time
    met = np.where(case.met, worth, -np.inf)
    k, z = np.unravel_index(met.argmax(), met.shape)
    most, least_time = float(met.max()), finite.draft_time
    per_state = np.maximum(worth, 0.0) / (least_time + np.maximum(worth, 0.0))
    rejection = 1.0 - case.threshold
    excess = np.where(case.met, rejection - per_state, -np.inf)
    charge = float(finite.verify_time[0]) - least_time  # c_2
    drafted_on = float(np.where(case.met, rejection, -np.inf).max())  # the greatest 1 - S* of all
    numbers: dict[str, Any] = {
        "bound": max(most, 0.0) / (least_time + max(most, 0.0)), "delta": most - charge,
        "delta_zero_bound": max(charge, 0.0) / (least_time + max(charge, 0.0)), "state": [int(k), int(z)],
        "largest_advantage": most,
        "advantage_error": float((ahead.upper - ahead.lower)[..., -1][case.met].max() / case.price),
        "threshold": drafted_on if np.isfinite(drafted_on) else None,
        "excess": float(excess.max()) if np.isfinite(drafted_on) else None,
    }  # fmt: skip
    if not np.ptp(finite.verify_time) and (last := case.met[-1] & (worth[-1] > 0)).any():
        numbers["equality_error"] = float(np.abs(rejection - per_state)[-1][last].max())
    holds = numbers["excess"] is None or numbers["excess"] <= 1e-6
    said = conditions.falling(case.finite)
    if holds:
        return Fact("F4", HOLDS, numbers, "V never falls" if not said else f"it is not exceeded here, although {said}")
    return Fact("F4", FAILS, numbers, said or f"the optimum drafts on past the bound at k {k}, regime {z}")


def fixed_length(case: Case) -> Fact:
    """F5: the best length chosen once the start regime is known, and the best single one."""
    found = case.lengths
    single = int(found.throughput.argmax())
    return _family(
        case, "F5", found.by_start, _broken(case, conditions.seen_to_vary),
        "acceptances are known once the round's start is", lengths=found.chosen, length=single,
        one_length_loss=1.0 - float(found.throughput[single]) / case.rate,
    )  # fmt: skip


def weighted_head(case: Case) -> Fact:
    """F6: the minimiser of the weighted loss at each regime's acceptance, found by number and by formula."""
    inside = np.unique(np.clip(case.finite.accept_prob[0], 0.01, 0.99))
    shown = np.unique(np.quantile(inside, np.linspace(0, 1, 5), method="nearest"))

    def loss(logit: float, accept: float) -> float:
        return WEIGHT * (1.0 - accept) * np.logaddexp(0.0, logit) + accept * np.logaddexp(0.0, -logit)

    found = [
        minimize_scalar(loss, bounds=(-30, 30), args=(a,), method="bounded", options={"xatol": 1e-10}) for a in shown
    ]
    answer = 1.0 / (1.0 + np.exp(-np.array([best.x for best in found])))  # type: ignore[union-attr]
    error = float(np.abs(unweighted(answer, WEIGHT) - shown).max())
    numbers = {"weight": WEIGHT, "error": error, "published_threshold": PUBLISHED,
               "means": 1.0 - unweighted(1.0 - PUBLISHED, WEIGHT)}  # fmt: skip
    why = f"a head that sees the regime, {len(shown)} acceptances, per token"
    return Fact("F6", HOLDS if error <= 1e-6 else FAILS, numbers, why)


def self_tuned(case: Case) -> Fact:
    r"""F7: look-ahead at $\rho$ earns $R(\rho)$, a step function; where $\rho_n$ can settle against the family's best.

    It settles where $R$ crosses the diagonal from above, within a step or at its end.
    """
    if said := conditions.persists(case.finite):
        return Fact("F7", OUT, {}, f"{said}: the rule needs the bias as a function of the rate")
    broken = _broken(case, conditions.concave, conditions.revealing)
    met = "look-ahead maximises tokens less time at every rate"
    if not case.exact:
        return Fact("F7", OUT if broken else HOLDS, {}, f"{case.name}: {'; '.join(broken) or met}")
    try:
        steps = families.ladder(case.finite, "rate")
    except ValueError as error:
        return Fact("F7", OUT, {}, str(error))
    rates, low, high = steps.throughput, steps.low, steps.high
    within = rates[(low < rates) & (rates <= high)]
    at_end = high[1:][(rates[1:] > high[1:]) & (high[1:] * (1 + ROUNDING) >= rates[:-1])]
    settles = np.r_[within, at_end]
    if not steps.complete:
        return Fact("F7", OUT, {}, "too many nodes to follow look-ahead at every rate")
    best, lowest = float(rates.max()), float(settles.min())
    numbers = {"loss": 1.0 - lowest / best, "settles_at": [lowest, float(settles.max())], "family_best": best,
               "family_loss": 1.0 - best / case.rate}  # fmt: skip
    if numbers["loss"] <= LOSS:
        why = met if not broken else f"nothing is lost here, although {'; '.join(broken)}"
        return Fact("F7", HOLDS, numbers, why)
    return Fact("F7", FAILS, numbers, "; ".join(broken) or "its condition is met and yet it settles below")


def information(case: Case) -> Fact:
    """F8: with the regime seen never less than with nothing seen, where a fixed length is best."""
    if said := conditions.persists(case.finite):
        return Fact("F8", OUT, {}, f"{said}: hidden and persistent is a problem of its own")
    nothing = float(case.lengths.throughput.max())
    numbers = {"seen": case.rate, "nothing": nothing, "gain": case.rate / nothing - 1.0}
    holds = nothing <= case.bounds[1] * (1 + ROUNDING)
    return Fact(
        "F8", HOLDS if holds else FAILS, numbers, "the regime is seen; with nothing seen a fixed length is best"
    )


FACTS: tuple[Callable[[Case], Fact], ...] = (
    threshold_form, constant_threshold, one_step, sufficient_bound, fixed_length, weighted_head, self_tuned,
    information,
)  # fmt: skip
