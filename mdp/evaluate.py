r"""Exact value of any stopping rule, without sampling and without a grid.

Under a rule that sees survival, regime and depth, a round is a finite tree; what matters of a path is where it is
($z_k$) and its survival $S_k$, which depends only on how often each regime was visited. Paths that agree in both are
merged, so depth $k$ holds at most $Z \binom{k+Z-1}{Z-1}$ states instead of $Z^k$. Mass flows forward: a state that
continues adds $t_d$ and its candidate's expected acceptance, one that stops adds $V(k)$. Every round ends in one more
token (correction or bonus).

Renewal: throughput = E[emitted] / E[time]. Persistent: the same under the stationary law of the start regime, which
must be unique: a rule that splits the start regimes into several recurrent classes has no one throughput.

The oracle needs no tree: it stops after k candidates if and only if exactly k would be accepted.

With hidden regimes the round is a tree of symbol histories (`mdp.histories`).

Of continuous acceptances only the mean matters to a fixed length and to the oracle. Where they are drawn afresh, a
threshold in survival is enclosed between two roundings (`mdp.rounded`); other rules are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.acceptance import Observed
from mdp.chain import recurrent_classes, stationary_law
from mdp.continuous import BetaMixture
from mdp.entrants import fit_depth, label, needs, read
from mdp.histories import histories_law
from mdp.metrics import Tally
from mdp.policy import (
    MERGE,
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Policy,
    PolicySpec,
    RejectionThreshold,
    ThresholdTable,
)
from mdp.problem import FiniteProblem, StoppingProblem
from mdp.rounded import enclose

__all__ = ["SHOWN", "Evaluation", "RoundLaw", "TreeTooLarge", "check_exact", "evaluate", "long_run",
           "observer", "round_law", "round_laws"]  # fmt: skip

MAX_STATES = 5_000_000
WIDEST = 1e-3  # relative width of an enclosure that still is a value
SHOWN = frozenset({"survival", "next_accept_prob", "regime", "token_accept_prob", "verify_time", "step_time"})
"""What any finite problem shows (`observer`)."""

SAME_RATE = 1e-9  # classes whose throughputs differ by less, relatively, are equally good


class RoundLaw(NamedTuple):
    """Expected counts of one round per start law (rows: `initial` alone if rounds renew, else each regime)."""

    emitted: Float[np.ndarray, " B"]
    time: Float[np.ndarray, " B"]
    drafted: Float[np.ndarray, " B"]
    next_start: Float[np.ndarray, "B Z"]


@dataclass(frozen=True)
class Evaluation:
    """Exact long-run figures of one policy; `tally` holds expectations per round.

    `bounds` are those of the best policy, if they are known; then `gap` = 1 - throughput / bound for each.
    `throughput_bounds` are proven bounds on this policy's own throughput where its value is enclosed, not exact.
    """

    policy: str
    tally: Tally
    speedup: float
    bounds: tuple[float, float] | None = None
    throughput_bounds: tuple[float, float] | None = None

    @property
    def throughput(self) -> float:
        """Long-run tokens per unit time."""
        return float(self.tally.throughput)

    @property
    def gap(self) -> tuple[float, float] | None:
        """What is lost against the proven lower and the proven upper bound of the optimum; not clipped."""
        return None if self.bounds is None else tuple(1.0 - self.throughput / bound for bound in self.bounds)  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop evaluate --json`."""
        names = ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
        return {"policy": self.policy, "throughput": self.throughput, "speedup": self.speedup,
                **{name: float(getattr(self.tally, name)) for name in names},
                "gap": None if self.gap is None else list(self.gap),
                **({} if self.throughput_bounds is None else {"throughput_bounds": list(self.throughput_bounds)}),
                }  # fmt: skip


def evaluate(
    problem: StoppingProblem | FiniteProblem, policy: str | Policy | PolicySpec, *, solution: Any = None
) -> Evaluation:
    """Exact throughput and rates of `policy` on `problem`.

    Args:
        problem: finite, or continuous for the rules that `check_exact` lets pass.
        policy: a policy string, or a rule without memory between rounds.
        solution: of `mdp.solve` for the same problem; supplies the rule for `optimal` and the gap.

    Raises:
        ValueError: if the rule does not fit the problem, keeps state, has several recurrent classes, or the tree
            is too large (simulate it instead).

    Example:
        >>> from mdp.acceptance import IID
        >>> from mdp.cost import Affine
        >>> problem = StoppingProblem(IID(0.5), Affine(draft_time=0.5, verify_time=1.0), max_candidates=4)
        >>> evaluate(problem, "fixed:2").throughput  # (1 + 1/2 + 1/4) / (2 * 0.5 + 1)
        0.875
    """
    finite = problem.unseen() if isinstance(problem, StoppingProblem) else problem
    (spec,) = read([policy])
    if spec.signal is not None:
        raise ValueError(f"policy {spec.text!r}: signal={spec.signal} is for traces; a problem shows its survival")
    if isinstance(problem, StoppingProblem):
        check_exact(problem, spec)
    rule = spec.policy
    if rule is None:
        if solution is None:
            raise ValueError(f"policy {spec.text!r}: solve the problem first and pass its solution")
        rule = solution.policy
    process = problem.acceptance if isinstance(problem, StoppingProblem) else None
    hidden = process if isinstance(process, Observed) else None
    rule = fit_depth(spec.text, rule, finite.max_candidates, finite.num_regimes if hidden is None else 1)
    if isinstance(problem, StoppingProblem) and _looks(problem, spec):
        return _enclosed(problem, spec.text, rule, None if solution is None else solution.bounds)
    if hidden is not None and not isinstance(rule, (FixedLength, Oracle)):  # those do not look
        law = RoundLaw(*histories_law(finite, hidden.observation, rule), next_start=np.zeros((1, 0)))
    else:
        features = problem.acceptance.features() if isinstance(problem, StoppingProblem) else {}
        law = round_law(finite, rule, features)
    weights = long_run(law, finite.initial, spec.text) if finite.persistent else np.ones(1)
    emitted, drafted, time = (float(weights @ part) for part in (law.emitted, law.drafted, law.time))
    # Where all candidates are accepted the difference is rounding, of either sign.
    tally = Tally(num_target_calls=1.0, num_drafted=drafted, num_emitted=emitted,
                  num_discarded=max(drafted - (emitted - 1.0), 0.0), num_cut=0.0, time=time)  # fmt: skip
    speedup = float(tally.throughput) * float(finite.verify_time[0])
    return Evaluation(spec.text, tally, speedup, None if solution is None else solution.bounds)


def check_exact(problem: StoppingProblem, spec: PolicySpec) -> None:
    """Refuse, before any work, a rule that has no exact value on the problem.

    Raises:
        ValueError: if acceptances are continuous and the rule looks at them, other than at survival where they are
            drawn afresh.
    """
    if not _looks(problem, spec):
        return
    kind, thresholds = problem.acceptance.kind, (RejectionThreshold, LookaheadThreshold, ThresholdTable)
    if not isinstance(problem.acceptance, BetaMixture):
        raise ValueError(
            f"policy {spec.text!r}: on {kind} only fixed and oracle have an exact value; simulate it instead"
        )
    if spec.policy is not None and not isinstance(spec.policy, thresholds):
        raise ValueError(f"policy {spec.text!r}: on {kind} only thresholds in survival can be enclosed; simulate it")


def _looks(problem: StoppingProblem, spec: PolicySpec) -> bool:
    """Whether acceptances are continuous and the rule may look at them."""
    process = problem.acceptance
    known = process.finite or isinstance(process, Observed) or (isinstance(process, BetaMixture) and process.sure)
    return not known and not isinstance(spec.policy, (FixedLength, Oracle))


def _enclosed(problem: StoppingProblem, text: str, rule: Policy, bounds: tuple[float, float] | None) -> Evaluation:
    """A threshold in survival on acceptances drawn afresh: the middle of its enclosure."""
    process, finite = problem.acceptance, problem.unseen()
    assert isinstance(process, BetaMixture)
    if isinstance(rule, ThresholdTable):
        threshold = rule.survival_threshold[:, 0]
    else:
        assert isinstance(rule, (RejectionThreshold, LookaheadThreshold))
        scale = process.mean if isinstance(rule, LookaheadThreshold) else 1.0
        level = 1.0 - rule.threshold
        threshold = np.full(finite.max_candidates, level / scale if scale > 0 else np.inf if level > 0 else 0.0)
    found = enclose(process, threshold, finite.round_time)
    lower, upper = found.emitted[0] / found.time[1], found.emitted[1] / found.time[0]
    if upper - lower > WIDEST * lower:
        raise ValueError(
            f"policy {text!r}: its throughput is only known to lie in [{lower:.6g}, {upper:.6g}], relative width "
            f"{upper / lower - 1.0:.1e}; simulate it instead"
        )
    emitted, drafted, time = (float(part.mean()) for part in (found.emitted, found.drafted, found.time))
    tally = Tally(num_target_calls=1.0, num_drafted=drafted, num_emitted=emitted,
                  num_discarded=max(drafted - (emitted - 1.0), 0.0), num_cut=0.0, time=time)  # fmt: skip
    speedup = float(tally.throughput) * float(finite.verify_time[0])
    return Evaluation(text, tally, speedup, bounds, (float(lower), float(upper)))


def long_run(law: RoundLaw, initial: Float[np.ndarray, " Z"], text: str) -> Float[np.ndarray, " Z"]:
    """Stationary law of the start regime of a persistent problem under a policy.

    Raises:
        ValueError: if the start regimes fall into recurrent classes with different throughputs.
    """
    classes = recurrent_classes(law.next_start, initial)
    laws = [stationary_law(law.next_start, members) for members in classes]
    rates = [(weights @ law.emitted) / (weights @ law.time) for weights in laws]
    if max(rates) - min(rates) > SAME_RATE * max(rates):
        raise ValueError(
            f"policy {text!r}: its start regimes fall into {len(classes)} recurrent classes with throughputs "
            f"from {min(rates):.6g} to {max(rates):.6g}"
        )
    return laws[0]


def observer(problem: FiniteProblem, features: Mapping[str, np.ndarray]) -> Callable[..., Observation]:
    """What a rule sees with k < K candidates in each of n states: a function of k, regime [n] and survival [n] or None.

    `features`: as for `round_law`.
    """
    next_accept_prob, step_time = problem.next_accept_prob, problem.step_time

    def observe(k: int, regime: np.ndarray, survival: np.ndarray | None) -> Observation:
        none = np.ones(len(regime))
        return Observation(
            num_candidates=k,
            survival=survival,
            next_accept_prob=next_accept_prob[k][regime],
            regime=regime,
            token_accept_prob=problem.accept_prob[k - 1][regime] if k else none,
            verify_time=problem.verify_time[k],
            step_time=step_time[k],
            **{name: values[regime] if k else none for name, values in features.items()},
        )

    return observe


def round_law(problem: FiniteProblem, policy: Policy, features: Mapping[str, np.ndarray] | None = None) -> RoundLaw:
    """What one round earns and where the next one starts, exactly.

    `features`: what else a candidate shows, by regime (`AcceptanceProcess.features`).

    Raises:
        ValueError: if the rule keeps state, needs what a problem does not show, or the tree is too large.
    """
    if isinstance(policy, Oracle):
        return _oracle_law(problem)
    name = label(policy)
    features = features or {}
    missing = needs(policy) - {*SHOWN, *features}
    if missing:
        raise ValueError(f"policy {name!r} needs {min(missing)}, which cannot be evaluated exactly")
    if type(policy).end_round is not Policy.end_round:
        raise ValueError(f"policy {name!r} remembers past rounds; simulate it instead")
    state = policy.init()

    def stops(observation: Observation) -> np.ndarray:
        new_state, answer = policy.stop(state, observation)
        if new_state is not state:
            raise ValueError(f"policy {name!r} changes its state within a round; simulate it instead")
        return np.asarray(answer, dtype=bool).astype(int)  # with one rule, column 1 is beyond the last

    law = round_laws(problem, stops, 1, "survival" in needs(policy), features)
    return RoundLaw(*(part[0] for part in law))


def round_laws(
    problem: FiniteProblem,
    first_going_on: Callable[[Observation], Any],
    num_rules: int,
    reads_survival: bool,
    features: Mapping[str, np.ndarray] | None = None,
) -> RoundLaw:
    """`round_law` of H rules at once, each array with a leading axis for them.

    The rules are in order of patience: where one goes on, so do all behind it. Each state carries the first rule that
    still drafts there, and what it adds is added to that rule and all behind it.

    Args:
        problem: a finite problem.
        first_going_on: for the states observed, the first rule that continues, H if none does.
        num_rules: H.
        reads_survival: if not, states differ in their regime alone.
        features: as for `round_law`.

    Raises:
        TreeTooLarge: if the tree, or what is known of so many rules, does not fit.
    """
    starts = np.eye(problem.num_regimes) if problem.persistent else problem.initial[None, :]
    size, depth, columns = problem.num_regimes, problem.max_candidates, num_rules + 1  # the last: beyond all rules
    if num_rules > 1 and (columns * size * len(starts) > MAX_STATES or columns * size * MERGE >= 2.0**63):
        raise TreeTooLarge(f"the problem is too large for {num_rules} rules at once")
    observe = observer(problem, features or {})
    bonus = problem.bonus if problem.bonus is not None else np.zeros((size, 0))
    rejection = problem.rejection if problem.rejection is not None else np.zeros((size, 0))
    survival = np.ones(size) if reads_survival else None
    states = _States(np.arange(size), survival, np.zeros(size, dtype=int), starts.T, starts.T)
    # What each rule adds to those before it; the rule before the first drafts nothing.
    emitted, time, drafted = np.zeros((3, columns, len(starts)))
    next_start = np.zeros((columns, len(starts), bonus.shape[1]))
    emitted[0] = 1.0
    for k in range(depth + 1):
        first = np.full(len(states.regime), num_rules)
        if k < depth:
            observation = observe(k, states.regime, states.survival)
            first = np.maximum(first_going_on(observation), states.first)
        stops = first > states.first  # under the rules from states.first up to first
        ended, onward = states.select(stops), first[stops]
        for rule, sign in ((ended.first, 1.0), (onward, -1.0)):
            np.add.at(time, rule, sign * problem.verify_time[k] * ended.mass)
            if problem.persistent:
                next_start += sign * (ended.by_regime(rule, columns, size) @ bonus)
        states = states._replace(first=first).select(first < num_rules)
        if len(states.regime) == 0:
            break
        np.add.at(drafted, states.first, states.mass)
        accept = problem.accept_prob[k]
        # one candidate each: its regime, whether it is accepted, and where a first rejection leads
        into = states.by_regime(states.first, columns, size) @ problem.transition
        emitted += into @ accept
        next_start += (into * (1.0 - accept)) @ rejection
        states = _branch(problem.transition, accept, states)
    time += problem.draft_time * drafted
    return RoundLaw(*(np.cumsum(part, axis=0)[:-1] for part in (emitted, time, drafted, next_start)))


class TreeTooLarge(ValueError):
    """The merged tree has too many states for exact evaluation."""


class _States(NamedTuple):
    """Rounds that are still drafting, [n] states of a regime and a survival (None if the rules do not read it).

    `first` [n] is the first rule that drafts there; `mass` [n, B] the states' probability under each start law and
    that rule, `alive` that of no candidate being rejected so far.
    """

    regime: np.ndarray
    survival: np.ndarray | None
    first: np.ndarray
    mass: np.ndarray
    alive: np.ndarray

    def select(self, kept: np.ndarray) -> "_States":
        return _States(*(None if part is None else part[kept] for part in self))  # type: ignore[arg-type]

    def by_regime(self, rule: np.ndarray, columns: int, size: int) -> np.ndarray:
        """Probability [columns, B, Z] of each regime with nothing rejected so far."""
        out = np.zeros((columns * size, self.alive.shape[1]))
        np.add.at(out, rule * size + self.regime, self.alive)
        return out.reshape(columns, size, -1).transpose(0, 2, 1)


def _branch(transition: np.ndarray, accept: np.ndarray, states: _States) -> _States:
    """Every state's children, merged where they agree in all that the rules read."""
    size = len(transition)
    if states.survival is None:  # rules that see no survival agree on every state of a depth
        mass, alive = (transition[states.regime].T @ part for part in (states.mass, states.alive))
        first = np.full(size, states.first[0])
        return _States(np.arange(size), None, first, mass, alive * accept[:, None])
    possible = transition > 0
    degree = possible.sum(axis=1)[states.regime]
    total = int(degree.sum())
    if total * states.mass.shape[1] > MAX_STATES:
        raise TreeTooLarge(
            f"the problem is too large for exact evaluation ({total} states at one depth); simulate it instead"
        )
    parent = np.repeat(np.arange(len(degree)), degree)
    child = np.concatenate([np.flatnonzero(row) for row in possible[states.regime]]) if total else parent
    survival = states.survival[parent] * accept[child]
    rules = int(states.first.max(initial=0)) + 1
    key = (np.rint(survival * MERGE).astype(np.int64) * size + child) * rules + states.first[parent]
    _, kept, group = np.unique(key, return_index=True, return_inverse=True)
    weight = transition[states.regime[parent], child][:, None]
    mass, alive = np.zeros((2, len(kept), states.mass.shape[1]))
    np.add.at(mass, group, states.mass[parent] * weight)
    np.add.at(alive, group, states.alive[parent] * weight * accept[child][:, None])
    return _States(child[kept], survival[kept], states.first[parent][kept], mass, alive)


def _oracle_law(problem: FiniteProblem) -> RoundLaw:
    """Stop after k iff exactly k candidates would be accepted, or k is the most there can be."""
    starts = np.eye(problem.num_regimes) if problem.persistent else problem.initial[None, :]
    depth = problem.max_candidates
    bonus = problem.bonus if problem.bonus is not None else np.zeros((problem.num_regimes, 0))
    emitted, time, drafted = np.ones(len(starts)), np.zeros(len(starts)), np.zeros(len(starts))
    next_start = np.zeros((len(starts), bonus.shape[1]))
    alive = starts  # [start, z_k]: all k accepted
    for k in range(depth + 1):
        last = 1.0 - problem.next_accept_prob[k] if k < depth else np.ones(problem.num_regimes)
        ending = alive * last
        time += (k * problem.draft_time + problem.verify_time[k]) * ending.sum(axis=1)
        emitted += k * ending.sum(axis=1)
        drafted += k * ending.sum(axis=1)
        next_start += ending @ bonus
        if k < depth:
            alive = (alive @ problem.transition) * problem.accept_prob[k]
    return RoundLaw(emitted, time, drafted, next_start)
