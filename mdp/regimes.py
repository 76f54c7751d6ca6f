r"""Hidden regimes fitted to what was accepted: expectation maximisation for a hidden Markov chain.

Along a text the flags $F_1, F_2, \dots$ (was the draft's token accepted?) are taken to come from a chain of regimes,
$z_0 \sim$ `initial`, $z_i \sim P(z_{i-1}, \cdot)$, $F_i \sim$ Bernoulli$(a(z_i))$, requests independent. If a signal is
given too, binned into symbols $o_i \sim O(z_i, \cdot)$, it helps to tell the regimes apart. Each step of EM (Baum,
Petrie, Soules and Weiss 1970) computes how likely each regime and each move was given the whole sequence, by scaled
forward and backward passes, and re-estimates by weighted counts; the likelihood never falls. It ends where a step
gains less than `tol` per observation, and the fit says whether it got there. The likelihood has several peaks: EM
starts from `restarts` random points and the best end is kept.

*What it is*: the regimes that predict flags along the target's text. The draft's own chain past an unseen rejection is
not in the flags; where regimes are a property of the text (code or prose, an easy or a hard stretch) the two agree.
As a process the regimes are then *visible*: what the fitted process earns is a ceiling for rules that must infer them.

*Identifiability.* Regimes are known up to their order (here: by falling acceptance) only if they differ in what they
show and P has full rank: with equal rows of P, flags are independent and *any* split of their mean fits as well. The
report gives the least gap between regimes, the least singular value of P, the share of restarts that came to the same
peak, and the gain over one regime fewer in the Bayesian information criterion; `weak` says which of these fails.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mdp.acceptance import MarkovModulated
from mdp.trace import Trace

__all__ = ["RegimeFit", "fit_regimes", "flag_sequences"]

SAME_PEAK = 1e-3  # log-likelihoods per observation that differ by less, times ten, are one peak
LEAST_GAP, LEAST_RANK, LEAST_SHARE = 0.05, 0.1, 0.02
MAX_REGIMES = 16


@dataclass(frozen=True, eq=False)
class RegimeFit:
    """A fitted chain and how far it can be trusted.

    Attributes:
        process: regimes in the order of falling acceptance.
        symbols: [Z, O] law of the signal's bins in each regime; None if none were given.
        log_likelihood: of all sequences; `restart_log_likelihoods` of each restart's end, best first.
        num_observations, num_steps, converged: of the best restart.
        occupancy: [Z] expected share of positions in each regime.
        bic_gain: of these regimes over one fewer; positive speaks for them; nan for one regime.
    """

    process: MarkovModulated
    symbols: Float[np.ndarray, "Z O"] | None
    log_likelihood: float
    restart_log_likelihoods: tuple[float, ...]
    num_observations: int
    num_steps: int
    converged: bool
    occupancy: Float[np.ndarray, " Z"]
    bic_gain: float

    @property
    def identifiability(self) -> dict[str, Any]:
        """What the regimes' identity rests on; `weak` lists what fails."""
        size = self.process.num_regimes
        if size == 1:
            return {"gap": None, "least_singular_value": None, "restarts_agreeing": None, "bic_gain": None, "weak": []}
        gap = float(-np.diff(self.process.accept_prob).max())
        if self.symbols is not None:
            apart = 0.5 * np.abs(self.symbols[:, None] - self.symbols[None]).sum(axis=2)
            gap = max(gap, float(apart[~np.eye(size, dtype=bool)].min()))
        rank = float(np.linalg.svd(self.process.transition, compute_uv=False).min())
        ends = np.array(self.restart_log_likelihoods)
        agreeing = float(np.mean(ends >= ends[0] - 10 * SAME_PEAK * max(1.0, abs(ends[0]) / self.num_observations)))
        weak = [
            why
            for why, fails in (
                (f"two regimes show nearly the same (gap {gap:.3f})", gap < LEAST_GAP),
                (f"the transition matrix is nearly singular ({rank:.3f}): regimes hardly last", rank < LEAST_RANK),
                (f"a regime is hardly visited ({self.occupancy.min():.3f})", self.occupancy.min() < LEAST_SHARE),
                ("no other restart came to this peak", agreeing <= 1 / len(ends) and len(ends) > 1),
                (f"one regime fewer is as good (BIC gain {self.bic_gain:.1f})", self.bic_gain <= 0),
                ("EM ran out of steps", not self.converged),
            )
            if fails
        ]
        return {"gap": gap, "least_singular_value": rank, "restarts_agreeing": agreeing, "bic_gain": self.bic_gain,
                "weak": weak}  # fmt: skip


def flag_sequences(trace: Trace) -> list[np.ndarray]:
    """The acceptance flags of each request's text."""
    return np.split(np.asarray(trace.accepted, dtype=bool), trace.offsets[1:-1])


def fit_regimes(
    sequences: Trace | Sequence[np.ndarray],
    num_regimes: int,
    *,
    symbols: Sequence[np.ndarray] | None = None,
    key: int = 0,
    restarts: int = 8,
    max_steps: int = 500,
    tol: float = 1e-7,
    compare: bool = True,
) -> RegimeFit:
    """The most likely chain of `num_regimes` hidden regimes, by EM from several random starts.

    Args:
        sequences: a trace, or one row of flags per request.
        num_regimes: Z, in 1..16.
        symbols: per request the signal's bins 0, 1, .., as long as its flags.
        key: of the random starts.
        restarts, max_steps, tol: see the module docstring.
        compare: False leaves out the fit of one regime fewer, and `bic_gain` is nan.

    Raises:
        ValueError: naming the argument and what is allowed.

    Example:
        >>> fit = fit_regimes([np.array([1, 1, 0, 1]), np.array([1, 0])], 1)
        >>> fit.process.accept_prob.round(6).tolist(), round(fit.log_likelihood, 6)
        ([0.666667], -3.819085)
    """
    rows = flag_sequences(sequences) if isinstance(sequences, Trace) else list(sequences)
    limits = {"num_regimes": (num_regimes, MAX_REGIMES), "restarts": (restarts, 1000), "max_steps": (max_steps, 10**6)}
    for name, (value, high) in limits.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= high:
            raise ValueError(f"{name}: must be a whole number in 1..{high}, got {value!r}")
    data = _Data.of(rows, symbols)
    fit = _best(data, num_regimes, key, restarts, max_steps, tol)
    if num_regimes == 1 or not compare:
        return fit
    fewer = _best(data, num_regimes - 1, key, restarts, max_steps, tol)
    gain = _bic(fewer, data) - _bic(fit, data)
    return RegimeFit(**{**vars(fit), "bic_gain": gain})


@dataclass(frozen=True, eq=False)
class _Data:
    """Sequences side by side, padded: `flags`, `there` [R, N], `codes` [R, N] or None."""

    flags: np.ndarray
    there: np.ndarray
    codes: np.ndarray | None
    num_codes: int

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], symbols: Sequence[np.ndarray] | None) -> "_Data":
        if not rows or any(np.ndim(row) != 1 or not len(row) for row in rows):
            raise ValueError("sequences: must be rows of flags, at least one and none of them empty")
        if any(not np.isin(row, (0, 1)).all() for row in rows):
            raise ValueError("sequences: every flag must be 0 or 1")
        lengths = np.array([len(row) for row in rows])
        there = np.arange(lengths.max()) < lengths[:, None]
        flags = np.zeros(there.shape)
        flags[there] = np.concatenate([np.asarray(row, dtype=float) for row in rows])
        if symbols is None:
            return cls(flags, there, None, 0)
        if len(symbols) != len(rows) or any(len(s) != len(row) for s, row in zip(symbols, rows, strict=False)):
            raise ValueError("symbols: must be one row per sequence, each as long as its flags")
        joined = np.concatenate([np.asarray(row) for row in symbols])
        if joined.dtype.kind not in "iu" or joined.min() < 0 or joined.max() > 255:
            raise ValueError("symbols: must be whole numbers in 0..255")
        codes = np.zeros(there.shape, dtype=np.int64)
        codes[there] = joined
        return cls(flags, there, codes, int(joined.max()) + 1)


class _Chains:
    """One chain a restart: `initial` [B, Z], `transition` [B, Z, Z], `accept` [B, Z], `emit` [B, Z, O]."""

    def __init__(self, data: _Data, size: int, key: int, restarts: int):
        rng = np.random.default_rng([key, size])
        mean = float(np.clip(data.flags[data.there].mean(), 0.01, 0.99))
        spread = np.sort(rng.beta(2 * mean, 2 * (1 - mean), (restarts, size)), axis=1)[:, ::-1]
        self.accept = np.full((restarts, size), data.flags[data.there].mean()) if size == 1 else spread
        stay = rng.uniform(0.5, 0.95, (restarts, 1, 1))
        self.transition = stay * np.eye(size) + (1 - stay) * rng.dirichlet(np.ones(size), (restarts, size))
        self.initial = np.full((restarts, size), 1 / size)
        self.emit = rng.dirichlet(np.full(max(data.num_codes, 1), 5.0), (restarts, size))


def _best(data: _Data, size: int, key: int, restarts: int, max_steps: int, tol: float) -> RegimeFit:
    """EM of all restarts side by side, until none of them gains any more."""
    chains = _Chains(data, size, key, restarts)
    count = int(data.there.sum())
    before = np.full(restarts, -np.inf)
    converged = np.zeros(restarts, dtype=bool)
    steps, shares = 0, np.zeros((restarts, size))
    while steps < max_steps and not converged.all():
        steps += 1
        found, shares = _step(data, chains)
        converged = found - before <= tol * count
        before = found
    best = int(before.argmax())
    order = np.argsort(-chains.accept[best], kind="stable")
    process = MarkovModulated(
        chains.transition[best][np.ix_(order, order)], chains.accept[best][order], chains.initial[best][order]
    )
    return RegimeFit(
        process=process,
        symbols=None if data.codes is None else chains.emit[best][order],
        log_likelihood=float(before[best]),
        restart_log_likelihoods=tuple(np.sort(before)[::-1].tolist()),
        num_observations=count,
        num_steps=steps,
        converged=bool(converged[best]),
        occupancy=shares[best][order],
        bic_gain=math.nan,
    )


def _step(data: _Data, chains: _Chains) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, "B Z"]]:
    """One step of EM in place: the log-likelihoods before it, and each regime's share of positions.

    `ahead[:, :, i]` is the law of $z_{i+1}$ given everything up to position i + 1, `behind` the likelihood of what
    follows, both scaled by the chance of each observation; $z_0$ shows nothing.
    """
    sizes = (*chains.accept.shape[:1], *data.flags.shape, chains.accept.shape[1])  # B, R, N, Z
    likely = np.where(
        data.flags[None, :, :, None] > 0, chains.accept[:, None, None, :], 1 - chains.accept[:, None, None]
    )
    if data.codes is not None:
        likely = likely * np.moveaxis(chains.emit[:, :, data.codes], 1, -1)
    likely = np.where(data.there[None, :, :, None], likely, 1.0)
    ahead, scale = np.empty(sizes), np.ones(sizes[:3])
    law = np.broadcast_to(chains.initial[:, None, :], (sizes[0], sizes[1], sizes[3]))
    for i in range(sizes[2]):
        law = law @ chains.transition * likely[:, :, i]
        total = law.sum(axis=2)
        scale[:, :, i] = np.where(data.there[:, i], total, 1.0)
        law = law / total[..., None]
        ahead[:, :, i] = law
    moves = np.zeros_like(chains.transition)
    start = np.broadcast_to(chains.initial[:, None, :], law.shape)
    behind = np.ones_like(law)
    regime = np.empty(sizes)
    backward = np.swapaxes(chains.transition, 1, 2)
    for i in range(sizes[2] - 1, -1, -1):
        on = data.there[:, i][None, :, None]
        regime[:, :, i] = ahead[:, :, i] * behind * on
        shown = np.where(on, likely[:, :, i] * behind / scale[:, :, i, None], 0.0)
        previous = ahead[:, :, i - 1] if i else start
        moves += np.einsum("brz,bry->bzy", previous, shown) * chains.transition
        behind = np.where(on, shown @ backward, behind)
    first = start * behind
    total = regime.sum(axis=(1, 2))
    log_likelihood = np.log(scale).sum(axis=(1, 2))
    chains.initial = first.sum(axis=1) / first.sum(axis=(1, 2))[:, None]
    rows = moves.sum(axis=2, keepdims=True)
    chains.transition = np.where(rows > 0, moves / np.where(rows > 0, rows, 1.0), chains.transition)
    held = total > 0
    kept = (regime * data.flags[None, :, :, None]).sum(axis=(1, 2))
    chains.accept = np.where(held, np.minimum(kept / np.where(held, total, 1.0), 1.0), chains.accept)
    if data.codes is not None:
        for code in range(data.num_codes):
            weight = (regime * (data.codes == code)[None, :, :, None]).sum(axis=(1, 2))
            chains.emit[:, :, code] = np.where(held, weight / np.where(held, total, 1.0), chains.emit[:, :, code])
    return log_likelihood, total / total.sum(axis=1, keepdims=True)


def _bic(fit: RegimeFit, data: _Data) -> float:
    size = fit.process.num_regimes
    parameters = size + size * (size - 1) + (size - 1) + size * max(data.num_codes - 1, 0)
    return parameters * math.log(fit.num_observations) - 2 * fit.log_likelihood
