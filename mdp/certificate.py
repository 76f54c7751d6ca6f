r"""Bounds on the best throughput from both sides of a price problem (theory, section 3).

With $\delta$ an estimate of $T_{\rho h} - h$, the best worth of a round at rate $\rho$ and bias $h$, and $T_{min}$,
$T_{max}$ the least and greatest round times: an over-estimate gives $\rho^* \le \rho + \delta / T_{min}$ ($/ T_{max}$
if negative), an under-estimate $\rho^* \ge \rho + \delta / T_{max}$ ($/ T_{min}$ if negative), whatever $\rho$ and $h$.
"""

from typing import Any

import numpy as np

__all__ = ["certificate"]


def certificate(rate: Any, low: Any, high: Any, round_time: np.ndarray, scale: Any, num_regimes: int) -> tuple:
    """Bounds on rho* from both sides of T_rho_h - h, widened for rounding; for one problem or a batch.

    Args:
        rate: rho, at which the round was priced.
        low, high: under- and over-estimate of T_rho_h - h: least and greatest start, mean over starts if rounds renew.
        round_time: [..., K + 1] k t_d + V(k).
        scale: largest size of the bias.
        num_regimes: Z, the terms of each sum.
    """
    least, greatest, depth = round_time.min(axis=-1), round_time.max(axis=-1), round_time.shape[-1] - 1
    # Values that matter are no worse than stopping at once; those beyond lose by more than they are rounded.
    worst = rate * round_time[..., 0]
    rounding = 8 * np.finfo(float).eps * (depth + num_regimes) * (scale + depth + 1 + worst)
    low, high = low - rounding, high + rounding
    lower = np.maximum(rate + low / np.where(low >= 0, greatest, least), 0.0)
    return lower, rate + high / np.where(high >= 0, least, greatest)
