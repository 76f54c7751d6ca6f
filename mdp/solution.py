"""What a solve returns."""

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from mdp.policy import BeliefRule, ThresholdTable

__all__ = ["Solution", "SolveStatus"]


class SolveStatus(enum.Enum):
    """How a solve ended; the value is advice for the user."""

    successful = ""
    max_steps_reached = (
        "The bounds on the throughput or the thresholds did not close. Raise `max_knots`, or loosen `tol`; "
        "many regimes with long rounds and nearly deterministic chains need the most knots, hidden regimes with many "
        "symbols and long rounds the most points. A continuous law with memory (logit_ar) closes to about 1e-5."
    )


@dataclass(frozen=True)
class Solution:
    """The optimal policy of a problem and what it earns.

    Attributes:
        throughput: rho*, tokens per unit time; `speedup` = throughput * V(0).
        bounds: proven lower and upper bound on the best throughput of any policy.
        survival_threshold: [K, Z]; CONTINUE iff survival >= threshold, inf = STOP at every survival. None if regimes
            are hidden: then `belief_rule` says when to stop.
        bias: [Z] relative value of each start regime in tokens; zeros if rounds renew.
        block_efficiency, verification_rate, discard_rate, mean_candidates: of the policy found; for a continuous
            process, what they are in the finite problem that bounds it from below; with hidden regimes, of the rule
            behind the lower bound.
        status: `successful`, or why not, with advice.
        num_sweeps, num_knots: backward inductions done in all, and knots per depth in the last pass.
        seconds: wall time, compilation included.
        method: `fixed_length` or `one_step_lookahead` (`mdp.direct`), `policy_iteration`, `value_iteration`, or
            `point_based` for hidden regimes.
    """

    throughput: float
    speedup: float
    bounds: tuple[float, float]
    survival_threshold: np.ndarray | None
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
    belief_rule: BeliefRule | None = None

    @property
    def policy(self) -> ThresholdTable | BeliefRule:
        """The stopping rule, for `evaluate`, `simulate`, and where regimes are seen `replay` and live decoding."""
        if self.belief_rule is not None:
            return self.belief_rule
        assert self.survival_threshold is not None
        return ThresholdTable(self.survival_threshold)

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `specstop solve --json`; null stands for STOP at every survival, or for the whole table."""
        rows = self.survival_threshold
        table = None if rows is None else [[None if np.isinf(cell) else float(cell) for cell in row] for row in rows]
        rule = {} if self.belief_rule is None else {"belief_rule": self.belief_rule.to_dict()}
        names = ("block_efficiency", "verification_rate", "discard_rate", "mean_candidates")
        return {"status": self.status.name, "throughput": self.throughput, "speedup": self.speedup,
                "bounds": list(self.bounds), "survival_threshold": table,
                **{name: getattr(self, name) for name in names},
                "seconds": self.seconds, "method": self.method, **rule}  # fmt: skip
