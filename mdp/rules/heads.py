r"""Stop by a trained predictor of acceptance: the head of SpecDec++ and the classifier of DISCO.

A head trained with weight w on rejections reports $\hat a = a / (a + w (1 - a))$ where the acceptance probability is
a (theory, F6), so $a = w \hat a / (1 - \hat a + w \hat a)$.
"""

import math
from dataclasses import dataclass, field

from mdp.policy import TIE, Policy, choose, known, parameter, published

__all__ = ["Disco", "SpecDecPP", "SpecDecPPIdeal"]


@published("specdecpp", "stop iff 1 - product of the head's outputs > threshold, within [least, most]",
           "SpecDec++, arXiv 2405.19715, as released", "code")  # fmt: skip
@dataclass(frozen=True)
class SpecDecPP(Policy):
    r"""Stop iff $1 - \prod_i \hat a_i > $ threshold; before `least` candidates never, at `most` always.

    As released [code]: the comparison is strict; the product runs to candidate k - 1 (`lag=1`), because the hidden
    state that the head reads while candidate k is drafted is that of candidate k - 1, so candidate k is submitted
    unscored; and outputs are used as they are. `lag=0` scores every candidate, `strict=0` stops at equality (the
    paper's text), `weight=w` first undoes the inflation of a head trained with weight w on rejections (1: none).
    Defaults [code: sample.py]: threshold .7, bounds 2 and 20.
    """

    threshold: float = parameter(0.7, 0.0, 1.0, "code")
    least: int = parameter(2, 0, 1024, "code")
    most: int = parameter(20, 0, 1024, "code")
    lag: int = parameter(1, 0, 1, "code")
    strict: int = parameter(1, 0, 1, "code")
    weight: float = parameter(1.0, 1e-6, 1e6, "code")
    needs = ("head",)

    def init(self):
        return 1.0, 1.0  # products to the candidate before the last, and to the last

    def reported(self, observation):
        """The head's output for the last candidate, 1 where there is none."""
        return known(observation.head, observation.num_candidates)

    def stop(self, state, observation):
        k = observation.num_candidates
        reported = self.reported(observation)
        accept_prob = self.weight * reported / (1.0 - reported + self.weight * reported)
        before = choose(k > 0, state[1], 1.0)
        product = before * accept_prob
        rejection_prob = 1.0 - choose(self.lag > 0, before, product)
        over = rejection_prob > self.threshold + (2.0 * self.strict - 1.0) * TIE
        return (before, product), (k >= self.most) | ((k >= self.least) & over)


@published("specdecpp_ideal", "specdecpp with a head that knows acceptance and reports what training makes of it",
           "SpecDec++, arXiv 2405.19715, as released", "code")  # fmt: skip
@dataclass(frozen=True)
class SpecDecPPIdeal(SpecDecPP):
    r"""`SpecDecPP` with the best head there can be: it reports $a / (a + w (1 - a))$, w = `inflation`.

    What the rule itself loses where the head is not at fault. Default of `inflation` [note]: 6, the weight of the
    shared configuration; `weight=6` undoes it.
    """

    inflation: float = parameter(6.0, 1e-6, 1e6, "note")
    needs = ("token_accept_prob",)

    def reported(self, observation):
        accept_prob = known(observation.token_accept_prob, observation.num_candidates)
        return accept_prob / (accept_prob + self.inflation * (1.0 - accept_prob))


UNFITTED = (((1.0, 0.0, 0.0, 0.0, 0.0),), (1.0, -0.5))
"""One unit that passes max q on, less 1/2."""


@published("disco", "stop after a candidate whose classifier score is below the threshold",
           "DISCO, arXiv 2405.04304", "paper", fits=True)  # fmt: skip
@dataclass(frozen=True)
class Disco(Policy):
    r"""Stop iff $\sigma(f(x)) < $ threshold, or at `most` candidates; f a network of two layers.

    Features x are max q, q(v), the entropy and the candidate's place in the round; the paper has the ten greatest q in
    place of the first two, which worlds here do not show. $f(x) = b + \sum_j v_j \max(0, u_j \cdot (x, 1))$: `inner`
    holds the $u_j$, `outer` the $v_j$ and b. `fit=1` trains it on the training half of a trace with cross-entropy on
    accept and reject, as the paper does, and tunes the threshold; not fitted, f = max q - 1/2, which is no published
    network.

    The threshold's default is ours (the paper tunes it on a validation set), as is `most` (the paper's is a setting).
    """

    threshold: float = parameter(0.5, 1e-6, 1 - 1e-6, "ours")
    most: int = parameter(20, 1, 1024, "ours")
    inner: tuple[tuple[float, ...], ...] = UNFITTED[0]
    outer: tuple[float, ...] = UNFITTED[1]
    cut: float = field(init=False)
    needs = ("draft_prob", "top_prob", "entropy")

    def __post_init__(self):
        # sigma(f) < t iff f < log(t / (1 - t)); a logarithm is no operator, so it is taken once
        object.__setattr__(self, "cut", math.log(self.threshold / (1.0 - self.threshold)))

    def score(self, features):
        """f at features (max q, q(v), entropy, place)."""
        *weights, total = self.outer
        for (*unit, bias), weight in zip(self.inner, weights, strict=True):
            for slope, value in zip(unit, features, strict=True):
                bias = bias + slope * value
            total = total + weight * (bias * (bias > 0))
        return total

    def stop(self, state, observation):
        k = observation.num_candidates
        features = (
            known(observation.top_prob, k), known(observation.draft_prob, k), known(observation.entropy, k), 1.0 * k,
        )  # fmt: skip
        return state, (k >= self.most) | ((k > 0) & (self.score(features) < self.cut))
