r"""Try arms, compare what they earn, prefer the better ones but not yet for good.

UCB1 (Auer et al. 2002): after t rounds play the arm with the greatest
$\bar r_i + \sqrt{w \ln t / n_i}$, $n_i$ its pulls and $\bar r_i$ its mean reward; ties go to the first. There is no
randomness. $\ln t$ is carried along, since rules are arithmetic:
$\ln(t + 1) = \ln t + 2\,\mathrm{artanh}(1 / (2t + 1))$, whose series is exact to rounding.
"""

from dataclasses import dataclass

from mdp.policy import Policy, choose, known, parameter, published

__all__ = ["BanditSpec", "TapOut"]

TERMS = 17  # (1/3)^(2 * 17) is below rounding


def next_log(log, rounds):
    """ln(rounds + 1) from log = ln(rounds), for rounds >= 1; 0 from rounds = 0."""
    ratio = 1.0 / (2.0 * rounds + 1.0)
    square, power, total = ratio * ratio, ratio, 0.0
    for term in range(TERMS):
        total = total + power / (2 * term + 1)
        power = power * square
    return choose(rounds < 1, 0.0 * rounds, log + 2.0 * total)


def greatest(values):
    """Index of the greatest value, the first of equals."""
    best, index = values[0], 0.0 * values[0]
    for i, value in enumerate(values[1:], start=1):
        better = value > best
        best, index = choose(better, value, best), choose(better, 1.0 * i, index)
    return index


def pulled(state, reward, played):
    """Counts, sums, rounds and ln(rounds) after one more round of the arm `state[0]`; nothing where none was played."""
    arm, counts, sums, rounds, log = state
    hits = tuple(played * (arm > i - 0.5) * (arm < i + 0.5) for i in range(len(counts)))
    counts = tuple(count + hit for count, hit in zip(counts, hits, strict=True))
    sums = tuple(total + hit * reward for total, hit in zip(sums, hits, strict=True))
    return counts, sums, rounds + played, choose(played > 0, next_log(log, rounds), log)


def ucb(counts, sums, log, width, shared=0.0):
    """The arm of the greatest upper confidence bound; `shared` divides by all pulls in place of the arm's own."""
    total = sum(counts)
    bounds = []
    for count, reward in zip(counts, sums, strict=True):
        pulls = count + (count < 1)
        bounds.append(reward / pulls + (width * log / choose(shared > 0, total + (total < 1), pulls)) ** 0.5)
    return greatest(bounds)


@published("banditspec", "UCB1 over lengths, reward tokens per time of the round", "BanditSpec, arXiv 2505.15141",
           "code")  # fmt: skip
@dataclass(frozen=True)
class BanditSpec(Policy):
    r"""Each of `lengths` is an arm, played in turn for `warmup` rounds, then by UCB1; reward: tokens / time.

    The bound is $\bar r_i + \sqrt{w \ln t / n_i}$ with w = `width`. `released=1` divides by all pulls in place of
    $n_i$, as the released code does: the bonus is then the same for every arm and the choice plain greedy on the mean.
    Defaults [code]: lengths 1..4, warm-up 7, width 6. UCB1 proper has width 2 and rewards in [0, 1]; these are in
    tokens per unit of time, so the weight of exploring depends on the unit.
    """

    lengths: tuple[int, ...] = parameter((1, 2, 3, 4), 0, 1024, "code")
    warmup: int = parameter(7, 1, 10**6, "code")
    width: float = parameter(6.0, 0.0, 1e9, "code")
    released: int = parameter(0, 0, 1, "ours")
    timed = True

    def __post_init__(self):
        if self.warmup < len(self.lengths):
            raise ValueError(f"warmup must play all {len(self.lengths)} lengths, got {self.warmup}")

    def init(self):
        none = (0.0,) * len(self.lengths)
        return 0.0, none, none, 0.0, 0.0

    def stop(self, state, observation):
        length = 1.0 * self.lengths[0]
        for i, other in enumerate(self.lengths):
            length = choose(state[0] > i - 0.5, 1.0 * other, length)
        return state, observation.num_candidates >= length

    def end_round(self, state, outcome):
        reward = (outcome.num_accepted + 1.0) / (outcome.draft_time + outcome.verify_time)
        counts, sums, rounds, log = pulled(state, reward, 1.0)
        best = ucb(counts, sums, log, self.width, self.released)
        return choose(rounds < self.warmup, rounds % len(self.lengths), best), counts, sums, rounds, log


@published("tapout", "UCB1 over confidence rules, reward accepted length and acceptance rate mixed",
           "TapOut, arXiv 2511.02017", "note")  # fmt: skip
@dataclass(frozen=True)
class TapOut(Policy):
    r"""UCB1 over stopping rules: each round is drafted under one arm, and all arms keep to `most`.

    Arms: max q < `confidence`; $\sqrt{.15 H} > $ `svip`; $1 - \sqrt{.2 H} < $ `adaedl`;
    $\sqrt{H_k} - \sqrt{H_{k-1}} > $ `difference`. The fifth arm of the source, the margin between the two greatest
    logits, is left out: no world shows it. Reward: `mix` $\cdot\, m / $ `most` $+ (1 - $ `mix`$)\, m / n$ for m of n
    accepted; UCB1 with w = 2, every arm once first. [note] for the arms, for UCB1 per sequence and for the reward being
    such a mixture. The figures are ours, but for those of SVIP and the .2 of AdaEDL, which are those rules' own.
    """

    confidence: float = parameter(0.6, 0.0, 1.0, "ours")
    svip: float = parameter(0.3, 0.0, 1e9, "code")
    adaedl: float = parameter(0.4, 0.0, 1.0, "ours")
    difference: float = parameter(0.2, 0.0, 1e9, "ours")
    mix: float = parameter(0.5, 0.0, 1.0, "ours")
    most: int = parameter(16, 1, 1024, "ours")
    needs = ("top_prob", "entropy")

    def init(self):
        """The bandit, and the root of the entropy at the candidate before (0 before the first)."""
        none = (0.0,) * 4
        return (0.0, none, none, 0.0, 0.0), 0.0

    def stop(self, state, observation):
        bandit, before = state
        k = observation.num_candidates
        top, entropy = known(observation.top_prob, k), abs(known(observation.entropy, k))
        root = entropy**0.5 * (k > 0)
        arms = (
            top < self.confidence,
            0.15**0.5 * root > self.svip,
            1.0 - 0.2**0.5 * root < self.adaedl,
            (root - before > self.difference) & (k > 1),
        )
        unsure = k < 0
        for i, arm in enumerate(arms):
            unsure = unsure | ((bandit[0] > i - 0.5) & (bandit[0] < i + 0.5) & arm)
        return (bandit, root), (k >= self.most) | ((k > 0) & unsure)

    def end_round(self, state, outcome):
        drafted, accepted = outcome.num_drafted, outcome.num_accepted
        played = 1.0 * (drafted > 0)
        rate = accepted / (drafted + (drafted < 1))
        counts, sums, rounds, log = pulled(state[0], self.mix * accepted / self.most + (1.0 - self.mix) * rate, played)
        arm = choose(rounds < 4, rounds, ucb(counts, sums, log, 2.0))
        return (arm, counts, sums, rounds, log), 0.0 * state[1]
