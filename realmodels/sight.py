r"""What a stopping rule sees of a running draft: one definition for our own loop and for transformers' `generate`.

A *sight* turns the features of the last candidate into an `Observation` and admits the rules that can live on it.

* `draft_prob`, `top_prob`, `entropy` are those of a trace: of the warped law that the candidate was drawn from.
* `head` is what an acceptance head makes of the draft's hidden states, through `score(hidden, features)`: [n, width]
  states and features [n] to probabilities [n]. A head with `lag` 0 reads the state that the candidate's law came from,
  there as soon as it is drawn. One with `lag` 1, as published, reads the state *after* the candidate, which the draft
  reaches a step later: candidate k comes with the score of k - 1, the first with 1, as in replay.
* `survival`, `next_accept_prob`, `regime` come from an *estimator* such as `mdp.fit.SignalModel`: `start() -> state`,
  `update(state, features) -> state`, `observation(state, num_candidates, features) -> Observation`.
* `verify_time` and `step_time` come from a declared cost; `Outcome` then holds its times, otherwise the clock's.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mdp import entrants
from mdp.cost import Cost
from mdp.policy import Observation, Outcome, Policy, PolicySpec

__all__ = ["LIVE", "SCORED", "Head", "Sight"]

LIVE: tuple[str, ...] = ("draft_prob", "top_prob", "entropy")
"""What the draft knows of its candidate: shown to every rule, and what a head may read beside the hidden state."""
SCORED: tuple[str, ...] = ("token_accept_prob", "step_accept_prob")
TIMES: tuple[str, ...] = ("verify_time", "step_time")


class Head(Protocol):
    """An acceptance head (`realmodels.head`)."""

    lag: int

    def score(self, hidden: Tensor, features: dict[str, Tensor], /) -> Tensor:
        """Acceptance probabilities [n] of candidates with these hidden states [n, width] and features [n]."""
        ...


class Sight:
    """The view of one rule, `self.rule`, on one draft.

    Args:
        policy: the rule, refused if it or the estimator reads what is not shown.
        max_candidates: K.
        shown: names of the features that `update` will be given.
        ways: for refusals: field -> what would show it.

    Raises:
        ValueError: one line, if the rule needs what is not there.
    """

    def __init__(
        self,
        policy: str | Policy | PolicySpec,
        max_candidates: int,
        *,
        shown: Sequence[str] = LIVE,
        estimator: Any = None,
        head: Head | None = None,
        cost: Cost | None = None,
        ways: dict[str, str] | None = None,
    ):
        self.estimator, self.head, self.shown = estimator, head, tuple(shown)
        self.times = None
        if cost is not None:
            self.times = float(cost.draft_time), cost.verify_times(max_candidates), cost.round_times(max_candidates)
        (self.spec,) = entrants.read([policy])
        self.restart()
        self.rule = self._admit(max_candidates, ways or {})
        reads = {*entrants.needs(self.rule), getattr(estimator, "signal", None)}
        self.reads_head = "head" in reads
        self.reads_features = bool(estimator or reads.intersection(self.features))

    def restart(self) -> None:
        """Before the first candidate of a round."""
        names = self.shown if self.head is None else (*self.shown, "head")
        self.features = dict.fromkeys(names, float("nan"))
        self._before: dict[str, float] | None = None
        self.state = self.estimator.start() if self.estimator else None

    def update(self, features: dict[str, float], hidden: Tensor | None = None) -> None:
        """One more candidate, with its features and, if the rule reads the head, the state [width] behind its law."""
        if self.reads_head and self.head is not None:
            scored = self._before if self.head.lag else features
            self._before = dict(features)
            features = features | {"head": 1.0 if scored is None else _score(self.head, hidden, scored)}
        self.features = features
        if self.estimator:
            self.state = self.estimator.update(self.state, features)

    def observation(self, num_candidates: int) -> Observation:
        """What the rule sees with so many candidates drafted."""
        if self.estimator:
            seen = self.estimator.observation(self.state, num_candidates, self.features)
        else:
            seen = Observation(num_candidates, **{k: v for k, v in self.features.items() if k in Observation._fields})
        if self.times is None:
            return seen
        _, verify, round_time = self.times
        k = min(num_candidates, len(verify) - 2)  # behind the last candidate nothing is asked
        return seen._replace(verify_time=verify[k], step_time=round_time[k + 1] - round_time[k])

    def outcome(self, num_drafted: int, num_accepted: int, draft_time: float, verify_time: float) -> Outcome:
        """What the rule is told of a round: the declared cost's times, or else the ones given, which were measured."""
        if self.times is not None:
            draft_time, verify_time = num_drafted * self.times[0], self.times[1][num_drafted]
        return Outcome(num_drafted, num_accepted, draft_time, verify_time)

    def _admit(self, max_candidates: int, ways: dict[str, str]) -> Policy:
        """The rule at this depth."""
        spec = self.spec
        if spec.policy is None:
            raise ValueError(f"policy {spec.text!r}: not solved; give the table of a solution, optimal:FILE")
        if spec.fit:
            raise ValueError(f"policy {spec.text!r}: not fitted; give the rule that simulate.replay.fitted makes of it")
        signal = getattr(self.estimator, "signal", None)
        if signal is not None and signal not in self.features:
            lacking = [signal]
        else:
            first = self.observation(0)
            lacking = sorted(name for name in entrants.needs(spec.policy) if getattr(first, name) is None)
        if lacking:
            ways = ways | dict.fromkeys(("survival", "next_accept_prob", "regime"), "an estimator does")
            ways = ways | dict.fromkeys(TIMES, "a cost does") | {"head": "a head does"}
            hint = f" ({ways[lacking[0]]})" if lacking[0] in ways else ""
            raise entrants.Lacking(spec.text, lacking[0], f"which this live run does not show{hint}")
        chain = getattr(self.estimator, "transition", None)
        rule = spec.policy if self.head is None else entrants.fit_lag(spec.policy, self.head.lag)
        return entrants.fit_depth(spec.text, rule, max_candidates, 1 if chain is None else len(chain))


def _score(head: Head, hidden: Tensor | None, features: dict[str, float]) -> float:
    if hidden is None:
        raise ValueError("head: this draft shows no hidden states")
    named = {name: torch.tensor([features[name]], device=hidden.device) for name in LIVE}
    with torch.inference_mode():
        return float(head.score(hidden[None].float(), named))
