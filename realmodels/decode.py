r"""Live speculative decoding of a pair under any stopping rule.

A round: the draft proposes candidates one at a time; before each, the empty round included, the rule is asked. What
was drafted is submitted, all of it, to one target pass (`realmodels.verify.verify`), both caches are cropped to what
was kept, and the rule is told the outcome. The emitted text has the target's law whatever the rule, because a rule
sees a candidate only after it is drafted and no drafted candidate is dropped.

Ends: a drafted end-of-text token forces the stop; accepted, it ends the text and the token behind it is cut.
Candidates are clamped to the positions left minus one. A forced stop is not asked for.

What a rule reads comes from an *estimator*, such as `mdp.fit.SignalModel`: `start() -> state`,
`update(state, features) -> state` and `observation(state, num_candidates, features) -> Observation`. Features are
those of a trace. `token_accept_prob` needs the target's law while drafting: `score=True` runs the target on every
drafted token, which is slow and serves validation only (a live run with a perfect acceptance head, to be compared
with replay). The text is still lossless: the features come after the candidate is drafted, and it is submitted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdp import entrants
from mdp.fit import SignalModel
from mdp.metrics import Tally
from mdp.policy import Observation, Outcome, Policy, PolicySpec
from realmodels.pair import ModelPair
from realmodels.reader import Reader
from realmodels.sampling import Sampling
from realmodels.streams import request_id, request_ids, stream
from realmodels.verify import Law, acceptance, draft_features, draw, verify

__all__ = ["Decoded", "Round", "decode", "decode_all", "total"]

_LIVE = ("draft_prob", "top_prob", "entropy")
_SCORED = ("token_accept_prob", "step_accept_prob")


class Round(NamedTuple):
    """Counts of one round, as `simulate.replay` logs them."""

    num_drafted: int
    num_accepted: int
    num_emitted: int
    num_cut: int


@dataclass(frozen=True)
class Decoded:
    """A decoded continuation.

    Attributes:
        tokens: what was emitted, an end-of-text token included.
        rounds: the counts of each round, in order.
        draft_time, verify_time: seconds spent in draft steps and in target passes.
        time: seconds of the whole loop.
        state: the rule's, at the end.
    """

    tokens: list[int]
    rounds: list[Round]
    draft_time: float
    verify_time: float
    time: float
    state: Any = ()

    @property
    def tally(self) -> Tally:
        """Sums over rounds, checked for balance; times in seconds."""
        drafted, accepted, emitted, cut = np.sum(self.rounds, axis=0).tolist()
        return Tally(len(self.rounds), drafted, emitted, drafted - accepted, cut, self.time).check_balance()


def total(runs: Sequence[Decoded]) -> Tally:
    """The tally of several continuations together."""
    tallies = [run.tally for run in runs]
    names = ("num_target_calls", "num_drafted", "num_emitted", "num_discarded", "num_cut", "time")
    return Tally(*(sum(getattr(tally, name) for tally in tallies) for name in names)).check_balance()


def decode_all(
    pair: ModelPair, prompts: Sequence[Sequence[int]], policy: str | Policy | PolicySpec, **options: Any
) -> list[Decoded]:
    """`decode` each prompt, with its own draws even where prompts are equal.

    The state of a rule that persists goes from one prompt to the next.
    """
    (spec,) = entrants.read([policy])
    runs: list[Decoded] = []
    for prompt, request in zip(prompts, request_ids(prompts), strict=True):
        state = runs[-1].state if runs and spec.policy is not None and spec.policy.persists else None
        runs.append(decode(pair, prompt, spec, request=request, state=state, **options))
    return runs


def decode(
    pair: ModelPair,
    prompt: Sequence[int],
    policy: str | Policy | PolicySpec,
    *,
    max_candidates: int = 12,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    estimator: Any = None,
    score: bool = False,
    request: str | None = None,
    state: Any = None,
) -> Decoded:
    """Continue `prompt` by speculative decoding under `policy`.

    Args:
        policy: a policy string or a rule; a bare `optimal` must have been solved by the caller.
        estimator: gives the rule its observation; None shows the features, and with `score` survival from them.
        score: run the target on every drafted token, for rules that read `token_accept_prob`.
        request: address of the draws (`realmodels.streams`); None names it after the prompt.
        state: the rule's, at the start; None is its own first one.

    Raises:
        ValueError: one line, if a setting is out of range or the rule needs what a live run does not show.
    """
    sampling = Sampling(max_candidates, max_new_tokens, temperature, top_k, seed)
    pair.check_prompts([prompt], sampling)
    if estimator is None and score:
        estimator = SignalModel()
    sight = _Sight(estimator, (*_LIVE, *_SCORED) if score else _LIVE)
    rule = sight.admit(entrants.read([policy])[0], max_candidates)
    run = _Run(pair, sampling, list(prompt), stream(seed, request or request_id(prompt), "live"), score)
    rounds, emitted = [], 0
    state = rule.init() if state is None else state
    start = time.perf_counter()
    while emitted < max_new_tokens:
        sight.restart()
        spent = run.draft_time, run.verify_time
        most, drafted = min(max_candidates, max_new_tokens - emitted - 1), []
        while len(drafted) < most and not (drafted and drafted[-1] in pair.end_token_ids):
            state, stop = rule.stop(state, sight.observation(len(drafted)))
            if stop:
                break
            token, features = run.draft()
            drafted.append(token)
            sight.update(features)
        num_accepted, tokens = run.verify()
        took = run.draft_time - spent[0], run.verify_time - spent[1]
        state = rule.end_round(state, Outcome(len(drafted), num_accepted, *took))
        emitted += len(tokens)
        rounds.append(Round(len(drafted), num_accepted, len(tokens), num_accepted + 1 - len(tokens)))
        if tokens[-1] in pair.end_token_ids:
            break
    seconds = time.perf_counter() - start
    return Decoded(run.path[len(prompt) :], rounds, run.draft_time, run.verify_time, seconds, state)


class _Sight:
    """What the rule sees: the last candidate's features, through the estimator if there is one."""

    def __init__(self, estimator: Any, names: Sequence[str]):
        self.estimator, self.names = estimator, names
        self.restart()

    def restart(self) -> None:
        self.features = dict.fromkeys(self.names, float("nan"))
        self.state = self.estimator.start() if self.estimator else None

    def update(self, features: dict[str, float]) -> None:
        self.features = features
        if self.estimator:
            self.state = self.estimator.update(self.state, features)

    def observation(self, num_candidates: int) -> Observation:
        if self.estimator:
            return self.estimator.observation(self.state, num_candidates, self.features)
        return Observation(num_candidates, **{k: v for k, v in self.features.items() if k in Observation._fields})

    def admit(self, spec: PolicySpec, max_candidates: int) -> Policy:
        """The rule of `spec` at this depth, refused if it or the estimator reads what is not there."""
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
            ways = dict.fromkeys(_SCORED, "score=True does")
            ways |= dict.fromkeys(("survival", "next_accept_prob", "regime"), "an estimator does")
            hint = f" ({ways[lacking[0]]})" if lacking[0] in ways else ""
            raise entrants.Lacking(spec.text, lacking[0], f"which this live run does not show{hint}")
        chain = getattr(self.estimator, "transition", None)
        return entrants.fit_depth(spec.text, spec.policy, max_candidates, 1 if chain is None else len(chain))


@dataclass
class _Run:
    """Both models on one text: `path` is what is emitted (and the prompt), `candidates` what is drafted after it."""

    pair: ModelPair
    sampling: Sampling
    path: list[int]
    rng: np.random.Generator
    score: bool
    candidates: list[int] = field(default_factory=list)
    draft_laws: list[Law] = field(default_factory=list)
    target_logits: list[Tensor] = field(default_factory=list)
    draft_time: float = 0.0
    verify_time: float = 0.0

    def __post_init__(self) -> None:
        self.target, self.drafter = (self.pair.reader(role, 1) for role in ("target", "draft"))

    def _read(self, reader: Reader) -> Tensor:
        """Bring a cache up to date; logits [n, vocabulary] after the last token of the path and each candidate."""
        text = self.path + self.candidates
        span = torch.arange(reader.num_columns, len(text))[None]
        keep = len(text) - max(reader.num_columns, len(self.path) - 1)
        return reader.read(torch.tensor([text])[:, span[0]], span, keep=keep)[0]

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(self.pair.target.device)

    def draft(self) -> tuple[int, dict[str, float]]:
        """Draw one more candidate; returns it with its features."""
        start = time.perf_counter()
        logits = self._read(self.drafter)[-1:]
        law = self.sampling.law(logits)
        token = draw(law, self._uniforms(1))
        values = draft_features(self.sampling.feature_law(logits), token)
        chosen = int(token)
        self.draft_time += time.perf_counter() - start
        if self.score:
            start = time.perf_counter()
            self.target_logits.append(self._read(self.target))
            values |= acceptance(self.sampling.law(self.target_logits[-1][-1:]), law, token)
            self.verify_time += time.perf_counter() - start
        self.candidates.append(chosen)
        self.draft_laws.append(law)
        return chosen, {name: float(value) for name, value in values.items()}

    def verify(self) -> tuple[int, list[int]]:
        """Submit all candidates; returns how many were accepted and the tokens emitted."""
        start = time.perf_counter()
        count, device = len(self.candidates), self.pair.target.device
        p = self.sampling.law(torch.cat([*self.target_logits, self._read(self.target)])[None])
        q = Law(torch.empty(1, 0, 1)) if count == 0 else _stack(self.draft_laws)
        accepted, following = verify(
            p, q, torch.tensor([self.candidates], dtype=torch.long, device=device),
            torch.tensor([count], device=device), self._uniforms(1, count), self._uniforms(1),
        )  # fmt: skip
        num_accepted = int(accepted)
        tokens = self.candidates[:num_accepted]
        if not (tokens and tokens[-1] in self.pair.end_token_ids):
            tokens = [*tokens, int(following)]
        # What was read of rejected candidates is forgotten; the new last token is read in the next round.
        valid = len(self.path) + num_accepted
        for reader in (self.target, self.drafter):
            reader.crop(min(reader.num_columns, valid))
        self.path = self.path + tokens
        self.candidates, self.draft_laws, self.target_logits = [], [], []
        self.verify_time += time.perf_counter() - start
        return num_accepted, tokens


def _stack(laws: list[Law]) -> Law:
    """[1, k, m] from k laws [1, m]."""
    ids = None if laws[0].ids is None else torch.stack([law.ids for law in laws if law.ids is not None], 1)
    return Law(torch.stack([law.probs for law in laws], 1), ids)
