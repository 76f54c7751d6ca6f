r"""The referee: how much a deployed policy leaves on a trace, with bounds from both sides.

On a trace every policy emits the same text (`simulate.starts`), so policies differ in time alone, and what $\pi$ leaves
to $\sigma$ is the share $1 - E[T^\sigma]/E[T^\pi]$ of its time, the same as $1 - \rho_\pi/\rho_\sigma$.

*Below*: rules. Requests are split in two halves by a hash (`mdp.fit`); everything is fitted, solved and chosen on the
training half (`simulate.ladder`), and every rule, the deployed one included, is scored on the same other half. What a
rule chosen beforehand saves there can be had: a lower bound on what is left.

*Above*: no rule that does not foresee, whatever it looks at, takes less than the least time under a fair charge for
foresight (`simulate.relaxation`, which says why it is a bound and of what). Its weights come from the training half.
To rules with a `nothing` to look at it is loose, and they can be counted: every fixed length, each with its own limit,
together as safe as one (Bonferroni). Where a trace holds no coins the clairvoyant is the only ceiling.

*Less noise.* The charge $M^\pi$ has mean 0 for every rule and is what a policy's luck consists of, so $T^\pi + M^\pi$
estimates the same mean with less of it (a control variate); `replayed` is the plain figure. Path by path it is also no
less than the ceiling's time, so every rule stays below the ceiling on any trace. The clairvoyant is not charged.

*Estimate.* With a signal's calibration and chain in the place of $a_i, \beta_i$ the same relaxation says what is left
to rules that read that signal. Its charges are fair as far as the fitted chain is true: `modelled`, not a bound.

*Intervals* are Student's, clustered by request, of ratios paired by request. "x % left, between y and z": x is what the
best rule found with the same information saves; y the lower limit of that, or 0, since the deployed rule itself is one
of them; z the upper limit of what the ceiling saves. Each end errs with probability (1 - level)/2.

*Acceptance by depth* is what the deployed policy's own rounds tell (`mdp.product_limit`): depths it never tested are
unidentified, and where it reads the candidates the rest looks too good, for it stops where rejection is likely.

*The setting to use* is the shortest fixed length that ties with the best one on the training half, unless the rule of
a higher rung that can be deployed beats it, and what was found so far, clear of zero on the test half. If that does not
beat the deployed policy clear of zero, the advice is to keep it.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from mdp.cost import Cost
from mdp.entrants import needs, read
from mdp.fit import PERFECT, SignalModel, split_requests
from mdp.policy import FixedLength, Policy, PolicySpec, ThresholdTable
from mdp.product_limit import ProductLimit, product_limit
from mdp.trace import Trace
from simulate.estimate import FEW_CLUSTERS, Estimate, interval, ratio, shortest_tied
from simulate.ladder import INFORMATION, SIGNALS_SEEN, Half, Rule, climb, fixed_rounds, halves, share
from simulate.relaxation import COINS, charge, fit_penalty, least_times
from simulate.replay import SIGNAL_FIELDS, measured_cost, replay_rounds
from simulate.starts import Rounds

__all__ = ["CEILING", "CLAIRVOYANT", "Audit", "Rung", "audit"]

CEILING, CLAIRVOYANT, EVERY_LENGTH = "all but the draws", "clairvoyant", "every fixed length"


@dataclass(frozen=True)
class Rung:
    """One step of the ladder, scored on the test half; estimates are None where the trace lacks something.

    Attributes:
        information: what is seen.
        bound: `lower` (a rule that has it), `upper` (a ceiling), or `needs X`.
        policy: the rule found, as a policy string where there is one; None of a ceiling.
        throughput: luck removed where the trace allows it; `replayed` as it came.
        left: share of the deployed policy's time that it saves.
        step: share of the time of the rung below that it saves.
    """

    information: str
    bound: str
    policy: str | None = None
    throughput: Estimate | None = None
    replayed: Estimate | None = None
    left: Estimate | None = None
    step: Estimate | None = None


@dataclass(frozen=True)
class Audit:
    """What a deployed policy earns and leaves; see the module docstring.

    Attributes:
        deployed: the policy's own row; its `information` is what it looks at.
        ladder: bottom to top.
        left, between: x, and (y, z): shares of the policy's time.
        ceiling: what z is the limit of: `every fixed length`, `all but the draws` or `clairvoyant`.
        modelled: what the fitted chain leaves to rules that read the policy's signal: an estimate, no bound.
        acceptance: by depth, from the deployed policy's own rounds; `selected` if it reads the candidates.
        setting, gain, change: the rule to run, the share of time it saves, and whether that is clear of zero.
    """

    deployed: Rung
    ladder: tuple[Rung, ...]
    left: float
    between: tuple[float, float]
    ceiling: str
    modelled: Estimate | None
    acceptance: ProductLimit
    selected: bool
    setting: str
    gain: Estimate
    change: bool
    num_requests: int
    num_trained: int
    plain_time: float
    draft_time: float
    verify_time: tuple[float, ...]
    cost_origin: str
    level: float
    rollouts: str

    @property
    def headline(self) -> str:
        """The one line."""
        low, high = (100 * x for x in self.between)
        return f"{100 * self.left:.1f} % left, between {low:.1f} and {high:.1f}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before the figures are used."""
        said = []
        if self.num_requests < FEW_CLUSTERS:
            said.append(f"only {self.num_requests} requests scored: intervals lean on a shape that nobody has checked")
        if self.ceiling == CLAIRVOYANT:
            said.append("no scored rollouts: the only ceiling is the clairvoyant, which no rule comes near")
        if self.rollouts == "imputed":
            said.append("features past a rejection are imputed, and better than they are: so is every rule that looks")
        if self.acceptance.unidentified:
            depths = self.acceptance.unidentified
            said.append(f"its own rounds tell nothing of acceptance at depths {depths[0]} to {depths[-1]}")
        return tuple(said)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop audit`."""
        return {
            "headline": self.headline, "left": self.left, "between": list(self.between), "ceiling": self.ceiling,
            "modelled": self._estimate(self.modelled), "deployed": self._row(self.deployed),
            "ladder": [self._row(rung) for rung in self.ladder],
            "setting": {"policy": self.setting, "gain": self._estimate(self.gain), "change": self.change},
            "acceptance": self.acceptance.to_dict() | {"selected": self.selected},
            "num_requests": self.num_requests, "num_trained": self.num_trained, "level": self.level,
            "draft_time": self.draft_time, "verify_time": list(self.verify_time), "cost_origin": self.cost_origin,
            "notes": list(self.notes),
        }  # fmt: skip

    def _row(self, rung: Rung) -> dict[str, Any]:
        out: dict[str, Any] = {"information": rung.information, "bound": rung.bound, "policy": rung.policy}
        out["speedup"] = None if rung.throughput is None else rung.throughput.value * self.plain_time
        return out | {key: self._estimate(getattr(rung, key)) for key in ("throughput", "replayed", "left", "step")}

    def _estimate(self, estimate: Estimate | None) -> dict[str, Any] | None:
        if estimate is None:
            return None
        bounds = interval(estimate, self.num_requests, self.level)
        return {"value": estimate.value, "se": estimate.se, "interval": list(bounds)}


def audit(trace: Trace, policy: str | Policy | PolicySpec, *, cost: Cost | None = None, level: float = 0.95) -> Audit:
    """How much a policy leaves on the trace, and what to run instead.

    Args:
        trace: a recorded pair; half of its requests are scored.
        policy: the deployed policy, a string or a rule of one's own.
        cost: declared times; None takes the times measured with the trace.
        level: of the intervals.

    Raises:
        ValueError: if the policy foresees, the trace lacks what it needs, or holds too few requests; one line.
    """
    interval(Estimate(1.0, 0.0), 2, level)  # refuses a bad level before any work
    origin = "measured" if cost is None else "declared"
    cost = measured_cost(trace) if cost is None else cost
    (spec,) = read([policy])
    information = _information(spec)
    halved = split_requests(trace)
    if min(map(len, halved)) < 2:
        raise ValueError(f"trace: an audit needs at least 4 different prompts, got {trace.num_requests} requests")
    log = replay_rounds(trace, spec, cost=cost, requests=halved[1].tolist())
    train, test, penalty = halves(trace, cost, *halved)
    own = (test.starts.offsets[np.searchsorted(halved[1], log.request)] + log.start, log.num_drafted)
    own_times, own_plain = test.times(own), test.times(own, charged=False)

    rules, models = climb(trace, cost, train, test)
    ladder, below = [], None
    for rule in rules:
        ladder.append(_rung(test, rule, own_times, below))
        below = below if rule.rounds is None else test.times(rule.rounds)
    assert below is not None
    ceilings = {} if penalty is None else {CEILING: least_times(test.starts, test.round_times, penalty)}
    ceilings[CLAIRVOYANT] = least_times(test.starts, test.round_times)
    for name, least in ceilings.items():
        left = share(least, own_times if name == CEILING else own_plain)
        ladder.append(Rung(name, "upper", throughput=ratio(test.starts.lengths, least), left=left,
                           step=share(least, below)))  # fmt: skip
        below = least

    at_hand = [rule for rule in rules[: INFORMATION.index(information) + 1] if rule.rounds is not None]
    saved = share(test.times(at_hand[-1].rounds), own_times)  # type: ignore[arg-type]
    low = interval(saved, len(own_times), level)[0]
    ceiling, high = _upper(test, spec, own_times, next(r for r in ladder if r.bound == "upper"), level)
    setting, gain, change = _setting(train, test, rules, spec, own_times, level)
    return Audit(
        deployed=_rung(test, Rule(information, spec.text, own), own_times, None),
        ladder=tuple(ladder),
        left=max(saved.value, 0.0),
        between=(max(low, 0.0), max(high, 0.0)),
        ceiling=ceiling,
        modelled=_modelled(train, test, models.get(_signal(spec) or ""), own),
        acceptance=product_limit(log.num_drafted, log.num_accepted, log.request, trace.max_candidates),
        selected=information in SIGNALS_SEEN,
        setting=setting,
        gain=gain,
        change=change,
        num_requests=len(test.requests),
        num_trained=len(train.requests),
        plain_time=float(cost.verify_times(trace.max_candidates)[0]),
        draft_time=float(cost.draft_time),
        verify_time=tuple(map(float, cost.verify_times(trace.max_candidates))),
        cost_origin=origin,
        level=level,
        rollouts=trace.rollouts,
    )


def _wanted(spec: PolicySpec) -> frozenset[str]:
    return frozenset(ThresholdTable.needs) if spec.policy is None else needs(spec.policy)


def _signal(spec: PolicySpec) -> str | None:
    """The signal that feeds the rule; None if it reads none."""
    return (spec.signal or PERFECT) if _wanted(spec) & SIGNAL_FIELDS else None


def _information(spec: PolicySpec) -> str:
    """The lowest rung that sees all the policy looks at.

    Raises:
        ValueError: if it foresees.
    """
    wanted = _wanted(spec)
    if "next_accepted" in wanted:
        raise ValueError(f"policy {spec.text!r} foresees: audit a rule that can be run")
    seen = wanted | {_signal(spec)}
    for information, signals in reversed(SIGNALS_SEEN.items()):
        if seen & set(signals):
            return information
    return "nothing" if isinstance(spec.policy, FixedLength) else "history"


def _rung(test: Half, rule: Rule, own: Float[np.ndarray, " R"], below: Float[np.ndarray, " R"] | None) -> Rung:
    if rule.rounds is None:
        return Rung(rule.information, f"needs {rule.missing}")
    time, plain = test.times(rule.rounds), test.times(rule.rounds, charged=False)
    return Rung(
        rule.information,
        "lower",
        rule.label,
        throughput=ratio(test.starts.lengths, time),
        replayed=ratio(test.starts.lengths, plain),
        left=share(time, own),
        step=None if below is None else share(time, below),
    )


def _upper(
    test: Half, spec: PolicySpec, own: Float[np.ndarray, " R"], ceiling: Rung, level: float
) -> tuple[str, float]:
    """What limits the rules with the policy's information, and the upper limit of what they can save."""
    count = len(own)
    if isinstance(spec.policy, FixedLength):
        lengths = range(test.starts.max_candidates + 1)
        safe = 1.0 - (1.0 - level) / len(lengths)
        saved = [share(test.times(fixed_rounds(test.starts, k)), own) for k in lengths]
        return EVERY_LENGTH, max(interval(each, count, safe)[1] for each in saved)
    assert ceiling.left is not None
    return ceiling.information, interval(ceiling.left, count, level)[1]


def _modelled(train: Half, test: Half, model: SignalModel | None, own: Rounds) -> Estimate | None:
    """What rules that read this signal could still save if its fitted chain were true."""
    if model is None or model.signal == PERFECT:
        return None
    first, second = (_as_coins(half, model) for half in (train, test))
    rate = float(np.sum(test.starts.lengths) / test.times(own, charged=False).sum())
    penalty = fit_penalty(first.starts, first.round_times, rate)
    charged = replace(second, charges=charge(second.starts, penalty))
    return share(least_times(second.starts, second.round_times, penalty), charged.times(own))


def _as_coins(half: Half, model: SignalModel) -> Half:
    """The half as it would be if acceptance were what the signal's model says."""
    values = half.starts.features[model.signal]
    regime = model.regime(values)
    before = np.concatenate([np.zeros((len(regime), 1), dtype=np.int64), regime[:, :-1]], axis=1)
    assert model.next_accept_prob is not None
    coins = dict(zip(COINS, (model.accept_prob(values), model.next_accept_prob[before]), strict=True))
    return replace(half, starts=replace(half.starts, features=coins), charges=None)


def _setting(
    train: Half, test: Half, rules: tuple[Rule, ...], spec: PolicySpec, own: Float[np.ndarray, " R"], level: float
) -> tuple[str, Estimate, bool]:
    """The rule to run, the share of the deployed policy's time it saves, and whether that is clear of zero."""

    def clear(gain: Estimate) -> bool:
        return interval(gain, len(own), level)[0] > 0

    lengths = range(train.starts.max_candidates + 1)
    times = [train.times(fixed_rounds(train.starts, k)) for k in lengths]
    shortest = shortest_tied([(train.starts.lengths, time) for time in times], level)
    setting, kept = f"fixed:{shortest}", test.times(fixed_rounds(test.starts, shortest))
    for rule in rules:
        if rule.rounds is None or rule.information in ("nothing", INFORMATION[-1]):
            continue
        time = test.times(rule.rounds)
        if clear(share(time, kept)):
            setting, kept = rule.label or "", time
    gain = share(kept, own)
    if clear(gain) and setting != spec.text:
        return setting, gain, True
    return spec.text, Estimate(0.0, 0.0), False
