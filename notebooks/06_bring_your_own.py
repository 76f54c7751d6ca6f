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
# # Bring your own: a rule in five lines, a trace from JSON
#
# **What this shows.** A stopping rule of your own is a small class. It gets its exact value, meets the same coins as
# the published rules, and is replayed on traces, without being told which of these worlds it is in. Then a trace:
# logged rounds of a serving stack, or accepted lengths, as JSON lines.
#
# **What to conclude.** Write the rule once; one table says what it is worth against everything else there is.

# %%
# %matplotlib inline
import json
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from IPython.display import display

from mdp.acceptance import Position
from mdp.calibrate import two_regimes
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.importers import read_rounds, read_trace
from mdp.policy import Policy, PolicySpec
from mdp.problem import StoppingProblem
from mdp.product_limit import product_limit
from mdp.solve import solve
from realmodels.pair import load_pair
from realmodels.record import record
from simulate import figures
from simulate.replay import replay
from simulate.rounds import simulate
from specstop.output import policy_table
from specstop.settings import prepare

SEED = 0
SMALL = os.environ.get("SPECSTOP_SMALL") == "1"
ROUNDS = 20_000 if SMALL else 200_000
prepare()  # quiet libraries

# %% [markdown]
# ## A rule in five lines
#
# Before each draft step the world shows an `Observation`, and the rule says whether to stop. `needs` names the fields
# it reads. Only operators (`<`, `|`, `&`), no `if`: the same line then runs on numbers, arrays and tensors.


# %%
@dataclass(frozen=True)
class Capped(Policy):
    """Stop below a survival, or at a length, whichever comes first."""

    threshold: float
    most: int
    needs = ("survival",)

    def stop(self, state, observation):
        return state, (observation.survival < self.threshold) | (observation.num_candidates >= self.most)


mine = Capped(threshold=0.5, most=6)

# %% [markdown]
# ## What it is worth, exactly
#
# Text in easy and hard stretches, a draft step a fifth of a target call. `gap` is what a rule loses against the proven
# bounds on the best rule.

# %%
problem = StoppingProblem(two_regimes(0.8, 0.6, 0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=12)
solution = solve(problem)
others = ["optimal", "rejection:0.5", "lookahead:0.6", "fixed:4"]
exact = [evaluate(problem, rule, solution=solution) for rule in (mine, *others)]
print(policy_table([value.to_dict() for value in exact]))

# %% [markdown]
# ## Against coins
#
# All rules meet the same coins, so their differences are sharper than their values.

# %%
simulated = simulate(problem, [mine, PolicySpec("optimal", solution.policy), "fixed:4"], rounds=ROUNDS, key=SEED)
for row in simulated.differences:
    print(f"{row.policy}\n    minus {row.baseline}: {row.throughput_difference.value:+.4f}"
          f" +- {row.throughput_difference.se:.4f} tokens per target call's time")  # fmt: skip

# %% [markdown]
# ## On a real pair
#
# On a trace survival is estimated from a signal. A rule of one's own reads a perfect head there unless told otherwise,
# so it belongs beside the other rules that do. (A tiny random pair; `mdp.trace.load("out/trace")` for the demo's.)

# %%
prompts = [[2 + (5 * i + j) % 20 for j in range(3)] for i in range(16)]
trace = record(load_pair("tiny", "tiny"), prompts, mkdtemp(), max_new_tokens=24, seed=SEED, progress=False)
replayed = replay(trace, ["fixed:4", mine, "rejection:0.5", "lookahead:0.6"], cost=problem.cost)
display(figures.policies(replayed, note="Tiny random pair: its figures mean nothing."))

# %% [markdown]
# ## A trace from JSON: rounds that were logged
#
# One line a request, with what each round drafted and how much of it was accepted. Here we write such a file; yours
# comes from your server's log.

# %%
rng = np.random.default_rng(SEED)
folder = Path(mkdtemp())
with (folder / "rounds.jsonl").open("w") as file:
    for request in range(40):
        runs = rng.geometric(0.25, size=12) - 1  # candidates accepted before the first rejection, if drafted for ever
        entry = {"id": f"request-{request}", "drafted": [5] * 12, "accepted": np.minimum(runs, 5).tolist()}
        file.write(json.dumps(entry) + "\n")
print((folder / "rounds.jsonl").read_text().splitlines()[0])

# %% [markdown]
# Of the draft such rounds hold no more than they tested. So the policy that was logged is replayed; another one would
# need candidates that nobody drafted, and is refused rather than guessed.

# %%
logged = read_trace(folder / "rounds.jsonl", "rounds")
(row,) = replay(logged, ["fixed:5"], cost=problem.cost).policies
print(f"fixed:5 as logged: {row.speedup.value:.3f}x +- {row.speedup.se:.3f}")
try:
    replay(logged, ["fixed:3"], cost=problem.cost)
except ValueError as error:
    print("fixed:3 is refused:", error)

# %% [markdown]
# What they do tell is acceptance by depth, each depth from the rounds that tested it (a product-limit estimate, as for
# censored lifetimes). If depth is all that acceptance depends on, that is a problem to solve.

# %%
found = product_limit(*read_rounds(folder / "rounds.jsonl"))
by_depth = found.to_dict()["accept_prob"]
print("acceptance by depth:", np.round(by_depth, 3).tolist())
fitted = StoppingProblem(Position(by_depth), problem.cost, max_candidates=len(by_depth))
best = solve(fitted)
rows = [evaluate(fitted, f"fixed:{k}", solution=best) for k in range(6)]
print(policy_table([value.to_dict() for value in rows]))

# %% [markdown]
# ## A trace from JSON: accepted lengths
#
# SpecDecode-Bench's files say, for every position of the output, how far a draft of up to 20 tokens would have been
# accepted. So any length is replayed exactly, the oracle too.

# %%
with (folder / "bench.jsonl").open("w") as file:
    for request in range(40):
        entry = {"id": request, "acc_eagle": {"acc_len": np.minimum(rng.geometric(0.25, size=60), 21).tolist()}}
        file.write(json.dumps(entry) + "\n")
bench = read_trace(folder / "bench.jsonl", "specdecode-bench")
lengths = replay(bench, ["fixed:4", *(f"fixed:{k}" for k in (0, 1, 2, 3, 5, 6, 8, 12)), "oracle"], cost=problem.cost)
display(figures.lengths(lengths, title="Accepted lengths, drawn at random", note="Declared: 0.2 target calls a step."))

# %% [markdown]
# **Next.** The same on the command line: `specstop import rounds.jsonl --format rounds --out trace`, then
# `specstop replay trace --policy fixed:5 --cost 0.2`; `specstop policies` lists the rules that are there already.
