r"""What an acceptance head is trained on: inputs, and the probability that the target accepts.

`matched`: the trace itself. Its features were taken where a stopping rule meets them, under the warping of inference,
on the path and along divergent rollouts; the label is the recorded `token_accept_prob`.

`published` (SpecDec++, as released): X is the target's recorded continuation. $Y_i \sim q(\cdot \mid X_{<i})$ is a
*one-step* draft sample after the target's own prefix, labelled $\min(1, p(Y_i)/q(Y_i))$ under the full softmax of both
models: no temperature, no top-k. Each position keeps $X_i$ with probability `mixing_ratio` and takes $Y_i$ otherwise,
which gives Z; the input at i is the draft's last hidden state after reading $Z_{\le i}$, and only positions with
$Z_i = Y_i$ *by that draw* are trained on, none of the prompt. So both labels and contexts differ from what inference
meets; `matched` is there to say what that costs. It needs the pair and the prompts, and reads each text once with the
target and twice with the draft.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdp.trace import Trace
from realmodels.head import VARIANTS
from realmodels.pair import ModelPair
from realmodels.streams import request_ids, stream
from realmodels.verify import draw, warp

__all__ = ["Examples", "digest", "matched_examples", "prompts_of", "published_examples"]


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs [n, hidden_size] in float32, the acceptance probability [n] of each, and its request [n] in the trace."""

    inputs: Tensor
    accept_prob: Tensor
    request: np.ndarray

    def of(self, requests: Iterable[int]) -> "Examples":
        """Those of the given requests."""
        chosen = np.flatnonzero(np.isin(self.request, np.fromiter(requests, dtype=np.int64)))
        return Examples(self.inputs[chosen], self.accept_prob[chosen], self.request[chosen])


def matched_examples(trace: Trace, requests: Sequence[int], inputs: Sequence[str] = VARIANTS["matched"]) -> Examples:
    """Every position and rollout step of the requests, as recorded.

    Args:
        inputs: `hidden`, then features of the trace.

    Raises:
        ValueError: if the trace lacks hidden states, or rollouts that the target scored.
    """
    hidden, rolled = trace.optional.get("hidden"), trace.optional.get("rollout_hidden")
    if hidden is None or rolled is None or trace.rollout_offsets is None:
        raise ValueError("trace: a head is trained on hidden states, also along rollouts; record it with --hidden")
    if "token_accept_prob" not in trace.rollout_features:
        raise ValueError("trace: its rollouts hold no token_accept_prob, the head's label")
    owner = np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets))
    everyone = np.concatenate([owner, np.repeat(owner, np.diff(trace.rollout_offsets))])
    chosen = np.isin(everyone, np.asarray(requests))

    def column(name: str) -> np.ndarray:
        both = np.concatenate([trace.features[name], trace.rollout_features[name]])
        return both[chosen].astype(np.float32)

    states = np.concatenate([hidden, rolled])[chosen].astype(np.float32)
    scalars = [column(name)[:, None] for name in inputs[1:]]
    label = np.clip(column("token_accept_prob"), 0.0, 1.0)
    return Examples(torch.from_numpy(np.hstack([states, *scalars])), torch.from_numpy(label), everyone[chosen])


def prompts_of(trace: Trace, prompts: Sequence[Sequence[int]]) -> dict[int, Sequence[int]]:
    """Which of the prompts belongs to each request of the trace.

    Raises:
        ValueError: if a request's prompt is not among them.
    """
    by_id = dict(zip(request_ids(prompts), prompts, strict=True))
    lacking = [name for name in trace.request_ids if name not in by_id]
    if lacking:
        raise ValueError(f"prompts: {len(lacking)} of the trace's {trace.num_requests} requests are not among them")
    return {r: by_id[name] for r, name in enumerate(trace.request_ids)}


@torch.inference_mode()
def published_examples(
    pair: ModelPair, trace: Trace, prompts: dict[int, Sequence[int]], requests: Sequence[int], *,
    mixing_ratio: float = 0.15, seed: int = 0, progress: bool | None = None,
) -> Examples:  # fmt: skip
    """Labels and mixed inputs of the published recipe, from one teacher-forced pass over the recorded tokens.

    Args:
        prompts: of each request (`prompts_of`).
        mixing_ratio: probability that a position keeps the target's token and is not trained on.

    Raises:
        ValueError: if the trace holds no tokens, or another pair recorded it.
    """
    if "token" not in trace.optional:
        raise ValueError("trace: it holds no tokens, which the published training data are made from")
    pair.check_recorded(trace.manifest.get("models"), "the trace")
    inputs, labels, owners = [], [], []
    for r in _bar(requests, "reading", progress):
        name, prompt = trace.request_ids[r], list(prompts[r])
        x = torch.from_numpy(trace.optional["token"][trace.offsets[r] : trace.offsets[r + 1]].astype(np.int64))
        before = torch.cat([torch.tensor(prompt), x[:-1]])
        p, q = (warp(_read(pair, role, before, len(x)), 1.0, 0) for role in ("target", "draft"))
        device = q.probs.device
        y = draw(q, torch.from_numpy(stream(seed, name, "head draft").random(len(x))).to(device))
        label = (p.prob(y) / q.prob(y)).clamp(max=1.0).float().cpu()
        kept = torch.from_numpy(stream(seed, name, "head mix").random(len(x)) < mixing_ratio)
        z = torch.where(kept, x, y.cpu())
        hidden = _read(pair, "draft", torch.cat([torch.tensor(prompt), z]), len(z), hidden=True)
        # half precision, as what inference reads was recorded
        inputs.append(hidden[~kept].half().float().cpu())
        labels.append(label[~kept])
        owners.append(np.full(int((~kept).sum()), r))
    return Examples(torch.cat(inputs), torch.cat(labels), np.concatenate(owners))


def _read(pair: ModelPair, role: str, tokens: Tensor, count: int, hidden: bool = False) -> Tensor:
    """Logits [count, vocabulary] or last hidden states [count, width] after each of the last `count` tokens."""
    reader = pair.reader(role, 1)
    logits = reader.read(tokens[None], torch.arange(len(tokens))[None], keep=count, keep_hidden=hidden)
    return (reader.hidden if hidden else logits)[0]


def _bar(items: Sequence[Any], what: str, wanted: bool | None) -> Iterable[Any]:
    """A bar with the time left on stderr, if someone watches (None) or it is wanted."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, file=sys.stderr)


def digest(trace: Trace) -> str:
    """What tells one trace from another: SHA-256 of its shards' hashes and its requests' ids."""
    parts = [str(shard.get("sha256")) for shard in trace.manifest.get("shards", [])] + trace.request_ids
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
