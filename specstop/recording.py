"""Recording a real pair: at once, in parts that are merged, or on a cluster."""

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specstop.models import load_pair_from, need, pair_options, sampling
from specstop.output import emit, json_line, key_values

if TYPE_CHECKING:
    from mdp.trace import Trace

__all__ = ["merge", "record"]

DONE = 0


def record(args: Namespace) -> int:
    """Run a real pair over prompts, or read its logits, and write the trace, or a part of it."""
    need(args, *(["out"] if args.logits else ["target", "draft", "prompts", "out"]))
    if args.impute and not args.logits:
        raise ValueError("--impute: goes with --logits; a recording holds what was drafted past a rejection")
    if args.logits:
        from specstop.logits import record_logits

        return record_logits(args)
    from realmodels.prompts import about_prompts, read_prompts, tokenise
    from realmodels.record import Plan, check_folder, record_part

    start = time.perf_counter()
    # Loading the models takes longest by far: what can be refused without them is refused first.
    settings = sampling(args) | {
        "batch_size": args.batch_size,
        "shard_size": args.shard_size,
        "store_top": args.store_top,
        "store_tokens": not args.no_tokens,
        "store_hidden": args.hidden,
        "score_rollouts": not args.no_rollout_scores,
    }
    if args.hidden and args.no_tokens:
        raise ValueError("--hidden: hidden states tell the text, so not with --no-tokens")
    out, part = Path(args.out), args.shard
    if not (out / "recording.json").exists():  # else its settings are compared once the models are known
        check_folder(out)
    prompts = read_prompts(args.prompts, args.limit)
    Plan.check_part(part, len(prompts), args.shard_size)
    if args.workers or args.scheduler:
        from realmodels.cluster import record_on_cluster

        trace = record_on_cluster(
            pair_options(args), prompts, out, source=args.prompts, template=args.template, workers=args.workers,
            scheduler=args.scheduler, part=part, **settings,
        )  # fmt: skip
    else:
        pair = load_pair_from(args)
        about = about_prompts(args.prompts, pair, args.template)
        trace = record_part(pair, tokenise(prompts, pair, args.template), out, part, about_prompts=about, **settings)
    if trace is None:
        result = {"part": args.out, "shard": "{}/{}".format(*part)}
        emit(json_line(result) if args.json else f"{key_values(result)}\n\nmerge the parts once all are there:\n"
             "  specstop merge OUT PART ...")  # fmt: skip
        return DONE
    _report(args, trace, args.out, time.perf_counter() - start)
    return DONE


def merge(args: Namespace) -> int:
    """Join the parts of a recording."""
    from realmodels.journal import merge

    start = time.perf_counter()
    trace = merge(args.out, args.parts)
    _report(args, trace, args.out, time.perf_counter() - start)
    return DONE


def _report(args: Namespace, trace: "Trace", folder: str, seconds: float) -> None:
    """What was recorded, and what it took per token, so that a larger pair can be planned."""
    measured, took = trace.manifest.get("measured") or {}, trace.manifest["recording"]
    result: dict[str, Any] = {
        "trace": folder,
        "num_requests": trace.num_requests,
        "num_positions": trace.num_positions,
        "mean_acceptance": trace.manifest.get("mean_acceptance"),
        "draft_time": measured.get("draft_time"),
        "verify_time": measured.get("verify_time"),
        "tokens_per_second": took["tokens_per_second"],
        "seconds_per": took["seconds_per"],
        "tokens": took["tokens"],
        "peak_memory": took["peak_memory"],
        "seconds": seconds,
    }
    if args.json:
        emit(json_line(result))
        return
    result |= {f"seconds per {key.replace('_', ' ')}": value for key, value in result.pop("seconds_per").items()}
    result |= {f"tokens, {key.replace('_', ' ')}": value for key, value in result.pop("tokens").items()}
    result |= {f"peak memory, {key}": f"{value / 2**30:.2f} GB" for key, value in result.pop("peak_memory").items()}
    emit(key_values(result))
