"""Live decoding: prompts continued by a real pair, with all that the rule reads made ready from a trace, head or cost.

What a rule reads beside the draft's own features comes from somewhere: a signal is calibrated on the training half of
`--trace`, and a rule of `fit=1` or a bare `optimal` is fitted or solved on it as in replay; `--head` scores the draft's
hidden states; times are those of `--cost`, or measured with the trace.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mdp.policy import SIGNALS
from specstop import inputs
from specstop.models import load_pair_from, sampling
from specstop.output import emit, json_line, key_values, table
from specstop.traces import load_trace

if TYPE_CHECKING:
    from mdp.cost import Cost
    from mdp.fit import SignalModel
    from mdp.metrics import Tally
    from mdp.policy import PolicySpec
    from mdp.trace import Trace
    from realmodels.decode import Decoded

__all__ = ["decode"]

DONE = 0
PERFECT = SIGNALS[0]
COUNTS = (
    "num_emitted", "num_drafted", "num_discarded", "num_cut", "num_target_calls", "block_efficiency",
    "verification_rate", "discard_rate", "throughput",
)  # fmt: skip


def decode(args: Namespace) -> int:
    """Continue prompts with a real pair under a policy, one result a prompt."""
    (spec,) = inputs.read_policies([args.policy])
    signal, wanted = _signal(spec, args.trace), _wanted(spec)
    if args.head is None and "head" in {*wanted, signal}:
        raise ValueError(f"policy {spec.text!r} needs head, which this live run does not show; give --head")
    cost = None if args.cost is None else inputs.declared_cost(args.cost)
    if cost is not None:
        inputs.check_depth(str(args.cost), cost, args.max_candidates)
    trace = None if args.trace is None else load_trace(args.trace)
    if args.trace is None and spec.fit:
        raise ValueError(f"policy {spec.text!r}: fit=1 is fitted to a trace; give --trace")

    from realmodels.decode import decode_each
    from realmodels.prompts import read_prompts, tokenise

    settings = sampling(args)
    given = [("--prompt", {"prompt": args.prompt})] if args.prompts is None else read_prompts(args.prompts, args.limit)
    head = None
    if args.head is not None:
        from realmodels.head import apply_head, load_head

        head = load_head(args.head)
        if trace is not None and "head" in {*wanted, signal}:
            trace = apply_head(head, trace)
    spec, model, cost = _ready(spec, signal, wanted, trace, cost, args.max_candidates)
    pair = load_pair_from(args)
    if trace is not None:
        pair.check_recorded(trace.manifest.get("models"), f"--trace: {args.trace}")
        _check_sampled(trace, settings, args.trace)
    if head is not None and head.manifest.get("models"):  # a published head does not say whose states it reads
        pair.check_recorded(head.manifest["models"], f"--head: what {args.head} was trained on")
    if pair.tokenizer is None and args.prompts is None:
        raise ValueError("--prompt: this pair has no tokenizer, it cannot read text")
    prompts = tokenise(given, pair, args.template)
    # the true acceptance probability is known only where the target scores what was drafted
    options: dict[str, Any] = {"score": args.score or PERFECT in {*wanted, signal}}
    options |= {"estimator": model, "head": head, "cost": cost, **settings}
    runs: list[Decoded] = []
    for run in decode_each(pair, prompts, spec, **options):
        runs.append(run)
        row = _row(args, pair.tokenizer, signal, len(runs) - 1, run)
        if args.json:
            emit(json_line(row))
        elif args.prompts is None:
            shown = {key: value for key, value in row.items() if key not in ("request", "text", "tokens", "rounds")}
            emit((row["text"] or "") + "\n\n" + key_values(shown))
        if not args.json and args.rounds:
            emit(table([{"request": row["request"], **step} for step in row["rounds"]]) + "\n")
    if args.prompts is not None and not args.json:
        from realmodels.decode import total

        rows = [{"request": str(r), **_counts(run.tally)} for r, run in enumerate(runs)]
        emit(table([*rows, {"request": "all", **_counts(total(runs))}]))
    return DONE


def _check_sampled(trace: "Trace", settings: Mapping[str, Any], folder: str | None) -> None:
    """Refuse a trace that was sampled otherwise: another law is accepted otherwise, and reads otherwise."""
    recorded = {"top_p": 1.0, **(trace.manifest.get("sampling") or {})}
    for name in ("temperature", "top_k", "top_p"):
        if recorded.get(name, settings[name]) != settings[name]:
            raise ValueError(
                f"--trace: {folder} was recorded with {name} {recorded[name]}, not {settings[name]}; what it "
                "calibrates would not hold here"
            )


def _wanted(spec: "PolicySpec") -> frozenset[str]:
    """The observation fields that the rule reads; of a bare `optimal`, those of the table it is solved to."""
    from mdp.entrants import needs
    from mdp.policy import ThresholdTable

    return frozenset(ThresholdTable.needs) if spec.policy is None else needs(spec.policy)


def _signal(spec: "PolicySpec", trace: str | None) -> str | None:
    """The signal that a live run makes the rule's survival from; None if it reads none."""
    from simulate.replay import SIGNAL_FIELDS

    if spec.policy is None and trace is None:
        raise ValueError(f"policy {spec.text!r}: a live run loads a saved table, optimal:FILE, or give --trace")
    wanted = _wanted(spec) & SIGNAL_FIELDS
    if not wanted:
        return None
    signal = spec.signal or PERFECT
    if trace is None and signal != PERFECT:
        raise ValueError(f"policy {spec.text!r}: signal={signal} is calibrated on a trace; give --trace")
    if trace is None and (fitted := sorted(wanted - {"survival"})):
        raise ValueError(f"policy {spec.text!r} needs {fitted[0]}, which is fitted to a trace; give --trace")
    return signal


def _ready(
    spec: "PolicySpec", signal: str | None, wanted: frozenset[str], trace: "Trace | None", cost: "Cost | None",
    max_candidates: int,
) -> tuple["PolicySpec", "SignalModel | None", "Cost | None"]:  # fmt: skip
    """The rule fitted or solved, the model of its signal, and the times it is told, if it reads any."""
    from mdp.fit import fit_signal, split_requests
    from simulate.replay import TIME_FIELDS, fitted

    if cost is None and wanted & TIME_FIELDS and trace is None:
        raise ValueError(f"policy {spec.text!r} needs times, which this live run does not show; give --cost or --trace")
    if trace is None:
        return spec, None, cost
    model = None if signal is None else fit_signal(trace, signal, split_requests(trace)[0])
    if spec.fit:
        spec = replace(spec, policy=fitted(trace, spec, cost=cost), fit=False)
    told = cost
    if cost is None and (spec.policy is None or wanted & TIME_FIELDS):
        told = _measured(trace, max_candidates)
    if spec.policy is None:
        from mdp.problem import StoppingProblem
        from mdp.solve import solve  # imports jax: only here

        assert model is not None and told is not None
        spec = replace(spec, policy=solve(StoppingProblem(model.process(), told, max_candidates)).policy)
    return spec, model, told if wanted & TIME_FIELDS else cost


def _measured(trace: "Trace", max_candidates: int) -> "Cost":
    """The trace's times, for rounds of at most `max_candidates`."""
    from mdp.cost import Table
    from simulate.replay import measured_cost

    if max_candidates > trace.max_candidates:
        raise ValueError(f"--max-candidates: the trace's times reach {trace.max_candidates}; declare some with --cost")
    cost = measured_cost(trace)
    return Table(float(cost.draft_time), cost.verify_times(trace.max_candidates)[: max_candidates + 1])


def _row(args: Namespace, tokenizer: Any, signal: str | None, request: int, run: "Decoded") -> dict[str, Any]:
    """What is said of one prompt."""
    text = None if tokenizer is None else tokenizer.decode(run.tokens, skip_special_tokens=True)
    row = {"policy": args.policy, "signal": signal, "request": request, "text": text, "tokens": run.tokens}
    row |= _counts(run.tally) | {"draft_time": run.draft_time, "verify_time": run.verify_time, "seconds": run.time}
    if args.rounds:
        row["rounds"] = [
            {**step._asdict(), "draft_time": spent.draft, "verify_time": spent.verify}
            for step, spent in zip(run.rounds, run.times, strict=True)
        ]
    return row


def _counts(tally: "Tally", names: Sequence[str] = COUNTS) -> dict[str, Any]:
    return {name: getattr(tally, name) for name in names}
