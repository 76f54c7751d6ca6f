r"""The coupled trace of a draft/target pair: everything any stopping rule can meet, recorded once.

For each request the target's own continuation $x_1..x_n$ is recorded. At position $j$, with $q, p$ the draft's and
target's next-token laws after $x_{<j}$ (both warped alike), the draft's token $y_j$ is drawn from the maximal
coupling given $x_j$: $y_j = x_j$ with probability $\min(1, q(x_j)/p(x_j))$, else $y_j \sim (q - p)^+$ normalised.
Then $y_j \sim q$, $y_j = x_j$ is exactly "accepted", and after a rejection $x_j$ is the correction. What the draft
would go on to draft after an unseen rejection depends on $j$ alone: the *divergent rollout*, recorded once per failed
position. So any rule is replayed exactly, with no model call (`simulate.replay`).

Layout. Positions of all requests are concatenated: request r owns positions `offsets[r]:offsets[r+1]`. Rollout steps
of all positions are concatenated too: position i owns steps `rollout_offsets[i]:rollout_offsets[i+1]`, none if
accepted. Per position and per step the same `FEATURES` are stored. A rollout holds
min(K - 1, limit - 2 - j) steps (j counted from 0 within the request), fewer only behind a drafted end-of-text.

*Imported* traces (`mdp.importers`) come from elsewhere: features may be missing, and acceptance may be known as two
counts a position in the place of rollouts. Of a round that starts there `tested` candidates are known, and `run_length`
of them are accepted before the first rejection; so the draft may depend on where its round began. A trace made of the
rounds of one policy knows no more than that policy drafted.

Rollouts may be *imputed* (`realmodels.impute`): a trace made from logits along the text has none of its own. Such a
trace says `imputed` in its manifest, and so do replays of it.

On disk a trace is a folder of safetensors shards and a `manifest.json` that is written last: a folder without it
is no trace. Reading checks sizes, ranges and hashes; a damaged shard is named.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["FEATURES", "SCHEMA_VERSION", "Trace", "atomic_write", "load", "save", "write_manifest", "write_shard"]

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_SHARD_BYTES = 64 * 2**30

FEATURES = {
    "token_accept_prob": (0.0, 1.0),
    "step_accept_prob": (0.0, 1.0),
    "draft_prob": (0.0, 1.0),
    "top_prob": (0.0, 1.0),
    "entropy": (0.0, np.inf),
}
"""Per drafted token: min(1, p/q); the overlap sum of min(p, q) before the draw; q of the drafted token; the greatest q;
the entropy of q in nats. The last three are taken from the draft's law at temperature 1 if decoding is greedy."""

_P_SIDE = ("token_accept_prob", "step_accept_prob")
_OPTIONAL = ("token", "draft_token", "head", "hidden", "draft_top_ids", "draft_top_logprobs", "target_top_ids",
             "target_top_logprobs", "run_length", "tested")  # fmt: skip
_ROLLOUT_OPTIONAL = ("draft_token", "head", "hidden", "draft_top_ids", "draft_top_logprobs", "target_top_ids",
                     "target_top_logprobs")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded pair; see the module docstring for the model and the layout.

    Attributes:
        offsets: [R + 1] first position of each request.
        limit: [R] most tokens the request may emit (its maximum length).
        accepted: [N] whether the drafted token at the position was accepted.
        drafts_end: [N] whether the drafted token is an end-of-text token, which forces the stop.
        ends: [R] whether the recorded path ends with an end-of-text token.
        features: each of `FEATURES`, [N].
        rollout_offsets: [N + 1] first rollout step of each position; None if none were recorded.
        rollout_drafts_end: [M]; rollout_features: each [M]; p-side ones absent if rollouts were not scored.
        optional: arrays that may be left out, such as `token` (privacy). `hidden` [N, width] is the draft's last
            hidden state, the one that its law at the position is made from; `rollout_hidden` [M, width] likewise.
            `head`, `rollout_head` are a head's predicted acceptance probability of the drafted token, nan where the
            state that tells it was not recorded.
        manifest: models, sampling parameters, seed, request ids, measured times, versions.
    """

    offsets: np.ndarray
    limit: np.ndarray
    ends: np.ndarray
    accepted: np.ndarray
    drafts_end: np.ndarray
    features: Mapping[str, np.ndarray]
    rollout_offsets: np.ndarray | None = None
    rollout_drafts_end: np.ndarray | None = None
    rollout_features: Mapping[str, np.ndarray] = field(default_factory=dict)
    optional: Mapping[str, np.ndarray] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_positions(self) -> int:
        return int(self.offsets[-1])

    @property
    def max_candidates(self) -> int:
        return int(self.manifest["max_candidates"])

    @property
    def rollouts(self) -> str:
        """Whether what was drafted past a rejection is `recorded`, `imputed`, or there is `none`."""
        if self.rollout_offsets is None:
            return "none"
        return "imputed" if self.manifest.get("imputed") else "recorded"

    @property
    def head_lag(self) -> int:
        """How many candidates late the scores in `head` become known, 0 or 1; see `realmodels.head`."""
        return int((self.manifest.get("head") or {}).get("lag", 0))

    @property
    def request_ids(self) -> list[str]:
        """One stable id per request, by which requests are split into halves."""
        return list(self.manifest["request_ids"])

    def validate(self, name: str = "trace") -> "Trace":
        """Return self if sizes, ranges and rollout lengths are those of the module docstring.

        Raises:
            ValueError: one line that names the field and the fault.
        """

        def need(ok: Any, what: str) -> None:
            if not ok:
                raise ValueError(f"{name}: {what}")

        def need_numbers(key: str, kinds: str) -> None:
            array = getattr(self, key)
            ok = isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in kinds
            need(ok, f"{key} must be a row of {'flags' if kinds == 'b' else 'whole numbers'}")

        manifest = self.manifest
        depth, ids = manifest.get("max_candidates"), manifest.get("request_ids")
        whole = isinstance(depth, int) and not isinstance(depth, bool) and 1 <= depth <= 1024
        need(whole, f"max_candidates must be in 1..1024, got {depth!r:.60}")
        measured = manifest.get("measured")
        need(measured is None or isinstance(measured, Mapping), f"measured must be an object, got {measured!r:.60}")
        head = manifest.get("head")
        known = head is None or (isinstance(head, Mapping) and head.get("lag", 0) in (0, 1))
        need(known, f"head must be an object with a lag of 0 or 1, got {head!r:.60}")
        for key in ("offsets", "limit"):
            need_numbers(key, "iu")
        for key in ("ends", "accepted", "drafts_end"):
            need_numbers(key, "b")
        offsets = self.offsets
        lengths = np.diff(offsets)
        need(len(offsets) > 1 and offsets[0] == 0 and (lengths >= 1).all(), "offsets must start at 0 and increase")
        total = self.num_positions
        need(
            isinstance(ids, list) and len(ids) == self.num_requests and all(isinstance(name, str) for name in ids),
            "request_ids must have one string a request",
        )
        for key, size in (("limit", self.num_requests), ("ends", self.num_requests), ("accepted", total)):
            need(len(getattr(self, key)) == size, f"{key} must have {size} entries")
        need(len(self.drafts_end) == total, f"drafts_end must have {total} entries")
        need((lengths <= self.limit).all(), "a path is longer than its limit")
        short = (lengths < self.limit) & ~self.ends
        need(not short.any(), "a path ends before its limit without an end-of-text token")
        kept_end, last = self.accepted & self.drafts_end, np.zeros(total, dtype=bool)
        last[offsets[1:] - 1] = self.ends
        need(not (kept_end & ~last).any(), "an accepted end-of-text token is not the end of its path")
        need(not (last & self.accepted & ~kept_end).any(), "a path's end was accepted but is not marked in drafts_end")
        _check_features(need, self.features, total, "", self.features if manifest.get("imported") else FEATURES)
        if "token_accept_prob" in self.features:
            certain = self.features["token_accept_prob"] <= 0
            need(not (self.accepted & certain).any(), "accepted where token_accept_prob is 0")
        for key, array in self.optional.items():
            if key.startswith("rollout_"):
                need(self.rollout_drafts_end is not None, f"{key} is there, but no rollouts")
            size = len(self.rollout_drafts_end) if key.startswith("rollout_") else total  # type: ignore[arg-type]
            need(array.ndim > 0 and len(array) == size, f"{key} must have {size} entries")
        runs, tested = (self.optional.get(key) for key in ("run_length", "tested"))
        need((runs is None) == (tested is None), "run_length and tested go together")
        if runs is not None and tested is not None:
            need(self.rollout_offsets is None, "run_length is there, and rollouts too")
            need(all(x.ndim == 1 and x.dtype.kind in "iu" for x in (runs, tested)), "run_length must be whole numbers")
            ok = (runs >= 0) & (runs <= tested) & (tested <= depth)
            need(ok.all(), "run_length must lie in 0..tested, and tested in 0..max_candidates")
            need((self.accepted == (runs > 0)).all(), "accepted is not what run_length says")
        if self.rollout_offsets is None:
            return self
        need_numbers("rollout_offsets", "iu")
        need_numbers("rollout_drafts_end", "b")
        need(len(self.rollout_offsets) == total + 1, f"rollout_offsets must have {total + 1} entries")
        steps = np.diff(self.rollout_offsets)
        need(
            self.rollout_offsets[0] == 0 and (steps >= 0).all(),
            "rollout_offsets must start at 0, not decrease",
        )
        count = int(self.rollout_offsets[-1])
        ended = self.rollout_drafts_end
        need(ended is not None and len(ended) == count, f"rollout_drafts_end must have {count} entries")
        scored = [key for key in FEATURES if key not in _P_SIDE or key in self.rollout_features]
        _check_features(need, self.rollout_features, count, "rollout_", scored)
        depth_in_request = np.arange(total) - np.repeat(offsets[:-1], lengths)
        full = np.clip(np.repeat(self.limit, lengths) - 2 - depth_in_request, 0, self.max_candidates - 1)
        full[self.accepted | self.drafts_end] = 0
        last = np.zeros(total, dtype=bool)
        last[steps > 0] = np.asarray(ended)[np.asarray(self.rollout_offsets)[1:][steps > 0] - 1]
        need(((steps == full) | (last & (steps <= full))).all(), "a rollout has the wrong number of steps")
        return self


def _check_features(need: Any, arrays: Mapping[str, np.ndarray], size: int, prefix: str, keys: Iterable[str]) -> None:
    for key in keys:
        need(key in arrays, f"{prefix}{key} is missing")
        array, (low, high) = arrays[key], FEATURES[key]
        need(array.shape == (size,), f"{prefix}{key} must have {size} entries")
        # float32 sums of probabilities may pass 1 by rounding
        ok = (array >= low - 1e-5) & (array <= high + 1e-5)
        need(ok.all(), f"{prefix}{key} must lie in [{low:g}, {high:g}]")


def _arrays(trace: Trace) -> dict[str, np.ndarray]:
    out = {"offsets": trace.offsets, "limit": trace.limit, "ends": trace.ends, "accepted": trace.accepted,
           "drafts_end": trace.drafts_end, **trace.features, **trace.optional}  # fmt: skip
    if trace.rollout_offsets is not None:
        out["rollout_offsets"] = trace.rollout_offsets
        out["rollout_drafts_end"] = np.asarray(trace.rollout_drafts_end)
        out.update({f"rollout_{key}": value for key, value in trace.rollout_features.items()})
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what a kill leaves is called `.NAME.` and eight hex digits."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:  # not tempfile: it would hide the file from everyone else
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_shard(trace: Trace, folder: str | Path, index: int) -> dict[str, Any]:
    """Write one shard atomically and return its manifest entry {file, sha256, num_requests, num_positions}."""
    from safetensors.numpy import save as to_bytes

    trace.validate(f"shard {index}")
    data = to_bytes(_arrays(trace))
    path = Path(folder) / f"shard-{index:05d}.safetensors"
    atomic_write(path, data)
    return {"file": path.name, "sha256": hashlib.sha256(data).hexdigest(), "num_requests": trace.num_requests,
            "num_positions": trace.num_positions}  # fmt: skip


def write_manifest(manifest: Mapping[str, Any], folder: str | Path) -> None:
    """Write `manifest.json` atomically, last: from here on the folder is a trace."""
    text = json.dumps({"schema_version": SCHEMA_VERSION, **manifest}, indent=1, allow_nan=False)
    atomic_write(Path(folder) / "manifest.json", text.encode())


def save(trace: Trace, folder: str | Path) -> None:
    """Write a whole trace as one shard and its manifest."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entry = write_shard(trace, folder, 0)
    write_manifest({**trace.manifest, "shards": [entry]}, folder)


def load(folder: str | Path) -> Trace:
    """Read a trace folder and check it.

    Raises:
        ValueError: if it is no trace, its schema is unknown or a shard is damaged; one line, naming the file.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a trace (no manifest.json)")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(path.read_text())
        version, entries = manifest["schema_version"], manifest["shards"]
        parts = [(str(entry["file"]), entry["sha256"]) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a trace manifest") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {version!r}")
    if not parts:
        raise ValueError(f"{path}: the trace has no shards")
    shards = [_read_shard(folder, name, digest) for name, digest in parts]
    try:
        trace = _concatenate(shards, manifest)
    except KeyError as error:
        raise ValueError(f"{folder}: the trace lacks {error.args[0]}") from error
    except (ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{folder}: the shards do not fit together ({error})") from error
    return trace.validate(str(folder))


def _read_shard(folder: Path, name: str, digest: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    path = folder / name
    if not re.fullmatch(r"[\w.-]{1,100}\.safetensors", name):
        raise ValueError(f"{folder}: a shard must be a .safetensors file in the trace's own folder, got {name!r:.200}")
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: shard is missing")
    if path.stat().st_size > MAX_SHARD_BYTES:
        raise ValueError(f"{path}: larger than {MAX_SHARD_BYTES} bytes")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{path}: shard is damaged (its hash is not the manifest's)")
    try:
        return from_bytes(data)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: shard is damaged ({error})") from error


def _concatenate(shards: list[dict[str, np.ndarray]], manifest: Mapping[str, Any]) -> Trace:
    """Join shards; `offsets`-like arrays are shifted, all others follow one another."""

    def join(key: str) -> np.ndarray:
        if not key.endswith("offsets"):
            return np.concatenate([shard[key] for shard in shards])
        sizes = np.cumsum([0] + [int(shard[key][-1]) for shard in shards])
        parts = [shard[key][:-1] + base for shard, base in zip(shards, sizes[:-1], strict=True)]
        return np.concatenate([*parts, sizes[-1:]]).astype(np.int64)

    keys = set(shards[0])
    if any(set(shard) != keys for shard in shards):
        raise ValueError("the trace's shards hold different fields")
    optional = [*_OPTIONAL, *(f"rollout_{key}" for key in _ROLLOUT_OPTIONAL)]
    has_rollouts = "rollout_offsets" in keys
    return Trace(
        offsets=join("offsets"),
        limit=join("limit"),
        ends=join("ends"),
        accepted=join("accepted"),
        drafts_end=join("drafts_end"),
        features={key: join(key) for key in FEATURES if key in keys},
        rollout_offsets=join("rollout_offsets") if has_rollouts else None,
        rollout_drafts_end=join("rollout_drafts_end") if has_rollouts else None,
        rollout_features={key: join(f"rollout_{key}") for key in FEATURES if f"rollout_{key}" in keys},
        optional={key: join(key) for key in optional if key in keys},
        manifest=manifest,
    )
