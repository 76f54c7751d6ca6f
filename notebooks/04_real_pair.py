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
# # From a real pair to a recommendation
#
# **What this shows.** A draft and a target model are recorded once. Then every stopping rule is *replayed* on that
# trace, exactly and without running a model again, and a referee says how much the rule you run today leaves, between
# which bounds, and what to run instead.
#
# **What to conclude.** The fixed length matters first. A rule that reads what the draft knows anyway (entropy,
# probabilities) may add a little; how much a *better* signal could still add is the ceiling's distance.
#
# With `make demo` done this reads its trace of a real pair (SmolLM2-135M-Instruct and a 4-bit copy of it on HumanEval
# prompts). Without it, or with `SPECSTOP_SMALL=1`, a tiny random pair is recorded on the spot: the same steps, but its
# figures mean nothing.

# %%
# %matplotlib inline
import os
from pathlib import Path
from tempfile import mkdtemp

from IPython.display import display

from mdp.cost import Affine
from mdp.fit import fit_signal, split_requests
from mdp.trace import load
from realmodels.pair import load_pair
from realmodels.record import record
from simulate import figures
from simulate.audit import audit
from simulate.replay import replay
from specstop.output import table
from specstop.referee import audit_text
from specstop.settings import prepare

SEED = 0
SMALL = os.environ.get("SPECSTOP_SMALL") == "1"
prepare()  # quiet libraries

# %% [markdown]
# ## Record
#
# The trace holds the target's own text and, at every position, what the draft proposed, with which probability, and
# whether it was accepted; behind each rejection also what the draft would have gone on to. On the command line:
# `specstop record --target T --draft D --prompts F.jsonl --out DIR`, with folders, hub ids or GGUF files.


# %%
def find_trace():
    """The demo's trace, or that of a tiny pair recorded now."""
    found = [folder for folder in (Path("out/trace"), Path("../out/trace")) if (folder / "manifest.json").exists()]
    if found and not SMALL:
        return load(found[0])
    prompts = [[2 + (5 * i + j) % 20 for j in range(3)] for i in range(32)]
    return record(load_pair("tiny", "tiny"), prompts, mkdtemp(), max_new_tokens=32, seed=SEED, progress=False)


trace = find_trace()
models = trace.manifest["models"]
print(f"target {models['target']['name']}, draft {models['draft']['name']}")
print(f"{trace.num_requests} requests, {trace.num_positions} tokens, accepted {trace.accepted.mean():.1%} of them")

# %% [markdown]
# ## What the draft knows
#
# Nobody sees acceptance while drafting. What is seen, such as the entropy of the draft's law, is turned into a
# probability of acceptance on one half of the requests; rules are scored on the other half.

# %%
train, test = split_requests(trace)
model = fit_signal(trace, "entropy", train)
print(f"{len(train)} requests to fit on, {len(test)} to score on")
rows = [{"entropy, nats": nats, "accepted with probability": round(float(model.accept_prob(nats)), 2)}
        for nats in (0.05, 0.5, 1.0, 2.0, 4.0)]  # fmt: skip
print(table(rows))

# %% [markdown]
# ## Replay
#
# A draft step is *declared* to take .22 of a target call, the ratio of SpecDec++'s pairs; leave `cost` out to use the
# times measured on the machine that recorded. Whiskers are 95 % intervals, clustered by request. Compare rules by the
# right panel: differences are paired, both rules met the same text.

# %%
COST = Affine(draft_time=0.22, verify_time=1.0)
policies = ["fixed:4", "fixed:0", "fixed:2", "fixed:6", "fixed:8"]
policies += [f"{rule},signal={signal}" for signal in ("entropy", "token_accept_prob") for rule in
             ("rejection:0.5", "lookahead:0.6")]  # fmt: skip
replayed = replay(trace, [*policies, "oracle"], cost=COST)
display(figures.policies(replayed, note="Draft step: 0.22 target calls, declared. Thresholds not tuned."))

# %% [markdown]
# ## Audit
#
# Say `fixed:4` runs today. Rungs say what a rule earns that sees no more than the rung's information, each fitted and
# chosen on the training half and scored on the other; `upper` rungs are ceilings that no rule passes.

# %%
audited = audit(trace, "fixed:4", cost=COST)
print(audit_text(audited.to_dict()))

# %% [markdown]
# ## The recommendation

# %%
saved, few = 100 * audited.gain.value, audited.num_requests < 30
if audited.change:
    print(f"Run {audited.setting} instead of {audited.deployed.policy}: it saves {saved:.1f} % of the time.")
else:
    print(f"Keep {audited.deployed.policy}: nothing found here saves time clear of zero.")
print(f"To rules that see no more than it does: {audited.headline}.")
if few:
    print(f"Only {audited.num_requests} requests were scored. Record more before you act on a small difference.")

# %% [markdown]
# A change is advised only where its gain is clear of zero on requests that it was not chosen on. The wide gap to the
# ceiling is not a promise: it is what a perfect acceptance head could earn, which nobody has.
#
# **Next.** Run it live: `specstop decode --target T --draft D --policy ...` emits text of the target's own law under
# any of these rules. Bring a rule or a trace of your own: notebook 06.
