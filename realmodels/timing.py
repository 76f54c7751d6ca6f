"""Measured times of a pair on this machine: one draft step, and V(k), a target pass over k candidates.

V(k) reads k + 1 new tokens on a context of a given length and warps their laws; a draft step reads one token, warps
and draws. Both grow with the context, so they are measured at several lengths; the middle one gives the times that
replay uses unless told otherwise. Sizes and contexts are measured in turn, round after round, so that a slow spell of
the machine touches all of them. What is kept are raw medians and quartiles; no curve is fitted and dips stay (the
theory allows them).
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
    pair: ModelPair,
    max_candidates: int,
    context_length: int | Sequence[int],
    repeats: int = 5,
    context: Sequence[int] = (),
) -> dict[str, Any]:
    """Median seconds `draft_time` and `verify_time` [V(0)..V(K)], with their quartiles, at each context length.

    Those of the middle context stand for the pair; `by_context` lists all of them, shortest first.

    Args:
        context: tokens to fill the context with, repeated as needed; token 0 if empty.
    """
    given = [context_length] if isinstance(context_length, int) else context_length
    lengths = sorted({max(1, int(length)) for length in given})
    clocks = [_Clock(pair, max_candidates, length, context) for length in lengths]
    verify, step = [], []
    for _ in range(repeats):
        for clock in clocks:
            verify.append([clock.read(clock.target, k + 1) for k in range(max_candidates + 1)])
            step.append([clock.read(clock.draft, 1, draws=True) for _ in range(3)])
    by_context = [
        {"context_length": length, **_quartiles(verify[i :: len(clocks)], step[i :: len(clocks)])}
        for i, length in enumerate(lengths)
    ]
    return {
        **by_context[(len(by_context) - 1) // 2],
        "unit": "second",
        "repeats": repeats,
        **machine(),
        "by_context": by_context,
    }


def _quartiles(verify: list[list[float]], step: list[list[float]]) -> dict[str, Any]:
    low, median, high = np.percentile(np.array(verify), [25, 50, 75], axis=0)
    draft = np.percentile(np.array(step), [25, 50, 75]).tolist()
    return {
        "draft_time": draft[1],
        "verify_time": median.tolist(),
        "draft_time_quartiles": [draft[0], draft[2]],
        "verify_time_quartiles": [low.tolist(), high.tolist()],
    }


class _Clock:
    """Both models behind a context, which every reading finds as it was."""

    def __init__(self, pair: ModelPair, max_candidates: int, length: int, context: Sequence[int]):
        self.sampling, self.length = Sampling(max_candidates=max_candidates), length
        tokens = torch.tensor(list(context) or [0])
        self.filler = tokens.repeat(-(-(length + max_candidates + 1) // len(tokens)))[None]
        self.uniform = torch.full((1,), 0.5, dtype=torch.float64)
        self.target, self.draft = (pair.reader(role, 1) for role in ("target", "draft"))
        for reader in (self.target, self.draft):
            reader.read(self.filler[:, :length], torch.arange(length)[None], keep=1)
            self.read(reader, 1)  # first calls pay for set-up

    def read(self, reader: Reader, count: int, draws: bool = False) -> float:
        """Seconds to read so many tokens and to have their laws, and one drawn token, on the CPU."""
        span = torch.arange(self.length, self.length + count)
        start = time.perf_counter()
        law = self.sampling.law(reader.read(self.filler[:, span], span[None]))
        last = law.select((slice(None), -1))
        if draws:
            draw(last, self.uniform.to(last.probs.device)).cpu()
        last.probs.cpu()  # waits for a GPU
        seconds = time.perf_counter() - start
        reader.crop(self.length)
        return seconds
