r"""Live speculative decoding of a pair under any stopping rule.

A round: the draft proposes candidates one at a time; before each, the empty round included, the rule is asked. What
was drafted is submitted, all of it, to one target pass (`realmodels.verify.verify`), both caches are cropped to what
was kept, and the rule is told the outcome. The emitted text has the target's law whatever the rule, because a rule
sees a candidate only after it is drafted and no drafted candidate is dropped.

Ends: a drafted end-of-text token forces the stop; accepted, it ends the text and the token behind it is cut.
Candidates are clamped to the positions left minus one. A forced stop is not asked for.

What a rule reads is in `realmodels.sight`. `token_accept_prob` needs the target's law while drafting: `score=True`
runs the target on every drafted token, which is slow and serves validation only (a live run with a perfect acceptance
head, to be compared with replay). The text is still lossless: the features come after the candidate is drafted, and
it is submitted.

Times are wall-clock seconds of each round. A request's first round also reads its prompt, with both models.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mdp import entrants
from mdp.cost import Cost
from mdp.fit import SignalModel
from mdp.metrics import Tally
from mdp.policy import Policy, PolicySpec
from realmodels.pair import ModelPair
from realmodels.reader import Reader
from realmodels.sampling import Sampling
from realmodels.sight import LIVE, SCORED, Head, Sight
from realmodels.streams import request_id, request_ids, stream
from realmodels.verify import Law, acceptance, draft_features, draw, verify
from simulate.replay import RoundLog

__all__ = ["Decoded", "Round", "RoundTime", "decode", "decode_all", "decode_each", "round_log", "total"]


class Round(NamedTuple):
    """Counts of one round, as `simulate.replay` logs them."""

    num_drafted: int
    num_accepted: int
    num_emitted: int
    num_cut: int


class RoundTime(NamedTuple):
    """Seconds that one round spent in draft steps and in its target pass."""

    draft: float
    verify: float


@dataclass(frozen=True)
class Decoded:
    """A decoded continuation.

    Attributes:
        tokens: what was emitted, an end-of-text token included.
        rounds: the counts of each round, in order.
        times: the seconds of each round.
        time: seconds of the whole loop.
        state: the rule's, at the end.
    """

    tokens: list[int]
    rounds: list[Round]
    times: list[RoundTime]
    time: float
    state: Any = ()

    @property
    def draft_time(self) -> float:
        """Seconds spent in draft steps."""
        return sum(spent.draft for spent in self.times)

    @property
    def verify_time(self) -> float:
        """Seconds spent in target passes."""
        return sum(spent.verify for spent in self.times)

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


def round_log(runs: Sequence[Decoded]) -> RoundLog:
    """The rounds of several continuations as `simulate.replay.replay_rounds` gives them; request r is run r."""
    rows = []
    for request, run in enumerate(runs):
        start = 0
        for step in run.rounds:
            rows.append((request, start, *step))
            start += step.num_emitted
    return RoundLog(*np.array(rows, dtype=np.int64).reshape(-1, 6).T)


def decode_all(
    pair: ModelPair, prompts: Sequence[Sequence[int]], policy: str | Policy | PolicySpec, **options: Any
) -> list[Decoded]:
    """`decode` each prompt, with its own draws even where prompts are equal.

    The state of a rule that persists goes from one prompt to the next.
    """
    return list(decode_each(pair, prompts, policy, **options))


def decode_each(
    pair: ModelPair, prompts: Sequence[Sequence[int]], policy: str | Policy | PolicySpec, **options: Any
) -> Iterator[Decoded]:
    """As `decode_all`, one continuation after the other."""
    (spec,) = entrants.read([policy])
    state = None
    for prompt, request in zip(prompts, request_ids(prompts), strict=True):
        run = decode(pair, prompt, spec, request=request, state=state, **options)
        state = run.state if spec.policy is not None and spec.policy.persists else None
        yield run


def decode(
    pair: ModelPair,
    prompt: Sequence[int],
    policy: str | Policy | PolicySpec,
    *,
    max_candidates: int = 12,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    estimator: Any = None,
    head: Head | None = None,
    cost: Cost | None = None,
    score: bool = False,
    request: str | None = None,
    state: Any = None,
) -> Decoded:
    """Continue `prompt` by speculative decoding under `policy`.

    Args:
        policy: a policy string or a rule; a bare `optimal` must have been solved by the caller.
        estimator: gives the rule its observation; None shows the features, and with `score` survival from them.
        head: an acceptance head, for rules that read `head`.
        cost: times that the rule is shown and told in place of the clock's, as in replay.
        score: run the target on every drafted token, for rules that read `token_accept_prob`.
        request: address of the draws (`realmodels.streams`); None names it after the prompt.
        state: the rule's, at the start; None is its own first one.

    Raises:
        ValueError: one line, if a setting is out of range or the rule needs what a live run does not show.
    """
    sampling = Sampling(max_candidates, max_new_tokens, temperature, top_k, top_p=top_p, seed=seed)
    pair.check_prompts([prompt], sampling)
    if estimator is None and score:
        estimator = SignalModel()
    shown = (*LIVE, *SCORED) if score else LIVE
    ways = dict.fromkeys(SCORED, "score=True does")
    sight = Sight(policy, max_candidates, shown=shown, estimator=estimator, head=head, cost=cost, ways=ways)
    rule = sight.rule
    draws = stream(seed, request or request_id(prompt), "live")
    run = _Run(pair, sampling, list(prompt), draws, score, keeps_hidden=sight.reads_head)
    rounds: list[Round] = []
    times: list[RoundTime] = []
    emitted, state = 0, rule.init() if state is None else state
    start = time.perf_counter()
    while emitted < max_new_tokens:
        sight.restart()
        most = min(max_candidates, max_new_tokens - emitted - 1)
        while (drafted := len(run.candidates)) < most and not (drafted and run.candidates[-1] in pair.end_token_ids):
            if drafted and sight.reads_features:
                sight.update(run.features(), run.hidden)
            state, stop = rule.stop(state, sight.observation(drafted))
            if stop:
                break
            run.draft()
        num_accepted, tokens = run.verify()
        times.append(run.take_times())
        state = rule.end_round(state, sight.outcome(drafted, num_accepted, *times[-1]))
        emitted += len(tokens)
        rounds.append(Round(drafted, num_accepted, len(tokens), num_accepted + 1 - len(tokens)))
        if tokens[-1] in pair.end_token_ids:
            break
    seconds = time.perf_counter() - start
    return Decoded(run.path[len(prompt) :], rounds, times, seconds, state)


@dataclass
class _Run:
    """Both models on one text: `path` is what is emitted (and the prompt), `candidates` what is drafted after it."""

    pair: ModelPair
    sampling: Sampling
    path: list[int]
    rng: np.random.Generator
    score: bool
    keeps_hidden: bool
    candidates: list[int] = field(default_factory=list)
    draft_laws: list[Law] = field(default_factory=list)
    target_logits: list[Tensor] = field(default_factory=list)
    draft_time: float = 0.0
    verify_time: float = 0.0

    def __post_init__(self) -> None:
        self.target, self.drafter = (self.pair.reader(role, 1) for role in ("target", "draft"))

    def _read(self, reader: Reader, keep_hidden: bool = False) -> Tensor:
        """Bring a cache up to date; logits [n, vocabulary] after the last token of the path and each candidate."""
        first, end = reader.num_columns, len(self.path) + len(self.candidates)
        # of a long text only what is new is touched
        unread = self.path[first:] + self.candidates[max(0, first - len(self.path)) :]
        keep = end - max(first, len(self.path) - 1)
        span = torch.arange(first, end)[None]
        return reader.read(torch.tensor([unread]), span, keep=keep, keep_hidden=keep_hidden)[0]

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(self.pair.device)

    def draft(self) -> None:
        """Draw one more candidate."""
        start = time.perf_counter()
        self.logits = self._read(self.drafter, self.keeps_hidden)[-1:]
        law = self.sampling.law(self.logits)
        self.token = draw(law, self._uniforms(1))
        chosen = int(self.token)
        self.draft_time += time.perf_counter() - start
        if self.score:
            start = time.perf_counter()
            self.target_logits.append(self._read(self.target))
            self.verify_time += time.perf_counter() - start
        self.candidates.append(chosen)
        self.draft_laws.append(law)

    def features(self) -> dict[str, float]:
        """Of the last candidate."""
        start = time.perf_counter()
        law = self.draft_laws[-1]
        # Unless decoding is greedy, the law that features are taken from is the one that was drawn from.
        shown_law = law if self.sampling.temperature else self.sampling.feature_law(self.logits)
        values = draft_features(shown_law, self.token)
        shown = {name: float(value) for name, value in values.items()}
        self.draft_time += time.perf_counter() - start
        if self.score:
            start = time.perf_counter()
            values = acceptance(self.sampling.law(self.target_logits[-1][-1:]), law, self.token)
            shown |= {name: float(value) for name, value in values.items()}
            self.verify_time += time.perf_counter() - start
        return shown

    @property
    def hidden(self) -> Tensor | None:
        """The draft's hidden state [width] that the last candidate's law came from, if it is kept."""
        return None if self.drafter.hidden is None else self.drafter.hidden[0, -1]

    def verify(self) -> tuple[int, list[int]]:
        """Submit all candidates; returns how many were accepted and the tokens emitted."""
        start = time.perf_counter()
        count, device = len(self.candidates), self.pair.device
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
        self.path += tokens
        self.candidates, self.draft_laws, self.target_logits = [], [], []
        self.verify_time += time.perf_counter() - start
        return num_accepted, tokens

    def take_times(self) -> RoundTime:
        """What was spent since the last call."""
        spent = RoundTime(self.draft_time, self.verify_time)
        self.draft_time = self.verify_time = 0.0
        return spent


def _stack(laws: list[Law]) -> Law:
    """[1, k, m] from k laws [1, m]."""
    ids = None if laws[0].ids is None else torch.stack([law.ids for law in laws if law.ids is not None], 1)
    return Law(torch.stack([law.probs for law in laws], 1), ids)
