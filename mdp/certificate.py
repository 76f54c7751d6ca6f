r"""The certificate: what proves a throughput, whatever computed it.

Whatever rate $\rho$ and bias $h$ a method ends with, by whatever road: let $T_{\rho h}(z)$ be the best value of a round
from start regime $z$ at that price, $\hat\delta$ and $\check\delta$ an over- and an under-estimate of the greatest and
least $T_{\rho h} - h$ over the start regimes that count (renewal: $h = 0$ and the mean under `initial`), and
$T_{min}, T_{max}$ the least and greatest round times. Then $\rho^* \le \rho + \hat\delta / T_{min}$ ($/ T_{max}$ if
negative) and $\rho^* \ge \rho + \check\delta / T_{min}$ ($/ T_{max}$ if positive). Theory, section 3.
"""

from typing import Any

import numpy as np

__all__ = ["certificate"]


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
