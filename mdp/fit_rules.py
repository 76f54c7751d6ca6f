r"""Rules whose parameters are fitted to the training half of a trace, as their sources fit them.

*Threshold by ROC* (Hugging Face): the samples are the drafted tokens at the positions of the text, with their draft
probability and whether they were accepted: what verification reveals, and nothing behind a rejection. The threshold
minimises FPR + 3 FNR over the probabilities that occur, the greatest of equals.

*Classifier* (DISCO): the same samples, each at every place of a round where it can stand with all candidates before it
accepted; a network of one hidden layer of `UNITS`, least cross-entropy by L-BFGS from fixed starting weights, with a
small quadratic penalty. Features are standardised for the fit, and that is folded into the weights. Then the
threshold, which the paper tunes, is the one of `THRESHOLDS` that earns most on the training half.

*Lengths* (last round): from the best fixed length, one entry at a time by one candidate up or down, as long as the
throughput on the training half rises. A local optimum, no more.

A rule that cannot be fitted to what there is (one class only) stays as it is.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from mdp.fit import position_signal
from mdp.policy import Policy
from mdp.rules.confidence import HFConfidence
from mdp.rules.heads import Disco
from mdp.rules.lengths import LastRound
from mdp.trace import Trace

__all__ = ["fit_rule", "roc_threshold"]

FN_WEIGHT = 3.0
UNITS, PENALTY, MAX_SAMPLES, STEPS = 8, 1e-4, 8_000, 200
THRESHOLDS = tuple(n / 10 for n in range(1, 10))


def fit_rule(
    trace: Trace, policy: Policy, requests: Int[np.ndarray, " train"], throughput: Callable[[Policy], float]
) -> Policy:
    """The rule with its parameters fitted to the given requests.

    Args:
        trace: a recorded pair.
        policy: a rule of `HFConfidence`, `Disco` or `LastRound`.
        requests: the training half.
        throughput: what a rule earns on it.

    Raises:
        ValueError: if it is no rule that can be fitted.
    """
    match policy:
        case HFConfidence():
            positions = _positions(trace, requests)
            prob = position_signal(trace, "draft_prob")[positions]
            return replace(policy, threshold=roc_threshold(prob, trace.accepted[positions], policy.threshold))
        case Disco():
            trained = _train(trace, policy, requests)
            return max((replace(trained, threshold=t) for t in THRESHOLDS), key=throughput)
        case LastRound():
            return _climb(policy, trace.max_candidates, throughput)
    raise ValueError(f"policy {type(policy).__name__}: cannot be fitted")


def _positions(trace: Trace, requests: np.ndarray) -> np.ndarray:
    chosen = np.isin(np.arange(trace.num_requests), requests)
    return np.flatnonzero(np.repeat(chosen, np.diff(trace.offsets)))


def roc_threshold(
    prob: Float[np.ndarray, " n"], accepted: Bool[np.ndarray, " n"], default: float, fn_weight: float = FN_WEIGHT
) -> float:
    """The threshold t on "accepted iff prob >= t" with the least FPR + `fn_weight` FNR; `default` for one class.

    Example:
        >>> roc_threshold(np.array([0.2, 0.4, 0.6, 0.9]), np.array([False, True, False, True]), 0.5)
        0.4
    """
    if accepted.all() or not accepted.any():
        return default
    thresholds = np.unique(prob)
    hits, misses = np.sort(prob[accepted]), np.sort(prob[~accepted])
    missed = np.searchsorted(hits, thresholds) / len(hits)
    false_alarms = 1.0 - np.searchsorted(misses, thresholds) / len(misses)
    loss = false_alarms + fn_weight * missed
    return float(thresholds[np.flatnonzero(loss <= loss.min() + 1e-12)[-1]])


def _samples(trace: Trace, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, 4] in the order of `Disco.score` and labels [n]; every sample at every place it can stand at."""
    positions = _positions(trace, requests)
    places = np.zeros(trace.num_positions, dtype=np.int64)  # accepted in a row before, within the request
    starts = set(trace.offsets[:-1].tolist())
    for i in range(1, trace.num_positions):
        places[i] = 0 if i in starts or not trace.accepted[i - 1] else places[i - 1] + 1
    most = np.minimum(places[positions] + 1, trace.max_candidates)
    rows = np.repeat(positions, most)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(most) - most, most) + 1
    shown = [position_signal(trace, name)[rows] for name in ("top_prob", "draft_prob", "entropy")]
    features, labels = np.stack([*shown, place], axis=1).astype(float), trace.accepted[rows].astype(float)
    kept = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_SAMPLES)).astype(np.int64))
    return features[kept], labels[kept]


def _train(trace: Trace, policy: Disco, requests: np.ndarray) -> Disco:
    from scipy.optimize import minimize
    from scipy.special import expit

    features, labels = _samples(trace, requests)
    if labels.min() == labels.max():
        return policy
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    inputs = np.column_stack([(features - centre) / spread, np.ones(len(features))])
    width = inputs.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        inner, outer = flat[: UNITS * width].reshape(UNITS, width), flat[UNITS * width :]
        sums = inputs @ inner.T
        active = np.column_stack([np.maximum(sums, 0.0), np.ones(len(sums))])
        score = active @ outer
        entropy = np.mean(np.logaddexp(0.0, score) - labels * score)
        error = (expit(score) - labels) / len(labels)
        back = (error[:, None] * outer[:-1] * (sums > 0)).T @ inputs
        gradient = np.concatenate([back.ravel(), active.T @ error]) + PENALTY * flat
        return float(entropy + PENALTY / 2 * flat @ flat), gradient

    start = np.random.default_rng(0).normal(scale=0.5, size=UNITS * width + UNITS + 1)
    flat = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    inner, outer = flat[: UNITS * width].reshape(UNITS, width), flat[UNITS * width :]
    slopes = inner[:, :-1] / spread
    bias = inner[:, -1] - slopes @ centre
    return replace(
        policy,
        inner=tuple(tuple(map(float, (*unit, b))) for unit, b in zip(slopes, bias, strict=True)),
        outer=tuple(map(float, outer)),
    )


def _climb(policy: LastRound, depth: int, throughput: Callable[[Policy], float]) -> LastRound:
    size = len(policy.lengths)
    best = max((replace(policy, lengths=(k,) * size, first=k) for k in range(depth + 1)), key=throughput)
    value, rising = throughput(best), True
    while rising:
        rising = False
        for entry in range(size):
            for change in (-1, 1):
                lengths = list(best.lengths)
                lengths[entry] += change
                if not 0 <= lengths[entry] <= depth:
                    continue
                other = replace(best, lengths=tuple(lengths))
                if (earned := throughput(other)) > value:
                    best, value, rising = other, earned, True
    return best
