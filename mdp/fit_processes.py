r"""Acceptance processes fitted to some requests of a trace, each by maximum likelihood or close to it.

What they are fitted to are the rounds of full depth of `mdp.likelihood`, or the flags along the text:

* `iid`: accepted over tested candidates.
* `position`: the same by place in the round, drawn towards iid's $\hat\alpha$ with the weight of one candidate, so
  that a depth that few rounds reached is not held to be certain: $(n_i^+ + \hat\alpha)/(n_i + 1)$.
* `beta_mixture`: mean as iid's, concentration by maximum likelihood on the recorded acceptance probabilities in equal
  cells of [0, 1].
* `markov_modulated`: hidden regimes by EM along the text (`mdp.regimes`). Rounds persist: a rejected candidate's
  correction stands at its position, so the next round starts in its regime; a bonus token is one step further,
  `bonus` = P. The number of regimes is the one with the best score on the other of two halves of the *training*
  requests, each fitted on one and scored on the other.
* `signal chain`: bins of a signal as visible regimes, rounds renew (`mdp.fit.fit_signal`). `SignalChain` also
  shows the signal: the bin's mean over the training requests stands for it, so that a rule that compares the signal
  with an edge of the bins is expressed exactly, and one that compares it with something else nearly.

Probabilities that a sample put at exactly 0 or 1 are pulled in by what half a candidate weighs: a process that calls
the next round impossible has no score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mdp.acceptance import IID, AcceptanceProcess, BetaMixture, MarkovModulated, Position, StartLaws
from mdp.cost import Cost
from mdp.fit import PERFECT, SignalModel, fit_signal, position_signal
from mdp.likelihood import CELLS, Runs, Score, full_rounds, run_score
from mdp.problem import Persistent, StoppingProblem
from mdp.regimes import fit_regimes, flag_sequences
from mdp.trace import Trace

__all__ = [
    "MOST_TEXTS", "Fitted", "SignalChain", "beta_cells", "choose_regimes", "fit_beta", "fit_chain", "fit_hidden",
    "fit_iid", "fit_position", "held_cells",
]  # fmt: skip

REGIMES = (2, 3, 4)
RESTARTS, STEPS, TOL = 4, 200, 1e-5
"""Of EM. What a step gains then is far below any standard error here, and stopping there overfits less."""
MOST_TEXTS = 256  # of EM, which takes time in proportion; the first of those given
LEAK = 1e-6  # of each regime's law, so that no regime is left for good and start regimes communicate


@dataclass(frozen=True)
class SignalChain(MarkovModulated):
    """Regimes that are bins of a signal, and what a candidate in each of them shows."""

    shown: Mapping[str, np.ndarray] = field(default_factory=dict, hash=False)

    def features(self) -> dict[str, Float[np.ndarray, " Z"]]:
        return dict(self.shown)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A process fitted to a trace.

    Attributes:
        coupling: of its rounds; None if they renew.
        model: of the signal whose bins are its regimes; None if nothing is seen.
        seen: [Z] acceptance of a candidate that shows each bin, pulled in from 0 and 1.
    """

    name: str
    acceptance: AcceptanceProcess
    num_parameters: int
    coupling: Persistent | None = None
    model: SignalModel | None = None
    seen: Float[np.ndarray, " Z"] | None = None

    @property
    def signal(self) -> str | None:
        return None if self.model is None else self.model.signal

    def problem(self, cost: Cost, max_candidates: int) -> StoppingProblem:
        """The stopping problem of this process under these times.

        Raises:
            ValueError: as `StoppingProblem`; above all where rounds persist and a longer one takes less time.
        """
        return StoppingProblem(self.acceptance, cost, max_candidates, self.coupling)

    def score(self, runs: Runs, max_candidates: int) -> Score:
        """Log-likelihood of run lengths (`mdp.likelihood`)."""
        laws = None if self.coupling is None else StartLaws(self.coupling.rejection, self.coupling.bonus)
        return run_score(self.acceptance.unseen(max_candidates), runs, laws)

    def parameters(self) -> dict[str, Any]:
        """The process's numbers, by the names of the problem file."""
        names = [f.name for f in fields(self.acceptance) if f.name != "shown"]  # type: ignore[arg-type]
        return {key: np.asarray(getattr(self.acceptance, key)).tolist() for key in names}


def fit_iid(trace: Trace, requests: Int[np.ndarray, " R"]) -> Fitted:
    """Acceptance that is the same everywhere."""
    runs = full_rounds(trace, requests)
    return Fitted("iid", IID(_share(runs.length.sum(), runs.num_tested.sum())), 1)


def fit_position(trace: Trace, requests: Int[np.ndarray, " R"]) -> Fitted:
    """Acceptance by place in the round."""
    runs = full_rounds(trace, requests)
    place = np.arange(1, trace.max_candidates + 1)
    tested, kept = (runs.num_tested[:, None] >= place).sum(axis=0), (runs.length[:, None] >= place).sum(axis=0)
    mean = _share(kept.sum(), tested.sum())
    return Fitted("position", Position((kept + mean) / (tested + 1.0)), trace.max_candidates)


def fit_beta(trace: Trace, requests: Int[np.ndarray, " R"]) -> Fitted:
    """Acceptance probabilities drawn afresh from a Beta law."""
    from scipy.optimize import minimize_scalar

    runs = full_rounds(trace, requests)
    mean = _share(runs.length.sum(), runs.num_tested.sum())
    counts = held_cells(trace, runs) * runs.num_tested.sum()

    def lost(log_concentration: float) -> float:
        return -float(counts @ np.log(beta_cells(BetaMixture(mean, float(np.exp(log_concentration))))))

    found: Any = minimize_scalar(lost, bounds=(-5.0, 8.0), method="bounded", options={"xatol": 1e-6})
    return Fitted("beta_mixture", BetaMixture(mean, float(np.exp(found.x))), 2)


def beta_cells(process: BetaMixture, cells: int = CELLS) -> Float[np.ndarray, " C"]:
    """Probability of each cell of [0, 1] under a Beta mixture."""
    from scipy.special import betainc

    law = np.diff(betainc(*process.shapes, np.linspace(0.0, 1.0, cells + 1)))
    law = np.maximum(law, 1e-12)  # betainc rounds where a shape is far from 1
    return law / law.sum()


def held_cells(trace: Trace, runs: Runs, cells: int = CELLS) -> Float[np.ndarray, " C"]:
    """Share of the tested candidates whose acceptance probability falls in each cell, half a candidate added to all."""
    values = position_signal(trace, PERFECT)[runs.tested()[0]]
    at = np.minimum((np.clip(values, 0.0, 1.0) * cells).astype(np.int64), cells - 1)
    counts = np.bincount(at, minlength=cells) + 0.5
    return counts / counts.sum()


def fit_hidden(trace: Trace, requests: Int[np.ndarray, " R"], num_regimes: int) -> Fitted:
    """Hidden regimes along the text, rounds persisting in them."""
    texts = flag_sequences(trace)
    few = [texts[r] for r in requests[:MOST_TEXTS]]
    fit = fit_regimes(few, num_regimes, restarts=RESTARTS, max_steps=STEPS, tol=TOL, compare=False)
    found = fit.process
    transition = (1.0 - LEAK) * found.transition + LEAK / num_regimes
    weight = fit.occupancy * fit.num_observations
    accept_prob = (found.accept_prob * weight + 0.5) / (weight + 1.0)
    process = MarkovModulated(transition, accept_prob, found.initial)
    size = num_regimes * (num_regimes + 1) - 1
    return Fitted("markov_modulated", process, size, Persistent(np.eye(num_regimes), transition))


def choose_regimes(
    trace: Trace, requests: Int[np.ndarray, " R"], numbers: Sequence[int] = REGIMES
) -> tuple[int, dict[int, float]]:
    """The number of regimes with the best score per candidate on the other half of these requests, and all scores."""
    if len(requests) < 2:
        return numbers[0], {}
    folds = requests[::2], requests[1::2]
    scores = {}
    for number in numbers:
        parts = [
            fit_hidden(trace, one, number).score(full_rounds(trace, other), trace.max_candidates)
            for one, other in (folds, folds[::-1])
        ]
        scores[number] = float(sum(p.log_likelihood.sum() for p in parts) / sum(p.num_tested.sum() for p in parts))
    return max(scores, key=lambda number: (scores[number], -number)), scores


def fit_chain(trace: Trace, signal: str, requests: Int[np.ndarray, " R"], edges: Any = None) -> Fitted:
    """Bins of a signal as visible regimes; `edges` of the bins, quantiles of these requests by default.

    Raises:
        ValueError: if the trace does not hold the signal, or no rollouts.
    """
    model = fit_signal(trace, signal, requests, edges=edges)
    assert model.transition is not None and model.regime_accept_prob is not None and model.edges is not None
    chosen = np.repeat(np.isin(np.arange(trace.num_requests), requests), np.diff(trace.offsets))
    values = position_signal(trace, signal)[chosen]
    size = len(model.transition)
    regime = model.regime(values)
    count = np.bincount(regime, minlength=size)
    weight = count + (count == 0)
    # A bin that a part of the requests never shows stands for its lower edge.
    shown = np.where(count > 0, np.bincount(regime, weights=values, minlength=size) / weight,
                     np.concatenate([[0.0], [values.min()], model.edges]))  # fmt: skip
    features = {} if signal == PERFECT else {signal: shown}
    process = SignalChain(model.transition, model.regime_accept_prob, np.eye(size)[0], features)
    seen = (model.regime_accept_prob * weight + 0.5) / (weight + 1.0)
    free = size * (size - 2) + size - 1  # no law leads back to the start; the start's acceptance is never used
    return Fitted(f"signal_chain:{signal}", process, free, model=model, seen=seen)


def _share(part: Any, whole: Any) -> float:
    return float((part + 0.5) / (whole + 1.0))
