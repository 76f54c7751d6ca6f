"""Published stopping rules, by the idea behind them.

`confidence`: how sure the draft was of its last candidate. `heads`: a trained predictor of acceptance. `lengths`: a
length set before the round, from past rounds. `bandits`: arms tried and compared. `tuned`: thresholds that follow what
was earned or seen.

Each rule is a frozen dataclass that says its formula, its defaults and their source. Figures carry how they were read:
[code] in the released code, [paper] in the paper, [note] in somebody's notes on it; "ours" where the source has none.
A rule meets a candidate after it is drafted and submits it; where a source drops it, the docstring says so.
"""

from mdp.rules import bandits, confidence, heads, lengths, tuned

__all__ = ["bandits", "confidence", "heads", "lengths", "tuned"]
