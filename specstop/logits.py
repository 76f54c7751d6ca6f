"""`specstop record --logits`: a trace from logits, without a model."""

import sys
import time
from argparse import Namespace

from specstop.arguments import build_parser
from specstop.models import sampling
from specstop.output import emit, json_line, key_values

__all__ = ["record_logits"]

DONE = 0
UNUSED = (
    "target", "draft", "prompts", "template", "dtype", "device", "device_map", "quantise", "target_revision",
    "draft_revision", "trust_remote_code", "max_new_tokens", "shard", "shard_size", "batch_size", "workers",
    "scheduler", "store_top", "hidden", "no_rollout_scores",
)  # fmt: skip
"""Options that say nothing about logits."""


def record_logits(args: Namespace) -> int:
    """Read `--logits` and write the trace."""
    untyped = build_parser().parse_args([args.verb])
    for name in UNUSED:
        if getattr(args, name) != getattr(untyped, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: does not go with --logits, which holds text and laws already"
            )
    from realmodels.logits import record_logits

    start = time.perf_counter()
    settings = sampling(args)
    del settings["max_new_tokens"]  # the file's texts are as long as they are
    trace = record_logits(
        args.logits, args.out, impute=args.impute, max_requests=args.limit, store_tokens=not args.no_tokens,
        progress=_bar() if sys.stderr.isatty() else None, **settings,
    )  # fmt: skip
    result = {
        "trace": args.out,
        "num_requests": trace.num_requests,
        "num_positions": trace.num_positions,
        "mean_acceptance": trace.manifest["mean_acceptance"],
        "rollouts": trace.rollouts,
        "mass_left_out": trace.manifest["logits"]["mass_left_out"],
        "seconds": time.perf_counter() - start,
    }
    emit(json_line(result) if args.json else key_values({k: v for k, v in result.items() if v is not None}))
    return DONE


def _bar():
    from tqdm.auto import tqdm

    return tqdm(desc="reading", unit="token", file=sys.stderr).update
