"""The policies of a validation: made ready on the training half, then replayed and run live on the other one."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from mdp import entrants
from mdp.cost import Cost
from mdp.fit import PERFECT, SignalModel, fit_signal
from mdp.metrics import Tally
from mdp.policy import Policy, PolicySpec, parse
from mdp.problem import StoppingProblem
from mdp.trace import Trace
from simulate.estimate import Estimate, interval, paired, ratio
from simulate.on_processes import RATES
from simulate.quality import best_of
from simulate.replay import CHAIN_FIELDS, SIGNAL_FIELDS, TIME_FIELDS, check, fitted, replay_rounds

__all__ = [
    "LiveRuns", "Ready", "choose", "compare", "digest", "make_ready", "measures", "replayed", "run_live",
    "with_interval",
]  # fmt: skip

SIGNAL = "draft_prob"
THRESHOLDS = tuple(f"{h:.2f}" for h in np.arange(0.04, 0.961, 0.04))
COUNTS = ("num_target_calls", "num_drafted", "num_emitted", "num_discarded", "num_cut")
PARTS = {"throughput": ("num_emitted", "time"), "block_efficiency": ("num_emitted", "num_target_calls"),
         "discard_rate": ("num_discarded", "num_emitted"),
         "verification_rate": ("num_target_calls", "num_emitted")}  # fmt: skip
"""Each of the rates that are compared as a ratio of sums."""

assert tuple(PARTS) == RATES


@dataclass(frozen=True, eq=False)
class Ready:
    """A policy that can be played.

    Attributes:
        text: as typed or chosen.
        spec: holds the rule itself, solved or fitted if it has to be; its own text is no policy string.
        model: of the signal that the rule reads; None if it reads none.
    """

    text: str
    spec: PolicySpec
    model: SignalModel | None

    @property
    def rule(self) -> Policy:
        assert self.spec.policy is not None
        return self.spec.policy

    @property
    def scored(self) -> bool:
        """Whether a live run has to score every drafted token by the target to show what the rule reads."""
        return PERFECT in {self.model.signal if self.model else None, *entrants.needs(self.rule)}

    @property
    def timed(self) -> bool:
        """Whether it reads times, or is told those of its rounds."""
        return self.rule.timed or bool(entrants.needs(self.rule) & TIME_FIELDS)


def make_ready(trace: Trace, texts: Sequence[str], cost: Cost, train: Int[np.ndarray, " R"]) -> list[Ready]:
    """Policies with everything that is fitted, from the training half.

    Raises:
        ValueError: if the trace lacks what a policy reads, or no live run can show it.
    """
    models: dict[str, SignalModel] = {}
    out = []
    for text in texts:
        spec = parse(text)
        check(trace, spec)
        if spec.policy is not None and "next_accepted" in entrants.needs(spec.policy):
            raise ValueError(f"policy {text!r}: knows the future, and no live run does")
        wanted = SIGNAL_FIELDS if spec.policy is None else entrants.needs(spec.policy) & SIGNAL_FIELDS
        model, rule = None, spec.policy
        if wanted:
            signal = spec.signal or PERFECT
            if signal not in models:
                models[signal] = fit_signal(trace, signal, train)
            model = models[signal]
            if signal == PERFECT and not wanted & CHAIN_FIELDS:
                model = SignalModel()
        if rule is None:
            from mdp.solve import solve

            assert model is not None
            rule = solve(StoppingProblem(model.process(), cost, trace.max_candidates)).policy
        elif spec.fit:
            rule = fitted(trace, spec, cost=cost)
        out.append(Ready(text, replace(spec, text=f"({text})", policy=rule, fit=False), model))
    return out


def choose(trace: Trace, cost: Cost, train: Int[np.ndarray, " R"]) -> list[str]:
    """The five default policies, each parameter the best of its grid on the training half.

    The confidence rule's thresholds are the edges of the draft probability's bins: there the fitted chain says exactly
    what the rule does.
    """
    model = fit_signal(trace, SIGNAL, train)

    def best(texts: Iterable[str], reader: SignalModel | None = None) -> str:
        return best_of(trace, texts, train, cost, reader).policy

    edges = np.asarray(model.edges)
    return [
        best([f"fixed:{k}" for k in range(trace.max_candidates + 1)]),
        best([f"rejection:{h},signal={SIGNAL}" for h in THRESHOLDS], model),
        best([f"lookahead:{h},signal={SIGNAL}" for h in THRESHOLDS], model),
        best([f"hf_confidence:threshold={edge:.4g}" for edge in edges]) if len(edges) else "hf_confidence",
        f"optimal:signal={SIGNAL}",
    ]


def replayed(trace: Trace, ready: Ready, cost: Cost, requests: Int[np.ndarray, " R"]) -> Tally:
    """Sums by request of what the policy earns on the trace."""
    log = replay_rounds(trace, ready.spec, cost=cost, model=ready.model, requests=requests.tolist())
    return log.tally(cost.round_times(trace.max_candidates), requests)


@dataclass(frozen=True, eq=False)
class LiveRuns:
    """Live continuations under one policy, by request: counts of its rounds by candidates drafted, and seconds.

    Attributes:
        drafted: [R, K + 1] rounds that drafted k candidates.
        accepted, emitted, cut: [R].
        seconds: [R] of the whole loop, reading the prompt included; `draft_seconds` and `verify_seconds` of it.
    """

    drafted: Int[np.ndarray, "R K+1"]
    accepted: Int[np.ndarray, " R"]
    emitted: Int[np.ndarray, " R"]
    cut: Int[np.ndarray, " R"]
    seconds: np.ndarray
    draft_seconds: np.ndarray
    verify_seconds: np.ndarray

    def tally(self, cost: Cost) -> Tally:
        """Sums by request under declared or measured times: counts times times, as in the replay."""
        most = self.drafted.shape[1] - 1
        num_drafted = self.drafted @ np.arange(most + 1)
        return Tally(
            num_target_calls=self.drafted.sum(axis=1), num_drafted=num_drafted, num_emitted=self.emitted,
            num_discarded=num_drafted - self.accepted, num_cut=self.cut, time=self.drafted @ cost.round_times(most),
        ).check_balance()  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LiveRuns":
        return cls(**{name: np.array(data[name]) for name in cls.__dataclass_fields__})


def run_live(
    pair: Any, prompts: Sequence[Sequence[int]], ready: Ready, cost: Cost, sampling: dict[str, Any],
    tell: Callable[[int], Any] = lambda tokens: None,
) -> LiveRuns:  # fmt: skip
    """Decode every prompt live under the policy, one at a time; `tell` hears the tokens of each.

    A rule that reads times is told those of `cost`, as in replay, or the two would play by different clocks.
    """
    from realmodels.decode import decode
    from realmodels.streams import request_ids

    rows, state = [], None
    most = sampling["max_candidates"]
    for prompt, request in zip(prompts, request_ids(prompts), strict=True):
        run = decode(pair, prompt, ready.spec, **sampling, estimator=ready.model, cost=cost, score=ready.scored,
                     request=request, state=state if ready.rule.persists else None)  # fmt: skip
        state = run.state
        drafted = np.bincount([step.num_drafted for step in run.rounds], minlength=most + 1)
        counts = [
            sum(getattr(step, name) for step in run.rounds) for name in ("num_accepted", "num_emitted", "num_cut")
        ]
        rows.append((drafted, *counts, run.time, run.draft_time, run.verify_time))
        tell(counts[1])
    return LiveRuns(*(np.array(column) for column in zip(*rows, strict=True)))


def measures(tally: Tally, level: float) -> dict[str, Any]:
    """Every rate with its interval, clustered by request, and the counts."""
    found = {name: ratio(getattr(tally, top), getattr(tally, bottom)) for name, (top, bottom) in PARTS.items()}
    ends = {name: list(interval(value, len(tally.time), level)) for name, value in found.items()}
    return {
        **{name: estimate.value for name, estimate in found.items()},
        "interval": ends["throughput"],
        "intervals": ends,
        "throughput_se": found["throughput"].se,
        **{name: int(np.sum(getattr(tally, name))) for name in COUNTS},
    }


def with_interval(estimate: Estimate, count: int, level: float) -> dict[str, Any]:
    """A value and its interval over `count` requests."""
    return {"value": estimate.value, "interval": list(interval(estimate, count, level))}


def compare(first: Tally, second: Tally) -> dict[str, float]:
    """z of each rate of `first` minus that of `second`, paired by request: both met the same prompts."""
    out = {}
    for name, (top, bottom) in PARTS.items():
        one, other = (
            replace(tally, num_emitted=getattr(tally, top), time=np.asarray(getattr(tally, bottom), dtype=float))
            for tally in (first, second)
        )
        difference: Estimate = paired(one, other)
        out[name] = 0.0 if difference.value == 0 else difference.value / difference.se if difference.se else np.inf
    return out


def digest(*parts: Any) -> str:
    """A short name of settings: equal for equal JSON."""
    text = json.dumps(parts, sort_keys=True, default=lambda x: np.asarray(x).tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]
