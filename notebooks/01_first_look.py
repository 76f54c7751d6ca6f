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
# # A first look: when to stop drafting
#
# A draft model proposes candidate tokens, a target model verifies them in one pass and keeps the prefix it accepts.
# Every candidate costs a draft step; those behind the first rejected one are lost. So before each draft step there is
# one question: go on, or verify now?
#
# **What this shows.** Such a problem is solved exactly; rules are compared by exact value and by simulation; then they
# are replayed on a trace recorded from a real pair.
#
# **What to conclude.** Exact value and simulation agree. A good fixed length gains most; rules that read what the draft
# knows gain a little more; what is left to gain is what the draft cannot see.
#
# `make demo` does the same at full size and leaves the trace that part 3 reads. Without it, or with `SPECSTOP_SMALL=1`,
# a tiny random pair is recorded on the spot.

# %%
# %matplotlib inline
import os
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from IPython.display import display

from mdp.acceptance import MarkovModulated
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.fit import fit_signal, split_requests
from mdp.problem import StoppingProblem
from mdp.solve import solve
from mdp.trace import load
from simulate import figures
from simulate.replay import replay
from simulate.rounds import simulate
from specstop.output import table
from specstop.settings import prepare

SEED = 0
SMALL = os.environ.get("SPECSTOP_SMALL") == "1"
ROUNDS = 20_000 if SMALL else 200_000
prepare()  # quiet libraries

# %% [markdown]
# ## 1. Solve
#
# Three kinds of text. In *easy* text the draft is right with probability .95. A *turn* is itself a good candidate (.8),
# but *trouble* mostly follows it, and trouble is rejected nine times in ten. A draft step takes .22 of a target call.

# %%
process = MarkovModulated(
    transition=np.array([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.6, 0.2, 0.2]]),
    accept_prob=np.array([0.95, 0.8, 0.1]),
    initial=np.array([0.6, 0.2, 0.2]),
)
problem = StoppingProblem(process, Affine(draft_time=0.22, verify_time=1.0), max_candidates=12)
solution = solve(problem)
print(f"speedup of the best policy: {solution.speedup:.6f}, status: {solution.status.name}")
print("throughput lies between", solution.bounds)

# %% [markdown]
# The bounds are a proof: no stopping rule whatever does better than the upper one. The optimal rule is a threshold on
# *survival*, the probability that nothing drafted so far is rejected: one threshold for each depth and regime.

# %%
display(figures.thresholds(solution.survival_threshold, names=["easy", "a turn", "trouble"], note="Solved exactly."))

# %% [markdown]
# After a turn it never pays to go on, however good survival looks, because trouble comes next. At the start of a round,
# where survival is 1, it pays even in trouble: easy text mostly follows. A rule that looks at survival alone, as a
# constant rejection threshold does, cannot tell these apart.
#
# ## 2. Compare rules
#
# Exactly first. `gap` is what a rule loses against the proven bounds.

# %%
rules = ["fixed:5", "rejection:0.38", "lookahead:0.48", "optimal"]
exact = [evaluate(problem, rule, solution=solution) for rule in rules]
columns = ["policy", "speedup", "block_efficiency", "discard_rate", "mean_candidates", "gap"]
print(table([entry.to_dict() for entry in exact], columns))

# %% [markdown]
# Then by simulation. All rules meet the same coins, so differences are sharper than the values themselves.

# %%
lengths = [f"fixed:{k}" for k in range(13) if k != 5]
comparison = simulate(problem, [*rules, *lengths], rounds=ROUNDS, key=SEED)
display(
    figures.lengths(
        comparison,
        exact=[*exact, *(evaluate(problem, rule) for rule in lengths)],
        bounds=solution.bounds,  # in units of V(0) = 1, so throughput is speedup
    )
)

# %% [markdown]
# ## 3. Replay a real pair
#
# A trace holds the target's own text and, at every position, what the draft proposed and whether it was accepted.
# Behind each rejected candidate it also holds what the draft would have gone on to draft. So any rule is replayed
# exactly, with no model call.


# %%
def find_trace():
    """The demo's trace, or that of a tiny pair recorded now."""
    found = [folder for folder in (Path("out/trace"), Path("../out/trace")) if (folder / "manifest.json").exists()]
    if found and not SMALL:
        return load(found[0])
    from realmodels.pair import load_pair
    from realmodels.record import record

    prompts = [[2 + (5 * i + j) % 20 for j in range(3)] for i in range(24)]
    return record(load_pair("tiny", "tiny"), prompts, mkdtemp(), max_new_tokens=32, seed=SEED, progress=False)


trace = find_trace()
models = trace.manifest["models"]
print(f"target {models['target']['name']}, draft {models['draft']['name']}")
print(f"{trace.num_requests} requests, {trace.num_positions} tokens")
print(f"mean acceptance {trace.manifest['mean_acceptance']:.3f}")

# %% [markdown]
# While drafting nobody knows acceptance. What the draft does know, such as the probability of the token it drew, is
# turned into acceptance by isotonic regression on one half of the requests; rules are scored on the other half. The
# bundled draft is the target with rounded weights, so its real time is the target's own: the cost ratio .22 below is
# *declared*, not measured.

# %%
train, test = split_requests(trace)
model = fit_signal(trace, "draft_prob", train)
for prob in (0.1, 0.3, 0.6, 0.9):
    print(f"drafted with probability {prob}: accepted with probability {model.accept_prob(prob):.2f}")

# %%
policies = ["fixed:4", "fixed:0", "fixed:2", "fixed:6", "fixed:8"]
for signal in ("draft_prob", "token_accept_prob"):
    policies += [f"rejection:0.5,signal={signal}", f"optimal:signal={signal}"]
replayed = replay(trace, [*policies, "oracle"], cost=Affine(draft_time=0.22, verify_time=1.0))
display(figures.policies(replayed, note="Draft step: 0.22 target calls, declared."))

# %% [markdown]
# The rows of the perfect head are a ceiling: they know true acceptance, which no rule can. What lies between them and
# the rows above is what a better signal could still earn. The thresholds here are a round .5, not tuned: `make demo`
# tunes them on the training half.
#
# **Next.** Change `process`, the cost or `max_candidates` above; write a rule of your own (five lines, see
# `mdp/policy.py`) and hand it to `evaluate`, `simulate` and `replay`; record another pair with `specstop record`.
