"""Rollouts filled in from the trace's own text, for a trace that could not record any.

What a draft would show after an unseen rejection is unknown if only logits along the target's text are there. In its
place, each failed position gets features of the trace's own steps: from a position drawn at random among those just
behind a rejection (any request; if there are none, among all), and on along that text, from another such position
where it ends. So levels and correlations are those after a rejection, but the draft there reads the target's
correction, not its own mistake: features past a rejection come out better than they are. No end of text is made up,
so rules that look at no feature, such as `fixed`, replay as they did.

The trace's manifest says `imputed`, and so does every replay of it.
"""

from dataclasses import replace

import numpy as np

from mdp.trace import FEATURES, Trace
from realmodels.streams import stream

__all__ = ["SCHEME", "impute_rollouts"]

SCHEME = "features past a rejection are those of random steps of this trace behind a rejection, corrected text and all"


def impute_rollouts(trace: Trace, seed: int) -> Trace:
    """The trace with a full rollout at every failed position.

    Raises:
        ValueError: if it has rollouts.
    """
    if trace.rollout_offsets is not None:
        raise ValueError("impute: the trace has rollouts")
    lengths = np.diff(trace.offsets)
    request = np.repeat(np.arange(trace.num_requests), lengths)
    depth = np.repeat(trace.limit, lengths) - 2 - (np.arange(trace.num_positions) - trace.offsets[request])
    depth = np.clip(depth, 0, trace.max_candidates - 1)
    depth[trace.accepted | trace.drafts_end] = 0
    # Where a text from a position on, or its draft, ends: the request's end, or the next drafted end-of-text.
    index = np.arange(trace.num_positions)
    drafted_end = np.where(trace.drafts_end, index, trace.num_positions)
    stop = np.minimum(trace.offsets[request + 1], np.minimum.accumulate(drafted_end[::-1])[::-1])
    usable = stop > index
    behind = np.concatenate([[False], ~trace.accepted[:-1]]) & (request == np.concatenate([[-1], request[:-1]]))
    donors = np.flatnonzero(usable & behind)
    if len(donors) == 0:
        donors = np.flatnonzero(usable)
    steps = []
    for i in np.flatnonzero(depth):
        r = int(request[i])
        rng = stream(seed, trace.request_ids[r], "impute", int(i - trace.offsets[r]))
        left = int(depth[i])
        while left:
            first = int(donors[rng.integers(len(donors))])
            taken = np.arange(first, min(first + left, int(stop[first])))
            steps.append(taken)
            left -= len(taken)
    chosen = np.concatenate(steps) if steps else np.zeros(0, np.int64)
    return replace(
        trace,
        rollout_offsets=np.concatenate([[0], np.cumsum(depth)]).astype(np.int64),
        rollout_drafts_end=np.zeros(len(chosen), dtype=bool),
        rollout_features={key: trace.features[key][chosen] for key in FEATURES},
        manifest={**trace.manifest, "imputed": {"what": "rollouts", "scheme": SCHEME, "seed": seed}},
    )
