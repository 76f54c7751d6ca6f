r"""Set the length before the round, from what past rounds had accepted.

No candidate of the round itself is looked at: the whole decision is K_t, and `end_round` makes K_{t+1} of the outcome.
The world may end a round earlier (its own `max_candidates`, the maximum length, an end-of-text); then the outcome tells
how many candidates there really were.
"""

from dataclasses import dataclass

from mdp.policy import Policy, choose, parameter, published

__all__ = ["DiffuSpec", "HFConstant", "HFHeuristic", "HFTransient", "LastRound", "RaLMSpec", "SGLangEMA"]

HF = "Hugging Face transformers, candidate_generator.py"


@published("hf_constant", "draft `length` candidates, or as many as there is room for", HF, "code")
@dataclass(frozen=True)
class HFConstant(Policy):
    """Draft `length` candidates. Default [code]: 20 (transformers 4.45 and later)."""

    length: int = parameter(20, 0, 1024, "code")

    def stop(self, state, observation):
        return state, observation.num_candidates >= self.length


@published("hf_heuristic", "two candidates more after a round accepted whole, else one less", HF, "code")
@dataclass(frozen=True)
class HFHeuristic(Policy):
    """K + `up` if every candidate was accepted, else K - `down`, at least `least`; kept from request to request.

    Defaults [code]: 5 at first (transformers 4.40, whose default schedule it was), 2, 1 and 1.
    """

    length: int = parameter(5, 0, 1024, "code")
    up: float = parameter(2.0, 0.0, 1024.0, "code")
    down: float = parameter(1.0, 0.0, 1024.0, "code")
    least: float = parameter(1.0, 0.0, 1024.0, "code")
    persists = True

    def init(self):
        return 1.0 * self.length

    def stop(self, state, observation):
        return state, observation.num_candidates >= state

    def end_round(self, state, outcome):
        less = choose(state - self.down > self.least, state - self.down, 1.0 * self.least)
        return choose(outcome.num_accepted >= outcome.num_drafted, state + self.up, less)


@published("hf_transient", "hf_heuristic, starting anew in every request", HF, "code")
@dataclass(frozen=True)
class HFTransient(HFHeuristic):
    """`HFHeuristic`, back to the first length at the start of a request. On an endless problem they are the same."""

    persists = False


@published("diffuspec", "length between bounds from running means of drafted and accepted lengths",
           "DiffuSpec, adaptive draft length", "code")  # fmt: skip
@dataclass(frozen=True)
class DiffuSpec(Policy):
    r"""$K = \lfloor \bar n \rfloor + $ `growth` $\cdot 1\{\bar m \ge \bar n\}$, cut to [`least`, `most`].

    $\bar n, \bar m$ are exponential means (weight `smoothing` on the last round) of the candidates drafted, which end
    at an end-of-text, and of those accepted; both start at 0, K at `most`. Defaults [code]: 20, 30, 10 and .5.
    Its drafter makes a block in one pass: a cost whose round time has one step at k = 1 (a `table` with a tiny
    `draft_time`), under which the length is all there is to choose.
    """

    least: int = parameter(20, 0, 1024, "code")
    most: int = parameter(30, 0, 1024, "code")
    growth: float = parameter(10.0, 0.0, 1024.0, "code")
    smoothing: float = parameter(0.5, 0.0, 1.0, "code")

    def __post_init__(self):
        if self.least > self.most:
            raise ValueError(f"least must be at most most = {self.most}, got {self.least}")

    def init(self):
        return 0.0, 0.0, 1.0 * self.most

    def stop(self, state, observation):
        return state, observation.num_candidates >= state[2]

    def end_round(self, state, outcome):
        drafted, accepted, _ = state
        drafted = (1.0 - self.smoothing) * drafted + self.smoothing * outcome.num_drafted
        accepted = (1.0 - self.smoothing) * accepted + self.smoothing * outcome.num_accepted
        length = drafted // 1.0 + self.growth * (accepted >= drafted)
        length = choose(length < self.least, 1.0 * self.least, length)
        return drafted, accepted, choose(length > self.most, 1.0 * self.most, length)


@published("sglang_ema", "step among a few lengths by a running mean of accepted candidates",
           "SGLang, adaptive_spec_params.py", "code")  # fmt: skip
@dataclass(frozen=True)
class SGLangEMA(Policy):
    r"""Move among `steps` by the exponential mean m of accepted candidates (weight `smoothing` on the last round).

    After `warmup` rounds, every `interval` rounds: while m <= (next step down) - 1/2 + `down`, go down; if it did not,
    while m > (this step) - 1/2 + `up`, go up. A step 0 below counts as 1; at step 0 the next one is tried. It starts at
    the middle step K with m = K - 1. Defaults [code], for batch size 1: steps 1, 3, 5, 7, smoothing .2, interval 5,
    warm-up 10, up 0, down -.25.
    """

    steps: tuple[int, ...] = parameter((1, 3, 5, 7), 0, 1024, "code")
    smoothing: float = parameter(0.2, 0.0, 1.0, "code")
    interval: int = parameter(5, 1, 10**6, "code")
    warmup: int = parameter(10, 0, 10**6, "code")
    up: float = parameter(0.0, -1024.0, 1024.0, "code")
    down: float = parameter(-0.25, -1024.0, 1024.0, "code")

    def __post_init__(self):
        if any(low >= high for low, high in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must increase, got {self.steps}")

    def init(self):
        middle = 1.0 * self.steps[len(self.steps) // 2]
        return middle, middle - 1.0, 0.0

    def stop(self, state, observation):
        return state, observation.num_candidates >= state[0]

    def end_round(self, state, outcome):
        length, mean, rounds = state
        drafting = length > 0
        mean = choose(drafting, (1.0 - self.smoothing) * mean + self.smoothing * outcome.num_accepted, mean)
        rounds = rounds + 1.0
        due = (rounds > self.warmup) & ((rounds - self.warmup) % self.interval < 0.5)
        new = length
        for low, high in reversed(list(zip(self.steps, self.steps[1:], strict=False))):
            floor = choose(low > 0, 1.0 * low, 1.0) - 0.5 + self.down
            new = choose(drafting & (new >= high) & (new <= high) & (mean <= floor), 1.0 * low, new)
        stayed = new >= length
        for low, high in zip(self.steps, self.steps[1:], strict=False):
            rises = (mean > low - 0.5 + self.up) & (low > 0)
            at = (new >= low) & (new <= low) & stayed
            new = choose(at & drafting & rises, 1.0 * high, new)
            new = choose((new <= low) & (low < 1) & (length < 1), 1.0 * high, new)
        return choose(due, new, length), mean, rounds


@published("last_round", "length by how many candidates the last round had accepted", fits=True)
@dataclass(frozen=True)
class LastRound(Policy):
    """Draft `lengths[m]` candidates after a round with m accepted; its last entry serves all greater m.

    The first round drafts `first`. Not a published rule but the bracket of what past lengths are worth. Defaults are
    ours; `fit=1` chooses the lengths on the training half of a trace, one entry at a time.
    """

    lengths: tuple[int, ...] = parameter((2, 2, 3, 4, 6), 0, 1024, "ours")
    first: int = parameter(3, 0, 1024, "ours")

    def init(self):
        return 1.0 * self.first

    def stop(self, state, observation):
        return state, observation.num_candidates >= state

    def end_round(self, state, outcome):
        length = 1.0 * self.lengths[0]
        for accepted, longer in enumerate(self.lengths):
            length = choose(outcome.num_accepted >= accepted, 1.0 * longer, length)
        return length


WINDOW = 5


@published("ralmspec", "length that makes expected accepted candidates per time greatest (OS3)",
           "RaLMSpec, arXiv 2401.14021", "code")  # fmt: skip
@dataclass(frozen=True)
class RaLMSpec(Policy):
    r"""OS3, the optimal speculation stride: the s that maximises $\frac{1 - g^s}{1 - g} / \text{time}(s)$.

    g estimates P(match) over the last 5 rounds [code]: matches / (matches + rounds with a mismatch), at most `cap`.
    Synchronous time: $s a + b$, a the time of a step, b that of a verification. `overlap=1`, asynchronous:
    $g^s ((s-1) a + \max(a, b)) + (1 - g^s)(s a + b)$. s rises from 1 while
    $(1 - g^{s+1})\,\text{time}(s) \ge (1 - g^s)\,\text{time}(s + 1)$, and starts at 1. With b <= a and overlap, s = 1.

    a and b are the rule's own, `step` and `verify`; where they are 0 (ours), they are the means of the rounds so far.
    Default of `cap` [code]: .6; `most` is ours, a guard.
    """

    overlap: int = parameter(0, 0, 1, "code")
    cap: float = parameter(0.6, 0.0, 1.0, "code")
    step: float = parameter(0.0, 0.0, 1e9, "ours")
    verify: float = parameter(0.0, 0.0, 1e9, "ours")
    most: int = parameter(16, 1, 1024, "ours")
    timed = True

    def init(self):
        """Length, matches and mismatches of the window, then sums: draft time, candidates, verify time, rounds."""
        return 1.0, (0.0,) * WINDOW, (0.0,) * WINDOW, (0.0, 0.0, 0.0, 0.0)

    def stop(self, state, observation):
        return state, observation.num_candidates >= state[0]

    def end_round(self, state, outcome):
        _, matched, missed, sums = state
        drafted, accepted = outcome.num_drafted, outcome.num_accepted
        matched, missed = (*matched[1:], 1.0 * accepted), (*missed[1:], 1.0 * (accepted < drafted))
        new = (outcome.draft_time, drafted, outcome.verify_time, 1.0)
        sums = tuple(old + more for old, more in zip(sums, new, strict=True))
        step = choose(self.step > 0, 1.0 * self.step, sums[0] / (sums[1] + (sums[1] < 1)))
        verify = choose(self.verify > 0, 1.0 * self.verify, sums[2] / sums[3])
        hits, tries = sum(matched), sum(matched) + sum(missed)
        match = hits / (tries + (tries < 1))
        return self.best(choose(match < self.cap, match, 1.0 * self.cap), step, verify), matched, missed, sums

    def best(self, match, step, verify):
        """The first s from which one more does not pay, at most the 32nd or `most`."""
        longer = choose(step > verify, step, verify)

        def time(length, power):
            one_by_one = length * step + verify
            together = power * ((length - 1.0) * step + longer) + (1.0 - power) * one_by_one
            return choose(self.overlap > 0, together, one_by_one)

        best, power, rising = 1.0 + 0.0 * match, match, match >= 0.0
        for length in range(1, 32):
            following = power * match
            pays = (1.0 - following) * time(length, power) >= (1.0 - power) * time(length + 1, following)
            rising = rising & pays & (length < self.most)
            best, power = best + rising, following
        return best
