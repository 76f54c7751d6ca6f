r"""Throughput from clusters: ratio estimates, their standard errors, and paired differences.

Throughput is a ratio of sums, $\hat\rho = \sum_i N_i / \sum_i T_i$, over *clusters* $i$ that are independent of each
other: replicas of a simulation, requests of a trace. Rounds inside a cluster may depend on each other in any way.
With the linearisation $e_i = (N_i - \hat\rho T_i) / \sum_j T_j$ the delta method gives

$$\mathrm{se}(\hat\rho)^2 = \frac{n}{n-1} \sum_i e_i^2 .$$

Two policies that met the same clusters are compared by the same formula on $e^A_i - e^B_i$: what the clusters share
cancels before it is squared, which is the whole gain of common random numbers. Intervals use Student's t with
$n - 1$ degrees of freedom. One cluster has no standard error: it is nan here and null in JSON.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.metrics import Tally

__all__ = ["Comparison", "Difference", "Estimate", "PolicyResult", "TraceComparison", "interval", "paired", "ratio"]


class Estimate(NamedTuple):
    """A number and its standard error (nan if it has none)."""

    value: float
    se: float


def ratio(emitted: Float[np.ndarray, " n"], time: Float[np.ndarray, " n"]) -> Estimate:
    """Ratio of sums over n independent clusters, with the delta-method standard error."""
    return Estimate(float(np.sum(emitted) / np.sum(time)), _standard_error(_linearised(emitted, time)))


def paired(first: Tally, second: Tally) -> Estimate:
    """Throughput of `first` minus that of `second`, both summed over the same n clusters in the same order."""
    terms = _linearised(first.num_emitted, first.time) - _linearised(second.num_emitted, second.time)
    difference = np.sum(first.num_emitted) / np.sum(first.time) - np.sum(second.num_emitted) / np.sum(second.time)
    return Estimate(float(difference), _standard_error(terms))


def interval(estimate: Estimate, num_clusters: int, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval; (nan, nan) for one cluster.

    Raises:
        ValueError: if `level` is not strictly between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: must lie strictly between 0 and 1, got {level!r}")
    if num_clusters < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit  # not scipy.stats: importing that takes longer than most replays

    half = float(stdtrit(num_clusters - 1, 0.5 + level / 2)) * estimate.se
    return estimate.value - half, estimate.value + half


def _linearised(emitted: Any, time: Any) -> np.ndarray:
    emitted, time = np.asarray(emitted, dtype=float), np.asarray(time, dtype=float)
    total = time.sum()
    return (emitted - emitted.sum() / total * time) / total


def _standard_error(terms: np.ndarray) -> float:
    count = len(terms)
    return math.sqrt(count / (count - 1) * float(np.square(terms).sum())) if count > 1 else math.nan


@dataclass(frozen=True)
class PolicyResult:
    """What one policy earned.

    Attributes:
        policy: the policy string as typed, or a rule's name.
        clusters: sums per cluster, one array entry each; they balance exactly.
        plain_time: V(0), the time of a plain target step, in which speedup is counted.
        signal: on a trace, what stood for acceptance; None if the rule looks at no signal.
    """

    policy: str
    clusters: Tally
    plain_time: float
    signal: str | None = None

    def __post_init__(self) -> None:
        self.clusters.check_balance()

    @property
    def total(self) -> Tally:
        """Sums over all clusters."""
        c = self.clusters
        return Tally(*(np.sum(x).item() for x in (c.num_target_calls, c.num_drafted, c.num_emitted, c.num_discarded,
                                                  c.num_cut, c.time)))  # fmt: skip

    @property
    def num_clusters(self) -> int:
        return len(self.clusters.time)

    @property
    def throughput(self) -> Estimate:
        return ratio(self.clusters.num_emitted, self.clusters.time)

    @property
    def speedup(self) -> Estimate:
        """Throughput times V(0): against plain decoding."""
        return Estimate(*(self.plain_time * x for x in self.throughput))

    def to_dict(self) -> dict[str, Any]:
        """The policy's entry in the JSON of `specstop simulate`."""
        total, throughput = self.total, self.throughput
        return {
            "policy": self.policy,
            "throughput": throughput.value,
            "throughput_se": _or_null(throughput.se),
            "speedup": self.speedup.value,
            "block_efficiency": total.block_efficiency,
            "verification_rate": total.verification_rate,
            "discard_rate": total.discard_rate,
            "num_emitted": total.num_emitted,
            "num_drafted": total.num_drafted,
            "num_discarded": total.num_discarded,
            "num_cut": total.num_cut,
            "num_target_calls": total.num_target_calls,
        }


class Difference(NamedTuple):
    """Throughput of `policy` minus throughput of `baseline`, paired over clusters."""

    policy: str
    baseline: str
    throughput_difference: Estimate

    def to_dict(self) -> dict[str, Any]:
        value, se = self.throughput_difference
        return {"policy": self.policy, "baseline": self.baseline, "throughput_difference": value, "se": _or_null(se)}


@dataclass(frozen=True)
class Comparison:
    """Policies in one world, paired cluster by cluster; the first one is the baseline of all differences.

    Attributes:
        policies: one result a policy, in the order asked for.
        rounds: rounds each policy played; None on a trace, where that number depends on the policy.
        seed: what the random draws came from, if it was a whole number.
    """

    policies: tuple[PolicyResult, ...]
    rounds: int | None = None
    seed: int | None = None

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Every policy but the first against the first."""
        first, *rest = self.policies
        return tuple(Difference(x.policy, first.policy, paired(x.clusters, first.clusters)) for x in rest)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop simulate`; nan becomes null."""
        return {"rounds": self.rounds, "seed": self.seed, "policies": [x.to_dict() for x in self.policies],
                "differences": [x.to_dict() for x in self.differences]}  # fmt: skip


@dataclass(frozen=True)
class TraceComparison(Comparison):
    """Policies replayed on a trace; clusters are requests.

    Attributes:
        draft_time, verify_time: the times used, V(0..K).
        cost_origin: `measured` with the trace, or `declared` by the caller.
        scored_on: `all` requests, or the `test half` if some policy's signal was fitted on the other half.
        level: of the intervals.
    """

    draft_time: float = math.nan
    verify_time: tuple[float, ...] = ()
    cost_origin: str = "declared"
    scored_on: str = "all"
    level: float = 0.95

    @property
    def num_requests(self) -> int:
        """Requests scored, the same for every policy."""
        return self.policies[0].num_clusters

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop replay`; nan becomes null."""
        shared = super().to_dict()
        for entry, result in zip(shared["policies"], self.policies, strict=True):
            entry["signal"] = result.signal
            bounds = interval(result.throughput, result.num_clusters, self.level)
            entry["throughput_interval"] = [_or_null(x) for x in bounds]
        return {**shared, "num_requests": self.num_requests, "level": self.level, "scored_on": self.scored_on,
                "draft_time": self.draft_time, "verify_time": list(self.verify_time),
                "cost_origin": self.cost_origin}  # fmt: skip


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
