"""Small bugs planted one at a time, and the law that must catch each: a law that catches nothing guards nothing.

A mutant is a function of the package with a piece of its source replaced. If the piece is no longer there the test
fails too: the mutant then has to follow the code. Compiled code is run operation by operation, on a few problems.
"""

import inspect
import textwrap

import jax
import pytest
import theory_laws as laws
from theory_problems import KINDS, Numbers, made

from mdp import conditions, families, price, theory
from mdp.case import Case, examine, examine_many
from mdp.cost import Affine
from mdp.gallery import gallery
from mdp.problem import FiniteProblem, StoppingProblem

SEEDS = [3, 77, *range(2**13, 2**13 + 6)]


def plant(monkeypatch, owner, name, old, new):
    """Replace `old` by `new` in the source of a function or method, once."""
    original = inspect.getattr_static(owner, name)
    function = original.func if hasattr(original, "func") else getattr(original, "fget", None) or original
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) >= 1, f"{name} no longer contains {old!r}"
    module = inspect.getmodule(function)
    scope = dict(vars(module))
    lines = source.replace(old, new, 1).splitlines()
    while lines[0].startswith("@"):
        lines.pop(0)
    exec("\n".join(lines), scope)
    planted = scope[name]
    # The mutant sees later changes of its module, as the original does.
    planted = type(function)(planted.__code__, vars(module), name, planted.__defaults__, planted.__closure__)
    planted.__kwdefaults__ = function.__kwdefaults__
    monkeypatch.setattr(owner, name, property(planted) if inspect.isclass(owner) else planted)
    if owner is theory:
        monkeypatch.setattr(theory, "FACTS", tuple(planted if fact is original else fact for fact in theory.FACTS))


MUTANTS = {
    # what a rule earns
    "survival takes the acceptance of the regime left, not entered": (
        families, "_grow", "problem.accept_prob[k, child]", "problem.accept_prob[k, regime[parent]]",
        "renewal", laws.ladders_are_evaluated),
    "the level forgets the nodes before": (
        families, "_grow", "np.minimum(level, index(", "np.minimum(np.inf, index(",
        "renewal", laws.ladders_are_evaluated),
    "the threshold is compared the other way round": (
        families, "_ladder", "np.argsort(-level", "np.argsort(level", "renewal", laws.ladders_are_evaluated),
    "V(k) is off by one": (
        families, "_ladder", "problem.verify_time[0] + sums", "problem.verify_time[1] + sums",
        "renewal", laws.ladders_are_evaluated),
    "the bonus is dropped": (
        families, "next_start_gain", "accept * problem.bonus)", "accept * problem.rejection)",
        "persistent", laws.ladders_are_evaluated),
    "fixed lengths meet the first regime only": (
        families, "best_lengths", "(alive @ problem.transition)", "alive", "renewal", laws.lengths_are_evaluated),
    "goodput leaves out the draft steps": (
        families, "goodput", "problem.round_time[k]", "problem.verify_time[k]", "renewal", laws.goodput_is_walked),
    "goodput prices the round by its candidates": (
        families, "goodput", "(earned[parent] + below)[first]", "earned[parent][first]",
        "renewal", laws.goodput_is_walked),
    # the optimum
    "a mean over starts becomes the best start": (
        families, "_improve", "(initial @ emitted) / (initial @ time)", "(emitted / time).max()",
        "renewal", laws.optimum_is_enumerated),
    "the steps of V are left out of a candidate's time": (
        FiniteProblem, "step_time", "+ np.diff(self.verify_time)", "+ 0.0 * np.diff(self.verify_time)",
        "renewal", laws.optimum_is_enumerated),
    "the bias stands still": (
        families, "_howard", "(1.0 - leak) * leads", "0.0 * leads", "persistent", laws.optimum_is_enumerated),
    "a candidate moves the next start from a survival of 1": (
        families, "optimum", "survival[:, None] * gains[k][regime]", "gains[k][regime]",
        "persistent", laws.optimum_is_enumerated),
    "the optimum never stops": (
        families, "optimum", "now @ value < 0", "now @ value < -9", "renewal", laws.optimum_is_enumerated),
    "look-ahead counts two candidates' time": (
        families, "lookahead_table", "rate * problem.step_time", "2 * rate * problem.step_time",
        "monotone", laws.look_ahead_is_optimal),
    "look-ahead pays for no time": (
        families, "lookahead_table", "rate * problem.step_time", "0.5 * rate * problem.step_time",
        "renewal", laws.continue_is_right),
    "the unit of time is V(0)": (
        families, "optimum", "verify = problem.verify_time[0]", "verify = 1.0", "renewal", laws.scales),
    "a draft step gives time back": (
        FiniteProblem, "step_time", "self.draft_time + np", "-self.draft_time + np",
        "persistent", laws.slower_is_never_better),
    "one threshold for all, compared the other way round": (
        families, "_ladder", "np.argsort(-level", "np.argsort(level", "constant", laws.one_threshold_is_optimal),
    "thresholds are a tenth too low": (
        Case, "threshold", "np.broadcast_to(table", "np.broadcast_to(0.9 * table",
        "renewal", laws.value_changes_sign_once),
    "thresholds are those of another regime": (
        Case, "threshold", "np.broadcast_to(table", "np.broadcast_to(table[:, ::-1]",
        "renewal", laws.optimal_table_earns_the_optimum),
    "thresholds are listed from the last depth": (
        Case, "threshold", "np.broadcast_to(table", "np.broadcast_to(table[::-1]",
        "persistent", laws.threshold_rises_with_depth),
    # the facts
    "Delta without t_d": (
        theory, "sufficient_bound", "(least_time + np.maximum(worth", "(1e-9 + np.maximum(worth",
        "persistent", laws.reports_are_sound),
    "the bound leaves out t_d": (
        theory, "sufficient_bound", "max(most, 0.0) / (least_time +", "max(most, 0.0) / (1e-9 +",
        "renewal", laws.bound_is_the_tightest),
    "c_2 is the whole verification": (
        theory, "sufficient_bound", "float(finite.verify_time[0]) - least_time", "float(finite.verify_time[0])",
        "renewal", laws.bound_is_the_tightest),
    "D leaves out the bias": (
        Case, "ahead", "self.solution.bias if self.exact else", "0.0 * self.solution.bias if self.exact else",
        "persistent", laws.bound_is_the_tightest),
    "D is taken at the wrong rate": (
        Case, "ahead", "self.price * unit", "1.1 * self.price * unit",
        "renewal", laws.bound_is_the_tightest),
    "F1 looks for the stop set above the threshold": (
        theory, "threshold_form", "knots < at", "knots > at", "renewal", laws.reports_are_sound),
    "F5 takes one length for all starts": (
        theory, "fixed_length", '"F5", found.by_start', '"F5", float(found.throughput.max())',
        "known", laws.length_by_start_is_optimal),
    "F7 settles where R crosses from below": (
        theory, "self_tuned", "rates[1:] > high[1:]", "rates[1:] < high[1:]", "monotone", laws.look_ahead_is_optimal),
    # their conditions
    "V is affine if its ends are": (
        conditions, "bent", "np.diff(problem.verify_time)", "np.diff(problem.verify_time)[:1]",
        "gallery", laws.reports_are_sound),
    "convex is taken for non-decreasing": (
        conditions, "concave", "n=2", "n=1", "gallery", laws.reports_are_sound),
    "persistent rounds count as renewal": (
        conditions, "persists", "if problem.persistent", "if False", "gallery", laws.reports_are_sound),
    "the next acceptance is looked at in one place": (
        conditions, "varying_next_accept", "np.where(met,", "np.where(np.cumsum(met).reshape(met.shape) == 1,",
        "gallery", laws.reports_are_sound),
    "monotone looks at the acceptance alone": (
        conditions, "revealing", "problem.accept_prob[k] * problem.next_accept_prob[k + 1]",
        "0.0 * problem.accept_prob[k]", "gallery", laws.reports_are_sound),
    "certain acceptance counts as a fall of survival": (
        conditions, "many_survivals", "values.max() == 1.0", "values.max() == 2.0",
        "gallery", laws.reports_are_sound),
    "acceptance may be seen to vary": (
        conditions, "seen_to_vary", "np.ptp(values) > ROUNDING", "np.ptp(values) > 9",
        "gallery", laws.reports_are_sound),
}  # fmt: skip

COMPILED = {
    "survival does not fall in the price problem": (
        price, "sweep", "survival, at = accept[:, None] * knots",
        "survival, at = (0.0 * accept[:, None] + 1.0) * knots", "renewal"),
    "the price problem drops the bias": (
        price, "sweep", "biases @ law.T if persistent", "0.0 * (biases @ law.T) if persistent", "persistent"),
    "the price problem verifies one candidate too few": (
        price, "sweep", "problem.verify_time[:-1], problem.verify_time[1:]",
        "problem.verify_time[:-1], problem.verify_time[:-1]", "renewal"),
    "a rejection leads where a bonus would": (
        price, "sweep", "((1.0 - accept) * if_rejected)", "((1.0 - accept) * bonus_now[into])", "persistent"),
}  # fmt: skip


def small(kind, count=2):
    """Problems of a kind with two candidates."""
    found = []
    for seed in range(2**13, 2**13 + count):
        problem = KINDS[kind](Numbers(seed))
        chain = problem.acceptance
        found.append(StoppingProblem(chain, Affine(0.1, 1.0, 0.1), 2, problem.coupling))
    return found


@pytest.fixture(scope="module")
def examined():
    """Problems of each kind, solved before anything is broken."""
    kinds = {mutant[4] for mutant in MUTANTS.values()} - {"gallery"}
    cases = {kind: examine_many(made(kind, SEEDS)) for kind in kinds}
    cases["gallery"] = [examine(entry.problem) for entry in gallery()]
    return cases


def fresh(case):
    """The case without what it has cached."""
    return Case(*(getattr(case, name) for name in case.__dataclass_fields__))


def law_holds(law, cases):
    try:
        laws.holds(law, [fresh(case) for case in cases])
    except (AssertionError, ValueError):  # a broken optimum may not even settle
        return False
    return True


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_caught(monkeypatch, examined, name):
    owner, function, old, new, kind, law = MUTANTS[name]
    plant(monkeypatch, owner, function, old, new)
    assert not law_holds(law, examined[kind]), f"{law.__name__} misses it"


def test_without_a_bug_the_laws_hold(examined):
    for kind, law in {mutant[4:] for mutant in MUTANTS.values()}:
        assert law_holds(law, examined[kind]), (kind, law.__name__)


@pytest.mark.parametrize("name", COMPILED)
def test_a_bug_in_compiled_code_is_caught(monkeypatch, name):
    owner, function, old, new, kind = COMPILED[name]
    problems = small(kind)
    with jax.disable_jit():
        plant(monkeypatch, owner, function, old, new)
        monkeypatch.setattr("mdp.policy_iteration.sweep", owner.sweep)
        caught = False
        for problem in problems:
            try:
                laws.optimum_is_enclosed(problem)
            except (AssertionError, ValueError):
                caught = True
        assert caught


def test_compiled_code_without_a_bug_is_right_operation_by_operation():
    with jax.disable_jit():
        for kind in ("renewal", "persistent"):
            for problem in small(kind):
                laws.optimum_is_enclosed(problem)


def test_every_law_catches_a_bug():
    """A law that no mutant trips is a law that may say nothing."""
    caught = {mutant[5].__name__ for mutant in MUTANTS.values()} | {"optimum_is_enclosed"}
    here = {name for name, law in vars(laws).items() if inspect.isfunction(law) and law.__module__ == laws.__name__}
    assert here - caught == {"holds", "oracle"}
