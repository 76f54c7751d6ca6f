# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Property-testing the claim, and breaking it
#
# **What this shows.** "Stop once the probability of a rejection passes *one* threshold" is the rule of SpecDec++. Is it
# optimal? We let hypothesis look for a problem where it is not, shrink what it finds, and see which condition was
# missing. Every loss is exact, so a violation is a violation and no noise.
#
# **What to conclude.** One constant threshold is optimal if what comes next does not depend on what is seen. Without
# that it loses; mostly little, at worst a lot. A threshold *for each depth and regime* is always enough.

# %%
import os

from hypothesis import find, given, settings
from hypothesis import strategies as st

from mdp import families
from mdp.acceptance import MarkovModulated
from mdp.cost import Affine
from mdp.gallery import gallery
from mdp.problem import StoppingProblem
from mdp.search import search
from mdp.solve import solve
from mdp.theory import check
from specstop.output import table
from specstop.settings import prepare

SEED = 0
SMALL = os.environ.get("SPECSTOP_SMALL") == "1"
EXAMPLES = 100 if SMALL else 1000
prepare()  # quiet libraries

# %% [markdown]
# ## The claim as a property
#
# A problem: two kinds of text, a round starts behind the first, all numbers in quarters. `loss` is what the *best*
# constant threshold gives away of the optimum. Both are found exactly, on the tree of all rounds.

# %%
quarters = st.integers(0, 4).map(lambda n: n / 4)


@st.composite
def problems(draw, same_next=False):
    """With `same_next` the law of what comes next is the same behind both kinds."""
    first, second = draw(quarters), draw(quarters)
    rows = [[first, 1 - first], [first, 1 - first] if same_next else [second, 1 - second]]
    accept_prob = [draw(quarters), draw(quarters)]
    cost = Affine(draft_time=draw(st.integers(1, 4)) / 4, verify_time=1.0)
    return StoppingProblem(MarkovModulated(rows, accept_prob, [1.0, 0.0]), cost, draw(st.integers(1, 4)))


def loss(problem):
    finite = problem.lower()
    return 1 - families.ladder(finite, "survival").best[0] / families.optimum(finite).throughput


repeatable = settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None)

# %% [markdown]
# ## With its condition it holds
#
# If what comes next does not depend on what was seen, no example in `EXAMPLES` breaks it.


# %%
@given(problems(same_next=True))
@repeatable
def one_threshold_is_optimal(problem):
    assert loss(problem) < 1e-12


one_threshold_is_optimal()
print(f"{EXAMPLES} problems, none lost anything")

# %% [markdown]
# ## Without it, it breaks
#
# `find` looks for a problem that loses, and makes it as simple as it can. Then `check` names the condition.

# %%
broken = find(problems(), lambda problem: loss(problem) > 1e-3, settings=settings(repeatable, max_examples=2000))
chain = broken.acceptance
print("what comes next, by kind of text:", *chain.transition.tolist())
print(
    "acceptance:", *chain.accept_prob.tolist(), "  draft step:", broken.cost.draft_time, "  K:", broken.max_candidates
)
print(f"the best constant threshold loses {100 * loss(broken):.2f} %")
fact = next(fact for fact in check(broken) if fact.id == "F2")
print(f"{fact.id}, one constant threshold: {fact.status}, for {fact.why}")

# %% [markdown]
# The rule that does not lose is a table, one threshold for each depth and kind of text:

# %%
solution = solve(broken)
print(solution.survival_threshold)
print(f"bounds on the best throughput: {solution.bounds[0]:.9f} .. {solution.bounds[1]:.9f}")

# %% [markdown]
# ## The gallery
#
# Problems like this, searched for and shrunk to small fractions, come with the package. Each breaks exactly one
# condition of one claim; the loss is an exact fraction.

# %%
rows = [{"name": entry.name, "claim": entry.fact, "loss": str(entry.value), "in %": round(100 * float(entry.value), 2),
         "broken condition": entry.breaks} for entry in gallery()]  # fmt: skip
print(table(rows))

# %%
first = gallery()[0]
print(first.story)
assert abs(loss(first.problem) - float(first.value)) < 1e-12

# %% [markdown]
# ## How bad can it get?
#
# Random problems, the worst improved step by step. A search proves no largest loss; it says what it found.

# %%
rows = []
for family in ("threshold", "lookahead", "fixed"):
    found = search(family, 2, max_candidates=4, steps=100 if SMALL else 400, seed=SEED)
    rows.append({"best of its kind": family, "loses at most found %": round(100 * found.loss, 2),
                 "of the simpler problem %": round(100 * found.simple_loss, 2)})  # fmt: skip
print(table(rows))

# %% [markdown]
# Look-ahead, which multiplies survival by the acceptance to be expected next, loses far less than the threshold on
# survival alone: most of what is missing is what comes next. A fixed length, which sees nothing, loses most.
#
# **Next.** `specstop check problem.json` for your own problem, `specstop check --search` for a longer search.
