"""`specstop record --logits`: a trace from logits, without a model."""

import sys
import time
from argparse import Namespace
from dataclasses import fields

from specstop.output import emit, json_line, key_values

__all__ = ["record_logits"]

DONE = 0
UNUSED = {
    "target": None, "draft": None, "prompts": None, "template": "chat", "dtype": "float32", "device": "cpu",
    "device_map": None, "quantise": None, "target_revision": None, "draft_revision": None, "trust_remote_code": False,
    "max_new_tokens": 128, "shard": (1, 1), "shard_size": 64, "batch_size": 32, "workers": 0, "scheduler": None,
    "store_top": 64, "hidden": False, "no_rollout_scores": False,
}  # fmt: skip
"""Options that say nothing about logits, with their defaults."""


def record_logits(args: Namespace) -> int:
    """Read `--logits` and write the trace."""
    for name, default in UNUSED.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')}: does not go with --logits, which holds text and laws already"
            )
    from realmodels.logits import record_logits
    from realmodels.sampling import Sampling

    start = time.perf_counter()
    names = {field.name for field in fields(Sampling)} - {"max_new_tokens"}
    sampling = {name: getattr(args, name) for name in names if hasattr(args, name)}
    trace = record_logits(
        args.logits, args.out, impute=args.impute, max_requests=args.limit, store_tokens=not args.no_tokens,
        progress=_bar() if sys.stderr.isatty() else None, **sampling,
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
