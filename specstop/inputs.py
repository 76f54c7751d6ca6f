"""What was typed, checked before any work starts.

Everything here raises ValueError with one line that names the fault.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from mdp import policy as rules
from mdp.acceptance import Observed
from mdp.cost import Affine, Cost
from mdp.entrants import Lacking, catalogue, check_symbols, fit_depth
from mdp.policy import PolicySpec
from mdp.problem import StoppingProblem, cost_from_dict, load, parse_json, read_text

__all__ = [
    "ALL", "able", "check_depth", "declared_cost", "describe_rules", "read_policies", "read_problems", "rule_names",
]  # fmt: skip

T = TypeVar("T")

# Not \d, which other scripts' digits match; nan and inf are numbers that the cost itself refuses.
_NUMBER = re.compile(
    r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII
)

ALL = "all"
"""In place of a policy: every rule there is, those that cannot run here shown as such."""


def rule_names() -> tuple[str, ...]:
    """The names a policy string may start with, and the one that stands for all."""
    return (*rules.RULES, ALL)


def describe_rules() -> list[dict[str, Any]]:
    """How to write each stopping rule, what it does, what it reads and where it was published."""
    return [
        {
            "name": name,
            "usage": rule.usage,
            "does": rule.does,
            "source": rule.source,
            "evidence": rule.evidence,
            "needs": list(rule.cls.needs) if rule.cls else [],
            "signals": list(rules.SIGNALS) if rule.takes_signal else [],
            "timed": bool(rule.cls and rule.cls.timed),
            "fits": rule.fits,
            "parameters": _parameters(rule),
        }
        for name, rule in rules.RULES.items()
    ]


def _parameters(rule: rules.Rule) -> list[dict[str, Any]]:
    """Name, default, range and the default's origin of each parameter."""
    known = {} if rule.cls is None else {f.name: f.metadata for f in fields(rule.cls)}  # type: ignore[arg-type]
    return [{"name": key, "default": value, **known[key]} for key, value in rule.parameters.items()]


def read_problems(paths: Sequence[str]) -> list[StoppingProblem]:
    """All problems or none: a bad file is named before any other is worked on."""
    return [load(path) for path in paths]


def read_policies(
    texts: Sequence[str], problem: StoppingProblem | None = None, *, max_candidates: int | None = None
) -> list[PolicySpec]:
    """All policies or none; with a problem, those it cannot hold are refused too.

    `all` is every rule there is; beside `max_candidates`, that of a trace, the fitted ones too.
    """
    depth = max_candidates if problem is None else problem.max_candidates
    specs = []
    for text in texts:
        if text != ALL:
            specs.append(rules.parse(text))
        elif depth is None:
            raise ValueError(f"policy {ALL!r}: stands for all rules in evaluate, simulate and replay only")
        else:
            specs += catalogue(depth, fits=problem is None)
    if problem is not None:
        for spec in specs:
            _check_fits(spec, problem)
    return specs


def able(
    texts: Sequence[str], specs: Sequence[PolicySpec], check: Callable[[PolicySpec], Any]
) -> tuple[list[PolicySpec], list[dict[str, str]]]:
    """Specs that pass the check, and those that do not with the reason, if `all` was asked for; else it is not run.

    Raises:
        ValueError: if none passes.
    """
    if ALL not in texts:
        return list(specs), []
    good, bad = [], []
    for spec in specs:
        try:
            check(spec)
        except Lacking as error:
            bad.append({"policy": spec.text, "why": f"needs {error.field}"})
        else:
            good.append(spec)
    if not good:
        raise ValueError(f"policy {ALL!r}: no rule can run here, {bad[0]['policy']} {bad[0]['why']}")
    return good, bad


def _check_fits(spec: PolicySpec, problem: StoppingProblem) -> None:
    if spec.fit:
        raise ValueError(f"policy {spec.text!r}: fit=1 is for traces; a problem has no training half")
    if spec.signal is not None:
        raise ValueError(f"policy {spec.text!r}: signal={spec.signal} is for traces; a problem shows its survival")
    if spec.policy is not None:
        fit_depth(spec.text, spec.policy, problem.max_candidates, problem.acceptance.num_regimes)
        if isinstance(problem.acceptance, Observed):
            check_symbols(spec.text, spec.policy, problem.acceptance.num_symbols)


def declared_cost(text: str) -> Cost:
    """`--cost`: a number c (a draft step's time in target calls), a JSON object, or a file that holds one."""
    if _NUMBER.fullmatch(text.strip()):
        return _named("--cost", lambda: Affine(draft_time=float(text), verify_time=1.0))
    if text.lstrip().startswith(("{", "[")):
        return _named("--cost", lambda: cost_from_dict(parse_json(text)))
    if not Path(text).exists():
        raise ValueError(f"--cost: neither a number, a JSON object nor a file: {text!r:.60}")
    return _named(text, lambda: cost_from_dict(parse_json(read_text(text))))


def check_depth(text: str, cost: Cost, max_candidates: int) -> None:
    """Refuse the cost that `text` declared if it lacks a time for some number of candidates."""
    inline = text.lstrip().startswith(("{", "["))  # a number has a time for any
    _named("--cost" if inline else text, lambda: cost.verify_times(max_candidates))


def _named(name: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
