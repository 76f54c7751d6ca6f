"""Traces as files: taken over from other projects, looked at, checked."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specstop.output import emit, json_line, jsonable, key_values, table

if TYPE_CHECKING:
    from mdp.trace import Trace

__all__ = ["import_", "load_trace", "validate"]

DONE = 0


def import_(args: Namespace) -> int:
    """A trace from a file of another project."""
    from mdp.importers import read_rounds, read_trace
    from mdp.product_limit import product_limit
    from mdp.trace import save

    if (Path(args.out) / "manifest.json").exists():
        raise ValueError(f"--out: {args.out} holds a trace already")
    trace = read_trace(args.file, args.format, drafter=args.drafter, seed=args.seed)
    save(trace, args.out)
    result = _about_trace(args.out, trace) | {"acceptance": None}
    if args.format == "rounds":
        result["acceptance"] = product_limit(*read_rounds(args.file), max_candidates=trace.max_candidates).to_dict()
    if args.json:
        emit(json_line(result))
        return DONE
    acceptance: Any = result.pop("acceptance")
    emit(key_values(result))
    if acceptance:
        columns = ("tested", "accepted", "accept_prob", "accept_prob_se", "survival", "survival_se")
        depths = range(1, trace.max_candidates + 1)
        rows = [{"depth": i} | {name: jsonable(acceptance[name][i - 1]) for name in columns} for i in depths]
        emit("\nacceptance by depth, rounds that were cut short counted as such (product-limit):\n" + table(rows))
    return DONE


def validate(args: Namespace) -> int:
    """What each file or folder is, and that it is sound; the first that is not is named."""
    from mdp.importers import guess, read_trace
    from mdp.problem import load

    results = []
    for path in args.paths:
        if Path(path).is_dir():
            trace = load_trace(path)
            results.append({"path": path, "kind": "trace"} | _about_trace(path, trace))
            continue
        kind = guess(path)
        if kind is not None:
            results.append({"path": path, "kind": kind} | _about_trace(path, read_trace(path, kind)))
        else:
            problem = load(path)
            results.append({"path": path, "kind": "problem", "max_candidates": int(problem.max_candidates)})
    for result in results:
        result.pop("trace", None)
        emit(json_line(result) if args.json else key_values({k: v for k, v in result.items() if v is not None}))
    return DONE


def _about_trace(folder: str, trace: "Trace") -> dict[str, Any]:
    fields = [*trace.features, *(name for name in ("head", "run_length") if name in trace.optional)]
    return {"trace": folder, "imported": trace.manifest.get("imported"), "num_requests": trace.num_requests,
            "num_positions": trace.num_positions, "max_candidates": trace.max_candidates,
            "rollouts": trace.rollout_offsets is not None, "fields": ", ".join(fields)}  # fmt: skip


def load_trace(folder: str) -> "Trace":
    from mdp.trace import load

    return load(folder)
