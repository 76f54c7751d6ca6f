"""Problems of one shape side by side: stacked, split into calls of one size, spread over the cores."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mdp.problem import FiniteProblem, StoppingProblem

__all__ = ["in_calls", "member", "round_times", "stack", "take"]


def stack(problems: Sequence[StoppingProblem | FiniteProblem] | FiniteProblem) -> Any:
    """One `FiniteProblem` whose every field has a leading batch axis; one that has it already is returned as it is.

    Raises:
        ValueError: if there are none, or the shapes differ.
    """
    if isinstance(problems, FiniteProblem):
        return problems
    members = [problem.lower() if isinstance(problem, StoppingProblem) else problem for problem in problems]
    if not members:
        raise ValueError("problems: there are none")
    shapes = {(member.accept_prob.shape, member.persistent) for member in members}
    if len(shapes) > 1:
        listed = ", ".join(f"K {k} Z {z} {'persistent' if joined else 'renewal'}" for (k, z), joined in sorted(shapes))
        raise ValueError(f"problems: must be of one shape, got {listed}")
    parts = zip(*members, strict=True)
    fields: Any = (None if part[0] is None else np.stack(part).astype(np.float64) for part in parts)
    return FiniteProblem(*fields)


def take(tree: Any, index: Any) -> Any:
    """Some members of a batch, or a slice of it."""
    return type(tree)(*(None if part is None else part[index] for part in tree))


def member(batch: Any, index: int) -> FiniteProblem:
    """One problem of a batch."""
    fields: Any = (None if part is None else part[index] for part in batch)
    return FiniteProblem(*fields)


def round_times(batch: Any) -> np.ndarray:
    """$T(k) = k t_d + V(k)$ of each [B, K + 1]."""
    return np.arange(batch.verify_time.shape[1]) * batch.draft_time[:, None] + batch.verify_time


def in_calls(work: Callable, count: int, size: int) -> tuple[np.ndarray, ...]:
    """`work(index)` on `size` members at a time, the last call filled up with copies; what it returns, joined.

    XLA runs a loop over problems on one core; calls on threads use them all.
    """
    calls: list[Any] = [slice(first, first + size) for first in range(0, count - size + 1, size)]
    if count % size:
        calls.append(np.minimum(np.arange(count - count % size, count - count % size + size), count - 1))
    with ThreadPoolExecutor(min(len(calls), os.cpu_count() or 1)) as pool:
        parts = list(pool.map(work, calls))
    return tuple(np.concatenate(part)[:count].copy() for part in zip(*parts, strict=True))
