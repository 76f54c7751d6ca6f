"""Heads in training: examples, the loss and its known bias, early stopping, same seed same bytes."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from heads import WIDTH, recorded, some_prompts, state_after, tiny_pair  # noqa: E402

from mdp.fit import split_requests  # noqa: E402
from realmodels.head import apply_head, load_head, save_head  # noqa: E402
from realmodels.head_data import Examples, matched_examples, prompts_of, published_examples  # noqa: E402
from realmodels.head_training import Recipe, fit_requests, soft_cross_entropy, train_head  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.streams import stream  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


@pytest.fixture(scope="module")
def prompts():
    return some_prompts()


@pytest.fixture(scope="module")
def trace(pair, prompts, tmp_path_factory):
    return recorded(pair, prompts, tmp_path_factory.mktemp("trace"))


def test_matched_examples_are_the_trace(trace):
    train, _ = split_requests(trace)
    found = matched_examples(trace, train.tolist())
    owner = np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets))
    first = int(train[0])
    i = int(trace.offsets[first])
    assert found.request[0] == first
    np.testing.assert_allclose(found.inputs[0, :WIDTH], trace.optional["hidden"][i].astype(np.float32))
    np.testing.assert_allclose(found.inputs[0, WIDTH:], [trace.features[n][i] for n in ("draft_prob", "entropy")])
    assert found.accept_prob[0] == min(1.0, trace.features["token_accept_prob"][i])
    count = np.isin(owner, train).sum() + np.isin(np.repeat(owner, np.diff(trace.rollout_offsets)), train).sum()
    assert len(found.request) == len(found.inputs) == count and set(found.request) == set(train)


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_published_examples_equal_a_naive_recomputation(pair, trace, prompts, ratio):
    """Full-softmax labels of one-step samples after the target's prefix; states of the mixed text; X is masked."""
    requests = [3, 8]
    by_request = prompts_of(trace, prompts)
    found = published_examples(pair, trace, by_request, requests, mixing_ratio=ratio, seed=2)
    row, kept_count = 0, 0
    for r in requests:
        name, x = trace.request_ids[r], trace.optional["token"][trace.offsets[r] : trace.offsets[r + 1]].tolist()
        draws = stream(2, name, "head draft").random(len(x))
        keeps = stream(2, name, "head mix").random(len(x)) < ratio
        mixed = list(prompts[r])
        for i, (draw, keep) in enumerate(zip(draws, keeps, strict=True)):
            with torch.inference_mode():
                p, q = (
                    torch.softmax(model(torch.tensor([[*prompts[r], *x[:i]]])).logits[0, -1].double(), -1).numpy()
                    for model in (pair.target, pair.draft)
                )
            y = int(np.searchsorted(np.cumsum(q) / q.sum(), draw, side="right"))
            mixed.append(x[i] if keep else y)
            if keep:
                kept_count += 1
                continue
            assert float(found.accept_prob[row]) == pytest.approx(min(1.0, p[y] / q[y]), abs=1e-5)
            np.testing.assert_allclose(found.inputs[row], state_after(pair, mixed).numpy(), atol=4e-3)
            assert found.request[row] == r
            row += 1
    assert row == len(found.request) and (kept_count > 0) == (ratio > 0)


def test_published_examples_want_this_pair_these_prompts_and_tokens(pair, trace, prompts):
    with pytest.raises(ValueError, match="2 of the trace's 14 requests are not among them"):
        prompts_of(trace, prompts[2:])
    by_request = prompts_of(trace, prompts)
    with pytest.raises(ValueError, match="recorded with draft tiny:1, not this tiny:2"):
        published_examples(load_pair("tiny", "tiny:2"), trace, by_request, [0])
    private = {key: value for key, value in trace.optional.items() if key != "token"}
    with pytest.raises(ValueError, match="holds no tokens"):
        published_examples(pair, dataclasses.replace(trace, optional=private), by_request, [0])


# Loss and training


def minimiser(loss, accept_prob, weight):
    """The constant output that a loss likes best."""
    grid = torch.linspace(-6, 6, 4001)
    labels = torch.tensor(accept_prob)
    values = [float(loss(torch.tensor([[0.0, z]]).expand(len(labels), 2), labels, weight)) for z in grid.tolist()]
    return float(torch.sigmoid(grid[int(np.argmin(values))]))


def test_the_loss_is_that_of_the_released_code_and_its_minimiser_is_biased_as_known():
    labels, weight = [0.2, 1.0, 0.9, 0.5], 6.0
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [-1.0, 1.0]])
    y = 1 / (1 + np.exp(-(logits[:, 1] - logits[:, 0]).numpy()))
    a = np.array(labels)
    wanted = (-weight * (1 - a) * np.log(1 - y) - a * np.log(y)).sum() / (weight * (1 - a) + a).sum()
    assert float(soft_cross_entropy(logits, torch.tensor(labels), weight)) == pytest.approx(wanted, rel=1e-5)
    m = a.mean()
    biased = m / (m + weight * (1 - m))
    assert minimiser(soft_cross_entropy, labels, weight) == pytest.approx(biased, abs=2e-3)

    def on_the_wrong_index(logits, labels, weight):  # [1, w] in the place of [w, 1]
        return soft_cross_entropy(logits.flip(-1), 1 - labels, weight)

    assert abs(minimiser(on_the_wrong_index, labels, weight) - biased) > 0.2


QUICK = {"max_epochs": 15, "learning_rate": 3e-3, "batch_size": 32, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def telling(trace):
    """Examples whose second number says how likely acceptance is, in a curve that no line follows."""
    train, _ = split_requests(trace)
    inputs = torch.randn((1200, WIDTH + 2), generator=torch.Generator().manual_seed(1))
    owner = train[np.arange(1200) % len(train)]
    return Examples(inputs, torch.sigmoid(1.0 + 3.0 * inputs[:, 1] * (inputs[:, 1] > 0)), owner)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("variant", ["matched", "published"])
def test_training_learns_what_there_is_and_undoes_its_weight(trace, telling, variant, shared):
    if variant == "published":
        telling = dataclasses.replace(telling, inputs=telling.inputs[:, :WIDTH])  # which holds the number that tells
    recipe = Recipe(variant, depth=2, rejection_weight=6.0, shared_blocks=shared, **QUICK)
    head = train_head(trace, telling, recipe)
    held = telling.of(fit_requests(trace)[1])
    x = held.inputs
    raw = torch.sigmoid(head.accept_logit(x))
    scalars = {"draft_prob": x[:, -2], "entropy": x[:, -1]} if variant == "matched" else None
    calibrated = head.score(x[:, :WIDTH], scalars)
    truth = held.accept_prob
    assert abs(float(calibrated.mean() - truth.mean())) < 0.04 < float(truth.mean() - raw.mean())
    spread = float((truth - truth.mean()).square().mean())
    assert float((calibrated - truth).square().mean()) < 0.6 * spread
    assert len({id(block) for block in head.module.model[:-1]}) == (1 if shared else 2)
    assert (head.mean is None) == (variant == "published")
    training = head.manifest["training"]
    assert 0 < training["best_epoch"] <= training["epochs"] <= 15


def test_what_tells_nothing_is_not_learnt(trace, telling):
    """Early stopping: noise ends at the start, which is the constant predictor."""
    noise = dataclasses.replace(telling, accept_prob=torch.full_like(telling.accept_prob, 0.7))
    head = train_head(trace, noise, Recipe("published", 1, 1.0, **QUICK))
    score = head.score(torch.zeros(WIDTH + 2)[: head.width])
    assert float(score) == pytest.approx(0.7, abs=0.05) and head.manifest["training"]["epochs"] <= 15


@pytest.mark.parametrize("inputs", [("hidden",), ("hidden", "entropy", "top_prob", "draft_prob")])
def test_inputs_can_be_chosen(trace, tmp_path, inputs):
    train, _ = split_requests(trace)
    examples = matched_examples(trace, train.tolist(), inputs)
    head = train_head(trace, examples, Recipe(inputs=inputs, **QUICK | {"max_epochs": 2}))
    again = load_head(save_head(head, tmp_path / "head"))
    assert again.inputs == inputs and again.width == WIDTH
    assert np.isfinite(apply_head(again, trace).optional["head"]).all()


def test_same_seed_same_bytes(trace, telling, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        torch.manual_seed(hash(name) % 1000)  # nothing global is read
        recipe = Recipe("matched", 3, 3.0, seed=seed, **QUICK | {"max_epochs": 3})
        save_head(train_head(trace, telling, recipe), tmp_path / name)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
    first, second = ((tmp_path / name / "manifest.json").read_bytes() for name in ("one", "two"))
    assert first == second


def test_training_stops_by_requests_it_does_not_fit(trace):
    fitted, held = fit_requests(trace)
    train, test = split_requests(trace)
    assert sorted([*fitted, *held]) == sorted(train) and len(held) > 0 and not set(fitted) & set(held)
    assert not set(test) & {*fitted, *held}


def test_examples_that_are_no_numbers_are_refused(trace, telling):
    broken = Examples(telling.inputs.clone().fill_(float("nan")), telling.accept_prob, telling.request)
    with pytest.raises(ValueError, match="must be finite numbers"):
        train_head(trace, broken, Recipe())


@pytest.mark.parametrize(
    ("field", "value"),
    [("variant", "x"), ("inputs", ("draft_prob",)), ("inputs", ("hidden", "token")), ("depth", 65), ("depth", True),
     ("rejection_weight", 0.0), ("seed", -1), ("mixing_ratio", 1.0), ("learning_rate", float("nan"))],
)  # fmt: skip
def test_a_bad_recipe_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Recipe(**{field: value})
