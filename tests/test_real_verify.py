"""The lossless rule: emitted text has the target's law, and the test that says so catches planted bugs."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

torch = pytest.importorskip("torch")

from mdp.policy import FixedLength, Observation, Policy  # noqa: E402
from realmodels.verify import (  # noqa: E402
    Law,
    acceptance,
    align,
    correction,
    couple,
    draft_features,
    draw,
    feature_law,
    residual,
    verify,
    warp,
)

torch.set_num_threads(1)  # tiny models: a second thread only waits

V, K, TOP_K, TEMPERATURE, SAMPLES = 5, 3, 3, 0.8, 20_000


@dataclass(frozen=True)
class Confident(Policy):
    """Adaptive: stop behind a candidate of low draft probability, or where the draft was unsure."""

    floor: float
    ceiling: float
    needs = ("draft_prob", "entropy")

    def stop(self, state, observation):
        unsure = (observation.draft_prob < self.floor) | (observation.entropy > self.ceiling)
        return state, (observation.num_candidates > 0) & unsure


ADAPTIVE = Confident(floor=0.35, ceiling=0.9)


def tables():
    """Logits [context, token] of target and draft over five tokens."""
    rng = np.random.default_rng(7)
    target = rng.normal(0, 1.5, (V, V))
    return torch.tensor(target), torch.tensor(target + rng.normal(0, 1.0, (V, V)))


def law_rows(logits, context):
    return warp(logits[context], TEMPERATURE, TOP_K)


def first_two_tokens(policy, *, correct=correction, bonus_from_draft=False, drop_below=0.0, warp_ratio=True):
    """The first two emitted tokens of SAMPLES continuations of token 0, by whole rounds of the product's own rule.

    The keyword arguments plant bugs; their defaults plant none.
    """
    target, draft = tables()
    rng = np.random.default_rng(11)
    rows = torch.arange(SAMPLES)
    out, filled, context = torch.full((SAMPLES, 2), -1), torch.zeros(SAMPLES, dtype=torch.long), torch.zeros_like(rows)
    while bool((filled < 2).any()):
        seen = {name: torch.full((SAMPLES,), np.nan) for name in ("draft_prob", "top_prob", "entropy")}
        drafting, count = torch.ones(SAMPLES, dtype=torch.bool), torch.zeros_like(rows)
        contexts, candidates = [context], []
        for k in range(K):
            _, stop = policy.stop((), Observation(k, **seen))
            drafting = drafting & ~torch.as_tensor(stop)
            law = law_rows(draft, contexts[-1])
            candidate = draw(law, torch.tensor(rng.random(SAMPLES)))
            seen = draft_features(law, candidate)
            drafting = drafting & (seen["draft_prob"] >= drop_below)
            count = count + drafting
            candidates.append(candidate)
            contexts.append(torch.where(drafting, candidate, contexts[-1]))
        before = torch.stack(contexts, 1)
        p = law_rows(target, before)
        q = law_rows(draft, before[:, :K])
        if bonus_from_draft:
            wrong = law_rows(draft, contexts[-1])
            p.probs[rows, count], p.ids[rows, count] = wrong.probs, wrong.ids  # type: ignore[index]
        if not warp_ratio:
            q = Law(torch.softmax(draft[before[:, :K]], -1), torch.arange(V).expand(SAMPLES, K, V))
        accepted, following = verify(
            p, q, torch.stack(candidates, 1), count, torch.tensor(rng.random((SAMPLES, K))),
            torch.tensor(rng.random(SAMPLES)), correct,
        )  # fmt: skip
        emitted = torch.cat([torch.stack(candidates, 1), following[:, None]], 1)
        emitted[rows, accepted] = following
        for i in range(K + 1):
            place = (i <= accepted) & (filled < 2)
            out[rows[place], filled[place]] = emitted[place, i]
            filled = filled + place
        context = following
    return out.numpy()


def assert_two_token_law(samples, first, second):
    """Chi-square of two-token cells at the 1e-3 level; cells of probability 0 must be empty."""
    size = len(first)
    expected = (first[:, None] * second).ravel() * len(samples)
    counts = np.bincount(samples[:, 0] * size + samples[:, 1], minlength=size * size)
    possible = expected > 0
    assert not counts[~possible].any(), "a token of probability 0 was emitted"
    common = expected >= 5
    rest = possible & ~common
    observed, wanted = counts[common], expected[common]
    if rest.any():
        observed, wanted = np.append(observed, counts[rest].sum()), np.append(wanted, expected[rest].sum())
    p_value = stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue
    assert p_value > 1e-3, f"the emitted law is not the target's (p = {p_value:.2g})"


def exact_law():
    target, _ = tables()
    law = law_rows(target, torch.arange(V))
    full = torch.zeros(V, V, dtype=torch.float64).scatter(1, law.ids, law.probs).numpy()
    return full[0], full


@pytest.mark.parametrize("policy", [FixedLength(0), FixedLength(1), FixedLength(K), ADAPTIVE], ids=repr)
def test_emitted_law_is_the_targets(policy):
    assert_two_token_law(first_two_tokens(policy), *exact_law())


BUGS = {
    "correction drawn from p": {"correct": lambda p, q: p},
    "bonus drawn from q": {"bonus_from_draft": True},
    "low-confidence candidate looked at and dropped": {"drop_below": 0.25},
    "q not warped in the ratio": {"warp_ratio": False},
}


@pytest.mark.parametrize("policy", [FixedLength(1), ADAPTIVE], ids=repr)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, policy):
    samples = first_two_tokens(policy, **BUGS[bug])
    with pytest.raises(AssertionError, match=r"emitted"):
        assert_two_token_law(samples, *exact_law())


def test_the_tables_have_impossible_tokens_and_real_rejections():
    _, target = exact_law()
    draft = law_rows(tables()[1], torch.arange(V))
    overlap = acceptance(law_rows(tables()[0], torch.arange(V)), draft, draft.ids[:, 0])["step_accept_prob"]
    assert (target == 0).any()
    assert 0.2 < float(overlap.mean()) < 0.95


def test_coupled_token_has_the_drafts_law_and_agrees_as_often_as_possible():
    target, draft = tables()
    p, q = (law_rows(table, torch.ones(SAMPLES, dtype=torch.long)) for table in (target, draft))
    u = torch.tensor(np.random.default_rng(3).random((3, SAMPLES)))
    x = draw(p, u[0])
    y = couple(p, q, x, u[1], u[2])
    wanted = np.zeros(V)
    wanted[q.ids[0].numpy()] = q.probs[0].numpy()
    counts = np.bincount(y.numpy(), minlength=V)
    assert not counts[wanted == 0].any()
    assert stats.chisquare(counts[wanted > 0], wanted[wanted > 0] * SAMPLES).pvalue > 1e-3
    overlap = float(acceptance(p, q, y)["step_accept_prob"][0])
    error = np.sqrt(overlap * (1 - overlap) / SAMPLES)
    assert abs(float((x == y).double().mean()) - overlap) < 4 * error
    # y's own acceptance probability has the same mean.
    assert abs(float(acceptance(p, q, y)["token_accept_prob"].mean()) - overlap) < 4 * error


def test_sparse_and_dense_laws_say_the_same():
    target, draft = tables()
    sparse = [warp(table, 0.7, V - 1) for table in (target, draft)]
    dense = [Law(torch.zeros(V, V, dtype=torch.float64).scatter(1, law.ids, law.probs)) for law in sparse]
    token = draw(sparse[1], torch.full((V,), 0.4, dtype=torch.float64))
    for a, b in zip(acceptance(*sparse, token).values(), acceptance(*dense, token).values(), strict=True):
        torch.testing.assert_close(a, b)
    mine, other = correction(*sparse), correction(*dense)
    spread = torch.zeros(V, V, dtype=torch.float64).scatter_add(1, mine.ids, mine.probs)
    torch.testing.assert_close(spread, other.probs)
    everything = torch.arange(V).expand(V, V)
    for t in range(V):
        torch.testing.assert_close(sparse[0].prob(everything[:, t]), dense[0].prob(everything[:, t]))
    with pytest.raises(ValueError, match="whole vocabulary"):
        align(sparse[0], dense[1])


def test_warp():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    full = warp(logits, 2.0, 0)
    torch.testing.assert_close(full.probs, torch.softmax(logits.double() / 2, -1))
    assert full.ids is None and warp(logits, 2.0, 4).ids is None
    top = warp(logits, 2.0, 2)
    assert top.ids.tolist() == [[1, 2]]
    torch.testing.assert_close(top.probs, torch.softmax(logits[:, 1:3].double() / 2, -1))
    greedy = warp(logits, 0.0, 2)
    assert (greedy.ids.tolist(), greedy.probs.tolist()) == ([[1]], [[1.0]])
    shown = feature_law(logits, 0.0, 2)
    torch.testing.assert_close(shown.probs, torch.softmax(logits[:, 1:3].double(), -1))


@pytest.mark.parametrize("top_k", [0, 1, 7, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-3])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_warp_is_that_of_transformers(temperature, top_k, top_p):
    """Its own warpers, in the order in which `generate` applies them."""
    transformers = pytest.importorskip("transformers")
    logits = torch.tensor(np.random.default_rng(5).normal(0, 2, (64, 40)))
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    scores = transformers.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = transformers.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    law = warp(logits, temperature, top_k, top_p)
    mine = law.probs if law.ids is None else torch.zeros_like(logits).scatter(-1, law.ids, law.probs)
    torch.testing.assert_close(mine, torch.softmax(scores, -1), atol=1e-12, rtol=0)
    if top_p == 0.5 and top_k != 1:
        counts = (mine > 0).sum(-1)
        assert counts.min() >= 1 and counts.max() > counts.min()


def test_top_p_keeps_the_smallest_set_of_that_mass():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    assert warp(logits, 1.0, 0, 0.8).probs.tolist()[0] == pytest.approx([0.0, 5 / 9, 1 / 6, 5 / 18], abs=1e-6)
    assert warp(logits, 1.0, 0, 0.7).probs.tolist()[0] == pytest.approx([0.0, 2 / 3, 0.0, 1 / 3], abs=1e-6)
    assert warp(logits, 1.0, 2, 0.6).probs.tolist()[0] == pytest.approx([1.0, 0.0])  # of what top-k left
    assert warp(logits, 0.0, 0, 0.5).probs.tolist() == [[1.0]]
    assert feature_law(logits, 0.0, 0, 0.7).probs.tolist()[0] == pytest.approx([0.0, 2 / 3, 0.0, 1 / 3], abs=1e-6)


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -0.1, float("nan"), True, "all", None])
def test_top_p_out_of_range_is_refused(value):
    from realmodels.sampling import Sampling

    with pytest.raises(ValueError, match=r"top_p must be a number in \(0, 1\], got"):
        Sampling(top_p=value)
    with pytest.raises(TypeError):
        Sampling(12, 128, 1.0, 50, 0)  # what stands behind top_k is given by name


def test_draw_never_gives_a_token_of_probability_zero():
    law = Law(torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64).expand(4, V))
    u = torch.tensor([0.0, 0.2999, 0.3, 1 - 2**-53], dtype=torch.float64)
    assert draw(law, u).tolist() == [1, 1, 3, 3]


def test_residual_of_equal_laws_is_the_law_itself():
    p = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    assert residual(p, p).equal(p)
    assert residual(p, torch.zeros_like(p)).equal(p)


def test_verify_counts_only_what_was_drafted():
    p = Law(torch.full((2, 3, 4), 0.25, dtype=torch.float64))
    q = p.select((slice(None), slice(2)))
    zero = torch.zeros(2, 2, dtype=torch.float64)
    accepted, following = verify(
        p, q, torch.zeros(2, 2, dtype=torch.long), torch.tensor([1, 2]), zero, zero[:, 0] + 0.6
    )
    assert (accepted.tolist(), following.tolist()) == ([1, 2], [2, 2])


def test_importing_needs_torch_only():
    code = (
        "import sys, realmodels.verify; loaded = set(sys.modules) & {'transformers', 'jax', 'matplotlib', 'mdp'};"
        "assert not loaded, loaded;"
        "import realmodels.record, realmodels.decode; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
