r"""The price problem where acceptances are drawn afresh from a continuous law: no cells, only knots in survival.

With $J_k(S)$ the best value of a renewal round from depth k on (`mdp.price`), $m = E[a]$ and
$C_k(S) = -\rho t_d + S m + E[J_{k+1}(S a)]$ what CONTINUE is worth,

$$J_k(S) = \max\{-\rho V(k),\, C_k(S)\}, \qquad J_K = -\rho V(K).$$

*Claim.* All $C_k$ and $J_k$ are convex. *Proof* by induction from $k = K$: $S \mapsto J(Sa)$ is convex for every a,
hence so are its mean and the maximum with a constant. $\square$

A function that is linear between knots $0 < s_N < \dots < s_1 = 1$ is a line plus $\sum_j c_j (S - s_j)^+$, and
$E[(Sa - s_j)^+] = S\, g(s_j / S)$ with $g(x) = E[(a - x)^+]$, known in closed form. With $s_j = e^{-(j-1) w}$ the
ratios are powers of one number, so that all means are one convolution. Where CONTINUE crosses STOP between knots, g,
which is convex, is taken from its chords or tangents. *Above:* the chords of $\hat C_{k+1}$ lie above it, and their
mean is known. *Below:* the mean's values and slopes at the knots give tangents; the knots' values are lowered by as
much as chords lie above tangents on the segments beside them. The greatest convex minorant of that is linear between
knots, convex and below $C_k$. The gap falls with $w^2$ where the law has a density; what is proven holds for any.

Bounds on the throughput follow as in `mdp.certificate`. Thresholds are where the tangents of CONTINUE from below cross
STOP; how much CONTINUE can be worth there is read off above (`Priced.slack`).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import fft, optimize

from mdp.continuous import BetaMixture

__all__ = ["Knots", "Priced", "price"]


class Priced(NamedTuple):
    """A round at rate rho: both sides of T_rho, the found rule's time, thresholds and their slack [K]."""

    lower: float
    upper: float
    time: float
    threshold: Float[np.ndarray, " K"]
    slack: Float[np.ndarray, " K"]


class Knots:
    """Knots from 1 down to `lowest`, then 0, and means of functions that are linear between them."""

    def __init__(self, process: BetaMixture, count: int, lowest: float) -> None:
        self.process, self.mean = process, process.mean
        self.survival = np.exp(np.linspace(0.0, np.log(lowest), count))
        self.ends = np.append(self.survival, 0.0)
        self.length = self.ends[:-1] - self.ends[1:]
        self.more, self.moment = process.above(self.survival)  # ratios of knots are knots
        self.gain = self.moment - self.survival * self.more
        self._size = fft.next_fast_len(2 * count, real=True)
        self._spectra = [np.conj(np.asarray(fft.rfft(part[1:], self._size))) for part in (self.gain, self.moment)]

    def slopes(self, values: Float[np.ndarray, " N+1"]) -> Float[np.ndarray, " N"]:
        """Of the chords."""
        return (values[:-1] - values[1:]) / self.length

    def expect(
        self, values: Float[np.ndarray, " N+1"], stop: float, above: bool
    ) -> tuple[Float[np.ndarray, " N+1"], Float[np.ndarray, " N+1"]]:
        r"""$E[\max\{F(Sa), \text{stop}\}]$ and its slope at every knot, F linear between knots and non-decreasing.

        Where F crosses `stop` between knots the mean is not a convolution; g is taken from its chords (`above`) or
        tangents (below) there.
        """
        count = len(self.survival)
        behind = np.flatnonzero(values < stop)
        first = int(behind[0]) if behind.size else count + 1
        if first == 0:
            return np.full(count + 1, stop), np.zeros(count + 1)
        if first == count and above:  # near 0 the chord to STOP at 0; from below no STOP
            values = np.append(values[:-1], stop)
        slope, crossed = self.slopes(values), first < count
        bends = fft.rfft(slope[: first - 1] - slope[1:first] if crossed else slope[:-1] - slope[1:], self._size)
        gain, moment = (np.asarray(fft.irfft(bends * part, self._size))[:count] for part in self._spectra)
        if not crossed:
            line = self.mean * slope[-1]
            return values[-1] + self.ends * np.append(line + gain, line), np.append(line + moment, line)
        rise, kink = slope[first - 1], self.ends[first] + (stop - values[first]) / slope[first - 1]
        mean, steep = stop + self.survival * gain, moment
        ahead = self.survival[:first]
        near, far = (slice(first - 1, None, -1) if j == 0 else slice(first, 0, -1) for j in (0, 1))
        if above:
            share = (ahead[-1] - kink) / (ahead[-1] - self.ends[first])
            mean[:first] += rise * ahead * ((1.0 - share) * self.gain[near] + share * self.gain[far])
        else:
            tangents = [ahead * self.moment[at] - kink * self.more[at] for at in (near, far)]
            mean[:first] += rise * np.maximum(*tangents)
            steep[:first] += rise * np.where(tangents[0] >= tangents[1], self.moment[near], self.moment[far])
        return np.append(mean, stop), np.append(steep, 0.0)

    def expect_at(self, at: float, values: Float[np.ndarray, " N+1"], stop: float) -> float:
        r"""$E[\max\{F(Sa), \text{stop}\}]$ at one survival between knots, F as in `expect`."""
        kept = np.maximum(values, stop)
        where = self.ends
        crossing = np.flatnonzero((values[:-1] > stop) & (values[1:] < stop))
        if crossing.size and crossing[0] + 1 < len(self.survival):
            i = int(crossing[0])
            share = (stop - values[i + 1]) / (values[i] - values[i + 1])
            where = np.insert(where, i + 1, where[i + 1] + share * (where[i] - where[i + 1]))
            kept = np.insert(kept, i + 1, stop)
        slope = (kept[:-1] - kept[1:]) / (where[:-1] - where[1:])
        inside = where[1:-1] < at
        ratio = where[1:-1][inside] / at
        more, moment = self.process.above(ratio)
        bends = (slope[:-1] - slope[1:])[inside] @ (moment - ratio * more)
        return float(kept[-1] + at * (self.mean * slope[-1] + bends))


def price(
    knots: Knots, rate: float, draft_time: float, verify_time: Float[np.ndarray, " K+1"], sharp: bool = False
) -> Priced:
    """Backward induction at rate rho; `sharp` reads the slack at each threshold, not off the knots beside it."""
    depth, ends = len(verify_time) - 1, knots.ends
    never = np.full(len(ends), -np.inf)
    above = below = never
    time = np.full(len(ends), verify_time[-1])
    threshold, slack = np.empty((2, depth))
    for k in range(depth - 1, -1, -1):
        after, stop = -rate * verify_time[k + 1], -rate * verify_time[k]
        sure = ends * knots.mean - rate * draft_time
        later, above = above, sure + knots.expect(above, after, above=True)[0]
        low, slope = knots.expect(below, after, above=False)
        low, slope = sure + low, knots.mean + slope
        threshold[k], slack[k] = _threshold(ends, low - stop, slope, above - stop)
        if sharp and 0.0 < threshold[k] <= 1.0:
            at = float(threshold[k])
            worth = knots.expect_at(at, later, after) if k < depth - 1 else after
            slack[k] = at * knots.mean - rate * draft_time + worth - stop
        below = _lowered(knots, low, slope)
        time = np.where(low >= stop, draft_time + knots.expect(time, -np.inf, above=True)[0], verify_time[k])
    stop = -rate * verify_time[0]
    return Priced(1.0 + max(low[0], stop), 1.0 + max(above[0], stop), float(time[0]), threshold, slack)


def _lowered(knots: Knots, values: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """A convex function below a convex one of these values and slopes, linear between knots."""
    chord = knots.slopes(values)
    turn = slope[:-1] - slope[1:]
    over = np.maximum(chord - slope[1:], 0.0) * np.maximum(slope[:-1] - chord, 0.0)
    too_high = np.append(over / np.where(turn > 0, turn, np.inf) * knots.length, 0.0)
    too_high[1:] = np.maximum(too_high[1:], too_high[:-1])
    lowered = values - too_high
    chord = knots.slopes(lowered)
    if (np.diff(chord) > 0).any():
        chord = optimize.isotonic_regression(chord, weights=knots.length, increasing=False).x
        lowered = lowered[-1] + np.append(np.cumsum((chord * knots.length)[::-1])[::-1], 0.0)
    return lowered


def _threshold(ends: np.ndarray, low: np.ndarray, slope: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """Where CONTINUE - STOP, at least `low`, is no longer negative; and how much it can be there."""
    behind = np.flatnonzero(low < 0)
    if not behind.size:
        return 0.0, 0.0
    last = int(behind[0])
    if last == 0:
        return np.inf, max(float(high[0]), 0.0)
    found = np.clip(ends[last - 1] - low[last - 1] / slope[last - 1], ends[last], ends[last - 1])
    return float(found), float(np.interp(found, ends[last - 1 : last + 1][::-1], high[last - 1 : last + 1][::-1]))
