"""Record a pair over prompts: a coupled trace on disk.

Prompts are taken a block at a time, a shard each; within a block they are sorted by length, so that batches carry
little padding, and written in the order given. Every draw is addressed by its request (`realmodels.streams`), so
neither batch size nor shard size changes what is drawn. Shards are written as they are done and the manifest last. A
recording that is killed leaves no trace; the same call goes on where it was (`realmodels.journal`). Blocks may be
spread over processes: parts that are merged, or Dask workers (`realmodels.cluster`).
"""

import hashlib
import json
import math
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from mdp.trace import FEATURES, Trace
from realmodels.coupled import Columns, Contents, record_batch
from realmodels.journal import Journal, check_folder, merge
from realmodels.pair import ModelPair
from realmodels.progress import Progress
from realmodels.sampling import Sampling
from realmodels.streams import request_ids
from realmodels.timing import measure_times

__all__ = [
    "Block", "Plan", "Settings", "check_folder", "measure_times", "merge", "record", "record_part", "run",
]  # fmt: skip

_CLAMPING = "candidates of a round are clamped to the positions left before max_new_tokens, minus one"
TARGET_SIDE = ("token_accept_prob", "step_accept_prob", "target_top_ids", "target_top_logprobs")
"""What only the target knows of a rollout."""
CONTEXT_QUANTILES = (0.1, 0.5, 0.9)
"""Of the context lengths that were met: where times are measured."""


class Settings(TypedDict, total=False):
    """What is recorded and how: sizes and contents of `Plan.make` and the fields of `Sampling`; defaults are there."""

    max_candidates: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    batch_size: int
    shard_size: int
    store_top: int
    store_tokens: bool
    store_hidden: bool
    score_rollouts: bool


def record(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    out: str | Path,
    *,
    timing_repeats: int = 5,
    progress: bool | Callable[[int], Any] | None = None,
    about_prompts: dict[str, Any] | None = None,
    **settings: Unpack[Settings],
) -> Trace:
    """Write the coupled trace of `pair` over `prompts` into the folder `out` and return it as read back.

    Args:
        prompts: token ids, one list a request (`realmodels.pair.load_prompts`).
        out: made if need be; what a killed recording of the same settings left in it is gone on with.
        timing_repeats: rounds of time measurement; 0 leaves the times out of the manifest.
        progress: a callable is told after each batch how many requests it held; True shows a bar; None shows one
            if stderr is a terminal.
        about_prompts: as of `Plan.make`, whose other settings are sizes and contents.
        settings: these, and the sampling as of `realmodels.sampling.Sampling`.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """
    trace = record_part(
        pair, prompts, out, (1, 1), timing_repeats=timing_repeats, progress=progress, about_prompts=about_prompts,
        **settings,
    )  # fmt: skip
    assert trace is not None
    return trace


def record_part(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    out: str | Path,
    part: tuple[int, int],
    *,
    timing_repeats: int = 5,
    progress: bool | Callable[[int], Any] | None = None,
    about_prompts: dict[str, Any] | None = None,
    **settings: Unpack[Settings],
) -> Trace | None:
    """Record every n-th block, from the i-th on, of `part` (i, n); returns the trace if that completes it.

    Parts may share the folder, or have one each, to be joined by `merge`; the trace is the same. The rest is as of
    `record`.
    """
    plan = Plan.make(Header.of(pair), prompts, about_prompts=about_prompts, **settings)
    pair.check_prompts(prompts, plan.sampling)
    pair.check_hidden(plan.contents.hidden)

    def results(blocks: Iterable[Block], bar: Progress) -> Iterator[tuple[int, Trace, dict[str, Any]]]:
        for block in blocks:
            yield block.index, *block.record(pair, bar)

    def times(lengths: Sequence[int]) -> dict[str, Any]:
        return measure_times(pair, plan.sampling.max_candidates, lengths, timing_repeats, context=prompts[0])

    return run(plan, Path(out), part, results, times, timing_repeats, progress)


@dataclass(frozen=True)
class Header:
    """What a manifest says of a pair."""

    models: dict[str, Any]
    dtype: str
    vocab_size: int
    end_token_ids: list[int]
    draft_is_target_time: bool

    @classmethod
    def of(cls, pair: ModelPair) -> "Header":
        return cls(pair.provenance, pair.dtype, pair.vocab_size, list(pair.end_token_ids), pair.draft_is_target_time)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is recorded."""

    header: Header
    prompts: Sequence[Sequence[int]]
    ids: list[str]
    sampling: Sampling
    contents: Contents
    batch_size: int
    shard_size: int
    about_prompts: dict[str, Any] | None = None

    @classmethod
    def make(
        cls,
        header: Header,
        prompts: Sequence[Sequence[int]],
        *,
        batch_size: int = 16,
        shard_size: int = 64,
        store_top: int = 64,
        store_tokens: bool = True,
        store_hidden: bool = False,
        score_rollouts: bool = True,
        about_prompts: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> "Plan":
        """A plan from settings.

        Args:
            batch_size: requests side by side; memory for keys and values grows with it.
            shard_size: requests a block, the unit that is resumed and spread over processes.
            store_top: how many of each law's most probable tokens are kept; 0 for none.
            store_tokens: False leaves out everything that tells the text: tokens, top tokens, hidden states.
            store_hidden: keep the draft's last hidden state behind each law, on the path and along rollouts, for heads.
            score_rollouts: False leaves out the target's view of rollouts, and its work on them: policies that need
                it past a rejection are refused.
            about_prompts: kept in the manifest as `prompts`: source and template (`realmodels.prompts.about_prompts`).
            sampling: as of `realmodels.sampling.Sampling`.

        Raises:
            ValueError: one line that names the argument, its value and what is allowed.
        """
        _check_sizes(batch_size=batch_size, shard_size=shard_size, store_top=store_top)
        contents = Contents(
            store_tokens, store_top if store_tokens else 0, store_hidden and store_tokens, score_rollouts
        )
        return cls(
            header, prompts, request_ids(prompts), Sampling(**sampling), contents, batch_size, shard_size, about_prompts
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The plan in JSON, the prompts by their hash: most of the manifest."""
        sampling = self.sampling
        text = json.dumps([list(map(int, prompt)) for prompt in self.prompts])
        return {
            "max_candidates": sampling.max_candidates,
            "max_new_tokens": sampling.max_new_tokens,
            "sampling": asdict(sampling),
            **asdict(self.header),
            "seed": sampling.seed,
            **({"prompts": self.about_prompts} if self.about_prompts else {}),
            "prompts_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "clamping": _CLAMPING,
            "replayable": True,
            "rollouts_scored": self.contents.rollout_scores,
            "contents": asdict(self.contents),
            "batch_size": self.batch_size,
            "shard_size": self.shard_size,
            "request_ids": self.ids,
        }

    @staticmethod
    def check_part(part: tuple[int, int], num_prompts: int, shard_size: int) -> None:
        """Refuse a part that holds no block."""
        (index, count), blocks = part, -(-num_prompts // shard_size)
        if not 1 <= index <= count:
            raise ValueError(f"shard must be i/n with 1 <= i <= n, got {index}/{count}")
        if index > blocks:
            raise ValueError(f"shard {index}/{count}: there are {blocks} blocks of {shard_size} requests in all")

    def block(self, index: int, requests: Iterable[int]) -> "Block":
        chosen = list(requests)
        return Block(
            index, [self.prompts[r] for r in chosen], [self.ids[r] for r in chosen], self.sampling, self.contents,
            self.batch_size, self.header.end_token_ids,
        )  # fmt: skip


@dataclass(frozen=True)
class Block:
    """The requests of one shard: all that a process needs to record them."""

    index: int
    prompts: Sequence[Sequence[int]]
    ids: list[str]
    sampling: Sampling
    contents: Contents
    batch_size: int
    end_token_ids: list[int]

    def record(self, pair: ModelPair, progress: Progress) -> tuple[Trace, dict[str, Any]]:
        """The block's trace, and what it took: tokens and seconds of each kind of work, memory, versions."""
        start, seconds = perf_counter(), {}
        done: dict[int, tuple[Columns, Columns]] = {}
        by_length = sorted(range(len(self.prompts)), key=lambda r: len(self.prompts[r]))
        # Batches of nearly equal size: a small last one would cost almost as much as a full one.
        for part in np.array_split(by_length, math.ceil(len(by_length) / self.batch_size)):
            batch = part.tolist()
            records = record_batch(
                pair, [self.prompts[r] for r in batch], [self.ids[r] for r in batch], self.sampling, self.contents,
                seconds, progress.within(len(batch)),
            )  # fmt: skip
            done |= zip(batch, records, strict=True)
            progress.done(len(batch))
        manifest = {"max_candidates": self.sampling.max_candidates, "request_ids": self.ids}
        trace = _assemble([done[r] for r in sorted(done)], self, manifest)
        steps = 0 if trace.rollout_drafts_end is None else len(trace.rollout_drafts_end)
        tokens = {
            "prompt": sum(map(len, self.prompts)),
            "target_path": trace.num_positions,
            "draft_path": trace.num_positions,
            "rollout": steps,
            "rollout_score": steps if self.contents.rollout_scores else 0,
        }
        return trace, {
            "seconds": seconds,
            "tokens": tokens,
            "total": perf_counter() - start,
            "peak_memory": _peak_memory(),
            "versions": _versions(),
            "machine": platform.node(),
        }


def run(
    plan: Plan,
    out: Path,
    part: tuple[int, int],
    results: Callable[..., Iterable[tuple[int, Trace, dict[str, Any]]]],
    times: Callable[[Sequence[int]], dict[str, Any]],
    timing_repeats: int,
    progress: bool | Callable[[int], Any] | None,
) -> Trace | None:
    """Record the part's blocks that are missing, measure times, and finish if all blocks are there.

    Args:
        results: yields (index, trace, what it took) of blocks, given those that are missing and a `Progress`.
        times: measures times at some context lengths; not called if `timing_repeats` is 0.
    """
    _check_sizes(timing_repeats=timing_repeats)
    plan.check_part(part, len(plan.prompts), plan.shard_size)
    journal = Journal(out, plan.settings, part).open()
    if not journal.finished:
        missing = [index for index in journal.mine if journal.check(index) is None]
        blocks = [plan.block(index, journal.requests(index)) for index in missing]
        total = sum(len(journal.requests(index)) for index in journal.mine)
        with Progress(progress, total, total - sum(len(block.ids) for block in blocks)) as bar:
            for index, trace, took in results(blocks, bar):
                journal.write(index, trace, took)
        if timing_repeats and journal.times() is None:
            measured = times(_contexts(plan, journal))
            journal.write_times({**measured, "draft_is_target_time": plan.header.draft_is_target_time})
    return journal.finish()


def _contexts(plan: Plan, journal: Journal) -> list[int]:
    """Quantiles of the context lengths met in this part: prompt and path before each position."""
    met = [
        len(plan.prompts[r]) + np.arange(length)
        for index in journal.mine
        for r, length in zip(journal.requests(index), (journal.entry(index) or {})["path_lengths"], strict=True)
    ]
    return [int(length) for length in np.quantile(np.concatenate(met), CONTEXT_QUANTILES)]


def _assemble(records: list[tuple[Columns, Columns]], block: Block, manifest: dict[str, Any]) -> Trace:
    """One trace of the requests in order."""
    paths, steps = [path for path, _ in records], [step for _, step in records]
    offsets = np.cumsum([0] + [len(path["accepted"]) for path in paths])
    per_position = [
        np.bincount(step["position"], minlength=len(path["accepted"])) if step else np.zeros(len(path["accepted"]))
        for path, step in records
    ]
    filled = [step for step in steps if step]
    optional = ("token", "draft_token", "hidden", "draft_top_ids", "draft_top_logprobs", "target_top_ids",
                "target_top_logprobs")  # fmt: skip

    def path(key: str) -> np.ndarray:
        return np.concatenate([columns[key] for columns in paths])

    def rollout(key: str) -> np.ndarray:
        # With no failed position at all, an empty column like the path's.
        return np.concatenate([columns[key] for columns in filled]) if filled else path(key)[:0]

    def scored(key: str) -> bool:
        return block.contents.rollout_scores or key not in TARGET_SIDE

    present = [key for key in optional if key in paths[0]]
    return Trace(
        offsets=offsets.astype(np.int64),
        limit=np.full(len(records), block.sampling.max_new_tokens, np.int64),
        ends=np.array([_ended(columns, block.end_token_ids) for columns in paths]),
        accepted=path("accepted"),
        drafts_end=path("drafts_end"),
        features={key: path(key) for key in FEATURES},
        rollout_offsets=np.cumsum(np.concatenate([[0], *per_position])).astype(np.int64),
        rollout_drafts_end=rollout("drafts_end"),
        rollout_features={key: rollout(key) for key in FEATURES if scored(key)},
        optional={key: path(key) for key in present}
        | {f"rollout_{key}": rollout(key) for key in present if key != "token" and scored(key)},
        manifest=manifest,
    )


def _ended(path: Columns, end_token_ids: list[int]) -> bool:
    return int(path["path_token"][-1]) in end_token_ids


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        low = 0 if name in ("store_top", "timing_repeats") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def _peak_memory() -> dict[str, int]:
    """Most bytes this process has held so far, and on GPUs."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    return peak


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("specstop", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
