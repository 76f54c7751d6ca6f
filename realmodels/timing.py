"""Measured times of a pair on this machine: one draft step, and V(k), a target pass over k candidates.

V(k) reads k + 1 new tokens on a context of the given length and warps their laws; a draft step reads one token, warps
and draws. The sizes are measured in turn, round after round, so that a slow spell of the machine touches all of them.
What is kept is the raw median; no curve is fitted and dips stay (the theory allows them).
"""

import os
import platform
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from realmodels.pair import ModelPair
from realmodels.reader import Reader
from realmodels.sampling import Sampling
from realmodels.verify import draw

__all__ = ["machine", "measure_times"]


def machine() -> dict[str, Any]:
    """Name and processor of this machine, and the threads torch uses."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        processor = lines[0] if lines else processor
    except OSError:
        pass
    return {
        "machine": platform.node(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def measure_times(
    pair: ModelPair, max_candidates: int, context_length: int, repeats: int = 5, context: Sequence[int] = ()
) -> dict[str, Any]:
    """Median seconds `draft_time` and `verify_time` [V(0)..V(K)], with their quartiles, at this context length.

    Args:
        context: tokens to fill the context with, repeated as needed; token 0 if empty.
    """
    sampling = Sampling(max_candidates=max_candidates)
    filler = torch.tensor(list(context) or [0]).repeat(context_length + max_candidates + 1)
    target, draft = (pair.reader(role, 1) for role in ("target", "draft"))
    for reader in (target, draft):
        reader.read(filler[None, :context_length], torch.arange(context_length)[None], keep=1)
    uniform = torch.full((1,), 0.5, dtype=torch.float64, device=pair.target.device)

    def one(reader: Reader, count: int, draws: bool) -> float:
        span = torch.arange(context_length, context_length + count)
        start = time.perf_counter()
        law = sampling.law(reader.read(filler[None, span], span[None]))
        if draws:
            draw(law.select((slice(None), -1)), uniform)
        if pair.target.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        reader.crop(context_length)
        return seconds

    for reader in (target, draft):
        one(reader, 1, False)  # first calls pay for set-up
    verify, step = [], []
    for _ in range(repeats):
        verify.append([one(target, k + 1, False) for k in range(max_candidates + 1)])
        step.append([one(draft, 1, True) for _ in range(3)])
    low, median, high = np.percentile(np.array(verify), [25, 50, 75], axis=0)
    draft_quartiles = np.percentile(np.array(step), [25, 50, 75])
    return {
        "draft_time": float(draft_quartiles[1]),
        "verify_time": median.tolist(),
        "draft_time_quartiles": [float(draft_quartiles[0]), float(draft_quartiles[2])],
        "verify_time_quartiles": [low.tolist(), high.tolist()],
        "unit": "second",
        "context_length": context_length,
        "repeats": repeats,
        **machine(),
    }
