r"""Any stopping rule on a recorded trace, exactly and with no model call.

The trace (`mdp.trace`) holds everything a rule can meet, so replay only walks it. A round starts at cursor $s$ of a
request (tokens emitted so far) and may draft up to $\min(K, \text{limit} - s - 1)$ candidates. Before each draft step,
the empty round included, the rule is asked; it sees features of the candidates drafted so far, never a flag, a token
of the text or the next draw. Candidate $k$ is the drafted token at position $s + k - 1$ as long as no earlier one
failed, afterwards a step of the failed position's divergent rollout. A drafted end-of-text forces the stop.

Verification then reveals the first failure. If there is one, the text's own token there is the correction; if not, the
text's next token is the bonus, except behind an accepted end-of-text: no bonus, one cut token. The cursor moves
behind the last emitted token, the rule's state is told the outcome, and the next round starts.

Each draw of the trace is used at most once per policy, so the replayed run has the law of a live one (theory, §4),
and all policies of one replay meet the same draws. The loop is over rounds and depth; requests are array entries.
A head whose scores come a candidate late (`Trace.head_lag`) is shown late: candidate $k$ comes with the score of
$k - 1$, the first with 1.
Without rollouts a round past a failure is assumed to go on to its end: nothing is known of an end-of-text there.
A trace of counts (`run_length`) says itself how many candidates of a round are accepted; one that would have to know
more than was tested there is refused.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mdp import entrants
from mdp.cost import Cost, Table
from mdp.entrants import Lacking
from mdp.fit import PERFECT, SignalModel, SignalState, fit_signal, position_signal, split_requests
from mdp.fit_rules import fit_rule
from mdp.metrics import Tally
from mdp.policy import Observation, Outcome, Policy, PolicySpec, ThresholdTable
from mdp.trace import FEATURES, Trace
from simulate.estimate import PolicyResult, TraceComparison, interval, ratio
from simulate.nodes import Nodes

__all__ = ["RoundLog", "check", "fitted", "measured_cost", "replay", "replay_rounds"]

SIGNAL_FIELDS = frozenset({"survival", "next_accept_prob", "regime"})
CHAIN_FIELDS = frozenset({"next_accept_prob", "regime"})
TIME_FIELDS = frozenset({"verify_time", "step_time"})
RAW_FIELDS = frozenset(Observation._fields) & {*FEATURES, "head"}


@dataclass(frozen=True, eq=False)
class RoundLog:
    """Every round of a replay, sorted by request and start; one array entry a round.

    Attributes:
        request: index of the request in the trace.
        start: tokens the request had emitted when the round began.
        num_drafted, num_accepted, num_emitted, num_cut: the round's counts.
    """

    request: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    num_drafted: Int[np.ndarray, " n"]
    num_accepted: Int[np.ndarray, " n"]
    num_emitted: Int[np.ndarray, " n"]
    num_cut: Int[np.ndarray, " n"]

    def tally(self, round_times: Float[np.ndarray, " K+1"], requests: Int[np.ndarray, " r"]) -> Tally:
        """Sums per request, in the order of `requests` (ascending)."""
        row = np.searchsorted(requests, self.request)

        def total(values: np.ndarray) -> np.ndarray:
            out = np.zeros(len(requests), dtype=values.dtype)
            np.add.at(out, row, values)
            return out

        return Tally(
            num_target_calls=total(np.ones_like(self.request)),
            num_drafted=total(self.num_drafted),
            num_emitted=total(self.num_emitted),
            num_discarded=total(self.num_drafted - self.num_accepted),
            num_cut=total(self.num_cut),
            time=total(round_times[self.num_drafted]),
        )


@dataclass(frozen=True)
class _Contender:
    """A policy made ready for one trace: its rule (None until the chain is solved) and the signal it reads."""

    spec: PolicySpec
    needs: frozenset[str]
    signal: str | None

    @property
    def models(self) -> bool:
        """Whether a signal model is fitted for it."""
        return self.signal is not None and (self.signal != PERFECT or bool(self.needs & CHAIN_FIELDS))

    @property
    def fitted(self) -> bool:
        return self.models or self.spec.fit

    @property
    def priced(self) -> bool:
        """Whether its decisions depend on times."""
        policy = self.spec.policy
        return policy is None or self.spec.fit or policy.timed or bool(self.needs & TIME_FIELDS)


def replay(
    trace: Trace, policies: Iterable[str | Policy | PolicySpec], *, cost: Cost | None = None, level: float = 0.95
) -> TraceComparison:
    """What each policy would have earned on the trace; all are scored on the same requests.

    Args:
        trace: a recorded pair.
        policies: policy strings, or rules of one's own.
        cost: declared times; None takes the times measured with the trace.
        level: of the throughput intervals.

    Raises:
        ValueError: if the trace lacks what a policy needs, or its measured times; one line.
    """
    interval(ratio(np.ones(1), np.ones(1)), 1, level)  # refuses a bad level before any work
    origin = "measured" if cost is None else "declared"
    cost = measured_cost(trace) if cost is None else cost
    verify_time = cost.verify_times(trace.max_candidates)
    contenders = [_contender(trace, spec) for spec in entrants.read(policies)]
    requests, models = np.arange(trace.num_requests), {None: None, PERFECT: SignalModel()}
    split = any(contender.fitted for contender in contenders)
    if split:
        train, requests = split_requests(trace)
        models |= {c.signal: fit_signal(trace, c.signal, train) for c in contenders if c.models and c.signal}
    ready = [(c, _rule(trace, c, models[c.signal], cost)) for c in contenders]
    times = _Times.of(cost, trace.max_candidates)
    results = tuple(
        PolicyResult(
            contender.spec.text,
            _walk(trace, rule, contender.needs, models[contender.signal], requests, times).tally(
                cost.round_times(trace.max_candidates), requests
            ),
            plain_time=float(verify_time[0]),
            signal=contender.signal,
        )
        for contender, rule in ready
    )
    return TraceComparison(
        policies=results,
        seed=trace.manifest.get("seed"),
        draft_time=float(cost.draft_time),
        verify_time=tuple(map(float, verify_time)),
        cost_origin=origin,
        scored_on="test half" if split else "all",
        level=level,
        rollouts=trace.rollouts,
    )


def replay_rounds(
    trace: Trace,
    policy: str | Policy | PolicySpec,
    *,
    cost: Cost | None = None,
    model: SignalModel | None = None,
    requests: Sequence[int] | None = None,
) -> RoundLog:
    """The rounds one policy plays on the trace, for comparison with a live run round by round.

    Args:
        trace: a recorded pair.
        policy: as in `replay`.
        cost: the times that a bare `optimal` is solved for, and that rules are told; None takes the measured ones.
        model: the signal's model, so that replay and live run read it alike; None fits it on the training half.
        requests: indices of the requests to play; None plays all of them.

    Raises:
        ValueError: as `replay`.
    """
    spec = entrants.read([policy])[0]
    contender = _contender(trace, spec if model is None else replace(spec, signal=model.signal))
    if model is None and contender.signal is not None:
        fits = contender.models
        model = fit_signal(trace, contender.signal, split_requests(trace)[0]) if fits else SignalModel()
    elif contender.signal is None:
        model = None
    elif contender.needs & CHAIN_FIELDS and model is not None and model.transition is None:
        raise ValueError(f"policy {spec.text!r} looks ahead, and the signal model given has no chain")
    if cost is None and contender.priced:
        cost = measured_cost(trace)
    chosen = np.arange(trace.num_requests) if requests is None else np.unique(np.asarray(requests, dtype=np.int64))
    times = None if cost is None else _Times.of(cost, trace.max_candidates)
    return _walk(trace, _rule(trace, contender, model, cost), contender.needs, model, chosen, times)


@dataclass(frozen=True)
class _Times:
    """A cost as the walk reads it: V(0..K) and T(0..K)."""

    draft: float
    verify: np.ndarray
    round: np.ndarray

    @classmethod
    def of(cls, cost: Cost, depth: int) -> "_Times":
        return cls(float(cost.draft_time), cost.verify_times(depth), cost.round_times(depth))


def measured_cost(trace: Trace) -> Cost:
    """The times recorded with the trace.

    Raises:
        ValueError: if there are none.
    """
    measured = trace.manifest.get("measured") or {}
    if measured.get("draft_time") is None or measured.get("verify_time") is None:
        raise ValueError("trace: it holds no measured times; declare a cost")
    return Table(measured["draft_time"], measured["verify_time"])


def _contender(trace: Trace, spec: PolicySpec) -> _Contender:
    """Check that the trace can show all that the policy looks at."""
    if not trace.manifest.get("replayable", True):
        raise ValueError("trace: its draft does not depend on the text alone (replayable is false in its manifest)")
    wanted = frozenset(ThresholdTable.needs) if spec.policy is None else entrants.needs(spec.policy)
    if "symbol" in wanted:
        raise Lacking(spec.text, "symbol", "which a trace does not hold")
    signal = (spec.signal or PERFECT) if wanted & SIGNAL_FIELDS else None
    if signal == "head" and trace.head_lag and wanted & CHAIN_FIELDS:
        raise Lacking(spec.text, min(wanted & CHAIN_FIELDS), "which a head whose scores come late does not give")
    read = (wanted & RAW_FIELDS) | ({signal} if signal else set())
    for name in sorted(read):
        for rollout in (False, True):
            if rollout and trace.rollout_offsets is None:
                raise Lacking(spec.text, name, "along rollouts, and this trace has no rollouts")
            try:
                position_signal(trace, name, rollout)
            except ValueError:
                where = " along its rollouts" if rollout else ""
                raise Lacking(spec.text, name, f"which this trace does not hold{where}") from None
    return _Contender(spec, wanted, signal)


def check(trace: Trace, spec: PolicySpec) -> None:
    """Whether the trace shows all that a rule reads.

    Raises:
        Lacking: if not.
    """
    _contender(trace, spec)


def fitted(trace: Trace, spec: PolicySpec, *, cost: Cost | None = None) -> Policy:
    """The rule of a spec with `fit`, fitted to the training half of the trace as `replay` does it.

    `cost`: the times under which it is to be good; None takes the measured ones.

    Raises:
        ValueError: as `replay`.
    """
    contender = _contender(trace, spec)
    return _rule(trace, contender, None, measured_cost(trace) if cost is None else cost)


def _rule(trace: Trace, contender: _Contender, model: SignalModel | None, cost: Cost | None) -> Policy:
    """The rule itself, solved if it is a bare `optimal`, as deep as the trace."""
    spec, depth = contender.spec, trace.max_candidates
    if spec.policy is not None:
        chain = None if model is None else model.transition
        if spec.fit:
            assert cost is not None
            train, times = split_requests(trace)[0], _Times.of(cost, depth)

            def throughput(rule: Policy) -> float:
                log = _walk(trace, rule, contender.needs, model, train, times)
                return float(log.num_emitted.sum() / times.round[log.num_drafted].sum())

            return fit_rule(trace, spec.policy, train, throughput)
        if isinstance(spec.policy, ThresholdTable) and "regime" in contender.needs and spec.text.startswith("optimal:"):
            raise ValueError(f"policy {spec.text!r}: a saved table must have one column to be replayed on a trace")
        rule = entrants.fit_lag(spec.policy, trace.head_lag)
        return entrants.fit_depth(spec.text, rule, depth, 1 if chain is None else len(chain))
    from mdp.problem import StoppingProblem
    from mdp.solve import solve  # imports jax: only here

    assert model is not None and cost is not None
    return solve(StoppingProblem(model.process(), cost, depth)).policy


def _walk(
    trace: Trace,
    rule: Policy,
    needs: frozenset[str],
    model: SignalModel | None,
    requests: Int[np.ndarray, " r"],
    times: "_Times | None",
) -> RoundLog:
    """Play all rounds of the requests, in their order if the rule's state goes from one to the next."""
    names = (needs & RAW_FIELDS) | ({model.signal} if model else set())
    nodes = Nodes.of(trace, names)
    state, log = rule.init(), []
    for batch in requests[:, None] if rule.persists else [requests]:
        rows, state = _play(trace, rule, model, nodes, batch, times, state)
        log.extend(rows)
    columns = [np.concatenate(column) for column in zip(*log, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    return RoundLog(*(column[order] for column in columns))


def _play(
    trace: Trace,
    rule: Policy,
    model: SignalModel | None,
    nodes: Nodes,
    requests: Int[np.ndarray, " r"],
    times: "_Times | None",
    start: Any,
) -> tuple[list, Any]:
    """The rounds of requests side by side, from one state; and the state at the end, if there is one request.

    Arrays have one entry per request that still has text to emit. Positions and rollout steps are laid end to end as
    *nodes*, so the candidate behind node i is node i + 1, except behind a failed position, where it is the rollout's
    first step.
    """
    base = trace.offsets[requests]
    length = np.diff(trace.offsets)[requests]
    limit = np.asarray(trace.limit, dtype=np.int64)[requests]
    cursor = np.zeros(len(requests), dtype=np.int64)
    state = _map(lambda leaf: np.repeat(np.asarray(leaf)[..., None], len(requests), axis=-1), start)
    log, last = [], state
    while len(requests):
        cap = np.minimum(trace.max_candidates, limit - cursor - 1)
        state, drafted, accepted, ended = _draft(rule, state, model, nodes, base + cursor, cap, times)
        nodes.check_tested(trace, base + cursor, cap if "next_accepted" in rule.needs else drafted)
        took = () if times is None else (drafted * times.draft, times.verify[drafted])
        state = last = rule.end_round(state, Outcome(drafted, accepted, *took))
        cut = ((accepted == drafted) & ended).astype(np.int64)
        emitted = accepted + 1 - cut
        log.append((requests, cursor, drafted, accepted, emitted, cut))
        cursor = cursor + emitted
        on = cursor < length
        if not on.all():
            base, length, limit, cursor, requests = base[on], length[on], limit[on], cursor[on], requests[on]
            state = _map(lambda leaf, on=on: np.broadcast_to(leaf, (*np.shape(leaf)[:-1], len(on)))[..., on], state)
    return log, _map(lambda leaf: np.atleast_1d(leaf)[..., 0], last) if len(on) == 1 else None


def _draft(rule: Policy, state: Any, model: SignalModel | None, nodes: Nodes, node: np.ndarray, cap: np.ndarray,
           times: "_Times | None"):  # fmt: skip
    """One round: ask, draft, ask. Returns the rule's state, counts, and whether end-of-text was drafted last."""
    size = len(node)
    drafting, failed, ended = cap > 0, np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    drafted, accepted = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    features: dict[str, Any] = {name: np.full(size, np.nan) for name in nodes.features}
    late = {name: np.ones(size) for name in nodes.late}  # 1 in the place of a score that is still to come
    signal: SignalState | None = model.start(size) if model else None
    num, start = 0, node
    while drafting.any():
        next_accepted = nodes.accepted[node] & ~failed if nodes.runs is None else nodes.runs[start] > num
        seen = Observation(num, **features) if model is None else model.observation(signal, num, features)  # type: ignore[arg-type]
        if "next_accepted" in rule.needs:  # clairvoyance is shown to those only who say that they use it
            seen = seen._replace(next_accepted=next_accepted)
        if times is not None:
            step_time = times.round[num + 1] - times.round[num]
            seen = seen._replace(verify_time=times.verify[num], step_time=step_time)
        asked, stop = rule.stop(state, seen)
        state = _map(lambda new, old, asking=drafting: np.where(asking, new, old), asked, state)
        drafting = drafting & ~np.broadcast_to(np.asarray(stop, dtype=bool), size)
        num += 1
        drawn = {name: values[node] for name, values in nodes.features.items()}
        features = {name: np.where(drafting, late.get(name, drawn[name]), features[name]) for name in drawn}
        late = {name: drawn[name] for name in nodes.late}
        if model is not None:
            signal = SignalState(*(np.where(drafting, new, old) for new, old in
                                   zip(model.update(signal, features), signal, strict=True)))  # type: ignore[arg-type]  # fmt: skip
        kept = drafting & next_accepted
        drafted, accepted = drafted + drafting, accepted + kept
        ended = np.where(drafting, nodes.ends[node], ended)
        following = np.where(drafting & ~failed & ~kept, nodes.after_failure[node], np.minimum(node + 1, nodes.last))
        failed = failed | (drafting & ~kept)
        node = np.where(drafting, following, node)
        drafting = drafting & (num < cap) & ~ended
    return state, drafted, accepted, ended


def _map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` on every leaf of a rule's state: numbers, arrays, or (named) tuples, dicts and dataclasses of them.

    Batch entries are a leaf's *last* axis, so that a state with an axis of its own still meets per-request numbers.
    """
    if isinstance(tree, tuple):
        parts = [_map(function, *leaves) for leaves in zip(tree, *others, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, dict):
        return {key: _map(function, *(x[key] for x in (tree, *others))) for key in tree}
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [f.name for f in fields(tree)]
        return replace(tree, **{n: _map(function, *(getattr(x, n) for x in (tree, *others))) for n in names})
    return function(tree, *others)
