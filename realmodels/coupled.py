r"""The coupled trace of one batch of prompts: target paths, coupled draft tokens, divergent rollouts.

Three stages share two key-value caches (`realmodels.reader`), one per model.

1. The target samples each path $x$, one token a step, all requests side by side; a path that has ended leaves.
2. The draft reads the paths, a chunk of positions at a time, and its token $y_j$ is drawn by the maximal coupling
   given $x_j$ (`realmodels.verify.couple`).
3. At each failed position a branch forks off the path: the draft goes on from $x_{<j}, y_j$, and the target reads
   the same tokens, so that p-side features exist past an unseen rejection. Branches of many positions and requests
   are read together; one that is done leaves. Their columns are dropped before the next ones are read.

A rollout holds min(K - 1, limit - 2 - j) steps, fewer only behind a drafted end-of-text: what a round that started
at j would still draft before the clamp at the maximum length.

Memory. No more than `LOGITS` logits exist at a time, whatever the batch. What grows with it are the caches: prompt,
path and one group of rollouts for each request. Laws are moved to the CPU as soon as they are warped, where after
top-k they are a few numbers; so the two models may sit on any devices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realmodels.pair import ModelPair
from realmodels.reader import PADDING, PATH, Rows
from realmodels.sampling import Sampling
from realmodels.streams import stream, uniforms
from realmodels.verify import Law, acceptance, couple, draft_features, draw, top_tokens

__all__ = ["WORK", "Columns", "Contents", "record_batch"]

CHUNK = 16
"""Positions that are sampled before the draft reads them and paths that have ended leave the batch."""

LOGITS = 2**24
"""Most logits that are held at a time (64 MB in float32), unless a single step of the batch has more."""

PROMPT_TOKENS = 512
"""About how many prompt tokens are read at a time."""

ENOUGH, FULL = 96, 0.85
"""Branches that are worth a read of their own; beyond that, a row joins if it has this share of the widest row's."""

Columns = dict[str, np.ndarray]

WORK = ("prompt", "target_path", "draft_path", "rollout", "rollout_score")
"""Kinds of work whose seconds are counted: both models read the prompts; the target samples the paths; the draft
reads them; the draft samples the rollouts; the target scores them."""


@dataclass(frozen=True)
class Contents:
    """What a recording holds besides the features: tokens, the `top` most probable tokens, hidden states, and the
    target's view of rollouts."""

    tokens: bool = True
    top: int = 64
    hidden: bool = False
    rollout_scores: bool = True


def record_batch(
    pair: ModelPair, prompts: Sequence[Sequence[int]], ids: Sequence[str], sampling: Sampling, contents: Contents,
    seconds: dict[str, float] | None = None, partly: Callable[[float], Any] = lambda share: None,
) -> list[tuple[Columns, Columns]]:  # fmt: skip
    """Per request: columns over its path positions, and columns over its rollout steps with their `position`.

    Args:
        seconds: the time spent on each kind of `WORK` is added here.
        partly: is told now and then about what share is done.
    """
    batch = _Batch(pair, prompts, ids, sampling, contents, {} if seconds is None else seconds, partly)
    path = batch.walk()
    steps = batch.branch(path)
    return list(zip(_split(path, len(prompts)), _split(steps, len(prompts)), strict=True))


class _Batch:
    """One batch while it is recorded. `order` says which request each row of both readers belongs to."""

    def __init__(
        self, pair: ModelPair, prompts: Sequence[Sequence[int]], ids: Sequence[str], sampling: Sampling,
        contents: Contents, seconds: dict[str, float], partly: Callable[[float], Any],
    ):  # fmt: skip
        self.pair, self.prompts, self.ids, self.sampling, self.contents = pair, prompts, ids, sampling, contents
        self.seconds, self.partly = seconds, partly
        self.lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.order = self.lengths.argsort(descending=True, stable=True)
        self.target, self.draft = (Rows(pair.reader(role, len(prompts)), len(prompts)) for role in ("target", "draft"))

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        # No waiting for a GPU is needed: each piece of work ends with laws on the CPU.
        start = perf_counter()
        yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + perf_counter() - start

    def _swap(self, one: int, other: int) -> None:
        for rows in (self.target, self.draft):
            rows.swap(one, other)
        self.order[[one, other]] = self.order[[other, one]]

    def _columns_at_a_time(self, rows: int) -> int:
        """Columns of so many rows whose logits may be held at a time."""
        return max(1, LOGITS // (rows * self.pair.vocab_size))

    def _read_prompts(self) -> tuple[Law, list[Any]]:
        """Both models' laws after the prompts."""
        tokens, position, owner = (part[self.order] for part in _left_padded(self.prompts))
        width, lengths = tokens.shape[1], self.lengths[self.order]
        p, carried, start = None, [], 0
        while start < width:
            # The longest prompts come first and stand alone to the left, where the others are nothing but padding.
            reach = int((lengths >= width - start).sum())
            stop = min(start + max(1, PROMPT_TOKENS // reach), width)
            rows = slice(0, int((lengths > width - stop).sum()))
            read = tuple(part[rows, start:stop] for part in (tokens, position, owner))
            logits = self.target.read(rows, *read, keep=1)
            if stop == width:
                p = _law(self.sampling, logits[:, -1])
                carried = self._draft_laws(rows, *read, keep=1)
            else:
                self.draft.read(rows, *read, keep=1)
            start = stop
        assert p is not None
        return p, carried

    def walk(self) -> Columns:
        """Stages 1 and 2: one row a position, with its `request`."""
        sampling, limit = self.sampling, self.sampling.max_new_tokens
        table = {
            purpose: torch.from_numpy(np.stack([uniforms(sampling.seed, r, purpose, limit)[:, 0] for r in self.ids]))
            for purpose in ("path", "accept", "draft")
        }
        with self._timed("prompt"):
            p, carried = self._read_prompts()
        out, start = [], 0
        while True:
            count = len(p.probs)
            rows, request, ahead = slice(0, count), self.order[:count].clone(), self.lengths[self.order[:count], None]
            chunk = CHUNK if p.ids is not None else min(CHUNK, self._columns_at_a_time(count))
            alive, laws, drawn, live = torch.ones(count, dtype=torch.bool), [p], [], []
            with self._timed("target_path"):
                for j in range(start, min(start + chunk, limit)):
                    drawn.append(draw(laws[-1], table["path"][request, j]))
                    live.append(alive)
                    alive = alive & ~_ends(drawn[-1], self.pair)
                    if j + 1 == limit or not alive.any():
                        alive = torch.zeros_like(alive)
                        break
                    # Until it leaves, an ended path goes on as padding: its row is read but never seen.
                    owner = torch.where(alive, PATH, PADDING)[:, None]
                    logits = self.target.read(rows, drawn[-1][:, None], ahead + j, owner, keep=1)
                    laws.append(_law(sampling, logits[:, -1]))
            x, reached = torch.stack(drawn, 1), torch.stack(live, 1)
            index = torch.arange(start, start + x.shape[1])
            with self._timed("draft_path"):
                read = self._draft_laws(rows, x, ahead + index, torch.where(reached, PATH, PADDING))
            row, column = reached.nonzero(as_tuple=True)
            # Laws after x_j belong to position j + 1, so each chunk begins with what the one before carried over.
            q, shown, hidden = (
                _cat([before, after], 1, stop=x.shape[1]) for before, after in zip(carried, read, strict=True)
            )
            path_laws = _cat([_unsqueeze(law) for law in laws], 1, stop=x.shape[1])
            owner_of, at = request[row], index[column]
            out.append(
                self._positions(
                    path_laws.select((row, column)), q.select((row, column)), shown.select((row, column)),
                    x[row, column], table["accept"][owner_of, at], table["draft"][owner_of, at],
                )
                | {"request": owner_of.numpy(), "position": at.numpy()}
            )  # fmt: skip
            if hidden is not None:
                out[-1]["hidden"] = hidden[row, column].half().cpu().numpy()
            if not alive.any():
                return _sorted({key: np.concatenate([part[key] for part in out]) for key in out[0]})
            start += x.shape[1]
            self.partly(start / limit / 2)
            kept = self._leave(alive)
            p, carried = laws[-1].select(kept), [_last(part, kept) for part in read]

    def _leave(self, alive: Tensor) -> Tensor:
        """Paths that have ended change places with later ones that go on; returns where the latter were."""
        slots, last = list(range(len(alive))), len(alive)
        for row in reversed((~alive).nonzero().flatten().tolist()):
            last -= 1
            if row != last:
                self._swap(row, last)
                slots[row], slots[last] = slots[last], slots[row]
        return torch.tensor(slots[:last])

    def _positions(
        self, p: Law, q: Law, shown: Law, x: Tensor, accept_uniform: Tensor, draw_uniform: Tensor
    ) -> Columns:
        y = couple(p, q, x, accept_uniform, draw_uniform)
        row = {"accepted": (x == y).numpy(), "drafts_end": _ends(y, self.pair).numpy(), "path_token": _ids(x)}
        return row | self._drafted(p, q, shown, y) | ({"token": _ids(x)} if self.contents.tokens else {})

    def _drafted(self, p: Law | None, q: Law, shown: Law, y: Tensor) -> Columns:
        """Features of drafted tokens, and what else `contents` asks for; without p, the draft's alone."""
        values = draft_features(shown, y) | ({} if p is None else acceptance(p, q, y))
        row = {key: value.float().numpy() for key, value in values.items()}
        row["drafted"] = _ids(y)
        if self.contents.tokens:
            row["draft_token"] = row["drafted"]
            if self.contents.top:
                dtype = np.uint16 if self.pair.vocab_size <= 2**16 else np.int32
                for role, law in (("draft", q), ("target", p)):
                    if law is not None:
                        ids, logprobs = top_tokens(law, self.contents.top)
                        row |= {f"{role}_top_ids": ids.numpy().astype(dtype), f"{role}_top_logprobs": logprobs.numpy()}
        return row

    def branch(self, path: Columns) -> Columns:
        """Stage 3: one row a rollout step, with its `request` and `position`."""
        sampling = self.sampling
        depth = np.minimum(sampling.max_candidates - 1, sampling.max_new_tokens - 2 - path["position"])
        failed = np.flatnonzero(~path["accepted"] & ~path["drafts_end"] & (depth > 0))
        forks = _Forks(
            request=torch.from_numpy(path["request"][failed]),
            position=torch.from_numpy(path["position"][failed]),
            token=torch.from_numpy(path["drafted"][failed]).long(),
            depth=torch.from_numpy(depth[failed]),
        )
        out, done = [], 0
        for rows, chosen in self._groups(forks):
            columns = self.target.reader.num_columns, self.draft.reader.num_columns
            out += self._roll_out(rows, forks, chosen)
            for side, count in zip((self.target, self.draft), columns, strict=True):
                side.reader.crop(count)
            done += len(chosen)
            self.partly((1 + done / len(failed)) / 2)
        if not out:
            return {}
        return _sorted({key: np.concatenate([part[key] for part in out]) for key in out[0]})

    def _groups(self, forks: "_Forks") -> Iterator[tuple[slice, Tensor]]:
        """Branches to read together: rows side by side, about as many branches in each, so that little is padding."""
        counts = torch.bincount(forks.request, minlength=len(self.prompts))
        wanted = counts.argsort(descending=True, stable=True)
        for row, request in enumerate(wanted.tolist()):
            place = int((self.order == request).nonzero())
            if place != row:
                self._swap(row, place)
        slot = torch.arange(len(forks.request)) - torch.searchsorted(forks.request, forks.request)
        row_of = torch.empty_like(self.order)
        row_of[self.order] = torch.arange(len(self.order))
        branches, most, first = counts[wanted].tolist(), max(1, LOGITS // self.pair.vocab_size), 0
        while first < len(branches) and (widest := branches[first]):
            last = first + 1
            while (
                last < len(branches)
                and (last - first + 1) * widest <= most
                and (branches[last] >= FULL * widest or (branches[last] and (last - first) * widest < ENOUGH))
            ):
                last += 1
            inside = (row_of[forks.request] >= first) & (row_of[forks.request] < last)
            for low in range(0, widest, most):
                yield slice(first, last), (inside & (slot >= low) & (slot < low + most)).nonzero().flatten()
            first = last

    def _roll_out(self, rows: slice, forks: "_Forks", active: Tensor) -> list[Columns]:
        """The rollouts of some branches, all of whose requests are in `rows`."""
        sampling, steps = self.sampling, self.sampling.max_candidates - 1
        row_of = torch.full_like(self.order, -1)
        row_of[self.order[rows]] = torch.arange(rows.stop - rows.start)
        coin = torch.zeros(len(forks.request), steps, dtype=torch.float64)
        for i in active.tolist():
            address = self.ids[int(forks.request[i])], "rollout", int(forks.position[i])
            coin[i] = torch.from_numpy(stream(sampling.seed, *address).random(steps))
        fork = self.lengths[forks.request] + forks.position
        token, out = forks.token.clone(), []
        for step in range(steps):
            active = active[forks.depth[active] > step]
            if len(active) == 0:
                break
            # Active branches of each request side by side; short rows are filled with padding.
            request = forks.request[active]
            row, slot = row_of[request], torch.arange(len(active)) - torch.searchsorted(request, request)
            packed = torch.zeros(4, rows.stop - rows.start, int(slot.max()) + 1, dtype=torch.long)
            packed[2] = PADDING
            packed[:, row, slot] = torch.stack([token[active], fork[active] + step, active, fork[active]])
            read = packed[0], packed[1], packed[2], packed[3]
            with self._timed("rollout"):
                logits = self.draft.read(rows, *read, keep_hidden=self.contents.hidden)[row, slot]
                q = _law(sampling, logits)
                shown = q if sampling.temperature else _host(sampling.feature_law(logits))
            y, p = draw(q, coin[active, step]), None
            if self.contents.rollout_scores:
                with self._timed("rollout_score"):
                    p = _law(sampling, self.target.read(rows, *read)[row, slot])
            drafts_end = _ends(y, self.pair)
            out.append(
                self._drafted(p, q, shown, y)
                | {"drafts_end": drafts_end.numpy(), "request": request.numpy(),
                   "position": forks.position[active].numpy()}
            )  # fmt: skip
            if self.draft.hidden is not None:
                out[-1]["hidden"] = self.draft.hidden[row, slot].half().cpu().numpy()
            token[active] = y
            active = active[~drafts_end]
        return out

    def _draft_laws(
        self, rows: slice, tokens: Tensor, position: Tensor, owner: Tensor, keep: int | None = None
    ) -> list[Any]:
        """The draft's law, its feature law and, if asked for, the hidden states behind them, after each column."""
        parts = []
        width = tokens.shape[1]
        span = width if keep else self._columns_at_a_time(len(tokens))
        for at in (slice(start, start + span) for start in range(0, width, span)):
            logits = self.draft.read(
                rows, tokens[:, at], position[:, at], owner[:, at], keep=keep, keep_hidden=self.contents.hidden
            )
            q = _law(self.sampling, logits)
            shown = q if self.sampling.temperature else _host(self.sampling.feature_law(logits))
            parts.append((q, shown, self.draft.hidden))
        return [_cat(list(part), 1) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Forks:
    """Failed positions in order: whose they are, where, the draft's token there, how many steps may follow."""

    request: Tensor
    position: Tensor
    token: Tensor
    depth: Tensor


def _law(sampling: Sampling, logits: Tensor) -> Law:
    """The law that is sampled from, on the CPU."""
    return _host(sampling.law(logits))


def _host(law: Law) -> Law:
    return Law(law.probs.cpu(), None if law.ids is None else law.ids.cpu())


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    position = torch.arange(width) - torch.tensor([[width - len(prompt)] for prompt in prompts])
    return tokens, position.clamp(min=0), torch.where(position < 0, PADDING, PATH)


def _ends(tokens: Tensor, pair: ModelPair) -> Tensor:
    return torch.isin(tokens, torch.tensor(pair.end_token_ids, dtype=torch.long))


def _ids(tokens: Tensor) -> np.ndarray:
    return tokens.numpy().astype(np.int32)


def _unsqueeze(law: Law) -> Law:
    return law.select((slice(None), None))


def _last(part: Any, rows: Tensor) -> Any:
    last = (rows, slice(-1, None))
    return part if part is None else part.select(last) if isinstance(part, Law) else part[last]


def _cat(parts: list[Any], dim: int, stop: int | None = None) -> Any:
    """Laws, tensors or Nones joined along `dim`, the first `stop` entries of the result."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], Law):
        ids = None if parts[0].ids is None else torch.cat([law.ids for law in parts], dim)
        return Law(torch.cat([law.probs for law in parts], dim), ids).select((slice(None), slice(stop)))
    return torch.cat(parts, dim)[:, :stop]


def _sorted(rows: Columns) -> Columns:
    """Rows by request, then position; rollout steps of one position keep their order."""
    order = np.lexsort((rows["position"], rows["request"]))
    return {key: value[order] for key, value in rows.items()}


def _split(rows: Columns, count: int) -> list[Columns]:
    if not rows:
        return [{} for _ in range(count)]
    cuts = np.searchsorted(rows["request"], np.arange(count + 1))
    return [{key: value[a:b] for key, value in rows.items()} for a, b in pairwise(cuts)]
