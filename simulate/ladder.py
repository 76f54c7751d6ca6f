r"""The ladder of information on a trace: the best rule found for each kind of knowledge, chosen on one half of it.

`nothing` (one length for all rounds), `position` (a length by tokens emitted so far), `history` (a length by the last
round's outcome), `draft features` (thresholds and the solved table on the draft's probability or entropy), `head`, and
`token acceptance` (the same with a perfect head). Who sees more may ignore it, so each rung keeps the rule of the rung
below unless one of its own is better on the training half: the order can fail by chance alone.

Lengths by position and by history are found by coordinate ascent on the training half's own rounds, from the best
single length on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Int

from mdp.cost import Cost
from mdp.fit import PERFECT, SignalModel, fit_signal
from mdp.policy import Policy, parse
from mdp.trace import Trace
from simulate.estimate import Estimate, ratio
from simulate.relaxation import COINS, Penalty, charge, fit_penalty, has_coins
from simulate.starts import Rounds, Starts, lengths_chosen, play, play_lanes, unroll

__all__ = ["INFORMATION", "SIGNALS_SEEN", "Half", "Rule", "climb", "fixed_rounds", "halves", "share"]

INFORMATION = ("nothing", "position", "history", "draft features", "head", "token acceptance")
SIGNALS_SEEN = {
    "draft features": ("draft_prob", "top_prob", "entropy"),
    "head": ("head",),
    "token acceptance": (PERFECT,),
}
FAMILIES = ("rejection", "lookahead")
THRESHOLDS = tuple(f"{h:.2f}" for h in np.linspace(0.0, 1.0, 26))
STRETCHES = 4
OUTCOMES = ("first", "0", "1", "2", "3+", "all")
MAX_SWEEPS = 4

Choose = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Half:
    """Half of a trace's requests, every round they could start, and what luck is charged (None: nothing is)."""

    requests: Int[np.ndarray, " R"]
    starts: Starts
    round_times: Float[np.ndarray, " K+1"]
    charges: Float[np.ndarray, "N K+1"] | None

    def times(self, rounds: Rounds, charged: bool = True) -> Float[np.ndarray, " R"]:
        """Time of each request, luck removed if it can be."""
        at, length = rounds
        time = self.round_times[length]
        if charged and self.charges is not None:
            time = time + self.charges[at, length]
        owner = np.searchsorted(self.starts.offsets, at, side="right") - 1
        return np.bincount(owner, weights=time, minlength=len(self.requests))


@dataclass(frozen=True, eq=False)
class Rule:
    """The best rule found for one kind of information, and the rounds it plays on the test half.

    `label` is a policy string where there is one. `missing` names what the trace would have to hold; then `rounds` are
    None.
    """

    information: str
    label: str | None
    rounds: Rounds | None
    missing: str | None = None


def share(time: Float[np.ndarray, " R"], base: Float[np.ndarray, " R"]) -> Estimate:
    """Share of `base` that is saved by taking `time`, paired by request."""
    value, se = ratio(time, base)
    return Estimate(1.0 - value, se)


def halves(
    trace: Trace, cost: Cost, train: Int[np.ndarray, " R"], test: Int[np.ndarray, " Q"]
) -> tuple[Half, Half, Penalty | None]:
    """Both halves unrolled with every signal that the trace holds, and the penalty fitted on the first."""
    held = [name for names in SIGNALS_SEEN.values() for name in names if _lacks(trace, name) is None]
    names = dict.fromkeys([*held, *(COINS if has_coins(trace) else ())])
    times = cost.round_times(trace.max_candidates)
    first, second = (unroll(trace, requests, names) for requests in (train, test))
    if not has_coins(trace):
        return Half(train, first, times, None), Half(test, second, times, None), None
    plain = Half(train, first, times, None)
    rate = max(ratio(first.lengths, plain.times(fixed_rounds(first, k))).value for k in range(len(times)))
    penalty = fit_penalty(first, times, rate)
    train_half, test_half = (
        Half(requests, starts, times, charge(starts, penalty)) for requests, starts in ((train, first), (test, second))
    )
    return train_half, test_half, penalty


def _lacks(trace: Trace, signal: str) -> str | None:
    """What a rule that reads the signal needs and the trace does not hold."""
    if trace.rollout_offsets is None:
        return "rollouts"
    if signal == "head" and trace.head_lag:
        return "head without lag"
    recorded = signal in trace.features or signal in trace.optional
    along = signal in trace.rollout_features or f"rollout_{signal}" in trace.optional
    return None if recorded and along else signal


def climb(trace: Trace, cost: Cost, train: Half, test: Half) -> tuple[tuple[Rule, ...], dict[str, SignalModel]]:
    """One rule a rung, bottom to top, and the models of the signals."""
    models: dict[str, SignalModel] = {}
    rules: list[Rule] = []
    best, kept, least = "", None, np.inf
    for information in INFORMATION:
        lacks = [_lacks(trace, name) for name in SIGNALS_SEEN.get(information, ())]
        if lacks and all(lacks):
            rules.append(Rule(information, None, None, lacks[0]))
            continue
        for label, on_train, on_test in _candidates(trace, cost, train, test, information, models):
            total = train.times(on_train()).sum()
            if total < least:
                best, kept, least = label, on_test, total
        assert kept is not None
        rules.append(Rule(information, best, kept()))
    return tuple(rules), models


Candidate = tuple[str, Callable[[], Rounds], Callable[[], Rounds]]


def _candidates(
    trace: Trace, cost: Cost, train: Half, test: Half, information: str, models: dict[str, SignalModel]
) -> Iterator[Candidate]:
    """Rules of a rung: name, and the rounds on either half."""
    if information == "nothing":
        for k in range(trace.max_candidates + 1):
            yield f"fixed:{k}", partial(fixed_rounds, train.starts, k), partial(fixed_rounds, test.starts, k)
    elif information in ("position", "history"):
        first, second = (_classes(half.starts, train.starts, information) for half in (train, test))
        table = _ascend(train, first, STRETCHES if information == "position" else len(OUTCOMES))
        label = _describe(table, train.starts, information)
        yield label, partial(_by_class, train.starts, first, table), partial(_by_class, test.starts, second, table)
    else:
        for signal in SIGNALS_SEEN[information]:
            if _lacks(trace, signal) is None:
                models[signal] = fit_signal(trace, signal, train.requests)
                yield from _signal_rules(cost, train, test, models[signal])


def _signal_rules(cost: Cost, train: Half, test: Half, model: SignalModel) -> Iterator[Candidate]:
    from mdp.problem import StoppingProblem
    from mdp.solve import solve  # imports jax: only here

    named: list[tuple[str, Policy]] = []
    for family in FAMILIES:
        for threshold in THRESHOLDS:
            label = f"{family}:{threshold},signal={model.signal}"
            named.append((label, parse(label).policy))  # type: ignore[arg-type]
    solution = solve(StoppingProblem(model.process(), cost, train.starts.max_candidates))
    named.append((f"optimal:signal={model.signal}", solution.policy))
    for label, rule in named:
        yield label, partial(_ruled, train.starts, rule, model), partial(_ruled, test.starts, rule, model)


def fixed_rounds(starts: Starts, length: int) -> Rounds:
    """The rounds of one length for all of them."""
    return play(starts, lambda at, drafted, accepted: np.full(len(at), length))


def _ruled(starts: Starts, rule: Policy, model: SignalModel) -> Rounds:
    lengths = lengths_chosen(starts, rule, model)
    return play(starts, lambda at, drafted, accepted: lengths[at])


def _by_class(starts: Starts, classify: Choose, table: np.ndarray) -> Rounds:
    return play(starts, lambda at, drafted, accepted: table[classify(at, drafted, accepted)])


def _classes(starts: Starts, train: Starts, information: str) -> Choose:
    """What a round's length may depend on, as a number."""
    if information == "history":
        return _outcome
    within = np.arange(starts.offsets[-1]) - np.repeat(starts.offsets[:-1], starts.lengths)
    stretch = np.searchsorted(_stretches(train), within, side="right")
    return lambda at, drafted, accepted: stretch[at]


def _stretches(starts: Starts) -> Int[np.ndarray, " 3"]:
    """Where stretches of the text begin: quartiles of all positions' distance from their request's start."""
    within = np.arange(starts.offsets[-1]) - np.repeat(starts.offsets[:-1], starts.lengths)
    return np.quantile(within, np.arange(1, STRETCHES) / STRETCHES, method="inverted_cdf")


def _outcome(at: np.ndarray, drafted: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """Index into `OUTCOMES` of the last round; one of no candidates tells nothing and counts as the first."""
    return np.where(drafted <= 0, 0, np.where(accepted == drafted, 5, 1 + np.minimum(accepted, 3)))


def _ascend(half: Half, classify: Choose, size: int) -> Int[np.ndarray, " C"]:
    """A length for each class by coordinate ascent, from the best single one on; ties keep the smaller length."""
    lengths = np.arange(half.starts.max_candidates + 1)
    totals = _totals(half, classify, np.repeat(lengths[:, None], size, axis=1))
    table, least = np.full(size, totals.argmin()), totals.min()
    for _ in range(MAX_SWEEPS):
        before = table
        for entry in range(size):
            trials = np.tile(table, (len(lengths), 1))
            trials[:, entry] = lengths
            totals = _totals(half, classify, trials)
            if totals.min() < least:
                table, least = trials[totals.argmin()], totals.min()
        if (table == before).all():
            break
    return table


def _totals(half: Half, classify: Choose, tables: Int[np.ndarray, "T C"]) -> Float[np.ndarray, " T"]:
    """Time of the whole half under each table, all of them played side by side."""
    starts, count = half.starts, len(half.requests)
    table = np.repeat(np.arange(len(tables)), count)

    def choose(at: np.ndarray, drafted: np.ndarray, accepted: np.ndarray, lane: np.ndarray) -> np.ndarray:
        return tables[table[lane], classify(at, drafted, accepted)]

    at, length, lane = play_lanes(starts, choose, np.tile(np.arange(count), len(tables)))
    time = half.round_times[length] if half.charges is None else half.round_times[length] + half.charges[at, length]
    return np.bincount(table[lane], weights=time, minlength=len(tables))


def _describe(table: np.ndarray, train: Starts, information: str) -> str:
    """The table in words; not a policy string."""
    if information == "history":
        return "K by tokens accepted last: " + ", ".join(f"{o}: {k}" for o, k in zip(OUTCOMES, table, strict=True))
    edges = [0, *map(int, _stretches(train))]
    return "K by tokens emitted: " + ", ".join(f"{e}+: {k}" for e, k in zip(edges, table, strict=True))
