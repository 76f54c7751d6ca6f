r"""Throughput from clusters: ratio estimates, their standard errors, and paired differences.

Throughput is a ratio of sums, $\hat\rho = \sum_i N_i / \sum_i T_i$, over *clusters* $i$ that are independent of each
other: replicas of a simulation, requests of a trace. Rounds inside a cluster may depend on each other in any way.
With the linearisation $e_i = (N_i - \hat\rho T_i) / \sum_j T_j$ the delta method gives

$$\mathrm{se}(\hat\rho)^2 = \frac{n}{n-1} \sum_i e_i^2 .$$

Two policies that met the same clusters are compared by the same formula on $e^A_i - e^B_i$: what the clusters share
cancels before it is squared, which is the whole gain of common random numbers. Intervals use Student's t with
$n - 1$ degrees of freedom. One cluster has no standard error: it is nan here and null in JSON.

Where clusters are few and of very different sizes the ratio is skewed, and a symmetric interval leans the wrong way.
`bca` resamples whole clusters and corrects for bias and skewness (Efron 1987, bias-corrected and accelerated), with
Student's quantiles times $\sqrt{n/(n-1)}$ in the place of normal ones (Hesterberg 2015: a bootstrap's spread is that of
n clusters known exactly, too narrow by that much). With few or very unequal clusters both intervals cover less
than they claim: an infinite tail that was not sampled is known to neither.

Two policies *tie* if the interval of their paired difference holds 0; among tied candidate lengths the smaller is
preferred (`shortest_tied`): it drafts, discards and delays less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mdp.metrics import Tally

__all__ = [
    "FEW_CLUSTERS", "Comparison", "Difference", "Estimate", "PolicyResult", "TraceComparison", "bca", "bca_paired",
    "interval", "paired", "ratio", "shortest_tied",
]  # fmt: skip

RESAMPLES = 2000
FEW_CLUSTERS = 30  # below so many a Student interval leans on a normal shape that nobody has checked


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
    _check_level(level)
    if num_clusters < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit  # not scipy.stats: importing that takes longer than most replays

    half = float(stdtrit(num_clusters - 1, 0.5 + level / 2)) * estimate.se
    return estimate.value - half, estimate.value + half


def bca(
    emitted: Float[np.ndarray, "*B n"], time: Float[np.ndarray, "*B n"], level: float = 0.95, seed: int = 0
) -> tuple[Float[np.ndarray, "*B"], Float[np.ndarray, "*B"]]:
    """Bootstrap interval of the ratio of sums, clusters resampled; over the last axis. nan for one cluster.

    Raises:
        ValueError: if `level` is not strictly between 0 and 1.
    """
    return _bootstrap((emitted, time), lambda e, t: e / t, level, seed)


def bca_paired(first: Tally, second: Tally, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the throughput of `first` minus that of `second`, clusters resampled together.

    Raises:
        ValueError: if `level` is not strictly between 0 and 1.
    """
    columns = (first.num_emitted, first.time, second.num_emitted, second.time)
    low, high = _bootstrap(columns, lambda e, t, f, u: e / t - f / u, level, seed)
    return float(low), float(high)


def _bootstrap(columns: tuple, of_sums: Any, level: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """BCa of a function of sums over the last axis. A resample is how often each cluster was drawn."""
    from scipy.special import ndtr, ndtri, stdtrit  # not scipy.stats: importing that takes longer than the work

    _check_level(level)
    arrays = [np.asarray(column, dtype=float) for column in columns]
    value, count = np.asarray(of_sums(*(x.sum(-1) for x in arrays))), arrays[0].shape[-1]
    if count < 2:
        return np.full(value.shape, math.nan), np.full(value.shape, math.nan)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).T.astype(float)
    resampled = np.sort(of_sums(*(x @ drawn for x in arrays)), axis=-1)
    without = of_sums(*(x.sum(-1, keepdims=True) - x for x in arrays))
    leans = without.mean(-1, keepdims=True) - without
    spread = np.square(leans).sum(-1)
    sure = spread <= (1e-12 * (1.0 + np.abs(value))) ** 2  # no cluster matters: nothing is spread, nothing to correct
    acceleration = (leans**3).sum(-1) / (6.0 * np.where(sure, 1.0, spread) ** 1.5)
    at, half = value[..., None], 0.5 / RESAMPLES
    below = ((resampled < at).mean(-1) + (resampled <= at).mean(-1)) / 2.0
    shift = ndtri(np.clip(below, half, 1.0 - half))
    ends, widened = [], math.sqrt(count / (count - 1))
    for share in ((1.0 - level) / 2.0, (1.0 + level) / 2.0):
        moved = shift + widened * float(stdtrit(count - 1, share))
        quantile = ndtr(shift + moved / (1.0 - acceleration * moved))
        rank = np.clip(quantile * (RESAMPLES - 1), 0, RESAMPLES - 1)
        least = np.floor(rank).astype(int)[..., None]
        left, right = (np.take_along_axis(resampled, np.minimum(least + i, RESAMPLES - 1), -1)[..., 0] for i in (0, 1))
        ends.append(np.where(sure, value, left + (rank - least[..., 0]) * (right - left)))
    return ends[0], ends[1]


def shortest_tied(options: Sequence[tuple[np.ndarray, np.ndarray]], level: float = 0.95) -> int:
    """Index of the first option that ties with the best one; options are (emitted, time) of the same clusters.

    Raises:
        ValueError: if `level` is not strictly between 0 and 1.
    """
    best = max(options, key=lambda option: ratio(*option).value)
    for index, option in enumerate(options):
        terms = _linearised(*best) - _linearised(*option)
        ahead = Estimate(ratio(*best).value - ratio(*option).value, _standard_error(terms))
        if not interval(ahead, len(terms), level)[0] > 0:
            return index
    raise AssertionError("the best option ties with itself")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: must lie strictly between 0 and 1, got {level!r}")


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
        rollouts: whether what was drafted past a rejection is `recorded`, `imputed` (made up), or there is `none`.
    """

    draft_time: float = math.nan
    verify_time: tuple[float, ...] = ()
    cost_origin: str = "declared"
    scored_on: str = "all"
    level: float = 0.95
    rollouts: str = "recorded"

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
            ends = bca(result.clusters.num_emitted, result.clusters.time, self.level)
            entry["throughput_bca"] = [_or_null(float(x)) for x in ends]
        return {**shared, "num_requests": self.num_requests, "level": self.level, "scored_on": self.scored_on,
                "draft_time": self.draft_time, "verify_time": list(self.verify_time),
                "cost_origin": self.cost_origin, "rollouts": self.rollouts}  # fmt: skip


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
