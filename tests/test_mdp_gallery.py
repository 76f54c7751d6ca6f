"""The gallery: every counterexample breaks what it says, by exactly what it says, in fractions."""

import itertools
import re
from fractions import Fraction

import pytest

from mdp import conditions, families
from mdp.case import examine
from mdp.gallery import FOLDER, gallery
from mdp.theory import check

ENTRIES = {entry.name: entry for entry in gallery()}
RENEWAL = [name for name, entry in ENTRIES.items() if not entry.problem.lower().persistent]


@pytest.fixture(scope="module")
def facts():
    """Every fact on every counterexample."""
    return {name: {fact.id: fact for fact in check(entry.problem)} for name, entry in ENTRIES.items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_the_check_reproduces_it(facts, name):
    entry = ENTRIES[name]
    fact = facts[name][entry.fact]
    assert fact.numbers[entry.number] == pytest.approx(float(entry.value), abs=1e-9)
    if entry.number in ("loss", "excess"):
        assert fact.status == "fails"


BROKEN = {
    "the next acceptance is the same in every regime": conditions.varying_next_accept,
    "the next acceptance is the same at every depth": conditions.varying_next_accept,
    "the next acceptance is the same in every start regime": conditions.varying_next_accept,
    "V is affine": conditions.bent,
    "rounds renew": conditions.persists,
    "the case is monotone": conditions.revealing,
    "V is convex": conditions.concave,
    "V never falls": conditions.falling,
    "acceptances are known once the round's start is": conditions.seen_to_vary,
}
NEEDS = {
    "F2": (conditions.varying_next_accept, conditions.persists, conditions.bent),
    "F3": (conditions.persists, conditions.concave, conditions.revealing),
    "F4": (conditions.falling,),
    "F5": (conditions.seen_to_vary,),
    "F7": (conditions.persists, conditions.concave, conditions.revealing),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_one_condition_is_broken_and_no_other(facts, name):
    entry, finite = ENTRIES[name], ENTRIES[name].problem.lower()
    broken = [condition for condition in NEEDS[entry.fact] if condition(finite)]
    if entry.breaks == "time is priced at the long-run rate":  # no matter of the problem: look-ahead at rho* is exact
        assert not broken
        assert facts[name]["F3"].status == "holds"
        return
    assert broken == [BROKEN[entry.breaks]]
    assert facts[name][entry.fact].why == broken[0](finite)


def test_all_files_are_listed_and_simple():
    assert {path.stem for path in FOLDER.glob("*.json")} == ENTRIES.keys() | {"index"}
    for entry in ENTRIES.values():
        for number in re.findall(r"[0-9.]+", entry.path.read_text()):
            assert Fraction(number).denominator <= 8, entry.name
        assert entry.problem.max_candidates <= 3 and entry.problem.acceptance.num_regimes <= 3


class Exact:
    """A renewal problem in fractions: what any rule earns, path by path. Shares no code with what it checks."""

    def __init__(self, finite):
        def exact(values):
            return [Fraction(float(value)).limit_denominator(64) for value in values]

        self.transition, self.accept = [exact(row) for row in finite.transition], exact(finite.accept_prob[0])
        self.by_depth = [exact(row) for row in finite.accept_prob]
        self.initial, self.verify = exact(finite.initial), exact(finite.verify_time)
        self.draft, self.depth = exact([finite.draft_time])[0], finite.max_candidates

    def next_accept(self, k, z):
        return sum(p * a for p, a in zip(self.transition[z], self.by_depth[k], strict=True))

    def earns(self, continues):
        """Throughput of the rule that continues where `continues(k, z, S, tokens)` says so."""
        tokens = time = Fraction(0)
        open_ = [(0, z, Fraction(1), Fraction(1), p) for z, p in enumerate(self.initial) if p]
        while open_:
            k, z, survival, earned, chance = open_.pop()
            if k == self.depth or not continues(k, z, survival, earned):
                tokens += chance * earned
                time += chance * (k * self.draft + self.verify[k])
                continue
            for y, p in enumerate(self.transition[z]):
                if p:
                    below = survival * self.by_depth[k][y]
                    open_.append((k + 1, y, below, earned + below, chance * p))
        return tokens / time

    def nodes(self):
        """(k, z, S) of every path with something left to decide."""
        found = {(0, z, Fraction(1)) for z, p in enumerate(self.initial) if p}
        layer = found
        for k in range(self.depth - 1):
            layer = {
                (k + 1, y, s * self.by_depth[k][y]) for _, z, s in layer for y, p in enumerate(self.transition[z]) if p
            }
            found = found | layer
        return sorted(found)

    def optimum(self):
        """The best of all rules there are."""
        nodes = self.nodes()
        rules = itertools.chain.from_iterable(itertools.combinations(nodes, n) for n in range(len(nodes) + 1))
        return max(self.earns(lambda k, z, s, _, go=frozenset(rule): (k, z, s) in go) for rule in rules)

    def best_threshold(self, index):
        levels = {index(k, z, s) for k, z, s in self.nodes()}
        return max(self.earns(lambda k, z, s, _, h=h: index(k, z, s) >= h) for h in [*levels, max(levels) + 1])

    def one_step(self, rate):
        def continues(k, z, survival, _):
            return survival * self.next_accept(k, z) >= rate * self.price(k)

        return self.earns(continues)

    def price(self, k):
        return self.draft + self.verify[k + 1] - self.verify[k]

    def goodput(self):
        def continues(k, z, survival, earned):
            spent = k * self.draft + self.verify[k]
            return (earned + survival * self.next_accept(k, z)) * spent >= earned * (spent + self.price(k))

        return self.earns(continues)


@pytest.mark.parametrize("name", RENEWAL)
def test_the_loss_is_that_fraction(name):
    """By every deterministic rule there is, in exact arithmetic."""
    entry = ENTRIES[name]
    exact = Exact(entry.problem.lower())
    best = exact.optimum()
    assert float(best) == pytest.approx(families.optimum(entry.problem.lower()).throughput, rel=1e-14)
    earned = {
        ("F2", "loss"): lambda: exact.best_threshold(lambda k, z, s: s),
        ("F3", "loss"): lambda: exact.one_step(best),
        ("F3", "lookahead_loss"): lambda: exact.best_threshold(lambda k, z, s: s * exact.next_accept(k, z)),
        ("F3", "goodput_loss"): exact.goodput,
        ("F5", "loss"): lambda: max(exact.earns(lambda k, z, s, _, n=n: k < n) for n in range(exact.depth + 1)),
    }
    if (entry.fact, entry.number) in earned:
        assert 1 - earned[entry.fact, entry.number]() / best == entry.value
    elif entry.fact == "F7":  # the family: look-ahead at every rate, plain decoding among them
        rates = {s * exact.next_accept(k, z) / exact.price(k) for k, z, s in exact.nodes()}
        assert 1 - exact.one_step(Fraction(1)) / max(exact.one_step(rate) for rate in rates) == entry.value
        assert exact.one_step(Fraction(1)) == 1  # where it started is where it stays
    else:  # F4: drafting at survival 0 is right, and D / (t_d + D) is less than 1
        (worth,) = [exact.next_accept(0, 0) / best - exact.price(0)]
        assert entry.value == 1 - worth / (exact.draft + worth)


def test_two_regimes_is_the_story_it_tells():
    """The optimum decides both ways at survival 1/2; a threshold cannot."""
    entry = ENTRIES["two_regimes"]
    exact = Exact(entry.problem.lower())
    assert exact.optimum() == Fraction(43, 26)
    assert exact.earns(lambda k, z, s, _: s >= Fraction(1, 2)) == Fraction(23, 14)
    assert exact.earns(lambda k, z, s, _: s == 1) == Fraction(37, 23)
    assert max(exact.earns(lambda k, z, s, _, n=n: k < n) for n in range(4)) == Fraction(23, 14)
    table = examine(entry.problem).threshold
    easy, hard = 0, 1
    assert table[1, hard] < 0.5 < table[2, easy]
    assert {(1, hard, Fraction(1, 2)), (2, easy, Fraction(1, 2))} <= set(exact.nodes())
    for fraction in ("43/26", "23/14", "37/23"):
        assert fraction in entry.story
