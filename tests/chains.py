"""Small worlds for tests: token chains as draft and target, their coupled trace, and a plain live decoder.

Draft and target are order-1 chains over a few tokens: row t is the law of the next token behind token t, so every
context is one token and everything can be drawn in a loop that shares no code with `simulate.replay`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mdp.fit import SignalModel
from mdp.policy import Outcome, Policy
from mdp.trace import Trace

FIRST = 0  # the prompt's last token


@dataclass(frozen=True)
class OneMore(Policy):
    """Draft one more than was accepted last time."""

    first: int

    def init(self):
        return self.first

    def stop(self, state, observation):
        return state, observation.num_candidates >= state

    def end_round(self, state, outcome):
        return outcome.num_accepted + 1


class ChainPair(NamedTuple):
    draft: np.ndarray
    target: np.ndarray
    end: int | None = None  # the end-of-text token


def random_pair(seed, size=4, end=None, sharpness=1.0):
    """A pair whose acceptance depends on the context, with an end-of-text token of small probability."""
    rng = np.random.default_rng(seed)
    draft, target = rng.dirichlet(np.full(size, sharpness), size), rng.dirichlet(np.full(size, sharpness), size)
    target = 0.5 * draft + 0.5 * target
    if end is not None:
        for law, prob in ((draft, 0.06), (target, 0.04)):
            law[:, end] = prob
            law /= law.sum(axis=1, keepdims=True)
    return ChainPair(draft, target, end)


def cyclic_pair(draft, target):
    """A pair in which every context has the same two laws up to a shift: acceptance is iid with sum(min(p, q))."""
    shifts = range(len(draft))
    return ChainPair(np.array([np.roll(draft, s) for s in shifts]), np.array([np.roll(target, s) for s in shifts]))


def _features(pair, context, token):
    q, p = pair.draft[context], pair.target[context]
    return {
        "token_accept_prob": min(1.0, p[token] / q[token]),
        "step_accept_prob": float(np.minimum(p, q).sum()),
        "draft_prob": q[token],
        "top_prob": q.max(),
        "entropy": float(-(q[q > 0] * np.log(q[q > 0])).sum()),
    }


def _coupled(rng, q, p, emitted):
    """The draft's token given the target's, from the maximal coupling."""
    if rng.random() < min(1.0, q[emitted] / p[emitted]):
        return emitted
    rest = np.maximum(q - p, 0.0)
    return rng.choice(len(q), p=rest / rest.sum())


def record(pair, seed, num_requests, limit, depth, measured=None):
    """The coupled trace of `num_requests` texts (theory, §4), one token at a time."""
    rng = np.random.default_rng(seed)
    size = len(pair.draft)
    requests = []
    for _ in range(num_requests):
        context, steps = FIRST, []
        for j in range(limit):
            emitted = rng.choice(size, p=pair.target[context])
            drafted = _coupled(rng, pair.draft[context], pair.target[context], emitted)
            rollout, last = [], drafted
            if drafted != emitted and drafted != pair.end:
                for _ in range(max(0, min(depth - 1, limit - 2 - j))):
                    token = rng.choice(size, p=pair.draft[last])
                    rollout.append({"end": token == pair.end, **_features(pair, last, token)})
                    last = token
                    if token == pair.end:
                        break
            steps.append({"accepted": drafted == emitted, "end": drafted == pair.end, "token": emitted,
                          **_features(pair, context, drafted), "rollout": rollout})  # fmt: skip
            context = emitted
            if emitted == pair.end:
                break
        requests.append(steps)
    return assemble(requests, [limit] * num_requests, depth, [r[-1]["token"] == pair.end for r in requests], measured)


def assemble(requests, limits, depth, ends, measured=None, **manifest):
    """A trace from nested lists: requests of positions, each a dict with its `rollout`, a list of dicts."""
    positions = [step for request in requests for step in request]
    rolled = [step for position in positions for step in position.get("rollout", [])]
    names = [name for name in positions[0] if name not in ("accepted", "end", "token", "rollout")]
    manifest = {"max_candidates": depth, "request_ids": [f"request-{r}" for r in range(len(requests))], **manifest}
    if measured is not None:
        manifest["measured"] = measured
    return Trace(
        offsets=np.cumsum([0] + [len(request) for request in requests]),
        limit=np.array(limits),
        ends=np.array(ends),
        accepted=np.array([step["accepted"] for step in positions]),
        drafts_end=np.array([step["end"] for step in positions]),
        features={name: np.array([step[name] for step in positions], dtype=float) for name in names},
        rollout_offsets=np.cumsum([0] + [len(step.get("rollout", [])) for step in positions]),
        rollout_drafts_end=np.array([step["end"] for step in rolled], dtype=bool),
        rollout_features={name: np.array([step[name] for step in rolled], dtype=float) for name in names},
        manifest=manifest,
    ).validate()


def decode(pair, rule, seed, num_requests, limit, depth, model=None):
    """Speculative decoding itself, round by round: rows (request, start, drafted, accepted, emitted, cut)."""
    rng = np.random.default_rng(seed)
    model = model or SignalModel()
    size, rows = len(pair.draft), []
    for request in range(num_requests):
        context, length, state, done = FIRST, 0, rule.init(), False
        while not done:
            start, tokens, signal = length, [], model.start()
            features = dict.fromkeys(_features(pair, 0, 0), np.nan)
            for k in range(min(depth, limit - start - 1)):
                state, stop = rule.stop(state, model.observation(signal, k, features))
                if stop or (tokens and tokens[-1] == pair.end):
                    break
                previous = tokens[-1] if tokens else context
                tokens.append(rng.choice(size, p=pair.draft[previous]))
                features = _features(pair, previous, tokens[-1])
                signal = model.update(signal, features)
            emitted, accepted, cut = [], 0, 0
            for token in tokens:
                q, p = pair.draft[context], pair.target[context]
                if rng.random() >= p[token] / q[token]:
                    rest = np.maximum(p - q, 0.0)
                    emitted.append(rng.choice(size, p=rest / rest.sum()))
                    break
                emitted.append(token)
                accepted, context = accepted + 1, token
            else:
                if tokens and tokens[-1] == pair.end:
                    cut = 1
                else:
                    emitted.append(rng.choice(size, p=pair.target[context]))
            length, context = start + len(emitted), emitted[-1]
            state = rule.end_round(state, Outcome(len(tokens), accepted))
            rows.append((request, start, len(tokens), accepted, len(emitted), cut))
            done = length >= limit or context == pair.end
    return np.array(rows)
