r"""Signals on a trace: what a rule may look at, turned into acceptance probabilities and regimes.

Beside each drafted token a real pair shows a *signal*: the draft's probability of the token, its entropy, an
acceptance head's output. Rules are written in survival $S_k$, so a `SignalModel` maps the signal $s$ of a candidate to
$a(s) = P(\text{accepted} \mid s, \text{all earlier ones accepted})$ and takes
$S_k = \prod_{i \le k} a(s_i)$ over the round. `token_accept_prob` $= \min(1, p/q)$ is that probability already (a
perfect head) and is used as it is. The others are calibrated by isotonic regression, decreasing for the entropy and
increasing for the rest. What is regressed is `token_accept_prob`, not the accepted flag: both have the same
conditional mean given the signal, and the probability has the smaller variance because the coin is not tossed.

For rules that look ahead the signal is also binned (8 quantiles) into regimes 1..8, with regime 0 the round's start,
and the draft's own chain over them is counted: from each position of the text to the next candidate the draft would
have drafted, which is the next position if the token was accepted and the first step of its rollout if not.
The first candidate's law is the marginal one over positions. Everything is fitted on one half of the requests
(`split_requests`) and must be scored on the other.

A rule meets a signal through `start`, `update` and `observation`, in arrays (`simulate.replay`) or in floats
(live decoding): there is one mechanism, so a rule cannot see anything else in the two worlds.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mdp.acceptance import MarkovModulated
from mdp.policy import SIGNALS, Observation
from mdp.trace import Trace

__all__ = ["NUM_BINS", "SignalModel", "SignalState", "fit_signal", "position_signal", "split_requests"]

NUM_BINS = 8
PERFECT = SIGNALS[0]
DECREASING = ("entropy",)
RECORDED_ID = re.compile(r"([0-9a-f]{64})-[0-9]+")


class SignalState(NamedTuple):
    """What is known of the round so far: `survival`, the `regime` of the last candidate (0 at the start), how many."""

    survival: Any
    regime: Any
    count: Any = 0


@dataclass(frozen=True, eq=False)
class SignalModel:
    """How one signal becomes acceptance probability, survival and regime; see the module docstring.

    Attributes:
        signal: the field of the trace it reads.
        knots, levels: the calibration curve, linear in between and flat outside; None: the signal is used as it is.
        edges: [Z - 2] lower edges of bins 2.. of the signal; None: no chain was fitted.
        transition: [Z, Z] the draft's chain over regimes, first row the law of a round's first candidate.
        regime_accept_prob: [Z] mean acceptance in each regime; entry 0 is never read by a solver.
        lag: how many candidates late the signal is; those not scored yet count as accepted.
    """

    signal: str = PERFECT
    knots: np.ndarray | None = None
    levels: np.ndarray | None = None
    edges: np.ndarray | None = None
    transition: np.ndarray | None = None
    regime_accept_prob: np.ndarray | None = None
    lag: int = 0

    def accept_prob(self, values: Any) -> Any:
        """Acceptance probability of a candidate that shows `values`: a float, or an array of them."""
        if self.knots is None or self.levels is None:
            return np.clip(values, 0.0, 1.0)  # float32 ratios may pass 1 by rounding (mdp.trace checks by how much)
        return np.interp(values, self.knots, self.levels)

    def regime(self, values: Any) -> Any:
        """The bin, 1.., of a candidate that shows `values`; 0 everywhere if no chain was fitted."""
        if self.edges is None:
            return np.zeros(np.shape(values), dtype=np.int64)[()]
        return 1 + np.searchsorted(self.edges, values, side="right")

    @cached_property
    def next_accept_prob(self) -> Float[np.ndarray, " Z"] | None:
        r"""$\bar a(z) = \sum_{z'} P(z, z') a(z')$ for each regime."""
        if self.transition is None or self.regime_accept_prob is None:
            return None
        return self.transition @ self.regime_accept_prob

    def start(self, size: int | None = None) -> SignalState:
        """The state before the first candidate: of one round, or of `size` rounds at once."""
        if size is None:
            return SignalState(1.0, 0)
        return SignalState(np.ones(size), np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))

    def update(self, state: SignalState, features: Mapping[str, Any]) -> SignalState:
        """The state after one more candidate, which shows `features`."""
        values = features[self.signal]
        accept_prob = self.accept_prob(values)
        if self.lag:
            accept_prob = np.where(state.count < self.lag, 1.0, accept_prob)[()]
        return SignalState(state.survival * accept_prob, self.regime(values), state.count + 1)

    def observation(self, state: SignalState, num_candidates: Any, features: Mapping[str, Any]) -> Observation:
        """What a rule sees with `num_candidates` drafted; `features` are the last candidate's, other names ignored."""
        ahead = None if self.next_accept_prob is None else self.next_accept_prob[state.regime]
        regime = None if self.transition is None else state.regime
        shown = {name: value for name, value in features.items() if name in Observation._fields}
        return Observation(num_candidates, survival=state.survival, next_accept_prob=ahead, regime=regime, **shown)

    def process(self) -> MarkovModulated:
        """The chain as an acceptance process whose rounds start in regime 0.

        Raises:
            ValueError: if no chain was fitted.
        """
        if self.transition is None or self.regime_accept_prob is None:
            raise ValueError(f"signal {self.signal}: no chain was fitted")
        return MarkovModulated(self.transition, self.regime_accept_prob, np.eye(len(self.transition))[0])

    def to_dict(self) -> dict[str, Any]:
        """The model in plain lists; `SignalModel.from_dict` gives it back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SignalModel":
        """A model from `to_dict`.

        Raises:
            ValueError: if a key is unknown or the signal is.
        """
        known = cls.__dataclass_fields__
        unknown = [key for key in data if key not in known]
        if unknown or data.get("signal") not in SIGNALS:
            what = f"unknown key {unknown[0]!r}" if unknown else f"signal must be one of {', '.join(SIGNALS)}"
            raise ValueError(f"signal model: {what}")
        arrays = {key: np.array(value, dtype=float) for key, value in data.items() if isinstance(value, list)}
        return cls(signal=data["signal"], lag=int(data.get("lag", 0)), **arrays)


def split_requests(trace: Trace, share: float = 0.5) -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]:
    """Requests to fit on and requests to score on, by the order of their ids' hashes: nobody chooses.

    `share` of all are to fit on; those of a smaller share are among those of a larger one.

    Recorded requests with the same prompt (ids "SHA-256 of the prompt-number") stay together, or a prompt would be
    scored on itself.

    Raises:
        ValueError: if there are fewer than two different prompts.
    """
    ids, groups = trace.request_ids, dict[str, list[int]]()
    for request, name in enumerate(ids):
        prompt = RECORDED_ID.fullmatch(name)
        groups.setdefault(prompt[1] if prompt else name, []).append(request)
    if len(groups) < 2:
        raise ValueError(f"trace: a fitted signal needs at least 2 different prompts to split, got {len(groups)}")
    order = sorted(groups.values(), key=lambda group: hashlib.sha256(ids[group[0]].encode()).hexdigest())
    sizes = np.cumsum([len(group) for group in order])
    cut = int(np.clip(np.searchsorted(sizes, int(len(ids) * share), side="right"), 1, len(order) - 1))
    train, test = (np.array(sorted(chain.from_iterable(part))) for part in (order[:cut], order[cut:]))
    return train, test


def position_signal(trace: Trace, signal: str, rollout: bool = False) -> Float[np.ndarray, " n"]:
    """A signal at every position of the text, or at every rollout step.

    Raises:
        ValueError: if the trace does not hold it.
    """
    features, key = (trace.rollout_features, f"rollout_{signal}") if rollout else (trace.features, signal)
    values = features.get(signal, trace.optional.get(key))
    if values is None:
        raise ValueError(f"trace: {signal} is not recorded{' along rollouts' if rollout else ''}")
    return np.asarray(values, dtype=np.float64)


def fit_signal(
    trace: Trace, signal: str, requests: Int[np.ndarray, " train"], *, edges: Float[np.ndarray, " Z-2"] | None = None
) -> SignalModel:
    """Calibration and chain of one signal, from the given requests alone; no chain for a signal that comes late.

    `edges` of the bins; None takes quantiles of these requests.

    Raises:
        ValueError: if the trace does not hold the signal, or no rollouts.
    """
    if trace.rollout_offsets is None:
        raise ValueError(f"trace: signal {signal} cannot be fitted without rollouts")
    chosen = np.isin(np.arange(trace.num_requests), requests)
    positions = np.flatnonzero(np.repeat(chosen, np.diff(trace.offsets)))
    lag = trace.head_lag if signal == "head" else 0
    if lag:
        # Where the state that tells the score was not recorded, no round gets to see it.
        positions = positions[np.isfinite(position_signal(trace, signal)[positions])]
    values = position_signal(trace, signal)[positions]
    accept_prob = np.clip(position_signal(trace, PERFECT)[positions], 0.0, 1.0)
    knots = levels = None
    if signal != PERFECT:
        knots, levels = _calibrate(values, accept_prob, increasing=signal not in DECREASING)
    if lag:
        return SignalModel(signal, knots, levels, lag=lag)
    binned = SignalModel(signal, knots, levels, edges=_edges(values) if edges is None else edges)
    here, there = _transitions(trace, binned, positions)
    size = 2 + len(binned.edges)  # type: ignore[arg-type]
    regimes = binned.regime(values)
    marginal = np.bincount(regimes, minlength=size)
    counts = np.zeros((size, size))
    np.add.at(counts, (here, there), 1.0)
    # The start, and a bin that was only ever seen at the end of a text, are followed by the marginal law.
    counts[counts.sum(axis=1) == 0] = marginal
    accepted = np.bincount(regimes, weights=accept_prob, minlength=size)
    mean = np.full(size, accepted.sum() / marginal.sum())
    np.divide(accepted, marginal, out=mean, where=marginal > 0)
    return SignalModel(signal, knots, levels, binned.edges, counts / counts.sum(axis=1, keepdims=True), mean)


def _calibrate(values: np.ndarray, accept_prob: np.ndarray, increasing: bool) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression as the corners of its curve; equal signals are pooled first, so they get one level."""
    from scipy.optimize import isotonic_regression

    points, which, weights = np.unique(values, return_inverse=True, return_counts=True)
    means = np.bincount(which, weights=accept_prob) / weights
    levels = np.clip(isotonic_regression(means, weights=weights, increasing=increasing).x, 0.0, 1.0)
    change = np.flatnonzero(np.diff(levels)) + 1
    corners = np.unique(np.concatenate([[0], change - 1, change, [len(levels) - 1]]))
    corners = corners[corners >= 0]
    return points[corners], levels[corners]


def _edges(values: np.ndarray) -> np.ndarray:
    """Lower edges of all bins but the first. Each is a value that occurs and exceeds the least: no bin is empty."""
    quantiles = np.quantile(values, np.arange(1, NUM_BINS) / NUM_BINS, method="inverted_cdf")
    edges = np.unique(quantiles)
    return edges[edges > values.min()]


def _transitions(trace: Trace, model: SignalModel, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regimes of all pairs (candidate, the draft's next candidate) that start at the given positions."""
    assert trace.rollout_offsets is not None
    on_path = model.regime(position_signal(trace, model.signal))
    rolled = model.regime(position_signal(trace, model.signal, rollout=True))
    last = np.zeros(trace.num_positions, dtype=bool)
    last[trace.offsets[1:] - 1] = True
    stays = positions[trace.accepted[positions] & ~last[positions] & ~trace.drafts_end[positions]]
    first, end = trace.rollout_offsets[positions], trace.rollout_offsets[positions + 1]
    leaves = end > first
    here = np.concatenate([on_path[stays], on_path[positions[leaves]]])
    return here, np.concatenate([on_path[stays + 1], rolled[first[leaves]]])
