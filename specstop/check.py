"""`specstop check`: facts on problems, the gallery of counterexamples, and the search for more of them."""

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from specstop import inputs
from specstop.output import emit, json_line, table

__all__ = ["check"]

DONE, NOT_CONVERGED = 0, 3
CLOSED = 1e-6  # relative width of bounds that `solve` calls solved


def check(args: Namespace) -> int:
    """Exactly one of problem files, the gallery or a search.

    Raises:
        ValueError: if there are none or several.
    """
    if (bool(args.problems) + args.gallery + args.search) != 1:
        raise ValueError("check: give problem files, or --gallery, or --search (see specstop check --help)")
    if args.gallery:
        return _gallery(args.json)
    return _search(args) if args.search else _problems(args)


def _problems(args: Namespace) -> int:
    problems = inputs.read_problems(args.problems)

    from mdp.acceptance import Observed
    from mdp.case import converged, examine
    from mdp.theory import check as check_facts

    code, answers = DONE, []
    for path, problem in zip(args.problems, problems, strict=True):
        try:
            case = None if isinstance(problem.acceptance, Observed) else examine(problem)
            facts = [fact._asdict() for fact in check_facts(problem if case is None else case)]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        answers.append(json_line({"facts": facts}) if args.json else f"{path}\n\n{_facts_text(facts)}")
        if case is None:  # hidden regimes are compared by their bounds
            lower, upper = facts[-1]["numbers"]["observed"]
            code = code if upper - lower <= CLOSED * lower else NOT_CONVERGED
        elif not converged(case):
            code = NOT_CONVERGED
    for answer in answers:
        emit(answer)
    return code


def _facts_text(facts: list[dict[str, Any]]) -> str:
    from mdp.theory import CLAIMS

    rows = [{"fact": f["id"], "claim": CLAIMS[f["id"]], "status": f["status"], "loss": _percent(f["numbers"]),
             "why": f["why"]} for f in facts]  # fmt: skip
    details = [{"fact": f["id"], "numbers": _line(f["numbers"])} for f in facts if f["numbers"]]
    return f"{table(rows)}\n\n{table(details)}\n"


def _percent(numbers: Mapping[str, Any]) -> str:
    loss = numbers.get("loss")
    return "-" if loss is None else f"{100 * max(loss, 0.0):.2g} %" if loss > 1e-12 else "0"


def _line(numbers: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.6g}" if abs(value) > 1e-12 else "0"
        return (
            "-" if value is None else "[" + ", ".join(map(show, value)) + "]" if isinstance(value, list) else str(value)
        )

    return ", ".join(f"{name} {show(value)}" for name, value in numbers.items())


def _gallery(as_json: bool) -> int:
    from mdp.gallery import gallery
    from mdp.theory import check as check_facts

    for entry in gallery():
        facts = {fact.id: fact for fact in check_facts(entry.problem)}
        fact = facts[entry.fact]
        found = fact.numbers[entry.number]
        if as_json:
            emit(json_line({
                "name": entry.name, "file": str(entry.path), "fact": entry.fact, "status": fact.status,
                "why": fact.why, "breaks": entry.breaks, "number": entry.number, "exact": str(entry.value),
                "expected": float(entry.value), "found": found, "story": entry.story,
                "problem": entry.problem.to_dict(),
                "facts": [f._asdict() for f in facts.values()],
            }))  # fmt: skip
        else:
            emit(f"{entry.name}: {entry.fact} {fact.status}, {entry.number} {entry.value} = {found:.6g}\n"
                 f"  broken: {entry.breaks}\n  found:  {fact.why}\n  {entry.story}\n  {entry.path}\n")  # fmt: skip
    return DONE


def _search(args: Namespace) -> int:
    from tqdm.auto import tqdm

    from mdp.search import FAMILIES, search

    for family in args.family or ():
        if family not in FAMILIES:
            raise ValueError(f"--family: must be among {', '.join(FAMILIES)}, got {family!r:.40}")
    cells = [(family, size) for family in args.family or FAMILIES for size in sorted(set(args.regimes))]
    found, rows = [], []
    for family, size in tqdm(cells, disable=not sys.stderr.isatty(), unit="search"):
        found.append(
            search(family, size, max_candidates=args.max_candidates, steps=args.steps, seed=args.seed,
                   persistent=args.persistent, also=found)
        )  # fmt: skip
        rows.append(found[-1].to_dict())
        if args.json:
            emit(json_line(rows[-1]))
    if not args.json:
        emit(_search_text(rows))
    return DONE


def _search_text(rows: list[dict[str, Any]]) -> str:
    summary = [
        {"family": row["family"], "regimes": row["num_regimes"], "loss": f"{100 * row['loss']:.2f} %",
         "proven": f"{100 * row['certificate'][0]:.4f} .. {100 * row['certificate'][1]:.4f} %",
         "a simple case loses": f"{100 * row['simple_loss']:.2f} %"}
        for row in rows
    ]  # fmt: skip
    return f"{table(summary)}\n\n" + "\n".join(_simple_cases(rows))


def _simple_cases(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield f"{row['family']}, {row['num_regimes']} regimes: {json_line(row['simple'])}"
