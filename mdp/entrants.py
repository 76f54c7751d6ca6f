"""What enters a comparison: policy strings, `PolicySpec`s or rules of one's own, checked against the world.

The simulator and replay take the same things as policies and refuse the same things, in one line each; so that is
written once, here. A table with fewer rows than the world's `max_candidates` stops where its rows end.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace

import numpy as np

from mdp.policy import (
    RULES,
    BeliefRule,
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Policy,
    PolicySpec,
    RejectionThreshold,
    ThresholdTable,
    parse,
    write,
)

__all__ = ["Lacking", "catalogue", "check_symbols", "fit_depth", "fit_lag", "label", "needs", "read"]


class Lacking(ValueError):
    """A world does not show a field that a rule reads; `field` is its name."""

    def __init__(self, text: str, field: str, why: str):
        super().__init__(f"policy {text!r} needs {field}, {why}")
        self.field = field


def read(policies: Iterable[str | Policy | PolicySpec]) -> list[PolicySpec]:
    """Policies of any kind as specs, in order.

    Raises:
        ValueError: if there are none, or one of them is no policy.
    """
    if isinstance(policies, str):
        raise ValueError(f"policies: must be a list of policies, got the string {policies!r}")
    specs = []
    for policy in policies:
        if isinstance(policy, str):
            specs.append(parse(policy))
        elif isinstance(policy, PolicySpec):
            specs.append(policy)
        elif isinstance(policy, Policy) and is_dataclass(policy):
            specs.append(PolicySpec(label(policy), policy))
        else:
            raise ValueError(
                f"policies: must be policy strings or frozen dataclasses of mdp.policy, got {policy!r:.60}"
            )
    if not specs:
        raise ValueError("policies: at least one is needed")
    return specs


def label(policy: Policy) -> str:
    """A short name: the policy string where there is one."""
    match policy:
        case FixedLength():
            return f"fixed:{policy.length}"
        case RejectionThreshold():
            return f"rejection:{write(policy.threshold)}"
        case LookaheadThreshold():
            return f"lookahead:{write(policy.threshold)}"
        case Oracle():
            return "oracle"
        case ThresholdTable():
            return "table"
        case BeliefRule():
            return "belief rule"
    for name, rule in RULES.items():
        if rule.cls is type(policy):
            given = {key: getattr(policy, key) for key in rule.parameters}
            keys = [f"{key}={write(value)}" for key, value in given.items() if value != rule.parameters[key]]
            fitted = " (fitted)" if policy != rule.cls(**given) else ""
            return ":".join([name, ",".join(keys)] if keys else [name]) + fitted
    values = ", ".join(f"{f.name}={getattr(policy, f.name)!r:.20}" for f in fields(policy))  # type: ignore[arg-type]
    return f"{type(policy).__name__}({values})"


def catalogue(max_candidates: int, fits: bool = False) -> list[PolicySpec]:
    """One spec for every rule there is, to be compared; with `fits`, fitted ones beside those that can be fitted."""
    texts = [rule.example for rule in RULES.values()]
    texts[0] = f"fixed:{min(4, max_candidates)}"
    return [parse(text) for text in texts + [f"{name}:fit=1" for name, rule in RULES.items() if rule.fits and fits]]


def needs(policy: Policy) -> frozenset[str]:
    """Observation fields the rule reads; a one-column table does not read the regime.

    Raises:
        ValueError: if it declares a field no observation has.
    """
    wanted = frozenset(policy.needs)
    unknown = wanted.difference(Observation._fields)
    if unknown:
        raise ValueError(f"policy {label(policy)!r} needs {min(unknown)}, which is no field of an observation")
    if isinstance(policy, ThresholdTable) and policy.survival_threshold.shape[1] == 1:
        wanted = wanted - {"regime"}
    return wanted


def fit_depth(text: str, policy: Policy, max_candidates: int, num_regimes: int | None) -> Policy:
    """The rule for rounds of at most `max_candidates`, with a table's missing rows filled by "stop".

    `num_regimes` None: a table may have any number of columns.

    Raises:
        ValueError: if the rule is made for longer rounds, or a table for another number of regimes.
    """
    if isinstance(policy, FixedLength) and policy.length > max_candidates:
        raise ValueError(f"policy {text!r}: length must be in 0..{max_candidates} here (max_candidates)")
    if isinstance(policy, BeliefRule):
        rows = len(policy.emitted)
        if rows > max_candidates:
            raise ValueError(f"policy {text!r}: made for rounds of {rows}, they hold at most {max_candidates} here")
        never = np.zeros((max_candidates - rows, *policy.emitted.shape[1:]))
        return replace(
            policy,
            emitted=np.concatenate([policy.emitted, never]),
            price=np.concatenate([policy.price, never + 1.0]),
        )
    if not isinstance(policy, ThresholdTable):
        return policy
    rows, columns = policy.survival_threshold.shape
    if rows > max_candidates:
        raise ValueError(f"policy {text!r}: its table has {rows} rows, rounds here hold at most {max_candidates}")
    if num_regimes is not None and columns not in (1, num_regimes):
        expected = "one column" if num_regimes == 1 else f"1 or {num_regimes} columns"
        raise ValueError(f"policy {text!r}: its table must have {expected} here (regimes), it has {columns}")
    stop = np.full((max_candidates - rows, columns), np.inf)
    return ThresholdTable(np.concatenate([policy.survival_threshold, stop]))


def fit_lag(policy: Policy, head_lag: int) -> Policy:
    """The rule in a world whose head comes `head_lag` candidates late by itself: that counts once, not twice."""
    own = getattr(policy, "lag", 0)
    return replace(policy, lag=max(own - head_lag, 0)) if own and head_lag and "head" in policy.needs else policy  # type: ignore[type-var]


def check_symbols(text: str, policy: Policy, num_symbols: int) -> None:
    """Refuse a rule that is made for other symbols.

    Raises:
        ValueError: if it tells another number of symbols apart than there are.
    """
    if isinstance(policy, BeliefRule) and policy.num_symbols != num_symbols:
        raise ValueError(f"policy {text!r}: made for {policy.num_symbols} symbols, here are {num_symbols}")
