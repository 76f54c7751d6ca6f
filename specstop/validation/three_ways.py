"""The stages of a validation, in their order; what each finds is there for the next."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp.cost import Affine, Cost
from mdp.fit import split_requests
from mdp.fit_processes import choose_regimes
from mdp.trace import Trace
from simulate.estimate import Estimate, interval, ratio
from simulate.on_processes import Processes, predict, signal_of, with_ends
from simulate.replay import measured_cost
from specstop.outcome import COST_RATIO, versions
from specstop.validation.policies import (
    LiveRuns,
    Ready,
    choose,
    compare,
    digest,
    make_ready,
    measures,
    replayed,
    run_live,
)  # fmt: skip
from specstop.validation.processes import process_entries, training_scores
from specstop.validation.report import explain
from specstop.validation.settings import Settings
from specstop.validation.stages import Progress, Stages

__all__ = ["Work", "drawn_prompts"]

NUM_CHOSEN = 5  # policies that are chosen where none are named
SIGNALS = ("draft_prob", "top_prob", "entropy", "token_accept_prob")


def drawn_prompts(vocab_size: int, count: int, seed: int) -> list[list[int]]:
    """Prompts of four token ids, for pairs without a tokenizer."""
    return np.random.default_rng([seed, 7]).integers(2, vocab_size, (count, 4)).tolist()


class Work:
    """What the stages hand on, in their order."""

    def __init__(self, settings: Settings, stages: Stages, progress: Progress, hidden: bool = False):
        self.settings, self.stages, self.progress, self.hidden = settings, stages, progress, hidden
        self.num_tokens = settings.num_prompts * settings.max_new_tokens
        self.progress.expect(NUM_CHOSEN * self.num_tokens / 2)
        self.seconds: dict[str, float] = {}
        self.entries: list[dict[str, Any]] = []

    def stage(self, name: str) -> "Timer":
        return Timer(self, name)

    def load(self, held: Trace | None) -> None:
        """Pair and prompts; those of a trace that is there are found by its request ids."""
        from realmodels.pair import load_pair, load_prompts
        from realmodels.streams import request_ids

        settings = self.settings
        self.pair = load_pair(settings.target, settings.draft, **settings.loading)
        count = settings.num_prompts if held is None else held.num_requests
        if settings.prompts == "drawn":
            self.prompts = drawn_prompts(self.pair.vocab_size, count, settings.seed)
        else:
            self.prompts = load_prompts(
                settings.prompts, self.pair, None if held is not None else count, settings.template
            )
        if held is not None:
            self.pair.check_recorded(held.manifest.get("models"), "the trace")
            by_id = dict(zip(request_ids(self.prompts), self.prompts, strict=True))
            if lacking := [name for name in held.request_ids if name not in by_id]:
                raise ValueError(
                    f"--prompts: {settings.prompts} lacks {len(lacking)} of the prompts that the trace holds"
                )
            self.prompts = [by_id[name] for name in held.request_ids]

    def record(self, held: Trace | None, folder: Path) -> None:
        from realmodels.record import record

        settings, done = self.settings, 0
        self.reused = held is not None

        def tell(count: int) -> None:
            nonlocal done
            done += count
            units = self.progress.RECORDED * count * settings.max_new_tokens
            self.progress.tell(f"recording: {done} of {len(self.prompts)} requests", units)

        if held is None:
            self.progress.expect(self.progress.RECORDED * self.num_tokens)
            held = record(self.pair, self.prompts, folder, **settings.sampling, batch_size=settings.batch_size,
                          shard_size=max(64, 4 * settings.batch_size), timing_repeats=settings.timing_repeats,
                          store_hidden=self.hidden, progress=tell)  # fmt: skip
        self.trace = held
        self.sampling = dict(held.manifest["sampling"])

    def fit(self, cost: Cost | None, measured: bool, policies: Sequence[str] | None) -> None:
        """Split, times, policies and processes: all from the training half."""
        self.progress.tell("fitting acceptance processes")
        trace = self.trace
        self.train, self.test = split_requests(trace)
        self.origin = "declared"
        if cost is None and not measured and trace.manifest.get("draft_is_target_time"):
            cost = Affine(draft_time=COST_RATIO, verify_time=1.0)
        if cost is None:
            cost, self.origin = measured_cost(trace), "measured"
        cost.verify_times(trace.max_candidates)  # a table that is too short is refused now
        self.cost = cost
        texts = choose(trace, cost, self.train) if policies is None else list(policies)
        self.ready = make_ready(trace, texts, cost, self.train)
        self.progress.expect((len(self.ready) - NUM_CHOSEN) * self.num_tokens / 2)
        self.num_regimes, self.regime_scores = choose_regimes(trace, self.train)
        held = [name for name in SIGNALS if name in trace.rollout_features]
        self.fits = Processes.fit(trace, self.train, tuple(held), self.num_regimes, self.settings.groups,
                                  lambda: self.progress.tell("fitting acceptance processes"))  # fmt: skip

    def predict(self) -> None:
        """Scores of the processes on the test half, and every policy under those that can express it."""
        self.processes = process_entries(self.trace, self.fits, self.train, self.test, self.regime_scores)
        unseen, self.order = training_scores(self.trace, self.train, self.num_regimes)
        for entry in self.processes:
            entry["training_score"] = unseen.get(entry["name"])
        for ready in self.ready:
            self.progress.tell(f"predicting {ready.text}")
            self.entries.append({"policy": ready.text} | self._predicted(ready))
        self._end_texts()

    def _end_texts(self) -> None:
        """The same predictions where texts end, all rules of one process on the same coins."""
        of_process: dict[str, list[int]] = {}
        for number, entry in enumerate(self.entries):
            if "process" in entry["predicted"]:
                of_process.setdefault(entry["predicted"]["process"], []).append(number)
        for name, numbers in of_process.items() if self.settings.rounds else ():
            self.progress.tell(f"simulating texts that end on {name}")
            rules = [(self.ready[number].spec, self.ready[number].rule) for number in numbers]
            found = with_ends(self.fits, name, rules, self.cost, self.trace, self.train, self.settings.rounds)
            for number, result in zip(numbers, found, strict=True):
                predicted = self.entries[number]["predicted"]
                fit = predicted["se"]["throughput"] * result["throughput"] / predicted["throughput"]
                both = Estimate(result["throughput"], math.hypot(fit, result.pop("se")))
                ends = list(interval(both, len(self.fits.without), self.settings.level))
                predicted["with_ends"] = result | {"interval": ends, "throughput_se": both.se}

    def _predicted(self, ready: Ready) -> dict[str, Any]:
        """Under the process that suits best, and under every other one that can express the policy."""
        try:
            signal = signal_of(ready.spec, ready.rule)
        except ValueError as error:
            return {"predicted": {"why": str(error)}, "predicted_otherwise": []}
        chains = [name for name in self.fits.whole if name.startswith("signal_chain")]
        names = [f"signal_chain:{signal}"] if signal else [*self.order, *chains]
        good, bad = [], []
        for name in names:
            try:
                good.append(predict(self.fits, name, ready.spec, ready.rule, self.cost, self.trace.max_candidates))
            except ValueError as error:  # a tree too large, times that a persistent process cannot have
                bad.append({"process": name, "why": str(error)})
        entries = [prediction.to_dict(self.settings.level) for prediction in good]
        if not entries:
            return {"predicted": {"why": bad[0]["why"]}, "predicted_otherwise": bad[1:]}
        return {"predicted": entries[0] | {"se": good[0].ses}, "predicted_otherwise": [*entries[1:], *bad]}

    def replay(self) -> None:
        """Every policy on the test half of the trace."""
        self.tallies = []
        for ready, entry in zip(self.ready, self.entries, strict=True):
            self.progress.tell(f"replaying {ready.text}")
            tally = replayed(self.trace, ready, self.cost, self.test)
            self.tallies.append(tally)
            known = replayed(self.trace, ready, self.cost, self.train)
            entry["replayed"] = measures(tally, self.settings.level)
            entry["replayed"]["on_training_half"] = float(known.num_emitted.sum() / known.time.sum())

    def live(self) -> None:
        """Every policy live on the test half's prompts, kept as soon as it is done."""
        for ready, tally, entry in zip(self.ready, self.tallies, self.entries, strict=True):
            runs, level = self._run_live(ready), self.settings.level
            mine = runs.tally(self.cost)
            wall = ratio(runs.emitted, runs.seconds)
            entry["live"] = measures(mine, level) | {
                "wall": {"throughput": wall.value, "interval": list(interval(wall, len(runs.seconds), level)),
                         "seconds": float(runs.seconds.sum()), "draft_seconds": float(runs.draft_seconds.sum()),
                         "verify_seconds": float(runs.verify_seconds.sum()), "unit": "tokens per second"},
            }  # fmt: skip
            entry["z"] = compare(tally, mine)
            entry["z_replay_live"] = entry["z"]["throughput"]
            entry["z_predicted_replayed"] = _z(entry["predicted"], entry["replayed"])

    def _run_live(self, ready: Ready) -> LiveRuns:
        prompts, done = [self.prompts[r] for r in self.test], 0
        sampling = self.sampling | {"seed": self.sampling["seed"] + 1}

        def tell(tokens: int) -> None:
            nonlocal done
            done += 1
            self.progress.tell(f"live, {ready.text}: {done} of {len(prompts)} requests", tokens)

        times = [self.cost.draft_time, self.cost.verify_times(self.trace.max_candidates)] if ready.timed else []
        key = digest(ready.text, vars(ready.rule), ready.model and ready.model.to_dict(), sampling, prompts, times,
                     dict(self.trace.manifest["models"]))  # fmt: skip
        runs = self.stages.get(
            f"live-{key}", key, lambda: run_live(self.pair, prompts, ready, self.cost, sampling, tell).to_dict()
        )
        return LiveRuns.from_dict(runs)

    def result(self) -> dict[str, Any]:
        """What `validation.json` holds, the open questions apart."""
        manifest, cost = self.trace.manifest, self.cost
        for entry in self.entries:
            entry["differences"] = explain(entry)
            entry["predicted"].pop("se", None)
        models = manifest["models"]
        pair = {
            "target": models["target"]["name"], "draft": models["draft"]["name"], "prompts": self.settings.prompts,
            "num_requests": self.trace.num_requests, "num_positions": self.trace.num_positions,
            "num_training": len(self.train), "num_held_out": len(self.test),
            "mean_acceptance": manifest.get("mean_acceptance"),
            "draft_is_target_time": manifest.get("draft_is_target_time"), "reused": self.reused,
        }  # fmt: skip
        depth = self.trace.max_candidates
        return {
            "pair": pair,
            "settings": {**asdict(self.settings), "sampling": self.sampling, "live_seed": self.sampling["seed"] + 1},
            "cost": {"origin": self.origin, "draft_time": float(cost.draft_time),
                     "verify_time": cost.verify_times(depth), "measured": manifest.get("measured")},
            "processes": self.processes,
            "policies": self.entries,
            "half_widths": _half_widths(self.entries),
            "seconds": self.seconds,
            "versions": versions(),
        }  # fmt: skip


def _z(predicted: Mapping[str, Any], replayed: Mapping[str, Any]) -> float | None:
    """Of the throughputs' difference by both standard errors, where texts end if that was simulated.

    The two come from different requests.
    """
    if "throughput" not in predicted:
        return None
    endless = {"throughput": predicted["throughput"], "throughput_se": predicted["se"]["throughput"]}
    ended = predicted.get("with_ends", endless)
    spread = math.hypot(ended["throughput_se"], replayed["throughput_se"])
    return (ended["throughput"] - replayed["throughput"]) / spread if spread > 0 else None


def _half_widths(entries: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The widest relative half-width of a throughput interval, by kind."""
    out: dict[str, float | None] = {}
    for kind in ("predicted", "replayed", "live"):
        wide = [
            (entry[kind]["interval"][1] - entry[kind]["interval"][0]) / 2 / entry[kind]["throughput"]
            for entry in entries
            if "interval" in entry[kind]
        ]
        out[kind] = max(wide, default=None)
    return out


@dataclass
class Timer:
    """Seconds of a stage, kept where the work keeps them."""

    work: Work
    name: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.work.progress.tell(self.name)
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.work.seconds[self.name] = time.perf_counter() - self.start
