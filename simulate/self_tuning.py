r"""Rules that tune themselves while they run: $\rho_n$ = emitted / time of the rounds so far (theory, F7).

The limit is exact in `mdp.self_tuning`; here the rule is played, so that the way to the limit can be seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.policy import TIE, Policy
from mdp.problem import StoppingProblem
from mdp.self_tuning import Family
from simulate.rounds import simulate
from simulate.steps import MAX_REPLICAS

__all__ = ["Path", "SelfTunedFamily", "play"]


@dataclass(frozen=True)
class SelfTunedFamily(Policy):
    """The family's table at the throughput so far, on survival as the head's outputs make it.

    Starts as if one round of plain decoding had been seen. Between two rates of the grid the lower one's table holds.
    """

    rates: np.ndarray = field(hash=False)
    tables: np.ndarray = field(hash=False)
    output: np.ndarray = field(hash=False)
    round_time: np.ndarray = field(hash=False)
    needs = ("regime",)

    def init(self):
        return 1.0, self.round_time[0] * 1.0, 1.0

    def stop(self, state, observation):
        emitted, time, survival = state
        k, regime = observation.num_candidates, observation.regime
        survival = (k == 0) * 1.0 + (k > 0) * survival * self.output[regime]
        below = (self.rates <= emitted / time).sum() - 1
        threshold = self.tables[below * (below > 0), k, regime]
        return (emitted, time, survival), survival < threshold - TIE

    def end_round(self, state, outcome):
        emitted, time, survival = state
        return emitted + outcome.num_accepted + 1.0, time + self.round_time[outcome.num_drafted], survival


class Path(NamedTuple):
    """Throughput so far after n rounds, over replicas: mean and standard deviation, each [N]."""

    rounds: list[int]
    mean: Float[np.ndarray, " N"]
    spread: Float[np.ndarray, " N"]


def play(
    problem: StoppingProblem, family: Family, output: Float[np.ndarray, " Z"], *,
    rounds: Sequence[int] = (10, 100, 1000), key: int = 0, rates: Float[np.ndarray, " G"],
) -> Path:  # fmt: skip
    """Play the family self-tuned from a cold start, in `MAX_REPLICAS` replicas of each number of rounds.

    Raises:
        ValueError: if rounds persist.
    """
    finite = problem.lower()
    if finite.persistent:
        raise ValueError("coupling: self-tuning is played for rounds that renew only")
    tables = np.stack([family(float(rate)) for rate in rates])
    rule = SelfTunedFamily(np.asarray(rates), tables, np.asarray(output), finite.round_time)
    ends = []
    for count in rounds:
        tally = simulate(problem, [rule], rounds=int(count) * MAX_REPLICAS, key=key).policies[0].clusters
        ends.append(np.asarray(tally.throughput))
    return Path(list(rounds), np.array([end.mean() for end in ends]), np.array([end.std(ddof=1) for end in ends]))
