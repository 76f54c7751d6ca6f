r"""What a process fitted to half of a trace predicts for a policy, and how sure the fit makes that.

The prediction is exact for the fitted process (`mdp.evaluate`): long-run throughput and rates on endless text, the
policy's parameters as they are. Which process can express a policy depends on what the rule reads: nothing, and every
process will do; a signal, and it is the chain of that signal's bins; more than that, or past rounds, and there is no
prediction.

*Interval.* Delete-a-group jackknife over training requests: G groups, the processes fitted again without each of them,
values $\theta_{(g)}$ with mean $\bar\theta$, $\mathrm{se}^2 = \frac{G-1}{G} \sum_g (\theta_{(g)} - \bar\theta)^2$,
Student's t with G - 1 degrees of freedom. The edges of a signal's bins are kept from the whole half, so that what is
refitted is a smooth function of counts. It is the sampling error of the fit alone: what the process leaves out is not
in it, and is what comparing with the replay shows.

*Texts that end.* Exact figures are of endless text. `with_ends` simulates the same rules on the same process with texts
of the trace's maximum length that end by chance as often as those of the training half; the difference is what the
ends of texts are worth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from mdp.cost import Cost
from mdp.entrants import needs
from mdp.evaluate import Evaluation, evaluate
from mdp.fit_processes import MOST_TEXTS, Fitted, fit_beta, fit_chain, fit_hidden, fit_iid, fit_position
from mdp.policy import Policy, PolicySpec
from mdp.trace import Trace
from simulate.estimate import Estimate, interval
from simulate.replay import SIGNAL_FIELDS
from simulate.requests import Requests

__all__ = ["RATES", "Prediction", "Processes", "predict", "signal_of", "with_ends"]

RATES = ("throughput", "block_efficiency", "discard_rate", "verification_rate")
DRAFT_SIDE = ("draft_prob", "top_prob", "entropy")


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes fitted to all training requests, and without each group of them.

    Attributes:
        whole: by name.
        without: one mapping a group, with the same names.
    """

    whole: dict[str, Fitted]
    without: tuple[dict[str, Fitted], ...]

    @classmethod
    def fit(
        cls, trace: Trace, train: Int[np.ndarray, " R"], signals: tuple[str, ...], num_regimes: int, groups: int,
        tell: Callable[[], Any] = lambda: None,
    ) -> "Processes":  # fmt: skip
        """Fit all of them; `tell` is called after each group."""
        chains = {name: fit_chain(trace, name, train) for name in signals}
        hidden = fit_hidden(trace, train, num_regimes)
        known = [fit(trace, train) for fit in (fit_iid, fit_position, fit_beta)]
        whole = {fitted.name: fitted for fitted in (*known, hidden, *chains.values())}

        def again(requests: np.ndarray) -> dict[str, Fitted]:
            found = [fit(trace, requests) for fit in (fit_iid, fit_position, fit_beta)]
            some = np.intersect1d(requests, train[:MOST_TEXTS])  # of those that the whole fit was made from
            found.append(fit_hidden(trace, some, num_regimes))
            for name, chain in chains.items():
                assert chain.model is not None
                found.append(fit_chain(trace, name, requests, edges=chain.model.edges))
            tell()
            return {fitted.name: fitted for fitted in found}

        groups = min(groups, len(train))
        without = [again(np.setdiff1d(train, train[g::groups])) for g in range(groups)] if len(train) > 1 else []
        return cls(whole, tuple(without))


@dataclass(frozen=True)
class Prediction:
    """Exact figures of a policy on a fitted process; `ses` of the fit, nan without groups."""

    process: str
    values: dict[str, float]
    ses: dict[str, float]
    num_groups: int

    def to_dict(self, level: float) -> dict[str, Any]:
        half = {
            name: interval(Estimate(self.values[name], se), self.num_groups, level) for name, se in self.ses.items()
        }
        return {**self.values, "interval": list(half["throughput"]), "process": self.process,
                "intervals": {name: list(ends) for name, ends in half.items()}}  # fmt: skip


def signal_of(spec: PolicySpec, rule: Policy) -> str | None:
    """The one signal that a rule reads, None if it reads nothing.

    Raises:
        ValueError: if no fitted process shows what the rule reads.
    """
    wanted = needs(rule) - {"verify_time", "step_time"}
    raw = [name for name in DRAFT_SIDE if name in wanted]
    if type(rule).end_round is not Policy.end_round:
        raise ValueError("it remembers past rounds")
    signals = {*raw, *([spec.signal or "token_accept_prob"] if wanted & SIGNAL_FIELDS else [])}
    beyond = wanted - SIGNAL_FIELDS - {*DRAFT_SIDE, "token_accept_prob"}
    if len(signals) > 1 or beyond or ("token_accept_prob" in wanted and raw):
        raise ValueError(f"it reads {', '.join(sorted(wanted))}, which no fitted process shows together")
    if "token_accept_prob" in wanted:
        return "token_accept_prob"
    return next(iter(signals), None)


def predict(
    fits: Processes, name: str, spec: PolicySpec, rule: Policy, cost: Cost, max_candidates: int
) -> Prediction:  # fmt: skip
    """The policy under the process `name`; `rule` is the spec's, solved if it has to be.

    Raises:
        ValueError: if there is no such process, or it cannot say what the policy would earn.
    """
    bare = replace(spec, policy=rule, signal=None)

    def values(fitted: Fitted) -> dict[str, float]:
        found: Evaluation = evaluate(fitted.problem(cost, max_candidates), bare)
        return {"throughput": found.throughput} | {key: float(getattr(found.tally, key)) for key in RATES[1:]}

    if name not in fits.whole:
        raise ValueError(f"no process {name} was fitted")
    whole, parts = values(fits.whole[name]), [values(fitted[name]) for fitted in fits.without]
    return Prediction(name, whole, {key: _jackknife([part[key] for part in parts]) for key in RATES}, len(parts))


def with_ends(
    fits: Processes, name: str, rules: Sequence[tuple[PolicySpec, Policy]], cost: Cost, trace: Trace,
    train: Int[np.ndarray, " R"], rounds: int, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """What each rule earns on the process `name` if texts end: every rate, simulated, and the throughput's error."""
    from simulate.rounds import simulate  # imports jax: only here

    ended = float(trace.ends[train].sum() / np.diff(trace.offsets)[train].sum())
    texts = Requests(int(np.max(trace.limit)), ended)
    bare = [replace(spec, policy=rule, signal=None) for spec, rule in rules]
    problem = fits.whole[name].problem(cost, trace.max_candidates)
    found = simulate(problem, bare, rounds=rounds, key=seed, requests=texts)
    return [
        {**{key: float(getattr(result.total, key)) for key in RATES}, "se": result.throughput.se, "end_prob": ended,
         "rounds": rounds}
        for result in found.policies
    ]  # fmt: skip


def _jackknife(values: list[float]) -> float:
    count = len(values)
    return math.sqrt((count - 1) * float(np.var(values))) if count > 1 else math.nan
