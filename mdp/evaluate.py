r"""Exact value of any stopping rule, without sampling and without a grid.

Under a rule that sees survival, regime and depth, a round is a finite tree; what matters of a path is where it is
($z_k$) and its survival $S_k$, which depends only on how often each regime was visited. Paths that agree in both are
merged, so depth $k$ holds at most $Z \binom{k+Z-1}{Z-1}$ states instead of $Z^k$. Mass flows forward: a state that
continues adds $t_d$ and its candidate's expected acceptance, one that stops adds $V(k)$. Every round ends in one more
token (correction or bonus).

Renewal: throughput = E[emitted] / E[time]. Persistent: the same under the stationary law of the start regime, which
must be unique: a rule that splits the start regimes into several recurrent classes has no one throughput.

The oracle needs no tree: it stops after k candidates if and only if exactly k would be accepted.

Of continuous acceptances only the mean matters to a fixed length and to the oracle; other rules are refused.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.chain import recurrent_classes, stationary_law
from mdp.entrants import fit_depth, label, needs, read
from mdp.metrics import Tally
from mdp.policy import FixedLength, Observation, Oracle, Policy, PolicySpec
from mdp.problem import FiniteProblem, StoppingProblem

__all__ = ["Evaluation", "RoundLaw", "check_exact", "evaluate", "long_run", "round_law"]

MAX_STATES = 5_000_000
SAME_RATE = 1e-9  # classes whose throughputs differ by less, relatively, are equally good
MERGE = 2.0**44  # survivals closer than 1 / MERGE are one state; far below the rules' own tolerance for ties


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
    """

    policy: str
    tally: Tally
    speedup: float
    bounds: tuple[float, float] | None = None

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
                "gap": None if self.gap is None else list(self.gap)}  # fmt: skip


def evaluate(
    problem: StoppingProblem | FiniteProblem, policy: str | Policy | PolicySpec, *, solution: Any = None
) -> Evaluation:
    """Exact throughput and rates of `policy` on `problem`.

    Args:
        problem: a finite problem.
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
    law = round_law(finite, fit_depth(spec.text, rule, finite.max_candidates, finite.num_regimes))
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
        ValueError: if acceptances are continuous and the rule looks at them.
    """
    process = problem.acceptance
    if not process.finite and not isinstance(spec.policy, (FixedLength, Oracle)):
        raise ValueError(
            f"policy {spec.text!r}: on {process.kind} only fixed and oracle have an exact value; simulate it instead"
        )


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


def round_law(problem: FiniteProblem, policy: Policy) -> RoundLaw:
    """What one round earns and where the next one starts, exactly.

    Raises:
        ValueError: if the rule keeps state, needs what a problem does not show, or the tree is too large.
    """
    starts = np.eye(problem.num_regimes) if problem.persistent else problem.initial[None, :]
    if isinstance(policy, Oracle):
        return _oracle_law(problem, starts)
    name = label(policy)
    missing = needs(policy) - {"survival", "next_accept_prob", "regime", "token_accept_prob"}
    if missing:
        raise ValueError(f"policy {name!r} needs {min(missing)}, which cannot be evaluated exactly")
    if type(policy).end_round is not Policy.end_round:
        raise ValueError(f"policy {name!r} remembers past rounds; simulate it instead")
    state = policy.init()
    size, depth = problem.num_regimes, problem.max_candidates
    next_accept_prob = problem.next_accept_prob
    bonus = problem.bonus if problem.bonus is not None else np.zeros((size, 0))
    rejection = problem.rejection if problem.rejection is not None else np.zeros((size, 0))
    states = _States(np.arange(size), np.ones(size) if "survival" in needs(policy) else None, starts.T, starts.T)
    emitted, time, drafted = np.ones(len(starts)), np.zeros(len(starts)), np.zeros(len(starts))
    next_start = np.zeros((len(starts), bonus.shape[1]))
    for k in range(depth + 1):
        stops = np.ones(len(states.regime), dtype=bool)
        if k < depth:
            observation = Observation(
                num_candidates=k,
                survival=states.survival,
                next_accept_prob=next_accept_prob[k][states.regime],
                regime=states.regime,
                token_accept_prob=problem.accept_prob[k - 1][states.regime] if k else np.ones(len(states.regime)),
            )
            new_state, answer = policy.stop(state, observation)
            if new_state is not state:
                raise ValueError(f"policy {name!r} changes its state within a round; simulate it instead")
            stops = np.broadcast_to(np.asarray(answer, dtype=bool), stops.shape)
        time += problem.verify_time[k] * states.mass[stops].sum(axis=0)
        next_start += states.alive[stops].T @ bonus[states.regime[stops]]
        states = states.select(~stops)
        if len(states.regime) == 0:
            break
        going_on = states.mass.sum(axis=0)
        time += problem.draft_time * going_on
        drafted += going_on
        accept = problem.accept_prob[k]
        # one candidate each: its regime, whether it is accepted, and where a first rejection leads
        into = _flow(problem, states)
        emitted += into @ accept
        next_start += (into * (1.0 - accept)) @ rejection
        states = _branch(problem.transition, accept, states)
    return RoundLaw(emitted, time, drafted, next_start)


class _States(NamedTuple):
    """Rounds that are still drafting, [n] states of a regime and a survival (None if the rule does not read it).

    `mass` [n, B] is their probability under each start law, `alive` that of no candidate being rejected so far.
    """

    regime: np.ndarray
    survival: np.ndarray | None
    mass: np.ndarray
    alive: np.ndarray

    def select(self, kept: np.ndarray) -> "_States":
        survival = None if self.survival is None else self.survival[kept]
        return _States(self.regime[kept], survival, self.mass[kept], self.alive[kept])


def _flow(problem: FiniteProblem, states: _States) -> np.ndarray:
    """Probability [B, Z] that nothing is rejected so far and the next candidate falls in each regime."""
    by_regime = np.zeros((problem.num_regimes, states.alive.shape[1]))
    np.add.at(by_regime, states.regime, states.alive)
    return by_regime.T @ problem.transition


def _branch(transition: np.ndarray, accept: np.ndarray, states: _States) -> _States:
    """Every state's children, merged where they agree in all that the rule reads."""
    size = len(transition)
    if states.survival is None:
        mass, alive = (transition[states.regime].T @ part for part in (states.mass, states.alive))
        return _States(np.arange(size), None, mass, alive * accept[:, None])
    possible = transition > 0
    degree = possible.sum(axis=1)[states.regime]
    total = int(degree.sum())
    if total * states.mass.shape[1] > MAX_STATES:
        raise ValueError(
            f"the problem is too large for exact evaluation ({total} states at one depth); simulate it instead"
        )
    parent = np.repeat(np.arange(len(degree)), degree)
    child = np.concatenate([np.flatnonzero(row) for row in possible[states.regime]]) if total else parent
    survival = states.survival[parent] * accept[child]
    key = np.rint(survival * MERGE).astype(np.int64) * size + child
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    weight = transition[states.regime[parent], child][:, None]
    mass, alive = np.zeros((2, len(first), states.mass.shape[1]))
    np.add.at(mass, group, states.mass[parent] * weight)
    np.add.at(alive, group, states.alive[parent] * weight * accept[child][:, None])
    return _States(child[first], survival[first], mass, alive)


def _oracle_law(problem: FiniteProblem, starts: np.ndarray) -> RoundLaw:
    """Stop after k iff exactly k candidates would be accepted, or k is the most there can be."""
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
