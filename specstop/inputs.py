"""What was typed, checked before any work starts.

Everything here raises ValueError with one line that names the fault.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mdp import policy as rules
from mdp.acceptance import Observed
from mdp.cost import Affine, Cost
from mdp.entrants import check_symbols, fit_depth
from mdp.policy import PolicySpec
from mdp.problem import StoppingProblem, cost_from_dict, load, parse_json, read_text

__all__ = ["check_depth", "declared_cost", "describe_rules", "read_policies", "read_problems", "rule_names"]

T = TypeVar("T")

# Not \d, which other scripts' digits match; nan and inf are numbers that the cost itself refuses.
_NUMBER = re.compile(
    r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII
)

# What a rule does, in words a terminal can show; `mdp.policy` holds the rules and how to write them.
DOES = {
    "fixed": "draft exactly K candidates",
    "rejection": "stop iff 1 - S_k > h, S_k = probability that all k are accepted",
    "lookahead": "stop iff 1 - S_k * a > h, a = acceptance probability of the next candidate",
    "optimal": "the table `solve` gives for this problem, on a trace for a chain fitted to half of it; or a saved one",
    "oracle": "draft exactly what will be accepted: a bracket, not a policy anyone can run",
}
SOURCES = {
    "fixed": "Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318",
    "rejection": "SpecDec++, arXiv 2405.19715",
    "oracle": "SpecDec++, arXiv 2405.19715",
}


def rule_names() -> tuple[str, ...]:
    """The names a policy string may start with."""
    return tuple(rules.RULES)


def describe_rules() -> list[dict[str, str | None]]:
    """How to write each stopping rule, what it does and where it was published."""
    return [
        {"name": name, "usage": rule.usage, "does": DOES.get(name, ""), "source": SOURCES.get(name)}
        for name, rule in rules.RULES.items()
    ]  # fmt: skip


def read_problems(paths: Sequence[str]) -> list[StoppingProblem]:
    """All problems or none: a bad file is named before any other is worked on."""
    return [load(path) for path in paths]


def read_policies(texts: Sequence[str], problem: StoppingProblem | None = None) -> list[PolicySpec]:
    """All policies or none; with a problem, those it cannot hold are refused too."""
    specs = [rules.parse(text) for text in texts]
    if problem is not None:
        for spec in specs:
            _check_fits(spec, problem)
    return specs


def _check_fits(spec: PolicySpec, problem: StoppingProblem) -> None:
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
