r"""Every round that a request could start: from each position of a trace, what drafting on would meet.

A round that starts at cursor s drafts at most `depth[s]` candidates: the clamp at the maximum length, or a drafted
end-of-text. `accepted[s]` of them are accepted if all are drafted, so a round of k candidates accepts
min(k, accepted[s]), takes $T(k)$ and moves the cursor on by the tokens it emits. A policy's run is a path through these
rounds, and *every* path through them emits the same text: on a trace policies differ in time alone.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from mdp.fit import SignalModel, position_signal
from mdp.policy import Policy
from mdp.trace import Trace

__all__ = ["Rounds", "Starts", "lengths_chosen", "play", "play_lanes", "unroll"]

Rounds = tuple[np.ndarray, np.ndarray]
"""Rounds that were played: the positions they started at, and how many candidates each drafted."""


@dataclass(frozen=True, eq=False)
class Starts:
    """The rounds of the chosen requests, laid end to end; N positions, K the trace's `max_candidates`.

    Attributes:
        offsets: [R + 1] first position of each request.
        depth: [N] most candidates of a round that starts there.
        accepted: [N] how many of them are accepted.
        ended: [N] whether the last of them is an end-of-text token.
        features: each [N, K]: what candidate i of the round shows; nan beyond `depth`.
    """

    offsets: Int[np.ndarray, " R+1"]
    depth: Int[np.ndarray, " N"]
    accepted: Int[np.ndarray, " N"]
    ended: Bool[np.ndarray, " N"]
    features: Mapping[str, Float[np.ndarray, "N K"]]
    max_candidates: int

    @property
    def lengths(self) -> Int[np.ndarray, " R"]:
        """Tokens that each request emits, under every policy."""
        return np.diff(self.offsets)

    def emitted(self, num_candidates: Int[np.ndarray, " n"], at: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Tokens emitted by rounds of so many candidates that start at the positions `at`."""
        accepted = np.minimum(self.accepted[at], num_candidates)
        no_bonus = self.ended[at] & (accepted == num_candidates) & (num_candidates == self.depth[at])
        return accepted + 1 - no_bonus


def unroll(trace: Trace, requests: Int[np.ndarray, " R"], names: Iterable[str] = ()) -> Starts:
    """All rounds of the given requests, with these features of their candidates.

    Raises:
        ValueError: if the trace does not hold a feature, or holds no rollouts to show it along.
    """
    names, most = tuple(names), trace.max_candidates
    lengths = np.diff(trace.offsets)[requests]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    node = np.repeat(trace.offsets[requests], lengths) + within
    room = np.minimum(np.repeat(np.asarray(trace.limit, dtype=np.int64)[requests], lengths) - within - 1, most)
    has_rollouts = trace.rollout_offsets is not None
    runs, tested = (trace.optional.get(key) for key in ("run_length", "tested"))
    if runs is not None and tested is not None and not names:
        known, kept = tested[node], runs[node]
        short = np.flatnonzero((kept == known) & (known < room))
        if short.size:
            raise ValueError(
                f"trace: {len(short)} of {len(node)} positions know less than a full round (the trace holds one "
                "policy's rounds): what lies deeper than it drafted cannot be played"
            )
        depth = np.maximum(room, 0)
        nothing = np.zeros(len(node), dtype=bool)
        return Starts(offsets, depth, np.minimum(kept, depth).astype(np.int64), nothing, {}, most)
    if names and not has_rollouts:
        raise ValueError(f"trace: it has no rollouts, so {names[0]} is not known past a rejection")
    # Positions, then rollout steps, then one node for what was not recorded.
    beyond = np.zeros(0 if trace.rollout_drafts_end is None else len(trace.rollout_drafts_end), dtype=bool)
    flags = np.concatenate([trace.accepted, beyond, [False]])
    rolled_ends = beyond if trace.rollout_drafts_end is None else trace.rollout_drafts_end
    ends = np.concatenate([trace.drafts_end, rolled_ends, [False]])
    last = len(flags) - 1
    shown = {
        name: np.concatenate([position_signal(trace, name), position_signal(trace, name, rollout=True), [np.nan]])
        for name in names
    }
    depth, accepted = np.zeros(len(node), dtype=np.int64), np.zeros(len(node), dtype=np.int64)
    drafting, failed, ended = room > 0, np.zeros(len(node), dtype=bool), np.zeros(len(node), dtype=bool)
    features = {name: np.full((len(node), most), np.nan) for name in names}
    for num in range(most):
        if not drafting.any():
            break
        for name, values in shown.items():
            features[name][drafting, num] = values[node[drafting]]
        kept = drafting & flags[node] & ~failed
        depth, accepted = depth + drafting, accepted + kept
        ended |= drafting & ends[node]
        fails = drafting & ~failed & ~kept
        into = np.full(len(node), last)
        if trace.rollout_offsets is not None:
            into[fails] = trace.num_positions + trace.rollout_offsets[node[fails]]
        node = np.where(fails, into, np.minimum(node + 1, last))
        failed |= fails
        drafting = drafting & ~ended & (num + 1 < room)
    return Starts(offsets, depth, accepted, ended, features, most)


def play(starts: Starts, choose: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Rounds:
    """The rounds of a rule that fixes each length at the round's start, clamped to the round's depth.

    `choose(position, last_drafted, last_accepted)` is asked for arrays; the last two are -1 in a request's first round.
    """
    every = np.arange(len(starts.lengths))
    return play_lanes(starts, lambda at, drafted, accepted, lane: choose(at, drafted, accepted), every)[:2]


def play_lanes(
    starts: Starts,
    choose: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    requests: Int[np.ndarray, " L"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `play`, of several runs side by side, lane l through `requests[l]`; `choose` is told the lanes too.

    Returns:
        Position, length and lane of each round.
    """
    cursor, end, on = starts.offsets[requests].copy(), starts.offsets[requests + 1], np.arange(len(requests))
    drafted, accepted = np.full(len(cursor), -1), np.full(len(cursor), -1)
    rounds = []
    while len(on):
        at = cursor[on]
        length = np.minimum(choose(at, drafted[on], accepted[on], on), starts.depth[at])
        drafted[on], accepted[on] = length, np.minimum(starts.accepted[at], length)
        cursor[on] = at + starts.emitted(length, at)
        rounds.append((at, length, on))
        on = on[cursor[on] < end[on]]
    at, length, lane = (np.concatenate(column) for column in zip(*rounds, strict=True))
    return at, length, lane


def lengths_chosen(starts: Starts, rule: Policy, model: SignalModel) -> Int[np.ndarray, " N"]:
    """How many candidates a rule without memory drafts from each position, fed by this signal."""
    state, going = model.start(len(starts.depth)), np.ones(len(starts.depth), dtype=bool)
    length = np.zeros(len(starts.depth), dtype=np.int64)
    features: dict[str, np.ndarray] = {}
    for num in range(starts.max_candidates):
        _, stop = rule.stop((), model.observation(state, num, features))
        going = going & ~np.asarray(stop, dtype=bool) & (num < starts.depth)
        if not going.any():
            break
        length += going
        features = {name: values[:, num] for name, values in starts.features.items()}
        state = model.update(state, features)
    return length
