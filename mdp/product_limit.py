r"""Acceptance by depth from rounds that were cut short: the product-limit estimator.

A round that drafts k candidates and keeps L of them tells that candidates 1..L were accepted and, if L < k, that
candidate L + 1 was not. What lies deeper was never tested: the round is *censored* at k. Dividing by all rounds, as
counters do, or by all rounds that drafted so deep, mixes up acceptance with how deep one happened to draft. Among the
$n_i$ rounds that *tested* candidate i (k >= i, all before it accepted) let $d_i$ have rejected it; then

$$\hat a_i = 1 - d_i / n_i, \qquad \hat S_k = \prod_{i \le k} \hat a_i$$

estimate P(i accepted | all before it were) and the survival (Kaplan and Meier 1958). *Condition*: given that all
candidates so far were accepted, stopping must not depend on what tells more about the next one. A fixed length, a
length by past outcomes and the clamp at the end of a text are fine; a rule that reads the candidates is not: it stops
where rejection is likely, and the rest looks too good.

A depth that no round tested is *unidentified*: nan here and null in JSON, no number is made up for it.

*Errors.* With rounds independent, Greenwood: $\mathrm{Var}(\hat S_k) = \hat S_k^2 \sum_{i \le k} d_i/(n_i (n_i -
d_i))$. Rounds of one request are not, so the standard errors given are of the same linearisation summed by request:
with $e_{ci} = (a_{ci} - \hat a_i n_{ci})/n_i$ over clusters c, those of $\hat a_i$ and of
$\sum_{i \le k} e_{ci} \prod_{j \le k, j \ne i} \hat a_j$. One cluster has none.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mdp.acceptance import Position

__all__ = ["ProductLimit", "product_limit"]


@dataclass(frozen=True, eq=False)
class ProductLimit:
    """Acceptance by depth, [D] each, depth 1 first; nan where no round tested it.

    Attributes:
        tested: rounds that tested candidate i; `accepted` of them kept it.
        accept_prob, accept_prob_se: $\\hat a_i$ and its standard error, by cluster.
        survival, survival_se: $\\hat S_i$ and its standard error, by cluster.
        greenwood_se: of the survival, as if rounds were independent.
        num_clusters: independent requests.
    """

    tested: Int[np.ndarray, " D"]
    accepted: Int[np.ndarray, " D"]
    accept_prob: Float[np.ndarray, " D"]
    accept_prob_se: Float[np.ndarray, " D"]
    survival: Float[np.ndarray, " D"]
    survival_se: Float[np.ndarray, " D"]
    greenwood_se: Float[np.ndarray, " D"]
    num_clusters: int

    @property
    def unidentified(self) -> list[int]:
        """Depths that no round tested."""
        return (1 + np.flatnonzero(self.tested == 0)).tolist()

    def process(self, max_candidates: int) -> Position:
        """Acceptance by place in the round, as a process.

        Raises:
            ValueError: if rounds of so many candidates would draft deeper than was ever tested.
        """
        known = int((self.tested > 0).sum())
        if max_candidates > known:
            raise ValueError(
                f"max_candidates: must be in 1..{known}, no round tested a candidate deeper than that, "
                f"got {max_candidates}"
            )
        return Position(self.accept_prob[:max_candidates])

    def to_dict(self) -> dict[str, Any]:
        """One entry a depth in each list."""
        names = ("tested", "accepted", "accept_prob", "accept_prob_se", "survival", "survival_se", "greenwood_se")
        arrays = {name: getattr(self, name).tolist() for name in names}
        return {**arrays, "unidentified": self.unidentified, "num_clusters": self.num_clusters}


def product_limit(
    num_drafted: Int[np.ndarray, " n"],
    num_accepted: Int[np.ndarray, " n"],
    cluster: Int[np.ndarray, " n"],
    max_candidates: int | None = None,
) -> ProductLimit:
    """Acceptance by depth from rounds, one array entry a round.

    Args:
        num_drafted, num_accepted: of each round.
        cluster: the request it belongs to.
        max_candidates: depths to report, the deepest that was drafted by default.

    Raises:
        ValueError: if there are no rounds, or one accepted more than it drafted.

    Example:
        >>> found = product_limit([1, 3, 3, 2], [1, 1, 3, 0], [0, 0, 1, 1], max_candidates=4)
        >>> found.tested.tolist(), found.accept_prob.tolist(), found.unidentified
        ([4, 2, 1, 0], [0.75, 0.5, 1.0, nan], [4])
    """
    drafted, accepted, owner = (np.asarray(x) for x in (num_drafted, num_accepted, cluster))
    if not len(drafted) or not drafted.shape == accepted.shape == owner.shape or drafted.ndim != 1:
        raise ValueError("rounds: num_drafted, num_accepted and cluster must be equally long rows, at least one round")
    if (accepted < 0).any() or (accepted > drafted).any():
        bad = int(np.flatnonzero((accepted < 0) | (accepted > drafted))[0])
        raise ValueError(
            f"num_accepted: must be in 0..num_drafted, round {bad} accepted {accepted[bad]} of {drafted[bad]}"
        )
    most = int(drafted.max()) if max_candidates is None else int(max_candidates)
    depth = np.arange(1, most + 1)
    tests = (drafted[:, None] >= depth) & (accepted[:, None] >= depth - 1)
    keeps = tests & (accepted[:, None] >= depth)
    names, row = np.unique(owner, return_inverse=True)
    n_by, a_by = np.zeros((2, len(names), most))
    np.add.at(n_by, row, tests)
    np.add.at(a_by, row, keeps)
    tested, kept = tests.sum(axis=0), keeps.sum(axis=0)
    accept = np.divide(kept, tested, out=np.full(most, np.nan), where=tested > 0)
    survival = np.cumprod(accept)
    linear = np.divide(a_by - accept * n_by, tested, out=np.full(n_by.shape, np.nan), where=tested > 0)
    spread = np.zeros((len(names), most))
    for k in range(most):  # the product without one factor, which may be 0
        others = np.array([np.prod(np.delete(accept[: k + 1], i)) for i in range(k + 1)])
        spread[:, k] = linear[:, : k + 1] @ others
    lost = tested - kept
    terms = np.divide(lost, tested * kept, out=np.full(most, np.nan), where=kept > 0)
    return ProductLimit(
        tested, kept, accept, _cluster_se(linear), survival, _cluster_se(spread),
        greenwood_se=survival * np.sqrt(np.cumsum(terms)), num_clusters=len(names),
    )  # fmt: skip


def _cluster_se(terms: Float[np.ndarray, "C D"]) -> Float[np.ndarray, " D"]:
    count = len(terms)
    if count < 2:
        return np.full(terms.shape[1], np.nan)
    return np.sqrt(count / (count - 1) * np.square(terms).sum(axis=0))
