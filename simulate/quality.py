r"""How good predicted acceptance probabilities are, and what a rule on them earns.

A prediction $m_t$ meets the true probability $a_t$ = min(1, p/q) of the drafted token, so nothing is lost to the coin:

* binary KL divergence, the mean of $a \ln\frac{a}{m} + (1 - a) \ln\frac{1 - a}{1 - m}$ in nats (SpecDec++'s figure);
* AUROC, the probability that an accepted token is ranked above a rejected one, each token counting as accepted with
  weight a and as rejected with weight 1 - a; ties count half;
* Brier score, the mean of $a (1 - m)^2 + (1 - a) m^2$, its expectation over the coin;
* ECE, the mean over ten bins of equally many tokens of |mean m - mean a|.

They are taken over positions of the text, where every earlier candidate was accepted: that is the acceptance of which
survival is the product. Standard errors are by resampling requests.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mdp.cost import Cost
from mdp.fit import PERFECT, SignalModel, position_signal
from mdp.metrics import Tally
from mdp.trace import Trace
from simulate.estimate import Estimate, ratio
from simulate.replay import replay_rounds

__all__ = ["Earned", "Quality", "best_of", "best_on", "earned", "on_path", "quality", "reliability"]

NUM_BINS = 10
RESAMPLES = 200
LEAST = 1e-6  # a probability nearer to 0 or 1 is scored as this


class Quality(NamedTuple):
    """Figures of the module docstring, each with its standard error."""

    kl: Estimate
    auroc: Estimate
    ece: Estimate
    brier: Estimate


class Earned(NamedTuple):
    """What a policy earns: its throughput, and the tally by request that it is from."""

    policy: str
    throughput: Estimate
    tally: Tally


def on_path(
    trace: Trace, requests: Int[np.ndarray, " r"], predicted: Float[np.ndarray, " N"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, acceptance probability and request of the positions of some requests; unscored ones are left out."""
    owner = np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets))
    chosen = np.isin(owner, requests) & np.isfinite(predicted)
    accept_prob = np.clip(position_signal(trace, PERFECT), 0.0, 1.0)
    return np.asarray(predicted, dtype=np.float64)[chosen], accept_prob[chosen], owner[chosen]


def quality(
    predicted: Float[np.ndarray, " n"],
    accept_prob: Float[np.ndarray, " n"],
    request: Int[np.ndarray, " n"],
    seed: int = 0,
) -> Quality:
    """All four figures.

    Raises:
        ValueError: if there are no predictions, or one is no probability.

    Example:
        >>> sure = quality(np.array([0.9, 0.9, 0.2]), np.array([1.0, 0.8, 0.2]), np.array([0, 1, 2]))
        >>> round(sure.kl.value, 3), round(sure.brier.value, 3), round(sure.auroc.value, 3)
        (0.05, 0.113, 0.85)
    """
    predicted, accept_prob = np.asarray(predicted, dtype=np.float64), np.asarray(accept_prob, dtype=np.float64)
    if predicted.size == 0 or not ((predicted >= 0) & (predicted <= 1)).all():
        raise ValueError("predicted: must be probabilities, at least one")
    order = np.argsort(predicted, kind="stable")
    m, a, owner = predicted[order], accept_prob[order], np.unique(request, return_inverse=True)[1][order]
    values = _figures(m, a, np.ones(len(m)))
    count = int(owner.max()) + 1
    if count < 2:
        return Quality(*(Estimate(float(value), float("nan")) for value in values))
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    again = np.array([_figures(m, a, times[owner].astype(float)) for times in drawn])
    spread = np.nanstd(again, axis=0, ddof=1) * np.sqrt(count / (count - 1))
    return Quality(*(Estimate(float(value), float(se)) for value, se in zip(values, spread, strict=True)))


def _figures(m: np.ndarray, a: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """KL, AUROC, ECE, Brier of predictions in ascending order, each counted `weight` times."""
    total = weight.sum()
    safe = np.clip(m, LEAST, 1.0 - LEAST)
    kl = _times_log(a, a / safe) + _times_log(1.0 - a, (1.0 - a) / (1.0 - safe))
    brier = a * (1.0 - m) ** 2 + (1.0 - a) * m**2
    accepted, rejected = weight * a, weight * (1.0 - a)
    _, tie = np.unique(m, return_inverse=True)
    up, down = np.bincount(tie, accepted), np.bincount(tie, rejected)
    pairs = up.sum() * down.sum()
    auroc = (up * (np.cumsum(down) - 0.5 * down)).sum() / pairs if pairs > 0 else np.nan
    gaps = [abs(row["predicted"] - row["accepted"]) * row["count"] for row in _bins(m, a, weight)]
    return np.array([(weight * kl).sum() / total, auroc, sum(gaps) / total, (weight * brier).sum() / total])


def _times_log(x: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, ratio, 1.0))


def _bins(m: np.ndarray, a: np.ndarray, weight: np.ndarray) -> list[dict[str, float]]:
    """Ten bins of equally many tokens, predictions ascending; equal predictions may fall into two."""
    edge = np.cumsum(weight) - 0.5 * weight
    at = np.minimum((edge * NUM_BINS / weight.sum()).astype(np.int64), NUM_BINS - 1)
    counts, predicted, accepted = (np.bincount(at, x, NUM_BINS) for x in (weight, weight * m, weight * a))
    return [
        {"count": float(n), "predicted": float(p / n), "accepted": float(q / n)}
        for n, p, q in zip(counts, predicted, accepted, strict=True)
        if n > 0
    ]


def reliability(predicted: Float[np.ndarray, " n"], accept_prob: Float[np.ndarray, " n"]) -> list[dict[str, float]]:
    """The bins of ECE, lowest predictions first: `count`, mean `predicted`, mean `accepted`."""
    order = np.argsort(predicted, kind="stable")
    return _bins(np.asarray(predicted)[order], np.asarray(accept_prob)[order], np.ones(len(order)))


def earned(
    trace: Trace, policy: str, requests: Int[np.ndarray, " r"], cost: Cost, model: SignalModel | None = None
) -> Earned:
    """What one policy earns on some requests; `model` of its signal, None fits it on the training half."""
    log = replay_rounds(trace, policy, cost=cost, model=model, requests=requests.tolist())
    tally = log.tally(cost.round_times(trace.max_candidates), np.unique(requests))
    return Earned(policy, ratio(tally.num_emitted, tally.time), tally)


def best_of(
    trace: Trace, policies: Iterable[str], requests: Int[np.ndarray, " r"], cost: Cost, model: SignalModel | None = None
) -> Earned:
    """The policy that earns most on these requests, of equals the first."""
    return max((earned(trace, text, requests, cost, model) for text in policies), key=lambda x: x.throughput.value)


def best_on(
    trace: Trace, policies: Iterable[str], train: Int[np.ndarray, " r"], test: Int[np.ndarray, " q"], cost: Cost,
    model: SignalModel | None = None,
) -> Earned:  # fmt: skip
    """The policy that earns most on `train`, and what it earns on `test`."""
    return earned(trace, best_of(trace, policies, train, cost, model).policy, test, cost, model)
