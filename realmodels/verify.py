r"""The lossless accept/correct rule on next-token laws, and the features a stopping rule may see.

Write $q$ and $p$ for the draft's and the target's laws of the next token, both warped alike (temperature, then
top-k, then top-p). A candidate $y \sim q$ is accepted with probability $\min(1, p(y)/q(y))$; the first rejected one is
replaced by a *correction* drawn from $(p - q)^+$ normalised; when all are accepted a *bonus* is drawn from $p$. The
emitted token then has law $p$ (Leviathan et al. 2023; Chen et al. 2023), whatever rule decided how many candidates to
draft, provided that each drafted candidate is submitted. The bonus is the correction at $q \equiv 0$, so there is one
rule.

`couple` reads the same joint law from the other side: given the target's token $x \sim p$ it draws $y$ with law $q$
such that $y = x$ exactly when $y$ would be accepted (the maximal coupling; `mdp.trace` says what it is for).

A law is kept on its support: after top-k 50 that is 50 of 49,152 tokens, in ascending order of their ids, so that
two laws meet by merging supports and nothing of the vocabulary's size is built. All randomness comes in as uniforms
and is turned into tokens by the inverse distribution function: results do not depend on how requests are batched.
Leading dimensions are batch dimensions everywhere. Probabilities are float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Law",
    "acceptance",
    "align",
    "correction",
    "couple",
    "draft_features",
    "draw",
    "feature_law",
    "residual",
    "top_tokens",
    "verify",
    "warp",
]


class Law(NamedTuple):
    """A next-token law: `probs` [..., m] of the tokens `ids` [..., m]; `ids` None means all tokens in order.

    After `align` a token may occur twice, once with probability 0.
    """

    probs: Tensor
    ids: Tensor | None = None

    def prob(self, token: Tensor) -> Tensor:
        """Probability of `token` [...]; 0 off the support."""
        if self.ids is None:
            return self.probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.ids == token.unsqueeze(-1), self.probs, 0.0).sum(-1)

    def select(self, index) -> "Law":
        """The law of the batch entries at `index`, an index into the leading dimensions."""
        return Law(self.probs[index], None if self.ids is None else self.ids[index])


def warp(logits: Tensor, temperature: float, top_k: int, top_p: float = 1.0) -> Law:
    r"""The law that decoding samples from: temperature, then the `top_k` most probable tokens, then `top_p`.

    Of what top-k leaves, renormalised, top-p keeps the tokens that fewer than `top_p` of the mass are more probable
    than: the smallest set of mass `top_p`, one token at least. Order and meaning are transformers'. Temperature 0 is
    greedy decoding, a point mass on the largest logit; `top_k` 0 and `top_p` 1 keep every token. What top-p removes
    stays on the support with probability 0. Of equal logits at either boundary, which are kept is arbitrary.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return Law(torch.ones(best.shape, dtype=torch.float64, device=logits.device), best)
    if 0 < top_k < logits.shape[-1]:
        # The order of equal logits is arbitrary; ascending ids make the inverse-CDF draw the same however ranked.
        ids = logits.topk(top_k, sorted=False).indices.sort(-1).values
        logits = logits.gather(-1, ids)
    else:
        ids = None
    probs = torch.softmax(logits.double() / temperature, -1)
    return Law(probs if top_p >= 1 else _nucleus(probs, top_p), ids)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Probabilities with the least probable tokens of joint mass at most 1 - `top_p` set to 0, renormalised."""
    ascending, order = probs.sort(dim=-1, stable=True)
    kept = ascending.cumsum(-1) > 1.0 - top_p
    kept[..., -1] = True
    probs = probs * torch.zeros_like(kept).scatter(-1, order, kept)
    return probs / probs.sum(-1, keepdim=True)


def feature_law(logits: Tensor, temperature: float, top_k: int, top_p: float = 1.0) -> Law:
    """The law whose probabilities and entropy serve as features: the warped one, or if decoding is greedy, where
    that is a point mass and says nothing, the law at temperature 1 under the same top-k and top-p."""
    return warp(logits, temperature or 1.0, top_k, top_p)


def draw(law: Law, uniform: Tensor) -> Tensor:
    """Token [...] at which the law's distribution function first exceeds `uniform` [...] in [0, 1)."""
    cumulative = law.probs.cumsum(-1)
    point = (uniform * cumulative[..., -1]).unsqueeze(-1)
    index = torch.searchsorted(cumulative, point, right=True)
    # Rounding may put the point on the total; a token of probability 0 must not be drawn even then.
    index = torch.minimum(index, cumulative.argmax(-1, keepdim=True))
    return (index if law.ids is None else law.ids.gather(-1, index)).squeeze(-1)


def align(p: Law, q: Law) -> tuple[Law, Law]:
    """The same two laws on one support: p's tokens, then those of q; q's mass on p's tokens moves there."""
    if p.ids is None or q.ids is None:
        if p.ids is not None or q.ids is not None:
            raise ValueError("align: one law is on the whole vocabulary and the other is not")
        return p, q
    index = torch.searchsorted(p.ids, q.ids).clamp(max=p.ids.shape[-1] - 1)
    shared = p.ids.gather(-1, index) == q.ids
    moved = torch.zeros_like(p.probs).scatter_add(-1, index, q.probs * shared)
    ids = torch.cat([p.ids, q.ids], -1)
    return (
        Law(torch.cat([p.probs, torch.zeros_like(q.probs)], -1), ids),
        Law(torch.cat([moved, q.probs * ~shared], -1), ids),
    )


def residual(p: Tensor, q: Tensor) -> Tensor:
    """(p - q)^+ normalised, on a common support.

    Where p <= q everywhere, the two are equal up to rounding and a rejection has probability 0 up to rounding: p.
    """
    excess = (p - q).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total.where(total > 0, 1.0), p)


def correction(p: Law, q: Law) -> Law:
    """Law of the target's own token after a rejection under q."""
    p, q = align(p, q)
    return Law(residual(p.probs, q.probs), p.ids)


def acceptance(p: Law, q: Law, token: Tensor) -> dict[str, Tensor]:
    """`token_accept_prob` min(1, p/q) of the drafted `token`, and `step_accept_prob`, the overlap of the laws."""
    on_p, on_q = align(p, q)
    drafted = q.prob(token)
    # q(token) = 0 happens only for a token that was not drafted from q; it counts as certain, p/0.
    ratio = torch.where(drafted > 0, p.prob(token) / drafted.where(drafted > 0, 1.0), 1.0)
    return {
        "token_accept_prob": ratio.clamp(max=1.0),
        "step_accept_prob": torch.minimum(on_p.probs, on_q.probs).sum(-1),
    }


def draft_features(law: Law, token: Tensor) -> dict[str, Tensor]:
    """What the draft alone knows of its candidate: `draft_prob`, `top_prob`, `entropy` (nats) of `feature_law`."""
    return {
        "draft_prob": law.prob(token),
        "top_prob": law.probs.amax(-1),
        "entropy": torch.special.entr(law.probs).sum(-1),
    }


def top_tokens(law: Law, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens [..., count] and their log-probabilities in float16, good to about 0.005."""
    probs, index = law.probs.topk(min(count, law.probs.shape[-1]), -1)
    return index if law.ids is None else law.ids.gather(-1, index), probs.log().clamp(min=-6e4).half()


def couple(p: Law, q: Law, token: Tensor, accept_uniform: Tensor, draw_uniform: Tensor) -> Tensor:
    """The draft's token y given the target's `token` x: x with probability min(1, q(x)/p(x)), else ~ (q - p)^+."""
    accepted = accept_uniform * p.prob(token) < q.prob(token)
    return torch.where(accepted, token, draw(correction(q, p), draw_uniform))


def verify(
    p: Law,
    q: Law,
    candidates: Tensor,
    num_candidates: Tensor,
    accept_uniforms: Tensor,
    next_uniform: Tensor,
    correct: Callable[[Law, Law], Law] = correction,
) -> tuple[Tensor, Tensor]:
    """Accept a prefix of the candidates and draw the target's next token.

    Args:
        p: target laws [B, K + 1], entry i after i candidates; entries past `num_candidates` are not used.
        q: draft laws [B, K]; entry i is the law that candidate i + 1 was drawn from.
        candidates: [B, K]; num_candidates: [B], how many of them were drafted.
        accept_uniforms: [B, K]; next_uniform: [B].
        correct: law of the next token given (p, q); with q = 0 (all accepted) it is the bonus.

    Returns:
        `num_accepted` [B], and the correction or bonus [B].
    """
    batch, most = candidates.shape
    if most == 0:
        return torch.zeros_like(num_candidates), draw(p.select((slice(None), 0)), next_uniform)
    first = p.select((slice(None), slice(most)))
    accepted = accept_uniforms * q.prob(candidates) < first.prob(candidates)
    accepted &= torch.arange(most, device=candidates.device) < num_candidates.unsqueeze(-1)
    num_accepted = accepted.long().cumprod(-1).sum(-1)
    rows = torch.arange(batch, device=candidates.device)
    rejecting = q.select((rows, num_accepted.clamp(max=most - 1)))
    rejecting = rejecting._replace(probs=rejecting.probs * (num_accepted < num_candidates).unsqueeze(-1))
    return num_accepted, draw(correct(p.select((rows, num_accepted)), rejecting), next_uniform)
