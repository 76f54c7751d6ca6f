r"""Stopping rules: one interface for the simulator, replay and live decoding.

Before each draft step, the empty round included, the world shows the rule an `Observation` of the $k$
candidates drafted so far and the rule says whether to stop. A stop sends all $k$ candidates to the target;
a rule sees a candidate only after it is drafted, and a drafted candidate is always submitted. That is what
keeps the output law equal to the target's: a rule that may look at a candidate and drop it biases it.

A rule is a frozen dataclass whose `stop` uses Python operators only, so the same line runs on floats, on NumPy
arrays with one entry per request, on jax arrays under `jit`, and on torch tensors. A rule of one's own:

    @dataclass(frozen=True)
    class Capped(Policy):
        threshold: float
        most: int
        needs = ("survival",)
        def stop(self, state, observation):
            return state, (observation.survival < self.threshold) | (observation.num_candidates >= self.most)

`needs` names the fields it reads; `if`, `and` and `or` do not work on arrays, `|`, `&` and comparisons do.

*Idioms.* Whatever holds the numbers, a rule selects with `choose(condition, yes, no)`, a blend in arithmetic: both
sides must be finite. What a candidate showed means nothing before there is one and may be nan there:
`known(value, k)` is 1 then. Several numbers of one kind (a bandit's arms, a window of rounds) are a *tuple* of leaves
and a loop over it, never an axis of an array: a leaf may hold one entry per request already. How long such a tuple is
belongs to the rule, as the length of one of its own tuples. A state holds floats, and divisors are kept from 0.

Published rules live in `mdp.rules`, by idea; they are entered into `RULES` under the name that `parse` reads.

Where a world does not know the true survival it supplies an estimate from a *signal* (`mdp.fit.SignalModel`);
the rule does not change. The world, not the rule, forces the stop at `max_candidates`, at the maximum length
and after a drafted end-of-text token.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

__all__ = [
    "MERGE",
    "RULES",
    "SIGNALS",
    "BeliefRule",
    "FixedLength",
    "LookaheadThreshold",
    "Observation",
    "Oracle",
    "Outcome",
    "Policy",
    "PolicySpec",
    "RejectionThreshold",
    "Rule",
    "ThresholdTable",
    "choose",
    "known",
    "load_table",
    "parameter",
    "parse",
    "published",
]

SIGNALS = ("token_accept_prob", "draft_prob", "top_prob", "entropy", "head")
"""What may stand for acceptance on a trace; the first is a perfect acceptance head."""

TIE = 1e-12
"""Two survivals closer than this are the same product rounded differently; a tie continues."""

MERGE = 2.0**44
"""Two survivals closer than 1 / MERGE are one state of a tree: far below `TIE`."""

MAX_TABLE_BYTES = 16 * 2**20


class Observation(NamedTuple):
    """What a rule may look at when k candidates are drafted. `None`: this world does not show it.

    `draft_prob`, `top_prob`, `entropy`, `token_accept_prob` and `head` describe the last drafted candidate and
    mean nothing at k = 0. `symbol` is what a world with hidden regimes shows of that candidate, -1 at k = 0.
    `next_accepted` (would one more candidate be accepted, none rejected before?) is clairvoyance: no live world has it.
    `verify_time` is V(k), `step_time` = T(k + 1) - T(k) what one more candidate takes.
    """

    num_candidates: Any
    survival: Any = None
    next_accept_prob: Any = None
    regime: Any = None
    token_accept_prob: Any = None
    draft_prob: Any = None
    top_prob: Any = None
    entropy: Any = None
    head: Any = None
    next_accepted: Any = None
    symbol: Any = None
    verify_time: Any = None
    step_time: Any = None


class Outcome(NamedTuple):
    """What verification revealed: candidates drafted in the round, and how many of them were accepted.

    `draft_time` and `verify_time` are what all draft steps of the round and its verification took: measured in a live
    run, elsewhere those of the cost model. `None` where there is neither.
    """

    num_drafted: Any
    num_accepted: Any
    draft_time: Any = None
    verify_time: Any = None


class Policy:
    """Base of all rules. Subclasses are frozen dataclasses; every field is a number or an array."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Observation fields the rule reads, `num_candidates` apart."""

    timed: ClassVar[bool] = False
    """Whether `end_round` reads the outcome's times."""

    persists: ClassVar[bool] = False
    """Whether the state at a request's end is that at the start of the next one, in place of `init()`."""

    def init(self) -> Any:
        """State at the start of a request."""
        return ()

    def stop(self, state: Any, observation: Observation) -> tuple[Any, Any]:
        """Whether to stop drafting and verify; asked before each draft step, at k = 0 too."""
        raise NotImplementedError

    def end_round(self, state: Any, outcome: Outcome) -> Any:
        """State after the round was verified."""
        return state


def choose(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; numbers or arrays, all finite."""
    held = condition * 1.0
    return held * yes + (1.0 - held) * no


def known(value: Any, num_candidates: Any) -> Any:
    """What the last candidate showed, and 1 where none is drafted: a power of 0 is 1, that of nan too."""
    return value ** ((num_candidates > 0) * 1.0)


@dataclass(frozen=True)
class FixedLength(Policy):
    """Draft exactly `length` candidates: plain speculative decoding (Leviathan et al. 2023, Chen et al. 2023)."""

    length: int

    def stop(self, state, observation):
        return state, observation.num_candidates >= self.length


@dataclass(frozen=True)
class RejectionThreshold(Policy):
    """Stop iff 1 - S_k > threshold: the rule of SpecDec++ without its bounds on the candidate count."""

    threshold: float
    needs = ("survival",)

    def stop(self, state, observation):
        return state, 1.0 - observation.survival > self.threshold + TIE


@dataclass(frozen=True)
class LookaheadThreshold(Policy):
    r"""Stop iff $1 - S_k \bar a > $ threshold, $\bar a$ the next candidate's acceptance probability."""

    threshold: float
    needs = ("survival", "next_accept_prob")

    def stop(self, state, observation):
        return state, 1.0 - observation.survival * observation.next_accept_prob > self.threshold + TIE


@dataclass(frozen=True)
class ThresholdTable(Policy):
    """Continue iff S_k >= survival_threshold[k, regime]; the form of every optimal policy (theory, F1).

    `survival_threshold` has shape [K, Z]; inf means stop at every survival. With Z = 1 the regime is not read.
    """

    survival_threshold: np.ndarray = field(hash=False)
    needs = ("survival", "regime")

    def stop(self, state, observation):
        regime = 0 if self.survival_threshold.shape[1] == 1 else observation.regime
        threshold = self.survival_threshold[observation.num_candidates, regime]
        return state, observation.survival < threshold - TIE


@dataclass(frozen=True)
class BeliefRule(Policy):
    r"""Continue iff some stored rule for what is left beats stopping, at the belief that the symbols lead to.

    The form of every optimal policy with hidden regimes (theory, F8). The state is the belief about the regime of the
    candidate to come, $[wP, \pi P]$ of `mdp.belief` once there are candidates and `initial` before.

    Args:
        initial: [Z] law of the regime at the round's start.
        transition: [Z, Z].
        likelihood, accepted: [O + 1, Z] probability of each symbol by regime, and of symbol and acceptance; the last
            row is 1, for no symbol.
        emitted, price: [K, M, Z] of M rules per depth: tokens by regime of the survivors, priced time by regime.
    """

    initial: np.ndarray = field(hash=False)
    transition: np.ndarray = field(hash=False)
    likelihood: np.ndarray = field(hash=False)
    accepted: np.ndarray = field(hash=False)
    emitted: np.ndarray = field(hash=False)
    price: np.ndarray = field(hash=False)
    needs = ("symbol",)

    def init(self):
        return self.initial, self.initial

    def stop(self, state, observation):
        alive = state[0] * self.accepted[observation.symbol]
        known = state[1] * self.likelihood[observation.symbol]
        total = known.sum(-1)
        total = (total + (total == 0))[..., None]  # a symbol that cannot be leaves nothing, and stops
        alive, known = alive / total, known / total
        k = observation.num_candidates
        worth = self.emitted[k] @ alive[..., None] - self.price[k] @ known[..., None]
        going_on = (worth[..., 0] >= -TIE).any(-1) & (known.sum(-1) > 0)
        return (alive @ self.transition, known @ self.transition), ~going_on

    def end_round(self, state, outcome):
        return self.init()

    @property
    def num_symbols(self) -> int:
        """How many symbols it tells apart."""
        return len(self.likelihood) - 1

    def to_dict(self) -> dict[str, Any]:
        """Its JSON, within that of a saved solution."""
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}


@dataclass(frozen=True)
class Oracle(Policy):
    """Draft exactly what will be accepted: the paper's oracle. A bracket, not a policy anyone can run."""

    needs = ("next_accepted",)

    def stop(self, state, observation):
        return state, observation.next_accepted < 1


@dataclass(frozen=True)
class PolicySpec:
    """A parsed policy string: the rule, the text as typed, and on traces the signal that feeds it.

    `fit` asks for the rule's parameters to be fitted to the training half of a trace.
    """

    text: str
    policy: Policy | None
    signal: str | None = None
    fit: bool = False

    @property
    def solves(self) -> bool:
        """True for a bare `optimal`: the rule is the solution of the problem at hand."""
        return self.policy is None


def load_table(path: str | Path) -> ThresholdTable | BeliefRule:
    """Read the policy from a saved solution, one JSON line of `specstop solve --json`: its table or its belief rule.

    Raises:
        ValueError: if the file is no such solution; the message names the file.
    """
    path = Path(path)
    try:
        found = path.is_file()
    except OSError:  # a name too long for any file
        found = False
    if not found:
        raise ValueError(f"policy: no such solution file: {str(path)!r:.200}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"policy: {path}: larger than {MAX_TABLE_BYTES} bytes")
    try:
        saved = json.loads(path.read_text())
        rule, rows = saved.get("belief_rule"), saved["survival_threshold"] or []
        arrays = rule and {f.name: np.array(rule[f.name], dtype=float) for f in fields(BeliefRule)}
        table = np.array([[np.inf if cell is None else cell for cell in row] for row in rows], dtype=float)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"policy: {path}: not a saved solution (one line of solve --json)") from error
    if arrays:
        return _belief_rule(path, arrays)
    if table.ndim != 2 or table.size == 0 or np.isnan(table).any() or (table < 0).any():
        raise ValueError(f"policy: {path}: survival_threshold must be K rows of Z numbers >= 0 or null")
    return ThresholdTable(table)


def _belief_rule(path: Path, arrays: dict[str, np.ndarray]) -> BeliefRule:
    """The rule for hidden regimes that these arrays make.

    Raises:
        ValueError: if their shapes do not fit together, or a number is negative or not finite.
    """
    rule, parts = BeliefRule(**arrays), list(arrays.values())
    size, symbols = rule.initial.size, len(rule.likelihood)
    shapes = [(size,), (size, size), (symbols, size), (symbols, size), rule.emitted.shape, rule.emitted.shape]
    fits = rule.emitted.ndim == 3 and rule.emitted.shape[2] == size > 0 and rule.emitted.size and symbols > 1
    if not fits or [part.shape for part in parts] != shapes:
        raise ValueError(f"policy: {path}: belief_rule: its arrays do not fit together")
    # A price may be negative: where T(k) dips, drafting on saves time.
    if not all(np.isfinite(part).all() for part in parts) or any((part < 0).any() for part in parts[:5]):
        raise ValueError(f"policy: {path}: belief_rule: its numbers must be finite and >= 0 (price: finite)")
    return rule


def parse(text: str) -> PolicySpec:
    """Read a policy string such as `fixed:4`, `rejection:0.4`, `lookahead:0.5,signal=entropy`, `optimal`.

    A bare `optimal` comes back unsolved (`spec.solves`): whoever holds the problem fills in its table.

    Raises:
        ValueError: one line that names the string, the value and what is allowed.
    """
    name, _, rest = text.partition(":")
    positional, options = [], {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if equals and key.isidentifier():
            if key in options:
                raise ValueError(f"policy {text!r}: {key} is given twice")
            options[key] = value
        else:
            positional.append(part)
    if name not in RULES:
        raise ValueError(f"policy {text!r}: unknown rule {name!r}; choose from {', '.join(RULES)}")
    rule = RULES[name]
    signal = options.pop("signal", None)
    if signal is not None and (not rule.takes_signal or signal not in SIGNALS):
        allowed = f"one of {', '.join(SIGNALS)}" if rule.takes_signal else "not taken by this rule"
        raise ValueError(f"policy {text!r}: signal={signal}: {allowed}")
    fit = _number(text, options.pop("fit"), int, 0, 1, "fit must be 0 or 1") if rule.fits and "fit" in options else 0
    for key in options:
        if key not in rule.parameters:
            raise ValueError(f"policy {text!r}: unknown parameter {key!r}")
    if not rule.min_args <= len(positional) <= rule.max_args:
        raise ValueError(f"policy {text!r}: expected {rule.usage}")
    try:
        policy = rule.build(text, *positional, **options)
    except ValueError as error:
        raise error if str(error).startswith("policy") else ValueError(f"policy {text!r}: {error}") from None
    return PolicySpec(text, policy, signal, bool(fit))


def _number(text: str, value: str, kind: type, low: float, high: float, what: str) -> Any:
    try:
        number = kind(value)
    except ValueError:
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"policy {text!r}: {what}, got {value!r}")
    return number


T = TypeVar("T", bound=Policy)


class Rule(NamedTuple):
    """How a rule is written and where it comes from; `parameters` maps the keys it takes to their defaults.

    `evidence` says how the source was read: code, paper, note (a third party's), memory; None for what is ours.
    `example` is the string that stands for the rule where all rules are compared.
    """

    usage: str
    build: Callable[..., Policy | None]
    min_args: int
    max_args: int
    takes_signal: bool
    does: str
    source: str | None = None
    evidence: str | None = None
    example: str = ""
    cls: type[Policy] | None = None
    parameters: dict[str, Any] = {}  # noqa: RUF012 - never written to
    fits: bool = False


def _fixed(text: str, value: str) -> Policy:
    return FixedLength(_number(text, value, int, 0, 1024, "length must be a whole number in 0..1024"))


def _threshold(cls: type) -> Any:
    def build(text: str, value: str) -> Policy:
        return cls(_number(text, value, float, 0.0, 1.0, "threshold must be a number in [0, 1]"))

    return build


SPECDEC = "SpecDec++, arXiv 2405.19715"
RULES = {
    "fixed": Rule(
        "fixed:K", _fixed, 1, 1, False, "draft exactly K candidates",
        "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318", "paper", "fixed:4", FixedLength,
    ),
    "rejection": Rule(
        "rejection:h[,signal=NAME]", _threshold(RejectionThreshold), 1, 1, True,
        "stop iff 1 - S_k > h, S_k = probability that all k are accepted", SPECDEC, "note", "rejection:0.5",
        RejectionThreshold,
    ),
    "lookahead": Rule(
        "lookahead:h[,signal=NAME]", _threshold(LookaheadThreshold), 1, 1, True,
        "stop iff 1 - S_k * a > h, a = acceptance probability of the next candidate", None, None, "lookahead:0.5",
        LookaheadThreshold,
    ),
    "optimal": Rule(
        "optimal or optimal:FILE[,signal=NAME] or optimal:signal=NAME",
        lambda text, file=None: load_table(file) if file else None,
        0,
        1,
        True,
        "the table `solve` gives for this problem, on a trace for a chain fitted to half of it; or a saved one",
        example="optimal",
        cls=ThresholdTable,
    ),
    "oracle": Rule(
        "oracle", lambda text: Oracle(), 0, 0, False,
        "draft exactly what will be accepted: a bracket, not a policy anyone can run", SPECDEC, "note", "oracle",
        Oracle,
    ),
}  # fmt: skip
"""Every rule a policy string can name."""


def parameter(default: Any, low: float, high: float, origin: str) -> Any:
    """A field of a published rule: a whole number, a number, or a tuple of whole numbers (written `1/3/5`).

    `origin` is where the default comes from: as `Rule.evidence`, or "ours" where the source names none.
    """
    return field(default=default, metadata={"low": low, "high": high, "origin": origin})


def published(
    name: str, does: str, source: str | None = None, evidence: str | None = None, fits: bool = False
) -> Callable[[type[T]], type[T]]:
    """Enter a dataclass of `parameter` fields into `RULES`; its keys are written `name:key=value,key=value`."""

    def enter(cls: type[T]) -> type[T]:
        keys = {f.name: f for f in fields(cls) if f.metadata}  # type: ignore[arg-type]
        defaults = {key: f.default for key, f in keys.items()}

        def build(text: str, **given: str) -> Policy:
            return cls(**{key: _value(text, keys[key], value) for key, value in given.items()})

        signal = bool({"survival", "next_accept_prob", "regime"}.intersection(cls.needs))
        options = [f"{key}={write(value)}" for key, value in defaults.items()]
        options += ["fit=0"] * fits + ["signal=NAME"] * signal
        usage = f"{name}[:{','.join(options)}]" if options else name
        RULES[name] = Rule(usage, build, 0, 0, signal, does, source, evidence, name, cls, defaults, fits)
        return cls

    return enter


def write(value: Any) -> str:
    """A parameter's value as `parse` reads it back."""
    if isinstance(value, tuple):
        return "/".join(map(write, value))
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _value(text: str, key: Any, value: str) -> Any:
    low, high = key.metadata["low"], key.metadata["high"]
    kind = type(key.default)
    if kind is not tuple:
        noun = "whole number" if kind is int else "number"
        return _number(text, value, kind, low, high, f"{key.name} must be a {noun} in {low:g}..{high:g}")
    what = f"{key.name} must be whole numbers in {low:g}..{high:g} with / between them"
    return tuple(_number(text, part, int, low, high, what) for part in value.split("/"))
