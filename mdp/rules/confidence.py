r"""Stop when the draft was not sure of its last candidate.

A candidate v was drawn from the draft's law q; the rules look at q(v), at max q or at the entropy H(q) in nats, of this
one candidate and not of the round: nothing here is a survival. The entropy rules come from a bound on acceptance,
$\beta = 1 - \mathrm{TV}(p, q) \ge 1 - \sqrt{\mathrm{KL}(q, p) / 2}$ (Pinsker), with the unknown divergence
taken to be a multiple of H(q).

An entropy may miss 0 by rounding, to either side, hence the absolute value under the root.

The candidate that triggers the stop is submitted, as the sources of HF, Kangaroo and SVIP do.
"""

from dataclasses import dataclass

from mdp.policy import Policy, choose, parameter, published

__all__ = ["SVIP", "AdaEDL", "BiLD", "HFConfidence", "Kangaroo", "LlamaCpp"]

MANY = 1e9


@published(
    "hf_confidence", "stop after a candidate of draft probability below the threshold",
    "Hugging Face transformers, candidate_generator.py", "code", fits=True,
)  # fmt: skip
@dataclass(frozen=True)
class HFConfidence(Policy):
    """Stop iff q(v) < threshold, or at `most` candidates.

    Defaults [code]: .4 and 20 (transformers 4.45 and later). `fit=1` takes the threshold from the ROC curve of (q(v),
    accepted) on the training half of a trace: the one that makes FPR + 3 FNR least.
    """

    threshold: float = parameter(0.4, 0.0, 1.0, "code")
    most: int = parameter(20, 0, 1024, "code")
    needs = ("draft_prob",)

    def stop(self, state, observation):
        k = observation.num_candidates
        return state, (k >= self.most) | ((k > 0) & (observation.draft_prob < self.threshold))


@published(
    "llamacpp", "stop after a candidate of draft probability below p_min, at most n_max", "llama.cpp server", "note"
)
@dataclass(frozen=True)
class LlamaCpp(Policy):
    """Stop iff q(v) < `p_min`, or at `n_max` candidates.

    Defaults [note: the server's README]: 0 and 3. There the unsure candidate is dropped, and so are drafts shorter than
    `n_min`; here what was drafted is submitted, so there is no `n_min`.
    """

    p_min: float = parameter(0.0, 0.0, 1.0, "note")
    n_max: int = parameter(3, 0, 1024, "note")
    needs = ("draft_prob",)

    def stop(self, state, observation):
        k = observation.num_candidates
        return state, (k >= self.n_max) | ((k > 0) & (observation.draft_prob < self.p_min))


@published("kangaroo", "stop after a candidate of top probability below the threshold, at most 6",
           "Kangaroo, arXiv 2404.18911", "code")  # fmt: skip
@dataclass(frozen=True)
class Kangaroo(Policy):
    r"""Stop iff max q < threshold, or at `most` candidates; at least one is drafted.

    Defaults [code]: .6 (the function's; .4 the program's) and 6. Its draft is the target's first layers, a share s of
    them, and an adapter of time e: n candidates take n + 1 shallow passes, n adapter passes and one deep pass, that is
    $t_d = s + e$ and V = 1 in target calls.
    """

    threshold: float = parameter(0.6, 0.0, 1.0, "code")
    most: int = parameter(6, 1, 1024, "code")
    needs = ("top_prob",)

    def stop(self, state, observation):
        k = observation.num_candidates
        return state, (k >= self.most) | ((k > 0) & (observation.top_prob < self.threshold))


@published("bild", "stop after a candidate of top probability below the threshold (fall back)",
           "BiLD, arXiv 2302.07863; Draft & Verify, arXiv 2309.08168", "note")  # fmt: skip
@dataclass(frozen=True)
class BiLD(Policy):
    """Stop iff max q < threshold, with no bound of its own on the length.

    The threshold's default is ours. BiLD's roll back, a lossy verification, is not the rule's business.
    """

    threshold: float = parameter(0.5, 0.0, 1.0, "ours")
    needs = ("top_prob",)

    def stop(self, state, observation):
        return state, (observation.num_candidates > 0) & (observation.top_prob < self.threshold)


@published("svip", "stop after a candidate with sqrt(scale * entropy) above the threshold",
           "SVIP, arXiv 2411.18462", "code")  # fmt: skip
@dataclass(frozen=True)
class SVIP(Policy):
    r"""Stop iff $\sqrt{\text{scale} \cdot H(q)} > $ threshold, or at `most` candidates.

    Defaults [code]: .15, .3 and 40; `scale=1` is the formula as the paper prints it.
    """

    threshold: float = parameter(0.3, 0.0, MANY, "code")
    scale: float = parameter(0.15, 0.0, MANY, "code")
    most: int = parameter(40, 0, 1024, "code")
    needs = ("entropy",)

    def stop(self, state, observation):
        k = observation.num_candidates
        return state, (k >= self.most) | ((k > 0) & (abs(self.scale * observation.entropy) ** 0.5 > self.threshold))


@published("adaedl", "stop after a candidate with 1 - sqrt(scale * entropy) below a threshold that follows acceptance",
           "AdaEDL, arXiv 2410.18351", "paper")  # fmt: skip
@dataclass(frozen=True)
class AdaEDL(Policy):
    r"""Stop iff $1 - \sqrt{\text{scale} \cdot H(q)} < \lambda$, or at `most` candidates; $\lambda$ follows acceptance.

    After a round of n candidates with m accepted, $r \leftarrow b r + (1 - b) m / n$ (b = `rate_memory`, r = 0 at
    first); $\lambda' = \lambda + $ `step` if r < `target`, else $\lambda - $ `step` unless m = `most`, else
    $\lambda$; $\lambda \leftarrow c \lambda + (1 - c) \lambda'$ (c = `memory`). An empty round changes nothing.

    Defaults [paper]: scale .2, target .9, step .01, b .5, c .9 (the last four from Draft & Verify), `most` 7 (of 3, 7,
    16). The first $\lambda$ is ours: the paper says that it matters, not what it is.
    """

    threshold: float = parameter(0.4, 0.0, 1.0, "ours")
    scale: float = parameter(0.2, 0.0, MANY, "paper")
    target: float = parameter(0.9, 0.0, 1.0, "paper")
    step: float = parameter(0.01, 0.0, 1.0, "paper")
    rate_memory: float = parameter(0.5, 0.0, 1.0, "paper")
    memory: float = parameter(0.9, 0.0, 1.0, "paper")
    most: int = parameter(7, 1, 1024, "paper")
    needs = ("entropy",)

    def init(self):
        return 1.0 * self.threshold, 0.0

    def stop(self, state, observation):
        k = observation.num_candidates
        return state, (k >= self.most) | ((k > 0) & (1.0 - abs(self.scale * observation.entropy) ** 0.5 < state[0]))

    def end_round(self, state, outcome):
        threshold, rate = state
        drafted, accepted = outcome.num_drafted, outcome.num_accepted
        empty = drafted < 1
        rate = choose(empty, rate, self.rate_memory * rate + (1.0 - self.rate_memory) * accepted / (drafted + empty))
        eased = choose(accepted < self.most, threshold - self.step, threshold)
        moved = choose(rate < self.target, threshold + self.step, eased)
        return choose(empty, threshold, self.memory * threshold + (1.0 - self.memory) * moved), rate
