"""Acceptance from censored rounds: by hand, against the truth under uneven depths, errors by request."""

import numpy as np
import pytest

from mdp.acceptance import Position
from mdp.product_limit import product_limit

TRUTH = np.array([0.9, 0.7, 0.8, 0.5])


def rounds(rng, clusters, per_cluster, spread=0.0):
    """Rounds whose depth depends on the request, and whose acceptance may too."""
    owner = np.repeat(np.arange(clusters), per_cluster)
    depth = rng.integers(1, 5, clusters)[owner]
    shift = rng.choice([-spread, spread], clusters)[owner]
    kept = np.cumprod(rng.random((len(owner), 4)) < TRUTH + shift[:, None], axis=1).sum(axis=1)
    return depth, np.minimum(depth, kept), owner


def test_by_hand():
    # depth 1: four tested, one rejected; 2: two tested, one rejected; 3: one tested, kept
    found = product_limit([1, 3, 3, 2], [1, 1, 3, 0], [0, 0, 1, 1], max_candidates=4)
    assert found.survival[:3].tolist() == [0.75, 0.375, 0.375]
    assert found.unidentified == [4] and np.isnan(found.accept_prob_se[3])
    assert found.greenwood_se[1] == pytest.approx(0.375 * np.sqrt(1 / (4 * 3) + 1 / (2 * 1)))
    # e_c1 = (2 - .75 * 2) / 4, (1 - .75 * 2) / 4
    assert found.accept_prob_se[0] == pytest.approx(np.sqrt(2 * 2 * 0.125**2))
    assert list(found.to_dict())[-2:] == ["unidentified", "num_clusters"]


def test_depth_that_differs_between_rounds_does_not_bias_it():
    rng = np.random.default_rng(0)
    drafted, accepted, owner = rounds(rng, 4000, 5)
    found = product_limit(drafted, accepted, owner)
    assert (abs(found.accept_prob - TRUTH) < 4.5 * found.accept_prob_se).all()
    assert (abs(found.survival - np.cumprod(TRUTH)) < 4.5 * found.survival_se).all()
    # Dividing by all rounds, as counters do, is far off.
    counted = np.array([(accepted >= i).mean() for i in range(1, 5)])
    assert abs(counted[1] - np.cumprod(TRUTH)[1]) > 20 * found.survival_se[1]


def test_errors_are_those_of_requests_not_of_rounds():
    rng = np.random.default_rng(1)
    repeats = [product_limit(*rounds(rng, 60, 25, spread=0.09)) for _ in range(1500)]
    spread = np.std([found.survival for found in repeats], axis=0)
    claimed = np.sqrt(np.mean([found.survival_se**2 for found in repeats], axis=0))
    greenwood = np.sqrt(np.mean([found.greenwood_se**2 for found in repeats], axis=0))
    assert claimed == pytest.approx(spread, rel=0.1)
    assert (greenwood < 0.75 * spread).all()  # as if rounds were independent: too sure
    rng = np.random.default_rng(2)
    alike = [product_limit(*rounds(rng, 60, 25)) for _ in range(1500)]
    greenwood = np.sqrt(np.mean([found.greenwood_se**2 for found in alike], axis=0))
    assert greenwood == pytest.approx(np.std([found.survival for found in alike], axis=0), rel=0.1)


def test_a_depth_where_all_were_rejected_has_an_error_all_the_same():
    found = product_limit([2, 2, 2], [1, 1, 0], [0, 1, 2])
    assert found.survival.tolist() == [pytest.approx(2 / 3), 0.0]
    assert found.survival_se[1] == 0.0 and np.isnan(found.greenwood_se[1])


def test_one_cluster_has_no_error():
    assert np.isnan(product_limit([2, 2], [1, 2], [7, 7]).survival_se).all()


def test_a_process_is_as_deep_as_what_was_tested():
    found = product_limit([3, 3], [3, 0], [0, 1], max_candidates=6)
    process = found.process(3)
    assert isinstance(process, Position) and process.accept_prob.tolist() == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"max_candidates: must be in 1..3, no round tested a candidate deeper"):
        found.process(4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], []), "at least one round"),
        (([1, 2], [1], [0, 0]), "equally long"),
        (([1, 2], [1, 3], [0, 0]), "round 1 accepted 3 of 2"),
        (([1, 2], [-1, 1], [0, 0]), "round 0 accepted -1 of 1"),
    ],
)
def test_refusals(columns, message):
    with pytest.raises(ValueError, match=message):
        product_limit(*columns)
