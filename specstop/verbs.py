"""What each verb does. A verb checks its input, works, prints, and returns the exit code; it holds no algorithm.

Every function takes the parsed arguments. Heavy modules are imported where they are used: what needs no jax does not
pay for it.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mdp.policy import SIGNALS
from specstop import inputs
from specstop.heads import with_head
from specstop.output import emit, json_line, key_values, policy_table, solution_text, table
from specstop.traces import load_trace

__all__ = [
    "audit", "demo", "evaluate", "policies", "replay", "schema", "simulate", "solve", "study", "sweep",
]  # fmt: skip

DONE, NOT_CONVERGED = 0, 3
MOST_WORK = 10**8  # about half a second
NO_LIMIT = 2**31  # tokens, where texts end by chance alone


def solve(args: Namespace) -> int:
    """Optimal policy and bounds, one result a file, in order."""
    problems = inputs.read_problems(args.problems)
    option = "--num-tokens" if args.num_tokens else "--method" if args.method == "value_iteration" else ""
    for path, problem in zip(args.problems, problems, strict=True):
        if option and not problem.acceptance.finite:
            kind = problem.acceptance.kind
            why = "hides its regimes" if kind == "observed" else "is continuous"
            raise ValueError(f"{path}: {option} needs a finite process, {kind} {why}")
    code = DONE
    for path, problem in zip(args.problems, problems, strict=True):
        solution = _solve(problem, args)
        result = solution.to_dict()
        done = [solution]
        if args.num_tokens:
            from mdp.horizon import solve_horizon

            done.append(solve_horizon(problem, args.num_tokens, tol=args.tol))
            result["horizon"] = done[-1].to_dict()
        advice = next((str(part.status.value) for part in done if part.status.value), "")
        emit(json_line(result) if args.json else solution_text(path, result, advice, _best_fixed(problem)))
        if advice:
            code = NOT_CONVERGED
    return code


def _best_fixed(problem: Any) -> tuple[int, float] | None:
    """The best fixed length and its throughput; None if a length has several long runs, or if finding it takes long."""
    from mdp.frontier import frontier

    finite = problem.unseen()
    if finite.persistent and finite.num_regimes**3 * finite.max_candidates > MOST_WORK:
        return None  # a stationary law of all regimes for each length
    try:
        throughput = frontier(problem, "fixed", range(finite.max_candidates + 1)).throughput
    except ValueError:
        return None
    best = int(throughput.argmax())
    return best, float(throughput[best])


def _solve(problem: Any, args: Namespace) -> Any:
    tol, method = getattr(args, "tol", 1e-6), getattr(args, "method", "auto")
    if method == "auto" and problem.acceptance.finite:
        from mdp.direct import solve_directly

        if (known := solve_directly(problem.lower(), tol=tol)) is not None:
            return known  # without jax, whose import takes longer than all of this
        method = "policy_iteration"  # which `auto` then means

    from mdp.solve import solve

    limits = {"max_knots": args.max_knots} if getattr(args, "max_knots", None) else {}
    return solve(problem, tol=tol, method=method, **limits)


def evaluate(args: Namespace) -> int:
    """The exact value of each policy, and its gap to the optimum."""
    (problem,) = inputs.read_problems([args.problem])
    specs = inputs.read_policies(args.policies, problem)

    from mdp.evaluate import check_exact, evaluate

    every = inputs.ALL in args.policies
    for spec in [] if every else specs:
        check_exact(problem, spec)
    solution = _solve(problem, args)
    results, refused = [], []
    for spec in specs:
        try:
            results.append(evaluate(problem, spec, solution=solution).to_dict())
        except ValueError as error:
            if not every:
                raise
            why = str(error).removeprefix(f"policy {spec.text!r}").lstrip(": ")
            refused.append({"policy": spec.text, "why": why})
    _print_policies([*results, *(refused if args.json else _not_applicable(refused))], args.json)
    return _code(solution)


def _not_applicable(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows of the table for rules that cannot run here."""
    return [{"policy": row["policy"], "throughput": f"n/a ({row['why']})"} for row in rows]


def _print_policies(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    if as_json:
        for row in rows:
            emit(json_line(row))
    else:
        emit(policy_table(rows))


def _code(*solutions: Any) -> int:
    done = all(solution is None or solution.status.name == "successful" for solution in solutions)
    return DONE if done else NOT_CONVERGED


def simulate(args: Namespace) -> int:
    """Monte Carlo of policies that meet the same coins."""
    (problem,) = inputs.read_problems([args.problem])
    specs = inputs.read_policies(args.policies, problem)

    from simulate.requests import Requests
    from simulate.rounds import check, simulate

    specs, lacking = inputs.able(args.policies, specs, lambda spec: check(problem, spec))
    solution = _solve(problem, args) if any(spec.solves for spec in specs) else None

    solved = [replace(spec, policy=spec.policy or solution.policy) for spec in specs]  # type: ignore[union-attr]
    ends = args.max_new_tokens or args.end_prob
    requests = Requests(args.max_new_tokens or NO_LIMIT, args.end_prob) if ends else None
    result = simulate(problem, solved, rounds=args.rounds, key=args.seed, requests=requests)
    _print_comparison(result.to_dict(), lacking, args)
    return _code(solution)


def sweep(args: Namespace) -> int:
    """A grid of problems, policies and seeds, written as netCDF."""
    from simulate.sweep import from_file, run

    start, planned = time.perf_counter(), from_file(args.sweep)
    try:
        found = run(planned, out=args.out, resume=args.resume, workers=args.workers, scheduler=args.scheduler)
    except ValueError as error:
        raise ValueError(f"{args.sweep}: {error}") from None
    unsolved = int((found.solved == 0).sum())
    result = {"out": args.out, "cells": planned.num_cells, "dims": dict(found.sizes), "not_converged": unsolved,
              "seconds": time.perf_counter() - start}  # fmt: skip
    emit(json_line(result) if args.json else key_values(result))
    return NOT_CONVERGED if unsolved else DONE


def replay(args: Namespace) -> int:
    """Policies on a recorded trace."""
    if inputs.ALL not in args.policies:
        inputs.read_policies(args.policies)
    cost = None if args.cost is None else inputs.declared_cost(args.cost)

    from simulate.replay import check, replay

    trace = with_head(load_trace(args.trace), args.head)
    specs = inputs.read_policies(args.policies, max_candidates=trace.max_candidates)
    specs, lacking = inputs.able(args.policies, specs, lambda spec: check(trace, spec))
    if cost is not None:
        inputs.check_depth(str(args.cost), cost, trace.max_candidates)
    result = replay(trace, specs, cost=cost, level=args.level)
    _print_comparison(result.to_dict(), lacking, args)
    return DONE


def audit(args: Namespace) -> int:
    """How much a deployed policy leaves on a trace, with bounds, and what to run."""
    (spec,) = inputs.read_policies([args.policy])
    cost = None if args.cost is None else inputs.declared_cost(args.cost)

    from simulate.audit import audit
    from specstop.referee import audit_text

    trace = load_trace(args.trace)
    if cost is not None:
        inputs.check_depth(str(args.cost), cost, trace.max_candidates)
    result = audit(trace, spec, cost=cost, level=args.level).to_dict()
    emit(json_line(result) if args.json else audit_text(result))
    return DONE


def _print_comparison(result: dict[str, Any], lacking: Sequence[Mapping[str, str]], args: Namespace) -> None:
    if args.json:
        emit(json_line(result | {"not_applicable": lacking} if lacking else result))
        return
    rows, differences = result["policies"], result["differences"]
    about = {key: value for key, value in result.items() if value is not None and not isinstance(value, list)}
    parts = [key_values(about), policy_table([*rows, *_not_applicable(lacking)])]
    if differences:
        parts.append(table(differences))
    if any(row.get("signal") == SIGNALS[0] for row in rows):
        parts.append(
            f"{SIGNALS[0]} is a perfect acceptance head, which nobody has while drafting: a ceiling, no setting"
        )
    emit("\n\n".join(parts))


def demo(args: Namespace) -> int:
    """The main job end to end."""
    from specstop.demo import run
    from specstop.report import headline

    summary = run(args.out, quick=args.quick)
    emit(json_line(summary) if args.json else headline(summary, args.out))
    return DONE


def study(args: Namespace) -> int:
    """One of the studies of the theory."""
    from specstop.studies import STUDIES

    result = STUDIES[args.name].run(args.quick)
    emit(json_line({"study": args.name, **result}) if args.json else STUDIES[args.name].text(result))
    return DONE


def schema(args: Namespace) -> int:
    """Every kind and key of the problem file, with shapes, units, ranges and defaults."""
    from mdp.problem import schema
    from specstop.schema import schema_text

    known = schema()
    if args.json:
        emit(json_line(known))
        return DONE
    emit(schema_text(known))
    return DONE


def policies(args: Namespace) -> int:
    """The stopping rules, one line each."""
    rows = inputs.describe_rules()
    if args.json:
        for row in rows:
            emit(json_line(row))
        return DONE
    about = [
        {**row, "needs": ", ".join([*row["needs"], *["times"] * row["timed"]]) or "-", "read in": row["evidence"]}
        for row in rows
    ]
    ours = [
        f"{row['name']}: {', '.join(p['name'] for p in row['parameters'] if p['origin'] == 'ours')}"
        for row in rows
        if any(p["origin"] == "ours" for p in row["parameters"])
    ]
    emit(
        f"{table(about, ['usage', 'needs', 'does', 'source', 'read in'])}\n\n"
        f"signals on a trace: {', '.join(SIGNALS)}; the first is a perfect head and the default\n"
        "fit=1: parameters fitted to the training half of a trace; in place of a policy, all: every rule\n"
        f"defaults that no source gives: {'; '.join(ours)}"
    )
    return DONE
