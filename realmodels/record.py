"""Record a pair over prompts: a coupled trace on disk.

Prompts are taken a shard at a time; within a shard they are sorted by length, so that batches carry little padding,
and written in the order given. Every draw is addressed by its request (`realmodels.streams`), so neither batch size
nor shard size changes what is recorded. Shards are written as they are done and the manifest last: a recording that
is killed leaves no trace, and the next one into the same folder clears what it left.
"""

import hashlib
import json
import math
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mdp.trace import FEATURES, Trace, load, write_manifest, write_shard
from realmodels.coupled import Columns, Contents, record_batch
from realmodels.pair import ModelPair
from realmodels.sampling import Sampling
from realmodels.streams import request_ids
from realmodels.timing import measure_times

__all__ = ["check_folder", "measure_times", "record"]

# What a recording that was killed may leave: shards, and the temporary files of `mdp.trace`'s atomic writes.
_SCRAP = re.compile(r"shard-[0-9]{5,}\.safetensors|\.(shard-[0-9]{5,}\.safetensors|manifest\.json)\.[0-9a-f]{8}")
_CLAMPING = "candidates of a round are clamped to the positions left before max_new_tokens, minus one"


def record(
    pair: ModelPair,
    prompts: Sequence[Sequence[int]],
    out: str | Path,
    *,
    max_candidates: int = 12,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = 64,
    store_top: int = 64,
    store_tokens: bool = True,
    store_hidden: bool = False,
    timing_repeats: int = 5,
    progress: bool | Callable[[int], Any] | None = None,
) -> Trace:
    """Write the coupled trace of `pair` over `prompts` into the folder `out` and return it as read back.

    Args:
        prompts: token ids, one list a request (`realmodels.pair.load_prompts`).
        store_top: how many of each law's most probable tokens are kept; 0 for none.
        store_tokens: False leaves out everything that tells the text: tokens, top tokens, hidden states.
        store_hidden: keep the draft's last hidden state behind each law, on the path and along rollouts, for heads.
        timing_repeats: rounds of time measurement; 0 leaves the times out of the manifest.
        progress: a callable is told after each batch how many requests it held; True shows a bar; None shows one
            if stderr is a terminal.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """
    sampling = Sampling(max_candidates, max_new_tokens, temperature, top_k, seed)
    contents = Contents(store_tokens, store_top if store_tokens else 0, store_hidden and store_tokens)
    _check_sizes(batch_size=batch_size, shard_size=shard_size, store_top=store_top, timing_repeats=timing_repeats)
    pair.check_prompts(prompts, sampling)
    out = _empty_folder(Path(out))
    ids = request_ids(prompts)
    base = {
        "max_candidates": max_candidates,
        "max_new_tokens": max_new_tokens,
        "sampling": asdict(sampling),
        "models": pair.provenance,
        "dtype": pair.dtype,
        "vocab_size": pair.vocab_size,
        "end_token_ids": list(pair.end_token_ids),
        "draft_is_target_time": pair.draft_is_target_time,
        "seed": seed,
        "prompts_sha256": hashlib.sha256(json.dumps([list(map(int, p)) for p in prompts]).encode()).hexdigest(),
        "clamping": _CLAMPING,
        "replayable": True,
        "versions": _versions(),
    }
    middle = int(np.mean([len(prompt) for prompt in prompts])) + max_new_tokens // 2
    shards, totals = [], np.zeros(2)
    with _Progress(progress, len(prompts)) as advance:
        for start in range(0, len(prompts), shard_size):
            chosen = range(start, min(start + shard_size, len(prompts)))
            done: dict[int, tuple[Columns, Columns]] = {}
            by_length = sorted(chosen, key=lambda r: len(prompts[r]))
            # Batches of nearly equal size: a small last one would cost almost as much as a full one.
            for part in np.array_split(by_length, math.ceil(len(by_length) / batch_size)):
                batch = part.tolist()
                records = record_batch(pair, [prompts[r] for r in batch], [ids[r] for r in batch], sampling, contents)
                done |= zip(batch, records, strict=True)
                advance(len(batch))
            trace = _assemble([done[r] for r in chosen], sampling, {**base, "request_ids": [ids[r] for r in chosen]})
            shards.append(write_shard(trace, out, len(shards)))
            totals += trace.features["step_accept_prob"].sum(dtype=float), trace.num_positions
    manifest = {**base, "request_ids": ids, "mean_acceptance": totals[0] / totals[1], "shards": shards}
    if timing_repeats:
        measured = measure_times(pair, max_candidates, middle, timing_repeats, context=prompts[0])
        manifest["measured"] = {**measured, "draft_is_target_time": pair.draft_is_target_time}
    write_manifest(manifest, out)
    return load(out)


def _assemble(records: list[tuple[Columns, Columns]], sampling: Sampling, manifest: dict[str, Any]) -> Trace:
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

    present = [key for key in optional if key in paths[0]]
    return Trace(
        offsets=offsets.astype(np.int64),
        limit=np.full(len(records), sampling.max_new_tokens, np.int64),
        ends=np.array([_ended(columns, manifest["end_token_ids"]) for columns in paths]),
        accepted=path("accepted"),
        drafts_end=path("drafts_end"),
        features={key: path(key) for key in FEATURES},
        rollout_offsets=np.cumsum(np.concatenate([[0], *per_position])).astype(np.int64),
        rollout_drafts_end=rollout("drafts_end"),
        rollout_features={key: rollout(key) for key in FEATURES},
        optional={key: path(key) for key in present}
        | {f"rollout_{key}": rollout(key) for key in present if key != "token"},
        manifest=manifest,
    )


def _ended(path: Columns, end_token_ids: list[int]) -> bool:
    return int(path["path_token"][-1]) in end_token_ids


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        low = 0 if name in ("store_top", "timing_repeats") else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def check_folder(out: Path) -> list[Path]:
    """What an unfinished recording left in the folder, if it is there at all; anything else in it is refused.

    Raises:
        ValueError: one line that names the folder and what it holds.
    """
    if (out / "manifest.json").exists():
        raise ValueError(f"out: {out} already holds a trace")
    if not out.exists():
        return []
    if not out.is_dir():
        raise ValueError(f"out: {out} is not a folder")
    left = sorted(out.iterdir())
    for path in left:
        if not _SCRAP.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            raise ValueError(f"out: {out} is not empty (holds {path.name})")
    return left


def _empty_folder(out: Path) -> Path:
    """The output folder, made if need be and cleared of what an unfinished recording left."""
    left = check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: cannot make {out} ({error.strerror})") from error
    for path in left:
        path.unlink()
    return out


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("specstop", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


class _Progress:
    """A bar over requests on stderr, a caller's own callable, or nothing."""

    def __init__(self, wanted: bool | Callable[[int], Any] | None, total: int):
        self.call = wanted if callable(wanted) else None
        self.shown = self.call is None and (sys.stderr.isatty() if wanted is None else bool(wanted))
        self.total, self.bar = total, None

    def __enter__(self) -> Callable[[int], Any]:
        if self.call is not None:
            return self.call
        if not self.shown:
            return lambda count: None
        from tqdm.auto import tqdm

        self.bar = tqdm(total=self.total, desc="recording", unit="request", file=sys.stderr)
        return self.bar.update

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
