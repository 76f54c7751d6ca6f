r"""The same stopping rules inside transformers' `generate`.

**attach.** Assisted generation drafts a round by calling the draft's own `generate`, which asks its stopping criteria
after every token. `attach` binds a criterion that carries the rule onto that call, and sets the draft's generation
config so that nothing else decides (K tokens, constant schedule, no confidence threshold). The text is transformers'
own: greedy output is that of the target alone, sampled output has its law, since what is drafted is submitted.

    with attach(draft, "rejection:0.4", estimator=model) as log:
        target.generate(**inputs, assistant_model=draft)
    total(log).block_efficiency  # realmodels.decode.total

The *log* holds one `Decoded` for each call of the target's `generate`, as `realmodels.decode` gives them. A rule sees
what it sees there (`realmodels.sight`), of the scores that transformers sampled from. How many candidates were accepted
shows in the text: those it goes on with. The next round's input tells it, and behind the last round the result of the
call; for that the block watches `GenerationMixin.generate`. One call at a time; all is put back by `detach`. Nobody
drafts for the last token at the maximum length: that round's time is counted with the one before.

*One candidate at least.* Transformers verifies no empty round (except for the last token at the maximum length): a rule
that wants none gets one, `log.num_forced` counts how often, and `fixed:0` is refused. So a rule's log equals that of
`realmodels.decode` where it is 0.

**speculate** is `realmodels.decode` as a `custom_generate`: our own loop, with transformers' settings.

    target.generate(ids, custom_generate=speculate, draft_model=draft, policy="rejection:0.4", log=log)

Both use public names alone. Tested with transformers 5.3, 5.12 and 5.23; versions outside 5.3 <= v < 6 are refused.

Example:
    >>> import torch
    >>> from realmodels.pair import load_pair
    >>> pair = load_pair("tiny", "tiny:1")
    >>> with attach(pair.draft, "hf_confidence:threshold=0.4", max_candidates=5) as log:
    ...     text = pair.target.generate(torch.tensor([[5, 9, 3]]), assistant_model=pair.draft, max_new_tokens=8,
    ...                                 do_sample=False, pad_token_id=0)
    >>> log[0].tokens == text[0, 3:].tolist()
    True
"""

import copy
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mdp import entrants
from mdp.cost import Cost
from mdp.policy import FixedLength, Policy, PolicySpec
from realmodels.decode import Decoded, Round, RoundTime, decode
from realmodels.pair import ModelPair
from realmodels.sampling import Sampling
from realmodels.sight import SCORED, Head, Sight
from realmodels.verify import Law, draft_features

__all__ = ["Log", "attach", "detach", "speculate"]

OLDEST, NEXT_MAJOR = (5, 3), 6
WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")
UNWARPED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
            "eta_cutoff": 0.0}  # fmt: skip
"""The draft's call is given the target's processors and its config, and would warp a second time by the config."""

_attached: dict[int, "Log"] = {}
_watched: list[Callable[..., Any]] = []  # transformers' own `generate` while something is attached


class Log(list[Decoded]):
    """What happened while a rule was attached: one `Decoded` a call of the target's `generate`, in order.

    Leaving the `with` block, or `detach`, ends it; the log stays readable.

    Attributes:
        num_forced: rounds in which the rule wanted no candidate and transformers took one.
    """

    def __init__(self, draft: Any, sight: Sight, greedy: Sampling):
        super().__init__()
        self.num_forced = 0
        self._draft, self._sight, self._greedy = draft, sight, greedy
        self._run: _Assisted | None = None
        wanted = {
            "num_assistant_tokens": greedy.max_candidates,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }
        config = draft.generation_config
        self._settings = {name: getattr(config, name) for name in wanted}
        for name, value in wanted.items():
            setattr(config, name, value)
        own = draft.generate

        @functools.wraps(own)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if self._run is None else self._run.draft(own, *args, **kwargs)

        draft.generate = generate
        _attached[id(draft)] = self
        if len(_attached) == 1:
            _watch()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Put the draft back as it was; a second time does nothing."""
        if _attached.get(id(self._draft)) is not self:
            return
        del _attached[id(self._draft)]
        if not _attached:
            _unwatch()
        del self._draft.generate  # the instance's; that of its class shows again
        for name, value in self._settings.items():
            setattr(self._draft.generation_config, name, value)

    def _follow(self, generate: Callable[[], Any]) -> Any:
        """One call of the target's `generate`."""
        rule = self._sight.rule
        state = self[-1].state if self and rule.persists else rule.init()
        self._run = _Assisted(self._sight, self._greedy, state)
        try:
            out = generate()
            text = getattr(out, "sequences", out)[0].tolist()
            self.append(self._run.finish(text))
            self.num_forced += self._run.num_forced
        finally:
            self._run = None
        return out


def attach(
    draft: Any,
    policy: str | Policy | PolicySpec,
    *,
    max_candidates: int = 12,
    top_k: int = 50,
    top_p: float = 1.0,
    estimator: Any = None,
    head: Head | None = None,
    cost: Cost | None = None,
) -> Log:
    """Let a rule decide how much `draft` drafts as an `assistant_model`, until the log is detached.

    Args:
        draft: a transformers model with the target's vocabulary.
        policy: a policy string or a rule; a bare `optimal` must have been solved by the caller.
        max_candidates: most candidates of a round.
        top_k, top_p: of the law that a rule's features are taken from where generation is greedy. Where it samples,
            that is the law of generation itself.
        estimator, head, cost: as in `realmodels.decode.decode`.

    Raises:
        ValueError: one line, if the rule needs what is not shown, `draft` has a rule attached, or the installed
            transformers is outside the supported versions.
    """
    _check_version()
    greedy = Sampling(max_candidates=max_candidates, temperature=0, top_k=top_k, top_p=top_p)
    ways = dict.fromkeys(SCORED, "realmodels.decode does, with score=True")
    sight = Sight(policy, max_candidates, estimator=estimator, head=head, cost=cost, ways=ways)
    if isinstance(sight.rule, FixedLength) and sight.rule.length == 0:
        raise ValueError(f"policy {sight.spec.text!r}: transformers drafts at least one candidate a round")
    if "generate" in vars(draft):
        raise ValueError("attach: this draft has a rule attached already, or a generate of its own; detach it first")
    return Log(draft, sight, greedy)


def detach(draft: Any) -> None:
    """End what `attach` began on this draft; without it nothing happens."""
    if (log := _attached.get(id(draft))) is not None:
        log.detach()


class _Assisted:
    """One call of the target's `generate`, round by round: what the draft is asked to do, and what became of it."""

    def __init__(self, sight: Sight, greedy: Sampling, state: Any):
        self.sight, self.greedy, self.state = sight, greedy, state
        self.rounds: list[Round] = []
        self.times: list[RoundTime] = []
        self.num_forced = 0
        self.prompt_length: int | None = None
        self.length = 0  # of the text when the round began
        self.candidates: list[int] | None = None
        self.hidden: Tensor | None = None
        self.draft_time = 0.0
        self.start = self.drafted = time.perf_counter()

    def draft(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Draft one round by the draft's own `generate`."""
        from transformers import StoppingCriteriaList

        now = time.perf_counter()
        text = args[0] if args else kwargs["input_ids"]
        if self.candidates is not None:
            self._end_round(text[0, self.length :].tolist(), now)
        self.length = text.shape[1]
        if self.prompt_length is None:
            self.prompt_length = self.length
        self.config = kwargs["generation_config"] = copy.copy(kwargs["generation_config"])
        for name, value in UNWARPED.items():
            setattr(self.config, name, value)
        self.most = int(kwargs["max_new_tokens"])
        self.sight.restart()
        self.state, stop = self.sight.rule.stop(self.state, self.sight.observation(0))
        self.forced = bool(stop)
        self.num_forced += self.forced
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), _criterion(self)])
        hook = None
        if self.sight.reads_head:
            hook = generate.__self__.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)  # type: ignore[attr-defined]
        begun = time.perf_counter()
        try:
            out = generate(*args, **kwargs)
        finally:
            if hook is not None:
                hook.remove()
        self.candidates = out.sequences[0, self.length :].tolist()
        self.drafted = time.perf_counter()
        self.draft_time = self.drafted - begun
        return out

    def _keep_hidden(self, module: Any, inputs: tuple[Tensor, ...]) -> None:
        self.hidden = inputs[0][0, -1]

    def stops(self, text: Tensor, scores: Sequence[Tensor]) -> bool:
        """Whether to stop behind the last token of `text` [1, n]; scores[i] [1, vocabulary] of candidate i."""
        num_candidates, token = text.shape[1] - self.length, text[:, -1]
        if self.forced:
            return True
        if num_candidates >= self.most or int(token) in _ends(self.config):
            return False  # transformers stops by itself, so the rule is not asked
        if self.sight.reads_features:
            law = (
                Law(torch.softmax(scores[-1].double(), -1))
                if self.config.do_sample
                else self.greedy.feature_law(scores[-1])
            )
            values = draft_features(law, token)
            self.sight.update({name: float(value) for name, value in values.items()}, self.hidden)
        self.state, stop = self.sight.rule.stop(self.state, self.sight.observation(num_candidates))
        return bool(stop)

    def finish(self, text: list[int]) -> Decoded:
        """All rounds, once the whole text is known."""
        now = time.perf_counter()
        rest = 1
        if self.candidates is not None:
            rest = self._end_round(text[self.length :], now)
        if rest > 1:
            raise RuntimeError(f"attach: {rest} tokens appeared without a draft; is this assisted generation?")
        if rest:  # transformers drafts nothing for the last token at the maximum length
            self.candidates, self.draft_time = [], 0.0
            self._end_round(text[-1:], now)
        tokens = text[-1:] if self.prompt_length is None else text[self.prompt_length :]
        return Decoded(tokens, self.rounds, self.times, now - self.start, self.state)

    def _end_round(self, emitted: list[int], now: float) -> int:
        """Log the round that began `emitted`; returns how many of those tokens belong to a later one."""
        assert self.candidates is not None
        # The correction differs from the rejected candidate: its probability there is (p - q)^+ = 0.
        pairs = zip(self.candidates, emitted, strict=False)
        agree = [candidate == token for candidate, token in pairs]
        num_accepted = agree.index(False) if False in agree else len(agree)
        num_emitted = min(num_accepted + 1, len(emitted))
        self.rounds.append(Round(len(self.candidates), num_accepted, num_emitted, num_accepted + 1 - num_emitted))
        self.times.append(RoundTime(self.draft_time, now - self.drafted))
        outcome = self.sight.outcome(len(self.candidates), num_accepted, *self.times[-1])
        self.state = self.sight.rule.end_round(self.state, outcome)
        self.drafted = now
        return len(emitted) - num_emitted


def _ends(config: Any) -> tuple[int, ...]:
    ends = config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _criterion(run: _Assisted) -> Any:
    from transformers import StoppingCriteria

    class Asked(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), run.stops(input_ids, scores), device=input_ids.device)

    return Asked()


def _watch() -> None:
    """From now on calls of any `generate` whose `assistant_model` has a rule attached are followed."""
    from transformers import GenerationMixin

    mixin: Any = GenerationMixin
    own = mixin.generate
    signature = inspect.signature(own)

    @functools.wraps(own)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        log = _attached.get(id(given.get("assistant_model")))
        if log is None or log._run is not None:
            return own(self, *args, **kwargs)
        if kwargs.get("assistant_tokenizer") is not None:
            raise ValueError("attach: assistant_tokenizer: target and draft must share one vocabulary")
        return log._follow(lambda: own(self, *args, **kwargs))

    _watched.append(own)
    mixin.generate = generate


def _unwatch() -> None:
    from transformers import GenerationMixin

    GenerationMixin.generate = _watched.pop()  # type: ignore[method-assign]


def speculate(
    model: Any,
    input_ids: Tensor,
    generation_config: Any,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
    attention_mask: Tensor | None = None,
    draft_model: Any = None,
    policy: str | Policy | PolicySpec = "fixed:4",
    max_candidates: int = 12,
    seed: int | None = None,
    estimator: Any = None,
    head: Head | None = None,
    cost: Cost | None = None,
    score: bool = False,
    log: list[Decoded] | None = None,
    **unused: Any,
) -> Any:
    """`realmodels.decode.decode` for `generate(..., custom_generate=speculate, draft_model=..., policy=...)`.

    Args:
        seed: of all draws; None takes one from torch's own generator, so that `torch.manual_seed` repeats a run.
        log: the `Decoded` is appended to it; a rule whose state persists goes on from its last one.

    The rest is as in `decode`; temperature, top-k, top-p, end-of-text and lengths are those of generation.

    Raises:
        ValueError: one line, for several prompts at once, padding, or settings of generation that the loop does not
            have.
    """
    _check_version()
    if draft_model is None:
        raise ValueError("speculate: draft_model is missing (generate keeps assistant_model to itself)")
    if input_ids.shape[0] != 1 or (attention_mask is not None and not bool((attention_mask == 1).all())):
        raise ValueError("speculate: one prompt at a time, without padding")
    for what, given, known in (("logits processor", logits_processor, WARPERS),
                               ("stopping criterion", stopping_criteria, CRITERIA)):  # fmt: skip
        for entry in given:
            if type(entry).__name__ not in known:
                raise ValueError(f"speculate: {what} {type(entry).__name__} is not supported; only {', '.join(known)}")
    config, prompt = generation_config, input_ids[0].tolist()
    sizes = [part.get_output_embeddings().weight.shape[0] for part in (model, draft_model)]
    dtype = str(model.dtype).removeprefix("torch.")
    pair = ModelPair(model, draft_model, None, _ends(config), min(sizes), dtype, draft_is_target_time=False)
    (spec,) = entrants.read([policy])
    persists = bool(log) and spec.policy is not None and spec.policy.persists
    run = decode(
        pair, prompt, spec, state=log[-1].state if log and persists else None,
        max_candidates=max_candidates, max_new_tokens=config.max_length - len(prompt),
        temperature=0 if not config.do_sample else 1.0 if config.temperature is None else float(config.temperature),
        top_k=config.top_k or 0, top_p=1.0 if config.top_p is None else float(config.top_p),
        seed=int(torch.randint(2**62, ())) if seed is None else seed,
        estimator=estimator, head=head, cost=cost, score=score,
    )  # fmt: skip
    if log is not None:
        log.append(run)
    text = torch.cat([input_ids, torch.tensor([run.tokens], device=input_ids.device, dtype=input_ids.dtype)], 1)
    if not config.return_dict_in_generate:
        return text
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=text)  # type: ignore[arg-type]


def _check_version() -> None:
    from transformers import __version__ as version

    major, minor = (int(part) for part in version.split(".")[:2])
    if not OLDEST <= (major, minor) < (NEXT_MAJOR, 0):
        least = ".".join(map(str, OLDEST))
        raise ValueError(f"transformers {version} is not supported here; needs {least} <= version < {NEXT_MAJOR}")
