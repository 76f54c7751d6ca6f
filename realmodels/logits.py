r"""A trace from logits that somebody already has: no model is loaded.

A safetensors file holds, for N target tokens of R requests laid end to end,

* `tokens` [N] whole numbers, the target's own text; request r is `tokens[offsets[r]:offsets[r+1]]`,
* `offsets` [R + 1] whole numbers, from 0 to N,
* `draft_logits`, `target_logits` [N, V] floats: row i is what each model says of token i, before it is read;

or, in the place of the last two, each model's k most probable tokens:

* `draft_top_ids`, `target_top_ids` [N, k] whole numbers, `draft_top_logits`, `target_top_logits` [N, k] floats,
* if wanted `draft_logsumexp`, `target_logsumexp` [N]: of all raw logits. They tell how much mass was left out.

More arrays may stand beside them: `end_token_ids` [e]; `limit` [R], the most tokens each request could have had (by
default a text that ends is as long as the longest, any other as long as it is); `prompts` [P] with `prompt_offsets`
[R + 1], which name the requests as `realmodels.record` would, so that its draws are met. The file's metadata may name
`target` and `draft`.

The laws are warped alike and coupled as in `realmodels.coupled`; temperature and top-k must be those that the text was
sampled with, or its tokens may have probability 0, which is refused. With k tokens a law under top-k of at most k is
exact and anything else is refused. What a draft would draft after a rejection cannot be known, so there are no
rollouts: `fixed` and `oracle` replay exactly, rules that look at features do not replay unless `impute`
(`realmodels.impute`).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mdp.trace import FEATURES, Trace, save
from realmodels.gguf_file import file_digest
from realmodels.impute import impute_rollouts
from realmodels.sampling import Sampling
from realmodels.streams import request_ids, uniforms
from realmodels.verify import Law, acceptance, couple, draft_features, top_tokens

__all__ = ["MAX_TOKENS", "record_logits"]

MAX_TOKENS, MAX_VOCABULARY = 2**27, 2**21
_CHUNK = 2**22  # logits of one model in memory at a time
_FLOATS, _WHOLE = ("F16", "BF16", "F32", "F64"), ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def record_logits(
    file: str | Path,
    out: str | Path,
    *,
    impute: bool = False,
    max_requests: int | None = None,
    store_top: int = 64,
    store_tokens: bool = True,
    progress: Callable[[int], Any] | None = None,
    **sampling: Any,
) -> Trace:
    """Write the trace of a file of logits (see the module docstring) into the folder `out` and return it.

    Args:
        impute: fill in features past a rejection; the trace is labelled.
        max_requests: take the first so many.
        store_top, store_tokens: as in `realmodels.record.record`.
        progress: told after each part how many tokens it held.
        sampling: `max_candidates`, `temperature`, `top_k`, ... of `Sampling`; its maximum length is the file's.

    Raises:
        ValueError: one line that names the file, the array and the fault.
    """
    file, out = Path(file), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} is not an empty folder")
    if max_requests is not None and max_requests < 1:
        raise ValueError(f"max_requests must be a whole number of at least 1, got {max_requests!r}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            source = _Source.of(opened, str(file), max_requests)
            settings = Sampling(**{**sampling, "max_new_tokens": int(source.limit.max())})
            columns = _columns(source, settings, store_top if store_tokens else 0, progress)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or damaged ({error})") from error
    tail = {role: float(np.mean(columns.pop(f"{role}_tail"))) for role in source.roles if f"{role}_tail" in columns}
    optional = ("token", "draft_token", "draft_top_ids", "draft_top_logprobs", "target_top_ids", "target_top_logprobs")
    names = source.metadata
    trace = Trace(
        offsets=source.offsets,
        limit=source.limit,
        ends=source.ends,
        accepted=columns["accepted"],
        drafts_end=columns["drafts_end"],
        features={key: columns[key] for key in FEATURES},
        optional={key: columns[key] for key in optional if store_tokens and key in columns},
        manifest={
            "max_candidates": settings.max_candidates,
            "max_new_tokens": settings.max_new_tokens,
            "sampling": asdict(settings),
            "models": {
                role: {"spec": "logits", "name": names.get(role, f"{role} of {file.name}")[:200], "revision": None}
                for role in source.roles
            },
            "logits": {
                "file": file.name, "sha256": file_digest(file), "kept": source.kept, "mass_left_out": tail or None,
            },
            "vocab_size": source.vocab_size if source.kept is None else None,
            "end_token_ids": source.end_token_ids.tolist(),
            "draft_is_target_time": False,
            "seed": settings.seed,
            "request_ids": source.request_ids,
            "mean_acceptance": float(columns["step_accept_prob"].mean(dtype=float)),
            "replayable": True,
        },
    )  # fmt: skip
    trace = impute_rollouts(trace, settings.seed) if impute else trace
    save(trace.validate(str(file)), out)
    return trace


@dataclass
class _Source:
    """The opened file, its small arrays read and everything checked that needs no logits."""

    opened: Any
    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    limit: np.ndarray
    ends: np.ndarray
    end_token_ids: np.ndarray
    request_ids: list[str]
    kept: int | None
    vocab_size: int
    metadata: dict[str, str]
    roles = ("target", "draft")

    @classmethod
    def of(cls, opened: Any, name: str, max_requests: int | None) -> "_Source":
        keys = set(opened.keys())

        def refuse(what: str) -> NoReturn:
            raise ValueError(f"{name}: {what}")

        def shape(key: str, kinds: tuple[str, ...], wanted: tuple[int | None, ...]) -> tuple[int, ...]:
            """The shape of an array that must be there, of the right kind and size (None: any)."""
            if key not in keys:
                refuse(f"lacks {key}")
            view = opened.get_slice(key)
            found = tuple(view.get_shape())
            if view.get_dtype() not in kinds:
                refuse(f"{key} must hold {'whole numbers' if kinds is _WHOLE else 'floats'}, not {view.get_dtype()}")
            if len(found) != len(wanted) or any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
                sizes = " x ".join("any" if w is None else str(w) for w in wanted)
                refuse(f"{key} must be {sizes}, got {' x '.join(map(str, found)) or 'a number'}")
            return found

        def whole(key: str, size: int | None = None) -> np.ndarray:
            (count,) = shape(key, _WHOLE, (size,))
            if count > MAX_TOKENS:
                refuse(f"{key} holds {count} entries, more than {MAX_TOKENS}")
            return opened.get_tensor(key).to(torch.int64).numpy()

        def cuts(key: str, total: int, requests: int | None = None) -> np.ndarray:
            found = whole(key, requests)
            if len(found) < 2 or found[0] != 0 or found[-1] != total or (np.diff(found) < 1).any():
                refuse(f"{key} must increase from 0 to {total}")
            return found

        tokens = whole("tokens")
        count = len(tokens)
        offsets = cuts("offsets", count)
        top = "target_top_ids" in keys
        if top:
            _, kept = shape("target_top_ids", _WHOLE, (count, None))
            for role in cls.roles:
                shape(f"{role}_top_ids", _WHOLE, (count, kept))
                shape(f"{role}_top_logits", _FLOATS, (count, kept))
                if f"{role}_logsumexp" in keys:
                    shape(f"{role}_logsumexp", _FLOATS, (count,))
            size = MAX_VOCABULARY
        else:
            _, size = shape("target_logits", _FLOATS, (count, None))
            shape("draft_logits", _FLOATS, (count, size))
            kept = None
        if not 1 <= size <= MAX_VOCABULARY or kept == 0:
            refuse(f"a vocabulary must have 1..{MAX_VOCABULARY} tokens, got {size if kept is None else kept}")
        if (tokens < 0).any() or (tokens >= size).any():
            refuse(f"tokens must be in 0..{size - 1}")
        requests = len(offsets) - 1
        stop = np.array([], np.int64) if "end_token_ids" not in keys else whole("end_token_ids")
        ends = np.isin(tokens[offsets[1:] - 1], stop)
        length = np.diff(offsets)
        if "limit" in keys:
            limit = whole("limit", requests)
            if (limit < length).any() or (limit >= 2**20).any():
                refuse(f"limit must be at least the text's length and less than {2**20}")
        else:
            limit = np.where(ends, length.max(), length)
        if "prompts" in keys:
            words = whole("prompts")
            at = cuts("prompt_offsets", len(words), requests + 1)
        else:
            words, at = tokens, offsets
        ids = request_ids([words[a:b].tolist() for a, b in pairwise(at)])
        few = slice(max_requests)
        used = offsets[: None if max_requests is None else max_requests + 1]
        return cls(opened, name, tokens[: used[-1]], used, limit[few], ends[few], stop, ids[few], kept, size,
                   dict(opened.metadata() or {}))  # fmt: skip

    def read(self, role: str, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Logits and, if only the top ones are kept, whose they are: ids ascend along each row."""
        key = f"{role}_logits" if self.kept is None else f"{role}_top_logits"
        logits = self.opened.get_slice(key)[rows]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        # The greatest of a row is nan if any is; -inf alone may stand for a token that cannot come.
        self.refuse_rows(~torch.isfinite(logits.amax(-1)), rows, f"{key} must be finite")
        if self.kept is None:
            return logits, None
        ids, order = self.opened.get_slice(f"{role}_top_ids")[rows].long().sort(-1)
        self.refuse_rows((ids < 0).any(-1) | (ids >= self.vocab_size).any(-1), rows, f"{role}_top_ids is out of range")
        self.refuse_rows((ids.diff(dim=-1) == 0).any(-1), rows, f"{role}_top_ids holds a token twice")
        return logits.gather(-1, order), ids

    def tail(self, role: str, rows: slice, logits: Tensor) -> np.ndarray | None:
        """The mass outside the top tokens, at temperature 1; None if the file does not tell."""
        key = f"{role}_logsumexp"
        if self.kept is None or key not in self.opened.keys():  # noqa: SIM118 - it is no mapping
            return None
        total = self.opened.get_slice(key)[rows].double()
        log_share = torch.logsumexp(logits, -1) - total
        # what half precision rounds off
        self.refuse_rows(~(log_share <= 0.05), rows, f"{key} is less than that of its own top logits")
        return -torch.expm1(log_share.clamp(max=0)).numpy()

    def refuse_rows(self, bad: Tensor, rows: slice, what: str) -> None:
        if bool(bad.any()):
            row = rows.start + int(bad.int().argmax())
            request = int(np.searchsorted(self.offsets, row, side="right")) - 1
            where = f"token {row - int(self.offsets[request])} of request {request}"
            raise ValueError(f"{self.name}: {what}, not so at {where}")


def _columns(
    source: _Source, sampling: Sampling, store_top: int, progress: Callable[[int], Any] | None
) -> dict[str, np.ndarray]:
    """One row a token: the coupled draft token, its flags and its features."""
    kept = source.kept
    if kept is not None and sampling.temperature > 0 and not 0 < sampling.top_k <= kept:
        raise ValueError(f"top_k must be in 1..{kept}: {source.name} holds {kept} tokens a law, got {sampling.top_k}")
    inside = np.isin(source.tokens, source.end_token_ids)
    inside[source.offsets[1:] - 1] = False
    none = slice(0, len(inside))
    source.refuse_rows(torch.from_numpy(inside), none, "an end-of-text token must be the last of its text")
    lengths = np.diff(source.offsets)
    coins = {
        purpose: torch.from_numpy(np.concatenate([
            uniforms(sampling.seed, name, purpose, int(n))[:, 0]
            for name, n in zip(source.request_ids, lengths, strict=True)
        ]))
        for purpose in ("accept", "draft")
    }  # fmt: skip
    ends = torch.from_numpy(source.end_token_ids)
    tokens, rows = torch.from_numpy(source.tokens), []
    step = max(1, _CHUNK // (kept or source.vocab_size))
    for start in range(0, len(tokens), step):
        part = slice(start, min(start + step, len(tokens)))
        x = tokens[part]
        row: dict[str, Any] = {}
        (p_logits, p_ids), (q_logits, q_ids) = source.read("target", part), source.read("draft", part)
        for role, logits in (("target", p_logits), ("draft", q_logits)):
            if (tail := source.tail(role, part, logits)) is not None:
                row[f"{role}_tail"] = tail
        p = _law(_favour(p_logits, p_ids, x), p_ids, sampling.law)
        q = _law(q_logits, q_ids, sampling.law)
        source.refuse_rows(
            p.prob(x) <= 0, part, "the text must be possible under the target's warped law (was it sampled with "
            f"temperature {sampling.temperature:g}, top_k {sampling.top_k}?)",
        )  # fmt: skip
        y = couple(p, q, x, coins["accept"][part], coins["draft"][part])
        shown = q if sampling.temperature > 0 else _law(q_logits, q_ids, sampling.feature_law)
        row |= {"accepted": x == y, "drafts_end": torch.isin(y, ends), "token": x.int(), "draft_token": y.int()}
        values = acceptance(p, q, y) | draft_features(shown, y)
        row |= {key: value.float() for key, value in values.items()}
        if store_top:
            for role, law in (("draft", q), ("target", p)):
                ids, row[f"{role}_top_logprobs"] = top_tokens(law, store_top)
                row[f"{role}_top_ids"] = ids.int()
        rows.append({key: np.asarray(value) for key, value in row.items()})
        if progress is not None:
            progress(len(x))
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _favour(logits: Tensor, ids: Tensor | None, x: Tensor) -> Tensor:
    """The text's token wins ties, which rounding to half precision makes: it was drawn, so it was in the law."""
    mine = x[:, None]
    if ids is not None:  # some column if the token is not among those kept: it then has probability 0 all the same
        mine = torch.searchsorted(ids, mine).clamp(max=ids.shape[-1] - 1)
    more = torch.nextafter(logits.gather(-1, mine), torch.tensor(torch.inf, dtype=logits.dtype))
    return logits.scatter(-1, mine, more)


def _law(logits: Tensor, ids: Tensor | None, warp: Callable[[Tensor], Law]) -> Law:
    """The warped law, on token ids also if the logits are those of some tokens only."""
    law = warp(logits)
    if ids is None:
        return law
    return Law(law.probs, ids if law.ids is None else ids.gather(-1, law.ids))
