r"""The coupled trace of one batch of prompts: target paths, coupled draft tokens, divergent rollouts.

Three stages share two key-value caches (`realmodels.reader`), one per model.

1. The target samples each path $x$, one token a step, all requests side by side.
2. The draft reads the paths, a chunk of positions at a time, and its token $y_j$ is drawn by the maximal coupling
   given $x_j$ (`realmodels.verify.couple`).
3. At each failed position a branch forks off the path: the draft goes on from $x_{<j}, y_j$, and the target reads
   the same tokens, so that p-side features exist past an unseen rejection. Branches of all positions of all requests
   are read together; one that is done leaves the batch.

A rollout holds min(K - 1, limit - 2 - j) steps, fewer only behind a drafted end-of-text: what a round that started
at j would still draft before the clamp at the maximum length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realmodels.pair import ModelPair
from realmodels.reader import PADDING, PATH, Reader
from realmodels.sampling import Sampling
from realmodels.streams import stream, uniforms
from realmodels.verify import Law, acceptance, couple, draft_features, draw

__all__ = ["Columns", "Contents", "record_batch"]

CHUNK = 32
"""Positions whose laws are held at a time; bounds memory where the laws are on the whole vocabulary."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Contents:
    """What a recording holds besides the features: tokens, the `top` most probable tokens, hidden states."""

    tokens: bool = True
    top: int = 64
    hidden: bool = False


def record_batch(
    pair: ModelPair, prompts: Sequence[Sequence[int]], ids: Sequence[str], sampling: Sampling, contents: Contents
) -> list[tuple[Columns, Columns]]:
    """Per request: columns over its path positions, and columns over its rollout steps with their `position`."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    target = Reader(pair.target, len(prompts), pair.vocab_size)
    draft = Reader(pair.draft, len(prompts), pair.vocab_size)
    path = _walk(pair, target, draft, prompts, lengths, ids, sampling, contents)
    steps = _branch(pair, target, draft, lengths, path, ids, sampling, contents)
    return list(zip(_split(path, len(prompts)), _split(steps, len(prompts)), strict=True))


def _walk(
    pair: ModelPair, target: Reader, draft: Reader, prompts: Sequence[Sequence[int]], lengths: Tensor,
    ids: Sequence[str], sampling: Sampling, contents: Contents,
) -> Columns:  # fmt: skip
    """Stages 1 and 2: one row a position, with its `request`."""
    limit, batch = sampling.max_new_tokens, len(prompts)
    table = {
        purpose: torch.from_numpy(np.stack([uniforms(sampling.seed, r, purpose, limit)[:, 0] for r in ids]))
        for purpose in ("path", "accept", "draft")
    }
    tokens, position, owner = _left_padded(prompts)
    logits = target.read(tokens, position, owner, keep=1)[:, -1]
    carried = _draft_laws(draft, sampling, contents, tokens, position, owner, keep=1)
    alive = torch.ones(batch, dtype=torch.bool)
    rows = []
    for start in range(0, limit, CHUNK):
        laws, drawn, live = [], [], []
        for j in range(start, min(start + CHUNK, limit)):
            laws.append(sampling.law(logits))
            drawn.append(draw(laws[-1], table["path"][:, j].to(logits.device)).cpu())
            live.append(alive)
            alive = alive & ~_ends(drawn[-1], pair)
            if j + 1 == limit or not alive.any():
                break
            # An ended path goes on as padding: its row of the batch is read but never seen.
            owner = torch.where(alive, PATH, PADDING)[:, None]
            logits = target.read(drawn[-1][:, None], lengths[:, None] + j, owner)[:, -1]
        x, reached = torch.stack(drawn, 1), torch.stack(live, 1)
        index = torch.arange(start, start + x.shape[1])
        read = _draft_laws(draft, sampling, contents, x, lengths[:, None] + index, torch.where(reached, PATH, PADDING))
        request, column = reached.nonzero(as_tuple=True)
        # Laws after x_j belong to position j + 1, so each chunk begins with what the one before carried over.
        q, shown, hidden = (
            _cat([before, after], 1, stop=x.shape[1]) for before, after in zip(carried, read, strict=True)
        )
        carried = [_last(part) for part in read]
        rows.append(
            _position_rows(
                pair, contents, _cat([_unsqueeze(law) for law in laws], 1).select((request, column)),
                q.select((request, column)), shown.select((request, column)), x[request, column],
                table["accept"][request, index[column]], table["draft"][request, index[column]],
            )
            | {"request": request.numpy(), "position": index[column].numpy()}
        )  # fmt: skip
        if hidden is not None:
            rows[-1]["hidden"] = hidden[request, column].half().cpu().numpy()
        if not alive.any():
            break
    return _sorted({key: np.concatenate([row[key] for row in rows]) for key in rows[0]})


def _position_rows(
    pair: ModelPair, contents: Contents, p: Law, q: Law, shown: Law, x: Tensor, accept_uniform: Tensor,
    draw_uniform: Tensor,
) -> Columns:  # fmt: skip
    device = p.probs.device
    x = x.to(device)
    y = couple(p, q, x, accept_uniform.to(device), draw_uniform.to(device))
    row = {"accepted": (x == y).cpu().numpy(), "drafts_end": _ends(y.cpu(), pair).numpy(), "path_token": _ids(x)}
    return row | _drafted(pair, contents, p, q, shown, y) | ({"token": _ids(x)} if contents.tokens else {})


def _drafted(pair: ModelPair, contents: Contents, p: Law, q: Law, shown: Law, y: Tensor) -> Columns:
    """Features of drafted tokens, and what else `contents` asks for."""
    values = acceptance(p, q, y) | draft_features(shown, y)
    row = {key: value.float().cpu().numpy() for key, value in values.items()}
    row["drafted"] = _ids(y)
    if contents.tokens:
        row["draft_token"] = row["drafted"]
        if contents.top:
            for name, law in (("draft", q), ("target", p)):
                row |= _top(law, contents.top, pair.vocab_size, f"{name}_top_")
    return row


def _branch(
    pair: ModelPair, target: Reader, draft: Reader, lengths: Tensor, path: Columns, ids: Sequence[str],
    sampling: Sampling, contents: Contents,
) -> Columns:  # fmt: skip
    """Stage 3: one row a rollout step, with its `request` and `position`."""
    depth = np.minimum(sampling.max_candidates - 1, sampling.max_new_tokens - 2 - path["position"])
    failed = np.flatnonzero(~path["accepted"] & ~path["drafts_end"] & (depth > 0))
    request = torch.from_numpy(path["request"][failed])
    position = torch.from_numpy(path["position"][failed])
    token, depth = torch.from_numpy(path["drafted"][failed]).long(), torch.from_numpy(depth[failed])
    steps = sampling.max_candidates - 1
    coins = [
        stream(sampling.seed, ids[int(path["request"][i])], "rollout", int(path["position"][i])).random(steps)
        for i in failed
    ]
    coin = torch.from_numpy(np.array(coins).reshape(len(coins), steps))
    fork = lengths[request] + position
    active = torch.arange(len(failed))
    rows = []
    for step in range(steps):
        active = active[depth[active] > step]
        if len(active) == 0:
            break
        # Active branches of each request side by side; short rows are filled with padding.
        row = request[active]
        slot = torch.arange(len(active)) - torch.searchsorted(row, row)
        packed = torch.zeros(4, len(lengths), int(slot.max()) + 1, dtype=torch.long)
        packed[2] = PADDING
        packed[:, row, slot] = torch.stack([token[active], fork[active] + step, active, fork[active]])
        tokens, at, owner, forks = packed
        logits = draft.read(tokens, at, owner, forks, keep_hidden=contents.hidden)[row, slot]
        q, shown = sampling.law(logits), sampling.feature_law(logits)
        y = draw(q, coin[active, step].to(logits.device))
        p = sampling.law(target.read(tokens, at, owner, forks)[row, slot])
        drafts_end = _ends(y.cpu(), pair)
        rows.append(
            _drafted(pair, contents, p, q, shown, y)
            | {"drafts_end": drafts_end.numpy(), "request": row.numpy(), "position": position[active].numpy()}
        )
        if draft.hidden is not None:
            rows[-1]["hidden"] = draft.hidden[row, slot].half().cpu().numpy()
        token[active] = y.cpu()
        active = active[~drafts_end]
    if not rows:
        return {}
    return _sorted({key: np.concatenate([row[key] for row in rows]) for key in rows[0]})


def _draft_laws(
    draft: Reader, sampling: Sampling, contents: Contents, tokens: Tensor, position: Tensor, owner: Tensor,
    keep: int | None = None,
) -> list[Any]:  # fmt: skip
    """The draft's law, its feature law and, if asked for, the hidden states behind them, after each column."""
    logits = draft.read(tokens, position, owner, keep=keep, keep_hidden=contents.hidden)
    return [sampling.law(logits), sampling.feature_law(logits), draft.hidden]


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    position = torch.arange(width) - torch.tensor([[width - len(prompt)] for prompt in prompts])
    return tokens, position.clamp(min=0), torch.where(position < 0, PADDING, PATH)


def _ends(tokens: Tensor, pair: ModelPair) -> Tensor:
    return torch.isin(tokens, torch.tensor(pair.end_token_ids, dtype=torch.long))


def _ids(tokens: Tensor) -> np.ndarray:
    return tokens.cpu().numpy().astype(np.int32)


def _top(law: Law, count: int, vocab_size: int, prefix: str) -> Columns:
    """The most probable tokens and their log-probabilities, which float16 holds to about 0.005."""
    probs, index = law.probs.topk(min(count, law.probs.shape[-1]), -1)
    ids = index if law.ids is None else law.ids.gather(-1, index)
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    return {
        f"{prefix}ids": ids.cpu().numpy().astype(dtype),
        f"{prefix}logprobs": probs.log().clamp(min=-6e4).half().cpu().numpy(),
    }


def _unsqueeze(law: Law) -> Law:
    return law.select((slice(None), None))


def _last(part: Any) -> Any:
    last = (slice(None), slice(-1, None))
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
