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
# # The problem and its thresholds, with sliders
#
# **What this shows.** Before each draft step there is one question: draft one more candidate, or verify what there is?
# Here you move what the answer depends on, and watch the policy, the speed and what the speed is made of.
#
# **What to conclude.** The best rule is a threshold on *survival*, the probability that nothing drafted so far is
# rejected. Whether *one* threshold will do, or even a fixed length, depends on what the draft can see coming.

# %%
# %matplotlib inline
from mdp.overview import Settings, overview
from mdp.solve import solve
from specstop.explorer import explore, headline
from specstop.output import table
from specstop.settings import prepare

prepare()  # quiet libraries

# %% [markdown]
# ## The model
#
# Text comes in easy and hard stretches. With *mean acceptance* $\alpha$ and *dispersion* $\delta$ a candidate in easy
# text is accepted with probability $\alpha + \delta(1 - \alpha)$, in hard text with $\alpha(1 - \delta)$. With
# *persistence* $\lambda$ text stays as it is, else it is drawn anew. A round of $k$ candidates takes $k\,t_d + V(k)$.
#
# With $k$ candidates drafted, in text of kind $z$ and at survival $S$, one more is worth its time iff
# $S \ge S^*(k, z)$. Left: these thresholds. Middle: the speedup they earn, against every fixed length. Right: what each
# rule pays per token, target calls against discarded candidates. Rules on the dotted line are as fast as the optimum;
# below it there are none.

# %%
explore()

# %% [markdown]
# The sliders need a running notebook (`jupyter lab notebooks/02_thresholds.ipynb`). Try, in this order:
#
# 1. *Dispersion* to 0: all candidates alike. The two thresholds meet, and a fixed length is as good as anything.
# 2. *Dispersion* up, *persistence* 0: the draft sees each candidate's kind, which says nothing of the next. One
#    constant threshold is optimal; a fixed length is not.
# 3. *Persistence* up: behind hard text comes hard text. The thresholds part. Mostly a constant one still loses little.
# 4. *Draft step* to 27 ms, *acceptance* .48, *dispersion* .78, *persistence* .94: now it loses
#    a lot. Drafting barely pays, and it pays in easy stretches only, which survival alone cannot tell from luck.
# 5. *Draft step* up to the target call's own time: the star moves to the upper left, to plain decoding.
#
# The same in numbers. `loss` is what the best rule of a kind gives away of the best throughput.

# %%
steps = {
    "all alike": Settings(dispersion=0.0),
    "seen, no memory": Settings(dispersion=0.8, persistence=0.0),
    "seen, persistent": Settings(dispersion=0.8, persistence=0.9),
    "slow draft, long stretches": Settings(mean=0.48, dispersion=0.78, persistence=0.94, draft_time=27.0),
    "draft as slow as target": Settings(draft_time=50.0),
}
rows = []
for name, settings in steps.items():
    found = overview(settings)
    best = found.optimum.speedup
    rows.append({
        "step": name, "optimum": best, "constant threshold": found.best_threshold[0],
        "loss %": round(100 * (1 - found.best_threshold[0] / best), 2) + 0.0,
        "fixed length": found.best_fixed[0], "K": found.best_fixed[1],
        "loss of it %": round(100 * (1 - found.best_fixed[0] / best), 2) + 0.0,
    })  # fmt: skip
print(table(rows))

# %% [markdown]
# ## Can these numbers be trusted?
#
# They are exact: with two kinds of text a round has few states, and thresholds are crossings of piecewise linear
# functions, not grid points. The general solver finds the same by another way and proves bounds.

# %%
settings = steps["slow draft, long stretches"]
found, solved = overview(settings), solve(settings.problem)
print(headline(found))
print(f"solver: throughput between {solved.bounds[0]:.12f} and {solved.bounds[1]:.12f} tokens per ms")
print(f"overview:                  {found.optimum.throughput:.12f}")
assert solved.bounds[0] * (1 - 1e-12) <= found.optimum.throughput <= solved.bounds[1] * (1 + 1e-12)

# %% [markdown]
# **Next.** `explore(mean=0.7, draft_time=20.0)` starts elsewhere. Which claims hold where, and how to break one, is the
# next notebook; `specstop check problem.json` says it for a problem of yours.
