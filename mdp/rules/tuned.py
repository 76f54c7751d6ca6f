r"""Thresholds that follow what was earned, or what was seen to be accepted."""

from dataclasses import dataclass

from mdp.policy import TIE, Policy, choose, known, parameter, published

__all__ = ["HFAuto", "SelfTuned"]


@published("selftuned", "look-ahead at the throughput earned so far: no setting")
@dataclass(frozen=True)
class SelfTuned(Policy):
    r"""Continue iff $S_k \bar a \ge \rho_n (T(k+1) - T(k))$, $\rho_n$ the throughput of the rounds so far.

    One plain target step, a token in V(0), is counted before the first round, so that $\rho_0 = 1 / V(0)$. In the
    monotone case (theory, F3, F7) $\rho_n$ converges to the optimum; elsewhere it may settle below its family's best.
    """

    needs = ("survival", "next_accept_prob", "verify_time", "step_time")
    timed = True

    def init(self):
        """Tokens, time, and V(0) as seen at the round's start."""
        return 0.0, 0.0, 0.0

    def stop(self, state, observation):
        emitted, time, _ = state
        plain = choose(observation.num_candidates > 0, state[2], observation.verify_time)
        price = (emitted + 1.0) / (time + plain) * observation.step_time
        return (emitted, time, plain), observation.survival * observation.next_accept_prob < price - TIE

    def end_round(self, state, outcome):
        emitted, time, plain = state
        return emitted + outcome.num_accepted + 1.0, time + outcome.draft_time + outcome.verify_time, plain


BINS = 10
PENDING = 20
UNSEEN = -1.0


@published("hf_auto", "hf_confidence with the threshold fitted on the way (ROC of probability against match)",
           "Hugging Face transformers, candidate_generator.py", "code")  # fmt: skip
@dataclass(frozen=True)
class HFAuto(Policy):
    r"""Stop iff q(v) < $\tau$, or at `most`; $\tau$ is the threshold that the rounds so far make best.

    Each round adds its accepted candidates and the first rejected one to the history; with more than `warmup` samples
    and both kinds seen, $\tau$ makes FPR + `fn_weight` $\cdot$ FNR least, the greatest of equals. Defaults [code]:
    $\tau$ = .4 at first, 20, 3 and 5. There $\tau$ is one of the probabilities seen; here the history is a histogram
    and $\tau$ a tenth, from 0 to 1. Of a round of more than 20 candidates the first 20 are remembered; one behind
    which the world forces the stop is not shown, so it is not remembered either.
    """

    threshold: float = parameter(0.4, 0.0, 1.0, "code")
    most: int = parameter(20, 1, 1024, "code")
    fn_weight: float = parameter(3.0, 0.0, 1e6, "code")
    warmup: int = parameter(5, 0, 10**6, "code")
    needs = ("draft_prob",)

    def init(self):
        """Threshold, the round's tenths so far, and histograms of accepted and rejected candidates."""
        return 1.0 * self.threshold, (UNSEEN,) * PENDING, (0.0,) * BINS, (0.0,) * BINS

    def stop(self, state, observation):
        threshold, pending, *history = state
        k = observation.num_candidates
        prob = known(observation.draft_prob, k)
        tenth = (BINS * prob + 1e-9) // 1.0
        tenth = choose(tenth < BINS, tenth, BINS - 1.0)
        pending = tuple(
            choose((k > i) & (k < i + 2), tenth, choose(k > 0, old, UNSEEN)) for i, old in enumerate(pending)
        )
        return (threshold, pending, *history), (k >= self.most) | ((k > 0) & (prob < threshold))

    def end_round(self, state, outcome):
        threshold, pending, matched, missed = state
        accepted, drafted = outcome.num_accepted, outcome.num_drafted
        labels = [
            (1.0 * (accepted > i), 1.0 * (accepted >= i) * (accepted < i + 1) * (drafted > i)) for i in range(PENDING)
        ]
        new_matched, new_missed = list(matched), list(missed)
        for b in range(BINS):
            for tenth, (match, miss) in zip(pending, labels, strict=True):
                here = (tenth > b - 0.5) & (tenth < b + 0.5)
                new_matched[b], new_missed[b] = new_matched[b] + here * match, new_missed[b] + here * miss
        hits, misses = sum(new_matched), sum(new_missed)
        best, cost = threshold, 0.0 * hits + 2.0 + self.fn_weight
        below_hits, above_misses = 0.0 * hits, misses
        for b in range(BINS + 1):  # at tau = b / BINS everything from bin b on is taken for accepted
            loss = above_misses / (misses + (misses < 1)) + self.fn_weight * below_hits / (hits + (hits < 1))
            better = loss <= cost + TIE
            best, cost = choose(better, b / BINS + 0.0 * loss, best), choose(better, loss, cost)
            if b < BINS:
                below_hits, above_misses = below_hits + new_matched[b], above_misses - new_missed[b]
        ready = (hits + misses > self.warmup) & (hits > 0) & (misses > 0)
        return choose(ready, best, threshold), pending, tuple(new_matched), tuple(new_missed)
