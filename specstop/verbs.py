"""What each verb does. A verb checks its input, works, prints, and returns the exit code; it holds no algorithm.

Every function takes the parsed arguments. Heavy modules are imported where they are used: what needs no jax does not
pay for it.
"""

import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdp.policy import SIGNALS
from specstop import inputs
from specstop.output import emit, json_line, key_values, policy_table, solution_text, table
from specstop.traces import load_trace

if TYPE_CHECKING:
    from mdp.fit import SignalModel
    from mdp.policy import PolicySpec
    from mdp.trace import Trace

__all__ = [
    "audit", "check", "decode", "demo", "evaluate", "import_", "policies", "record", "replay", "schema", "simulate",
    "solve", "study", "sweep", "validate",
]  # fmt: skip

DONE, NOT_CONVERGED = 0, 3
MOST_WORK = 10**8  # about half a second
NO_LIMIT = 2**31  # tokens, where texts end by chance alone

DECODE_COLUMNS = (
    "num_emitted", "num_drafted", "num_discarded", "num_cut", "num_target_calls", "block_efficiency",
    "verification_rate", "discard_rate", "throughput",
)  # fmt: skip


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

    trace = load_trace(args.trace)
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


def import_(args: Namespace) -> int:
    """A trace from a file of another project."""
    from specstop.traces import import_

    return import_(args)


def validate(args: Namespace) -> int:
    """What each file or folder is, and that it is sound; the first that is not is named."""
    from specstop.traces import validate

    return validate(args)


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


def record(args: Namespace) -> int:
    """Run a real pair over prompts and write the trace."""
    from realmodels.pair import load_pair
    from realmodels.prompts import read_prompts, tokenise
    from realmodels.record import check_folder, record

    start = time.perf_counter()
    # Loading the models takes longest by far: what can be refused without them is refused first.
    sampling = _sampling(args)
    check_folder(Path(args.out))
    prompts = read_prompts(args.prompts, args.limit)
    pair = load_pair(args.target, args.draft)
    trace = record(pair, tokenise(prompts, pair), args.out, **sampling, store_tokens=not args.no_tokens)
    measured = trace.manifest.get("measured") or {}
    result = {
        "trace": args.out,
        "num_requests": trace.num_requests,
        "num_positions": trace.num_positions,
        "mean_acceptance": trace.manifest.get("mean_acceptance"),
        "draft_time": measured.get("draft_time"),
        "verify_time": measured.get("verify_time"),
        "seconds": time.perf_counter() - start,
    }
    emit(json_line(result) if args.json else key_values(result))
    return DONE


def _sampling(args: Namespace) -> dict[str, Any]:
    """What was typed of `realmodels.sampling.Sampling`, checked."""
    from realmodels.sampling import Sampling

    return asdict(Sampling(**{name: getattr(args, name) for name in Sampling.__dataclass_fields__}))


def decode(args: Namespace) -> int:
    """Decode one prompt with a real pair under a policy."""
    (spec,) = inputs.read_policies([args.policy])
    if spec.policy is None:
        raise ValueError(f"policy {spec.text!r}: a live run loads a saved table, optimal:FILE")
    signal = _live_signal(spec, args.trace)
    trace = None if args.trace is None else load_trace(args.trace)
    estimator = None if trace is None or signal is None else _estimator(trace, signal)
    if spec.fit:
        if trace is None:
            raise ValueError(f"policy {spec.text!r}: fit=1 is fitted to a trace; give --trace")
        from simulate.replay import fitted

        spec = replace(spec, policy=fitted(trace, spec), fit=False)

    from realmodels.decode import decode
    from realmodels.pair import load_pair
    from realmodels.prompts import tokenise

    sampling = _sampling(args)
    pair = load_pair(args.target, args.draft)
    if trace is not None:
        pair.check_recorded(trace.manifest.get("models"), f"--trace: {args.trace}")
    if pair.tokenizer is None:
        raise ValueError("--prompt: this pair has no tokenizer, it cannot read text")
    (prompt,) = tokenise([("--prompt", {"prompt": args.prompt})], pair)
    # the true acceptance probability is known only where the target scores what was drafted
    score = args.score or signal == "token_accept_prob"
    run = decode(pair, prompt, spec, **sampling, estimator=estimator, score=score)
    tally = run.tally
    result = {
        "policy": spec.text,
        "signal": signal,
        "text": pair.tokenizer.decode(run.tokens, skip_special_tokens=True),
        "tokens": run.tokens,
        **{name: getattr(tally, name) for name in DECODE_COLUMNS},
        "draft_time": run.draft_time,
        "verify_time": run.verify_time,
        "seconds": run.time,
    }
    if args.json:
        emit(json_line(result))
    else:
        emit(result.pop("text") + "\n\n" + key_values({k: v for k, v in result.items() if k != "tokens"}))
    return DONE


def _live_signal(spec: "PolicySpec", trace: str | None) -> str | None:
    """The signal that a live run makes the rule's survival from; None if it reads none."""
    from mdp.entrants import needs
    from mdp.fit import PERFECT
    from simulate.replay import SIGNAL_FIELDS

    wanted = needs(spec.policy) & SIGNAL_FIELDS if spec.policy else frozenset()
    if not wanted:
        return None
    signal = spec.signal or PERFECT
    if trace is None and signal != PERFECT:
        raise ValueError(f"policy {spec.text!r}: signal={signal} is calibrated on a trace; give --trace")
    if trace is None and (fitted := sorted(wanted - {"survival"})):
        raise ValueError(f"policy {spec.text!r} needs {fitted[0]}, which is fitted to a trace; give --trace")
    return signal


def _estimator(trace: "Trace", signal: str) -> "SignalModel":
    from mdp.fit import fit_signal, split_requests

    return fit_signal(trace, signal, split_requests(trace)[0])


def demo(args: Namespace) -> int:
    """The main job end to end."""
    from specstop.demo import run
    from specstop.report import headline

    summary = run(args.out, quick=args.quick)
    emit(json_line(summary) if args.json else headline(summary, args.out))
    return DONE


def check(args: Namespace) -> int:
    """Facts of the theory on problems, the gallery of counterexamples, or a search for more."""
    from specstop.check import run

    return run(args)


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
