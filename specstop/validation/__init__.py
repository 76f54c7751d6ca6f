r"""Predicted, replayed, live: the same policies three ways, side by side, each with its own error.

One half of the requests trains: acceptance processes are fitted to it, and every parameter of a policy is chosen on
it. The other half judges: it scores the processes (`mdp.likelihood`), and every policy is replayed on it and run live
on its prompts.

* *Predicted*: exact on the fitted process that can express the policy (`simulate.on_processes`); for a rule that sees
  nothing, the simplest whose score on training requests left out of its fit is within two standard errors of the best.
* *Replayed*: the recorded trace, exactly, no model call (`simulate.replay`).
* *Live*: `realmodels.decode` on the same prompts with draws of its own. Throughput is under the same times as the
  replay's (counts times times), so that the two differ by counts alone; what the clock said stands beside it.

Replay and live are two samples of one law if replay is right. They are compared paired by request, since both met the
same prompts: $z$ is the difference of the ratios over its standard error, clustered by request.

Predictions are of endless text. What separates them from the replay is taken apart: the ends of texts (the same process
simulated with texts that end), the halves (the replay of the training half against that of the other), and what is
left, which is the process.

No variance reduction is used but the pairing. What takes long is kept in `DIR/stages` with a hash of its settings: a
killed run goes on where it was.

Modules: `make` (the verb), `settings`, `stages` (progress, what is kept), `three_ways` (the work, stage by stage),
`policies` (made ready, replayed, live), `processes` (held-out scores), `report` (the text), `questions` and
`head_inputs` (the open questions of `--full`).
"""
