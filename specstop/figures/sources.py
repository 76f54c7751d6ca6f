"""Results that several figures share: the paper's predictions, a trace of a real pair, rules on it, and a live run.

*The pair.* Figures of a real pair come from one trace: the one given, that of `make demo` (`out/trace`), or one that
is recorded here, with the demo's settings. Signals, thresholds and the best fixed length are fitted and chosen on the
training half of its requests; all else is scored on the other half (`mdp.fit`). Two prices: the declared cost ratio of
SpecDec++'s pairs, under which the bundled pair's acceptance can be compared with theirs, and wall time.

*Live.* The pair decodes prompts of the test half under a few rules, the rules in turn for each prompt, so that a slow
spell of the machine touches all of them.
"""

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mdp.cost import Affine
from mdp.fit import SignalModel, fit_signal, split_requests
from mdp.policy import PolicySpec, parse
from mdp.problem import StoppingProblem
from specstop import demo
from specstop.figures.recipe import Data, Unavailable
from specstop.figures.store import Source, Store
from specstop.outcome import COST_RATIO, FULL, QUICK

__all__ = ["DECLARED", "GRID", "PLAIN", "SIGNALS", "SOURCES", "recorded_trace"]

DECLARED = Affine(draft_time=COST_RATIO, verify_time=1.0)
PLAIN = "fixed:0"
SIGNALS = ("draft_prob", "entropy", "token_accept_prob")
GRID = tuple(f"{h:.2f}" for h in np.linspace(0.0, 1.0, 51))
PRICES = (0.05, 0.1, 0.15, COST_RATIO, 0.3, 0.4, 0.6)
LIVE_SIGNAL = "draft_prob"
LIVE_REQUESTS = {True: 6, False: 12}
"""Requests that are decoded live, by whether it is to be quick."""


def recorded_trace(store: Store) -> Path:
    """The folder of the trace: the one given, or one recorded into the store with the demo's settings."""
    if store.given is not None:
        return store.given
    settings, folder = (QUICK, "trace-quick") if store.quick else (FULL, "trace")
    folder = store.out / "data" / folder
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        pair, prompts = demo.load_models(settings)
        demo.record_once(settings, pair, prompts, folder)
    return folder


def _prediction(store: Store) -> Data:
    from specstop.prediction import predict

    return predict()


def _replayed(store: Store) -> Data:
    """Every rule of the figures under the declared cost, `chosen` on the training half, scored on the other."""
    from simulate.replay import replay as on_trace

    trace = store.trace
    if trace.rollout_offsets is None:
        raise Unavailable(f"{store.trace_folder}: rules that see signals need a trace with rollouts")
    chosen = demo.choose(trace, DECLARED)
    sweeps = [f"rejection:{h},signal={signal}" for signal in SIGNALS for h in GRID]
    found = on_trace(trace, list(dict.fromkeys([*chosen, *sweeps])), cost=DECLARED).to_dict()
    prices = {}
    rules = [PLAIN, *(f"optimal:signal={signal}" for signal in SIGNALS)]
    for price in PRICES:
        prices[f"{price:g}"] = on_trace(trace, rules, cost=Affine(price, 1.0)).to_dict()["policies"][1:]
    return {"chosen": chosen, "baseline": chosen[0], "policies": {row["policy"]: row for row in found["policies"]},
            "num_requests": found["num_requests"], "level": found["level"], "prices": prices,
            "measured_times": _at_measured_times(trace, chosen), "pair": _about(trace)}  # fmt: skip


def _at_measured_times(trace: Any, chosen: list[str]) -> Data:
    """Tokens per second that the rounds of the live run's rules would give at the times recorded with the trace."""
    from simulate.estimate import interval, ratio
    from simulate.replay import measured_cost, replay_rounds

    if not trace.manifest.get("measured"):
        return {}
    train, test = split_requests(trace)
    times, out = measured_cost(trace).round_times(trace.max_candidates), {}
    for policy in _live_policies(chosen):
        model = fit_signal(trace, LIVE_SIGNAL, train) if "signal=" in policy else None
        log = replay_rounds(trace, policy, cost=DECLARED, model=model, requests=test.tolist())
        tally = log.tally(times, test)
        estimate = ratio(tally.num_emitted, tally.time)
        out[policy] = {"throughput": estimate.value, "throughput_interval": interval(estimate, len(test))}
    return out


def _about(trace: Any) -> Data:
    models, sampling = trace.manifest.get("models") or {}, trace.manifest.get("sampling") or {}
    names = {role: (models.get(role) or {}).get("name") for role in ("target", "draft")}
    known = {(QUICK.target, QUICK.draft): "tiny random pair", (FULL.target, FULL.draft): "SmolLM2-135M, 4-bit draft"}
    target, draft = (str((models.get(role) or {}).get("spec")) for role in ("target", "draft"))
    label = known.get((target, draft), f"{names['target']} drafted by {names['draft']}")
    return {**names, "label": label, "num_requests": trace.num_requests, "num_positions": trace.num_positions,
            "sampling": sampling, "max_candidates": trace.max_candidates, "cost_ratio": COST_RATIO}  # fmt: skip


def _modelled(store: Store) -> Data:
    """What theory predicts from the training half alone: independent acceptances, and the chain of each signal."""
    from mdp.evaluate import evaluate
    from mdp.frontier import frontier
    from mdp.solve import solve

    trace = store.trace
    train, _ = split_requests(trace)
    depth = trace.max_candidates
    chosen = store.get("replayed")["chosen"]
    mean = _mean_acceptance(trace, train)
    lengths = np.arange(depth + 1)
    emitted = np.array([(mean ** np.arange(k + 1)).sum() for k in lengths])
    fixed = {"K": lengths, "speedup": emitted / (1.0 + COST_RATIO * lengths), "verification_rate": 1.0 / emitted,
             "discard_rate": (lengths + 1) / emitted - 1.0}  # fmt: skip
    signals = {}
    for signal in SIGNALS:
        problem = StoppingProblem(fit_signal(trace, signal, train).process(), DECLARED, depth)
        curve = frontier(problem, "rejection", np.array(GRID, dtype=float))
        solution = solve(problem)
        own = [text for text in chosen if text.endswith(f"signal={signal}")]
        rules = {text: evaluate(problem, _unread(text), solution=solution).speedup for text in own}
        signals[signal] = {
            "h": curve.threshold, "speedup": curve.speedup, "verification_rate": curve.verification_rate,
            "discard_rate": curve.discard_rate, "optimum": solution.speedup, "bounds": solution.bounds, "rules": rules,
            "optimum_rates": _rates(evaluate(problem, "optimal", solution=solution)),
        }  # fmt: skip
    oracle = 1.0 / (COST_RATIO + (1.0 - COST_RATIO) * (1.0 - mean))
    return {"mean": mean, "fixed": fixed, "signals": signals, "oracle": oracle}


def _unread(policy: str) -> str:
    """The policy string as it stands where survival is seen: without its signal."""
    return policy.partition(":signal=")[0].partition(",signal=")[0]


def _mean_acceptance(trace: Any, requests: np.ndarray) -> float:
    chosen = np.isin(np.arange(trace.num_requests), requests)
    return float(trace.features["token_accept_prob"][np.repeat(chosen, np.diff(trace.offsets))].mean())


def _rates(entry: Any) -> list[float]:
    return [float(entry.tally.verification_rate), float(entry.tally.discard_rate)]


def _audit(store: Store) -> Data:
    from simulate.audit import audit

    return audit(store.trace, store.get("replayed")["baseline"], cost=DECLARED).to_dict()


def _live(store: Store) -> Data:
    """Requests x rules, each decoded once: counts and seconds."""
    from realmodels.decode import decode
    from realmodels.streams import request_ids

    trace = store.trace
    pair, prompts = _pair(store)
    train, test = split_requests(trace)
    names = request_ids(prompts)
    requests = test[: LIVE_REQUESTS[store.quick]]
    model = fit_signal(trace, LIVE_SIGNAL, train)
    rules = _live_rules(store.get("replayed")["chosen"], model, trace.max_candidates)
    sampling: Data = dict(trace.manifest["sampling"])
    rows: list[Data] = []
    first: Data = sampling | {"max_new_tokens": 4}
    decode(pair, prompts[0], "fixed:2", **first)  # first calls pay for set-up
    for request in requests.tolist():
        for spec in rules:
            reader = model if spec.signal else None
            processor = time.process_time()
            run = decode(pair, prompts[request], spec, estimator=reader, request=names[request], **sampling)
            processor = time.process_time() - processor
            tally = run.tally
            rows.append({"policy": spec.text, "request": request, "num_emitted": tally.num_emitted,
                         "num_drafted": tally.num_drafted, "num_discarded": tally.num_discarded,
                         "num_cut": tally.num_cut, "num_target_calls": tally.num_target_calls,
                         "draft_seconds": run.draft_time, "verify_seconds": run.verify_time,
                         "seconds": run.time, "processor_seconds": processor})  # fmt: skip
    return {"policies": [spec.text for spec in rules], "rows": rows, "measured": trace.manifest.get("measured")}


def _live_rules(chosen: list[str], model: SignalModel, depth: int) -> list[PolicySpec]:
    """The same as rules; the chain's optimum is that at the declared times."""
    from mdp.solve import solve

    *texts, optimal = _live_policies(chosen)
    solution = solve(StoppingProblem(model.process(), DECLARED, depth))
    return [*map(parse, texts), PolicySpec(optimal, solution.policy, LIVE_SIGNAL)]


def _live_policies(chosen: list[str]) -> list[str]:
    """Plain decoding, the best fixed length, the best threshold on the draft's probability, and the chain's optimum."""
    threshold = next(text for text in chosen if text.startswith("rejection") and text.endswith(LIVE_SIGNAL))
    return [PLAIN, chosen[0], threshold, f"optimal:signal={LIVE_SIGNAL}"]


def _pair(store: Store) -> tuple[Any, list[list[int]]]:
    """The pair that recorded the trace, and the trace's prompts.

    Raises:
        Unavailable: if the trace does not say which models made it, or its prompts are not known here.
    """
    from realmodels.streams import request_ids

    trace = store.trace
    models = trace.manifest.get("models") or {}
    specs = [(models.get(role) or {}).get("spec") for role in ("target", "draft")]
    for settings in (QUICK, FULL):
        if specs == [settings.target, settings.draft]:
            pair, prompts = demo.load_models(replace(settings, num_prompts=trace.num_requests))
            if request_ids(prompts) == trace.request_ids:
                return pair, prompts
    raise Unavailable(f"{store.trace_folder}: its prompts are not those of the demo, so the pair cannot be run on them")


def _heads(store: Store) -> Data:
    """`grid.json` of acceptance heads, as `specstop train-head --grid` writes it: found beside the trace, or made."""
    beside = [store.trace_folder.parent / name / "grid.json" for name in ("head", "heads")]
    for path in beside:
        if path.is_file():
            return _grid(path)
    trace = store.trace_folder
    if "hidden" not in store.trace.optional:
        settings = QUICK if store.quick else FULL
        trace = store.out / "data" / ("trace-hidden-quick" if store.quick else "trace-hidden")
        if not (trace / "manifest.json").exists():
            demo.record_once(settings, *demo.load_models(settings), trace)
    folder = store.out / "data" / "heads"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, with other inputs
    tiny = ["--variant", "matched"] if store.quick else []  # the published one needs prompts as text
    _run("train-head", "--trace", trace, "--out", folder, "--grid", "--cost", COST_RATIO, *tiny, "--json")
    return _grid(folder / "grid.json")


def _grid(path: Path) -> Data:
    with suppress(ValueError, OSError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("rows"), list) and found["rows"]:
            return found
    raise Unavailable(f"{path}: not a grid of acceptance heads")


def _run(*words: Any) -> None:
    """One verb of the command line, in a process of its own.

    Raises:
        Unavailable: if it answers that it cannot.
    """
    command = [sys.executable, "-m", "specstop", *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        raise Unavailable(f"specstop {words[0]}: {said.removeprefix('specstop: error: ')}")


def _study(name: str) -> Any:
    def compute(store: Store) -> Data:
        from specstop.studies import STUDIES

        return STUDIES[name].run(store.quick)

    return compute


SOURCES = {
    source.name: source
    for source in (
        Source("prediction", (), _prediction),
        Source("phase", (), _study("phase")),
        Source("information", (), _study("information")),
        Source("self_tuning", (), _study("self-tuning")),
        Source("replayed", ("trace",), _replayed),
        Source("modelled", ("trace", "replayed"), _modelled),
        Source("audit", ("trace", "replayed"), _audit),
        Source("live", ("trace", "replayed"), _live, live=True),
        Source("heads", ("trace",), _heads, live=True),
    )
}
