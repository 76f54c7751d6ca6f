r"""Predicted, replayed, live: the same policies three ways, side by side, each with its own error.

One half of the requests trains: acceptance processes are fitted to it, and every parameter of a policy is chosen on
it. The other half judges: it scores the processes (`mdp.likelihood`), and every policy is replayed on it and run live
on its prompts.

* *Predicted*: exact on the fitted process that can express the policy (`simulate.on_processes`); for a rule that sees
  nothing, the simplest whose score on training requests left out of its fit is within two standard errors of the best.
* *Replayed*: the recorded trace, exactly, no model call (`simulate.replay`).
* *Live*: `realmodels.decode` on the same prompts with draws of its own. Throughput is under the same times as the
  replay's (counts times times), so that the two differ by counts alone; what the clock said stands beside it.

Replay and live are two samples of one law if replay is right. They are compared paired by request, since both met the
same prompts: $z$ is the difference of the ratios over its standard error, clustered by request.

Predictions are of endless text. What separates them from the replay is taken apart: the ends of texts (the same process
simulated with texts that end), the halves (the replay of the training half against that of the other), and what is
left, which is the process.

No variance reduction is used but the pairing. What takes long is kept in `DIR/stages` with a hash of its settings: a
killed run goes on where it was.
"""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specstop.output import emit, json_line, jsonable, write_file

if TYPE_CHECKING:
    from mdp.cost import Cost
    from mdp.trace import Trace

__all__ = ["PROFILES", "Settings", "Stages", "report", "run", "validate"]

DONE = 0
OPTIONS = ("target", "draft", "prompts", "limit", "trace", "policies", "cost", "out", "max_candidates",
           "max_new_tokens", "temperature", "top_k", "seed", "level", "quick", "full")  # fmt: skip
"""What is typed for the report and means nothing beside files."""


@dataclass(frozen=True)
class Settings:
    """What is recorded, and how predictions are made.

    Attributes:
        groups: of training requests, for the jackknife.
        rounds: simulated for each policy to see what the ends of texts are worth; 0 leaves that out.
    """

    target: str = "bundled"
    draft: str = "rtn:bits=4,group=64"
    prompts: str = "human-eval"
    num_prompts: int = 56
    max_new_tokens: int = 64
    max_candidates: int = 12
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0
    batch_size: int = 16
    groups: int = 20
    rounds: int = 200_000
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
    (False, True): {"num_prompts": 8, "max_new_tokens": 24, "groups": 4, "rounds": 20_000, "timing_repeats": 2},
    (True, False): TINY | {"num_prompts": 6000},
    (True, True): TINY | {"num_prompts": 160, "groups": 8, "rounds": 20_000},
}
"""Settings that differ from the defaults, for (tiny pair, quick)."""


def validate(args: Namespace) -> int:
    """Files are checked; a pair is validated. Which of the two was asked for, and the result, printed."""
    typed = [name for name in OPTIONS if getattr(args, name) not in (None, False)]
    if args.paths:
        if typed:
            name = {"policies": "policy"}.get(typed[0], typed[0]).replace("_", "-")
            raise ValueError(
                f"validate: --{name} is for the report on a pair, {args.paths[0]!r:.60} is a file to check"
            )
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
    settings = Settings(
        **PROFILES[tiny, args.quick] | {key: value for key, value in given.items() if value is not None}
    )
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
        cost: declared times. None declares .22 where the draft takes the target's own time, and takes the
            times measured with the trace elsewhere, or if `measured`.
        full: the open questions too (`specstop.questions`).

    Returns:
        What `validation.json` holds.
    """
    from specstop.three_ways import Work
    from specstop.validation_report import write_report

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is not a folder")
    folder = Path(trace) if trace is not None else out / "trace"
    held = _held(settings, folder, given=trace is not None)
    out.mkdir(parents=True, exist_ok=True)
    work = Work(settings, Stages(out / "stages"), Progress(settings.num_prompts * settings.max_new_tokens), full)
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
    result: dict[str, Any] = work.result() | {"questions": questions}
    result["seconds"]["total"] = sum(result["seconds"].values())
    result = jsonable(result)
    write_report(result, out)
    write_file(out / "validation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
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
        write_file(path, json.dumps({"key": key, "value": value}))
        return value


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
