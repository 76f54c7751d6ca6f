r"""How likely a fitted acceptance process finds what another half of the requests did.

*The datum* is the run length of a round of full depth. Rounds tile each text: one starts behind the last emitted
token, holds $d = \min(K, \text{limit} - s - 1)$ candidates (s tokens are out; fewer if an end-of-text is accepted),
and $L \in 0..d$ of them are accepted before the first rejection. So every flag on the path is tested once, but for
those of bonus tokens, which nobody tests, and one number says it all of a round: candidates 1..L were accepted and, if
L < d, candidate L + 1 was not.

*The likelihood.* With regimes $z_i \sim P(z_{i-1}, \cdot)$ and acceptances $a_i(z)$, let $b$ [Z] be the law of the
start regime, $A_i = \operatorname{diag} a_i$, $R_i = I - A_i$, $\rho$ and $\beta$ the laws of the next start after a
rejection and after none (theory, section 1). A round weighs

$$w = b\, P A_1 \cdots P A_L \cdot \begin{cases} P R_{L+1}\, \rho & L < d \\ \beta & L = d,\end{cases}
  \qquad P(L \mid \text{rounds before}) = w \mathbf 1,$$

and the next one starts from $b' = w / w\mathbf 1$; if rounds renew, from `initial` again. The log-likelihood of a text
is the sum over its rounds, texts are independent. Divided by the number of tested candidates it is a log score per
candidate (0 is certainty; $-H(\alpha)$ is what iid acceptance can reach), comparable between any two processes,
since all are scored on the same flags. It is a proper score: on data of another sample more parameters do not help by
themselves, so no penalty is due.

*What is seen* is scored apart. Given that a candidate shows a signal, a process that has a law for it predicts the
flag better; `seen_score` is the log score of the flags given the signals, hence the worth of seeing them, in nats per
tested candidate. A Beta mixture's flags are iid's: its concentration is about the acceptance probabilities
themselves, which `cell_score` compares with those recorded (equal cells of [0, 1], since min(1, p/q) is exactly 1 so
often that no density fits it).

Errors belong to the caller: every function answers with sums by request, for `simulate.estimate.ratio`.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mdp.process import FiniteChain, StartLaws
from mdp.trace import Trace

__all__ = ["CELLS", "Runs", "Score", "cell_score", "full_rounds", "run_score", "seen_score"]

CELLS = 20
"""Equal cells of [0, 1] on which acceptance probabilities are compared."""


class Runs(NamedTuple):
    """Rounds of full depth that tile the texts of some requests, in order; one array entry a round.

    `row` is the request's place in the list of requests, `start` the round's first position in the trace.
    """

    row: Int[np.ndarray, " n"]
    start: Int[np.ndarray, " n"]
    depth: Int[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    num_requests: int

    @property
    def num_tested(self) -> Int[np.ndarray, " n"]:
        """Candidates tested: the accepted ones and the first rejected one, if there is one."""
        return self.length + (self.length < self.depth)

    def tested(self) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Of each tested candidate: its position in the trace, its place 1.. in the round, and its request's row."""
        count = self.num_tested
        place = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(self.start, count) + place, place + 1, np.repeat(self.row, count)


class Score(NamedTuple):
    """Log-likelihood and number of tested candidates of each request."""

    log_likelihood: Float[np.ndarray, " R"]
    num_tested: Int[np.ndarray, " R"]


def full_rounds(trace: Trace, requests: Int[np.ndarray, " R"]) -> Runs:
    """The rounds that `fixed:K` plays on the requests, K the trace's own.

    Raises:
        ValueError: if the trace holds counts in the place of flags.
    """
    if "run_length" in trace.optional:
        raise ValueError("trace: it holds counts, and its flags are not all known; a recorded trace is needed")
    rejected = np.append(np.flatnonzero(~np.asarray(trace.accepted, dtype=bool)), trace.num_positions)
    rows = []
    for row, request in enumerate(requests):
        start, end = (int(x) for x in trace.offsets[request : request + 2])
        last = start + int(trace.limit[request])
        while start < end:
            depth = min(trace.max_candidates, last - start - 1)
            length = min(int(rejected[np.searchsorted(rejected, start)]), end) - start
            if length > 0 and length <= depth and start + length == end and trace.drafts_end[end - 1]:
                depth = length  # an accepted end-of-text: nothing is drafted behind it
            length = min(length, depth)
            rows.append((row, start, depth, length))
            start += length + 1
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    return Runs(*columns, num_requests=len(requests))


def run_score(chain: FiniteChain, runs: Runs, start_laws: StartLaws | None = None) -> Score:
    """Log-likelihood of the run lengths, by request; -inf where the process holds a round impossible.

    Args:
        chain: lowered for at least as many candidates as the deepest round holds.
        start_laws: of a persistent process; None renews each round from `initial`.
    """
    belief = np.tile(chain.initial, (runs.num_requests, 1))
    found = np.zeros(runs.num_requests)
    first = np.searchsorted(runs.row, np.arange(runs.num_requests + 1))
    for turn in range(int(np.diff(first).max(initial=0))):
        at = first[:-1] + turn
        rows = np.flatnonzero(at < first[1:])
        depth, length = runs.depth[at[rows]], runs.length[at[rows]]
        law = belief[rows]
        ended = np.zeros_like(law)  # at the first rejected candidate
        for i in range(int(depth.max())):
            ahead = law @ chain.transition
            kept = ahead * chain.accept_prob[i]
            ended = np.where(((length == i) & (i < depth))[:, None], ahead - kept, ended)
            law = np.where((length > i)[:, None], kept, law)
        whole = (length == depth)[:, None]
        weight = np.where(whole, law, ended)
        total = weight.sum(axis=1)
        with np.errstate(divide="ignore"):
            found[rows] += np.log(total)
        if start_laws is not None:
            following = np.where(whole, law @ start_laws.bonus, ended @ start_laws.rejection)
            belief[rows] = np.divide(following, total[:, None], out=belief[rows], where=total[:, None] > 0)
    return Score(found, _by_row(runs.row, runs.num_tested, runs.num_requests).astype(np.int64))


def seen_score(accept_prob: Float[np.ndarray, " N"], accepted: Bool[np.ndarray, " N"], runs: Runs) -> Score:
    """Log score of the tested flags given what each candidate showed, turned into `accept_prob` by position."""
    position, _, row = runs.tested()
    prob = np.where(accepted, accept_prob, 1.0 - accept_prob)[position]
    with np.errstate(divide="ignore"):
        return _score(np.log(prob), row, runs.num_requests)


def cell_score(law: Float[np.ndarray, " C"], accept_prob: Float[np.ndarray, " N"], runs: Runs) -> Score:
    """Log score of the cells that the tested candidates' acceptance probabilities fall in; `law` [C] of the cells."""
    position, _, row = runs.tested()
    cell = np.minimum((np.clip(accept_prob[position], 0.0, 1.0) * len(law)).astype(np.int64), len(law) - 1)
    with np.errstate(divide="ignore"):
        return _score(np.log(law)[cell], row, runs.num_requests)


def _score(logs: np.ndarray, row: np.ndarray, size: int) -> Score:
    return Score(_by_row(row, logs, size), np.bincount(row, minlength=size))


def _by_row(row: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.bincount(row, weights=values, minlength=size)
