"""The verb `validate`: which of its two meanings was typed, the stages in their order, and the files written last."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specstop.models import LOADING
from specstop.output import emit, json_line, jsonable, write_file
from specstop.validation.settings import PROFILES, Settings
from specstop.validation.stages import Progress, Stages

if TYPE_CHECKING:
    from mdp.cost import Cost
    from mdp.trace import Trace

__all__ = ["validate", "validate_pair"]

DONE = 0
OPTIONS = ("target", "draft", "prompts", "template", "limit", "trace", "policies", "cost", "out", "max_candidates",
           "max_new_tokens", "temperature", "top_k", "seed", "level", "quick", "full", *LOADING)  # fmt: skip
"""What is typed for the report and means nothing beside files."""


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
        from specstop.validation.report import headline

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
             "template": args.template, "loading": {name: value for name in LOADING if (value := getattr(args, name))},
             "num_prompts": args.limit, "level": args.level,
             **{name: getattr(args, name) for name in ("max_candidates", "max_new_tokens", "temperature", "top_k",
                                                       "seed")}}  # fmt: skip
    settings = Settings(
        **PROFILES[tiny, args.quick] | {key: value for key, value in given.items() if value is not None}
    )
    return validate_pair(settings, args.out, trace=args.trace, policies=policies, cost=cost,
                  measured=args.cost == "measured", quick=args.quick, full=args.full)  # fmt: skip


def validate_pair(
    settings: Settings, out: str | Path, *, trace: str | Path | None = None, policies: Sequence[str] | None = None,
    cost: "Cost | None" = None, measured: bool = False, quick: bool = False, full: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Predict, replay and run live; writes `validation.json` and `report.md` into the folder `out`.

    Args:
        trace: a recorded trace of the same pair and prompts; None records one into `out/trace`, or uses the one there.
        policies: policy strings; None chooses five on the training half.
        cost: declared times. None declares .22 where the draft takes the target's own time, and takes the
            times measured with the trace elsewhere, or if `measured`.
        full: the open questions too (`specstop.validation.questions`).

    Returns:
        What `validation.json` holds.
    """
    from specstop.validation.report import write_report
    from specstop.validation.three_ways import Work

    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is not a folder")
    folder = Path(trace) if trace is not None else out / "trace"
    held = _held(settings, folder, given=trace is not None)
    out.mkdir(parents=True, exist_ok=True)
    work = Work(settings, Stages(out / "stages"), Progress(), full)
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
        from specstop.validation.questions import answer

        with work.stage("questions"):
            questions = answer(work, quick)
    result: dict[str, Any] = work.result() | {"questions": questions}
    result["seconds"]["total"] = sum(result["seconds"].values())
    result = jsonable(result)
    write_report(result, out)
    write_file(out / "validation.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    work.progress.done()
    return result


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
