"""Every rule decides alike on floats, NumPy arrays, jax arrays under jit, and torch tensors."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdp.policy import (
    BeliefRule,
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Policy,
    RejectionThreshold,
    ThresholdTable,
)

DEPTH, REGIMES, SIZE = 5, 3, 64
RNG = np.random.default_rng(0)
TABLE = RNG.uniform(size=(DEPTH, REGIMES))
RULES = [
    FixedLength(3),
    RejectionThreshold(0.4),
    LookaheadThreshold(0.6),
    ThresholdTable(np.where(TABLE > 0.9, np.inf, TABLE)),
    ThresholdTable(TABLE[:, :1]),
    Oracle(),
]
ids = [f"{type(rule).__name__}{i}" for i, rule in enumerate(RULES)]


def test_no_rule_is_left_out():
    assert {type(rule) for rule in RULES} == set(Policy.__subclasses__()) & {
        cls for cls in Policy.__subclasses__() if cls.__module__ == "mdp.policy"
    } - {BeliefRule}  # no live world shows a symbol


def observations():
    survival = RNG.uniform(size=SIZE)
    survival[:4] = [1.0, 0.6, 0.0, 0.4]  # ties with the thresholds above
    return {
        "survival": survival,
        "next_accept_prob": np.where(RNG.uniform(size=SIZE) < 0.2, 1.0, RNG.uniform(size=SIZE)),
        "regime": RNG.integers(0, REGIMES, SIZE),
        "next_accepted": RNG.uniform(size=SIZE) < 0.5,
    }


def by_float(rule, k, seen):
    rows = (dict(zip(seen, (x.item() for x in row), strict=True)) for row in zip(*seen.values(), strict=True))
    return np.array([bool(rule.stop(rule.init(), Observation(k, **row))[1]) for row in rows])


def full(answer):
    return np.broadcast_to(np.asarray(answer, dtype=bool), SIZE)


@pytest.mark.parametrize("rule", RULES, ids=ids)
@pytest.mark.parametrize("k", range(DEPTH))
def test_float_numpy_and_jax_agree(rule, k):
    seen = observations()
    expected = by_float(rule, k, seen)
    assert (full(rule.stop(rule.init(), Observation(k, **seen))[1]) == expected).all()
    with jax.enable_x64(True):
        if isinstance(rule, ThresholdTable):
            rule = replace(rule, survival_threshold=jnp.asarray(rule.survival_threshold))
        seen = {name: jnp.asarray(value) for name, value in seen.items()}
        stop = jax.jit(lambda k, seen: rule.stop(rule.init(), Observation(k, **seen))[1])
        assert (full(stop(jnp.asarray(k), seen)) == expected).all()


@pytest.mark.parametrize("rule", RULES, ids=ids)
@pytest.mark.parametrize("k", range(DEPTH))
def test_torch_agrees(rule, k):
    torch = pytest.importorskip("torch")
    seen = observations()
    expected = by_float(rule, k, seen)
    if isinstance(rule, ThresholdTable):
        rule = replace(rule, survival_threshold=torch.from_numpy(np.ascontiguousarray(rule.survival_threshold)))
    seen = {name: torch.from_numpy(np.asarray(value)) for name, value in seen.items()}
    assert (full(rule.stop(rule.init(), Observation(k, **seen))[1]) == expected).all()
