r"""What a solve returns, and the certificate that proves it.

Whatever rate $\rho$ and bias $h$ a method ends with, by whatever road: let $T_{\rho h}(z)$ be the best value of a round
from start regime $z$ at that price, $\hat\delta$ and $\check\delta$ an over- and an under-estimate of the greatest and
least $T_{\rho h} - h$ over the start regimes that count (renewal: $h = 0$ and the mean under `initial`), and
$T_{min}, T_{max}$ the least and greatest round times. Then $\rho^* \le \rho + \hat\delta / T_{min}$ ($/ T_{max}$ if
negative) and $\rho^* \ge \rho + \check\delta / T_{min}$ ($/ T_{max}$ if positive). Theory, section 3.
"""

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdp.policy import ThresholdTable

__all__ = ["Solution", "SolveStatus", "certificate"]


class SolveStatus(enum.Enum):
    """How a solve ended; the value is advice for the user."""

    successful = ""
    max_steps_reached = (
        "The bounds on the throughput or the thresholds did not close. Raise `max_knots`, or loosen `tol`; "
        "many regimes with long rounds and nearly deterministic chains need the most knots."
    )


@dataclass(frozen=True)
class Solution:
    """The optimal policy of a problem and what it earns.

    Attributes:
        throughput: rho*, tokens per unit time; `speedup` = throughput * V(0).
        bounds: proven lower and upper bound on the best throughput of any policy.
        survival_threshold: [K, Z]; CONTINUE iff survival >= threshold, inf = STOP at every survival.
        bias: [Z] relative value of each start regime in tokens; zeros if rounds renew.
        block_efficiency, verification_rate, discard_rate, mean_candidates: of the policy found; for a continuous
            process, what they are in the finite problem that bounds it from below.
        status: `successful`, or why not, with advice.
        num_sweeps, num_knots: backward inductions done in all, and knots per depth in the last pass.
        seconds: wall time, compilation included.
        method: `fixed_length` or `one_step_lookahead` (`mdp.direct`), `policy_iteration` or `value_iteration`.
    """

    throughput: float
    speedup: float
    bounds: tuple[float, float]
    survival_threshold: np.ndarray
    bias: np.ndarray
    block_efficiency: float
    verification_rate: float
    discard_rate: float
    mean_candidates: float
    status: SolveStatus
    num_sweeps: int
    num_knots: int
    seconds: float
    method: str = "policy_iteration"

    @property
    def policy(self) -> ThresholdTable:
        """The stopping rule, for `evaluate`, `simulate`, `replay` and live decoding."""
        return ThresholdTable(self.survival_threshold)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop solve --json`; null stands for STOP at every survival."""
        table = [[None if np.isinf(cell) else float(cell) for cell in row] for row in self.survival_threshold]
        names = ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
        return {"status": self.status.name, "throughput": self.throughput, "speedup": self.speedup,
                "bounds": list(self.bounds), "survival_threshold": table,
                **{name: getattr(self, name) for name in names},
                "seconds": self.seconds, "method": self.method}  # fmt: skip


def certificate(
    rate: Any,
    low: Any,
    high: Any,
    round_time: np.ndarray,
    scale: Any,
    num_regimes: int,
    eps: float = float(np.finfo(np.float64).eps),
) -> tuple:
    r"""Bounds on rho* from both sides of T_rho_h - h, widened for rounding; for one problem or a batch.

    *Rounding.* A value is a mean, over the paths of a round, of tokens and biases (at most K + 1 + scale in size) less
    $\rho$ times the round's time; that time's share is at most as much plus $\rho T(0)$, since a value that matters is
    no less than that of stopping at once. So the parts' sizes add up to at most twice $B = K + 1 + scale + \rho T(0)$.
    Each of K + 1 steps rounds each part, by half an `eps` relatively, once for each of the Z terms of its mean and less
    than 16 times otherwise: inputs to this precision (transition, acceptance, times, knots and their weights) and
    products. Errors of later steps come in as means. Together they are at most $(K + 1)(Z + 16)\,\mathrm{eps}\,B$.

    Args:
        rate: rho, at which the round was priced.
        low, high: under- and over-estimate of T_rho_h - h: least and greatest start, mean over starts if rounds renew.
        round_time: [..., K + 1] k t_d + V(k).
        scale: largest size of the bias.
        num_regimes: Z, the terms of each sum.
        eps: of the floating point in which `low` and `high` were computed.
    """
    least, greatest, depth = round_time.min(axis=-1), round_time.max(axis=-1), round_time.shape[-1] - 1
    rounding = eps * (depth + 1) * (num_regimes + 16) * (depth + 1 + scale + rate * round_time[..., 0])
    low, high = low - rounding, high + rounding
    lower = np.maximum(rate + low / np.where(low >= 0, greatest, least), 0.0)
    return lower, rate + high / np.where(high >= 0, least, greatest)
