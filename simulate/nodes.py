"""A trace laid end to end for replay: one array entry for everything that can be drafted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mdp.fit import position_signal
from mdp.trace import Trace

__all__ = ["Nodes"]


@dataclass(frozen=True)
class Nodes:
    """Positions, then rollout steps, then one node for what was not recorded.

    Features named in `late` are those of a candidate that are known only once the next one is drafted.
    """

    accepted: np.ndarray
    ends: np.ndarray
    after_failure: np.ndarray
    features: Mapping[str, np.ndarray]
    late: tuple[str, ...]
    runs: np.ndarray | None
    tested: np.ndarray | None

    def check_tested(self, trace: Trace, start: np.ndarray, asked: np.ndarray) -> None:
        """Refuse rounds that went deeper than the trace knows, with no rejection before."""
        if self.runs is None or self.tested is None:
            return
        beyond = np.flatnonzero((self.runs[start] == self.tested[start]) & (asked > self.tested[start]))
        if beyond.size:
            at = int(start[beyond[0]])
            request = int(np.searchsorted(trace.offsets, at, side="right")) - 1
            raise ValueError(
                f"trace: a round of {int(asked[beyond[0]])} candidates at token {at - int(trace.offsets[request])} of "
                f"request {trace.request_ids[request]!r:.40}, where {int(self.tested[at])} were tested: what lies "
                "deeper than a trace drafted cannot be replayed"
            )

    @property
    def last(self) -> int:
        return len(self.accepted) - 1

    @classmethod
    def of(cls, trace: Trace, names: Iterable[str]) -> "Nodes":
        has_rollouts = trace.rollout_offsets is not None
        starts = trace.rollout_offsets[:-1] if has_rollouts else np.zeros(trace.num_positions, dtype=np.int64)  # type: ignore[index]
        rolled = trace.rollout_drafts_end if has_rollouts else np.zeros(0, dtype=bool)
        beyond = np.zeros(len(rolled) + 1, dtype=bool)  # type: ignore[arg-type]
        accepted = np.concatenate([np.asarray(trace.accepted, dtype=bool), beyond])
        features = {}
        for name in names:
            along = position_signal(trace, name, rollout=True)
            features[name] = np.concatenate([position_signal(trace, name), along, [np.nan]])
        return cls(
            accepted,
            np.concatenate([trace.drafts_end, rolled, [False]]).astype(bool),  # type: ignore[list-item]
            np.concatenate([trace.num_positions + starts, np.zeros(len(beyond), dtype=np.int64)]),
            features,
            ("head",) if trace.head_lag and "head" in features else (),
            trace.optional.get("run_length"),
            trace.optional.get("tested"),
        )
