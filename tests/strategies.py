"""Hypothesis strategies for stopping problems, for the tests here and for users' own.

    from strategies import problems

    @given(problems(coupling="renewal"))
    def test_my_rule_never_beats_the_optimum(problem): ...

They look for trouble: probabilities 0, 1 and next to them, rows with few or simple entries (ties), regimes with one
future, times that stand still, jump, dip (where rounds renew) or come in odd units. `SHAPES` are few, since the solver
is compiled once a shape.
"""

import numpy as np
from hypothesis import strategies as st

from mdp.acceptance import MarkovModulated, Observed, Position
from mdp.cost import Affine, Table
from mdp.problem import Persistent, StoppingProblem

__all__ = [
    "OBSERVED_SHAPES", "SHAPES", "affine_costs", "distributions", "observed_problems", "position_problems",
    "probabilities", "problems", "scales", "stochastic_matrices", "tables", "tame_probabilities",
]  # fmt: skip

SHAPES = ((1, 3), (2, 3), (3, 6))
"""(number of regimes Z, max_candidates K); Z^(K+1) paths are few enough to enumerate."""

COUPLINGS = ("renewal", "persistent")


def probabilities():
    """Any number in [0, 1], and more often than not a telling one."""
    telling = st.sampled_from([0.0, 1.0, 0.5, 0.25, 0.75, 1 / 3, 1e-9, 1 - 1e-9, 1e-6, 1 - 1e-6])
    return telling | st.floats(0.0, 1.0)


def tame_probabilities():
    """Probabilities well inside (0, 1), for laws whose tolerance would have to widen at the ends."""
    return st.floats(0.05, 0.95)


@st.composite
def distributions(draw, size):
    """A law on `size` points: one point, simple fractions, nearly deterministic, or anything."""
    weight = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 1e-9, 1e-4]) | st.floats(0.0, 1.0)
    weights = np.array(draw(st.lists(weight, min_size=size, max_size=size)))
    weights[draw(st.integers(0, size - 1))] += 1.0
    return weights / weights.sum()


@st.composite
def stochastic_matrices(draw, size):
    """Row-stochastic [size, size]."""
    return np.array([draw(distributions(size)) for _ in range(size)])


def draft_times():
    """Times of a draft step relative to one target pass."""
    return st.sampled_from([1e-3, 0.1, 0.2, 0.25, 0.5, 1.0, 4.0]) | st.floats(1e-3, 4.0)


def scales():
    """Units of time, from microseconds to megaseconds."""
    return st.integers(-6, 6).map(lambda power: 10.0**power)


@st.composite
def tables(draw, depth, dips=False):
    """Verification times with steps; k * draft_time + V(k) never falls unless `dips`."""
    draft_time = draw(draft_times())
    change = st.sampled_from([0.0, 0.0, 0.25, 0.5, 2.0]) | st.floats(0.0, 2.0)
    changes = np.array(draw(st.lists(change, min_size=depth, max_size=depth)))
    if dips and draw(st.booleans()):
        times = np.append(1.0, 0.1 + changes)
    elif draw(st.booleans()):
        times = 1.0 + np.append(0.0, np.cumsum(changes))  # V itself steps up
    else:
        round_time = 1.0 + depth * draft_time + np.append(0.0, np.cumsum(changes))  # V falls, T does not
        times = round_time - np.arange(depth + 1) * draft_time
    scale = draw(scales())
    return Table(draft_time * scale, [float(time * scale) for time in times])


def affine_costs():
    """Convex verification times, at ordinary sizes."""
    return st.builds(Affine, st.floats(0.01, 1.0), st.floats(0.5, 2.0), st.sampled_from([0.0, 0.1]) | st.floats(0, 0.5))


@st.composite
def problems(draw, coupling=None, costs=None, accept_prob=None, shapes=SHAPES):
    """Problems that `StoppingProblem` accepts.

    Args:
        coupling: "renewal", "persistent", or None for both.
        costs: strategy for the times; by default steps, and dips where rounds renew.
        accept_prob: strategy for each regime's acceptance.
        shapes: the (Z, K) to choose from.
    """
    coupling = coupling or draw(st.sampled_from(COUPLINGS))
    size, depth = draw(st.sampled_from(shapes))
    cost = draw(costs if costs is not None else tables(depth, dips=coupling == "renewal"))
    accept = draw(st.lists(probabilities() if accept_prob is None else accept_prob, min_size=size, max_size=size))
    transition, rejection, bonus = (draw(stochastic_matrices(size)) for _ in range(3))
    if size > 1 and draw(st.booleans()):  # twins: two regimes that differ in their own acceptance alone
        transition[1], bonus[1] = transition[0], bonus[0]
    chain = MarkovModulated(transition, accept, draw(distributions(size)))
    if coupling == "renewal":
        return StoppingProblem(chain, cost, depth)
    if not draw(st.booleans()):
        return _communicating(chain, cost, depth, rejection, bonus)
    try:
        return StoppingProblem(chain, cost, depth, Persistent(rejection, bonus))
    except ValueError:
        return _communicating(chain, cost, depth, rejection, bonus)


def _communicating(chain, cost, depth, rejection, bonus):
    """After a whole round any start may follow, and no regime is left for good: that is always communicating."""
    everywhere = 0.5 * bonus + 0.5 / len(bonus)
    return StoppingProblem(chain, cost, depth, Persistent(rejection, everywhere))


@st.composite
def position_problems(draw, depth=6):
    """Acceptance by place in the round, with steps and dips in the times."""
    accept = draw(st.lists(probabilities(), min_size=depth, max_size=depth))
    return StoppingProblem(Position(accept), draw(tables(depth, dips=True)), depth)


OBSERVED_SHAPES = ((1, 2, 3), (2, 2, 4), (3, 2, 5), (2, 3, 5), (3, 3, 4))
"""(hidden regimes Z, symbols O, max_candidates K); O^K histories are few enough to enumerate."""


@st.composite
def observed_problems(draw, costs=None, shapes=OBSERVED_SHAPES):
    """Hidden regimes, with channels from telling to mute, symbols that never come, and steps and dips in the times."""
    size, symbols, depth = draw(st.sampled_from(shapes))
    accept = draw(st.lists(probabilities(), min_size=size, max_size=size))
    channel = np.array([draw(distributions(symbols)) for _ in range(size)])
    process = Observed(draw(stochastic_matrices(size)), accept, draw(distributions(size)), channel)
    return StoppingProblem(process, draw(costs if costs is not None else tables(depth, dips=True)), depth)
