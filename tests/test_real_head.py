"""The acceptance head: the released forward pass and files, columns on a trace, training data, loss and training."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_model, save, save_file, save_model  # noqa: E402

import realmodels.head  # noqa: E402
from mdp.fit import split_requests  # noqa: E402
from mdp.trace import load  # noqa: E402
from realmodels.decode import decode_all, round_log  # noqa: E402
from realmodels.head import AcceptanceHead, Head, apply_head, following, load_head, save_head  # noqa: E402
from realmodels.head_data import Examples, matched_examples, prompts_of, published_examples  # noqa: E402
from realmodels.head_training import Recipe, fit_requests, soft_cross_entropy, train_head  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from realmodels.sight import LIVE, Sight  # noqa: E402
from realmodels.streams import stream  # noqa: E402
from simulate.replay import replay_rounds  # noqa: E402

torch.set_num_threads(1)

WIDTH = 32
BLOCK, BIAS = [[1.0, -2.0], [0.5, 0.0]], [0.25, -1.0]
LAST, LAST_BIAS = [[1.0, 0.0], [-1.0, 3.0]], [0.5, 0.0]


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", "tiny:1")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(2, 24, rng.integers(1, 7)).tolist() for _ in range(14)]


@pytest.fixture(scope="module")
def trace(pair, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return record(pair, prompts, folder, max_candidates=5, max_new_tokens=20, top_k=8, timing_repeats=0,
                  batch_size=4, store_hidden=True)  # fmt: skip


def released(hidden_size, num_layers):
    """The published module as its layout implies it: a Sequential that holds one block `num_layers` times."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(hidden_size, hidden_size)

        def forward(self, x):
            return x + torch.nn.functional.silu(self.linear(x))

    whole = torch.nn.Module()
    whole.model = torch.nn.Sequential(*[Block()] * num_layers, torch.nn.Linear(hidden_size, 2))
    return whole


def checkpoint(folder, tensors, num_layers, hidden_size=2):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden_size, "num_layers": num_layers}))
    save_file({key: torch.tensor(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def by_hand(x, blocks):
    """Residual SiLU blocks and the last layer in NumPy."""
    for weight, bias in blocks:
        z = np.array(weight) @ x + np.array(bias)
        x = x + z / (1.0 + np.exp(-z))
    return np.array(LAST) @ x + np.array(LAST_BIAS)


def repeated(num_layers):
    tensors = {f"model.{i}.linear.weight": BLOCK for i in range(num_layers)}
    tensors |= {f"model.{i}.linear.bias": BIAS for i in range(num_layers)}
    return tensors | {f"model.{num_layers}.weight": LAST, f"model.{num_layers}.bias": LAST_BIAS}


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_repeated_keys_load_as_one_block_with_the_forward_pass_by_hand(tmp_path, num_layers):
    head = load_head(checkpoint(tmp_path / "head", repeated(num_layers), num_layers))
    assert head.module.shared_blocks and head.lag == 1 and head.rejection_weight == 1.0
    assert sum(p.numel() for p in head.module.parameters()) == 6 + 6 * min(num_layers, 1)
    x = np.array([0.3, -0.7])
    logits = by_hand(x, [(BLOCK, BIAS)] * num_layers)
    np.testing.assert_allclose(head.module(torch.tensor(x).float()).numpy(), logits, rtol=1e-5)
    accept = np.exp(logits[1]) / np.exp(logits).sum()  # index 1 is "accept"
    assert float(head.score(torch.tensor(x))) == pytest.approx(accept, rel=1e-5)
    if num_layers == 3:
        wrong = by_hand(x, [(BLOCK, BIAS)])  # the paper's text read as one layer
        assert abs(logits - wrong).max() > 0.1


def test_the_file_that_the_hub_mixin_writes_loads_and_ours_loads_there(tmp_path):
    """It stores a shared block once; strict loading there must find all it wants."""
    torch.manual_seed(0)
    theirs = released(5, 3)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"hidden_size": 5, "num_layers": 3}')
    save_model(theirs, str(tmp_path / "theirs" / "model.safetensors"))
    head, x = load_head(tmp_path / "theirs"), torch.randn(4, 5)
    torch.testing.assert_close(head.module(x), theirs.model(x))
    save_head(head, tmp_path / "ours")
    again = released(5, 3)
    load_model(again, str(tmp_path / "ours" / "model.safetensors"), strict=True)
    torch.testing.assert_close(again.model(x), theirs.model(x))
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {"hidden_size": 5, "num_layers": 3}


def test_blocks_that_differ_are_not_shared(tmp_path):
    tensors = repeated(2) | {"model.1.linear.bias": [0.0, 0.0]}
    folder = checkpoint(tmp_path / "head", tensors, 2)
    head = load_head(folder)
    assert not head.module.shared_blocks
    x = np.array([1.0, 2.0])
    wanted = by_hand(x, [(BLOCK, BIAS), (BLOCK, [0.0, 0.0])])
    np.testing.assert_allclose(head.module(torch.tensor(x).float()).numpy(), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="its blocks differ, so they are not shared"):
        load_head(folder, shared_blocks=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.2.weight": None}, "lacks model.2.weight"),
        ({"model.0.linear.weight": None, "model.1.linear.weight": None}, "lacks model.0.linear.weight"),
        ({"model.3.linear.weight": BLOCK}, "holds 'model.3.linear.weight'"),
        ({"model.2.bias": [0.0]}, "model.2.bias must have shape"),
        ({"model.2.bias": [0.0, float("nan")]}, "model.2.bias must hold finite numbers"),
        ({"model.2.bias": [0, 1]}, "model.2.bias must hold finite numbers"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, said):
    tensors = {key: value for key, value in (repeated(2) | change).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        load_head(checkpoint(tmp_path / "head", tensors, 2))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "hidden_size is missing"),
        ('{"hidden_size": 2, "num_layers": 65}', "num_layers must be a whole number in 0..64, got 65"),
        ('{"hidden_size": 99999999}', "hidden_size must be a whole number in 1..65536"),
        ('{"hidden_size": true}', "hidden_size must be a whole number"),
    ],
)
def test_a_bad_config_is_named(tmp_path, config, said):
    folder = checkpoint(tmp_path / "head", repeated(2), 2)
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match=said):
        load_head(folder)


def test_pickles_large_and_damaged_files_are_refused(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "head", repeated(1), 1)
    file = folder / "model.safetensors"
    monkeypatch.setattr(realmodels.head, "MAX_WEIGHT_BYTES", 10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        load_head(folder)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_head(folder)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="read as safetensors only"):
        load_head(folder)
    with pytest.raises(ValueError, match="not a head"):
        load_head(tmp_path / "nowhere")


def a_head(variant="matched", seed=0, layers=2, **manifest):
    width = WIDTH + (2 if variant == "matched" else 0)
    module = AcceptanceHead(width, layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return Head(module.requires_grad_(False), manifest={"variant": variant, **manifest})


@pytest.mark.parametrize("variant", ["matched", "published"])
def test_a_head_comes_back_from_its_folder(tmp_path, variant):
    head = a_head(variant, rejection_weight=6.0)
    if variant == "matched":
        head = dataclasses.replace(head, mean=torch.randn(WIDTH + 2), scale=torch.rand(WIDTH + 2) + 0.5)
    folder = save_head(head, tmp_path / "head")
    again, x = load_head(folder), torch.randn(7, WIDTH)
    features = {"draft_prob": torch.rand(7), "entropy": torch.rand(7)}
    torch.testing.assert_close(head.score(x, features), again.score(x, features), rtol=0, atol=0)
    assert (again.variant, again.lag, again.inputs, again.rejection_weight) == (
        variant, head.lag, head.inputs, 6.0,
    )  # fmt: skip
    save_head(again, tmp_path / "twice")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_saving_is_all_or_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_head(a_head(trouble=object()), tmp_path / "head")
    with pytest.raises(ValueError):
        save_head(a_head(trouble=float("nan")), tmp_path / "head")
    assert not list(tmp_path.iterdir())
    save_head(a_head(), tmp_path / "head")
    with pytest.raises(ValueError, match="is there already"):
        save_head(a_head(), tmp_path / "head")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variant": "other"}, "variant must be one of"),
        ({"inputs": ["draft_prob"]}, "inputs must be hidden, then some of"),
        ({"inputs": ["hidden", "token"]}, "inputs must be hidden, then some of"),
        ({"rejection_weight": 0}, "rejection_weight must be a number"),
        ({"lag": 2}, "lag must be a whole number in 0..1"),
        ({"schema_version": 9}, "schema_version must be"),
        ({"model_sha256": "0"}, "damaged"),
        ({"models": []}, "models must be an object"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, change, said):
    folder = save_head(a_head(), tmp_path / "head")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=said):
        load_head(folder)


def test_debiasing_is_the_inverse_of_the_weight():
    from mdp.head_rule import unweighted

    head = a_head("published", rejection_weight=6.0)
    x = torch.randn(50, WIDTH)
    raw = dataclasses.replace(head, debias=False).score(x).double().numpy()
    np.testing.assert_allclose(head.score(x).numpy(), unweighted(raw, 6.0), rtol=1e-4)


# Columns on a trace


def state_after(pair, tokens):
    """The draft's last hidden state after the last token, without cache, batch or padding."""
    with torch.inference_mode():
        return pair.draft(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, -1]


def branches(trace, prompts):
    """Every recorded draft step in order: the tokens before it and its candidate."""
    x, y, rolled = (trace.optional[key] for key in ("token", "draft_token", "rollout_draft_token"))
    path, rollout = [], []
    for r, prompt in enumerate(prompts):
        first, last = trace.offsets[r : r + 2]
        for i in range(first, last):
            before = [*prompt, *x[first:i].tolist()]
            path.append((before, int(y[i])))
            branch = [*before, int(y[i])]
            for step in range(trace.rollout_offsets[i], trace.rollout_offsets[i + 1]):
                rollout.append((list(branch), int(rolled[step])))
                branch.append(int(rolled[step]))
    return path + rollout


def test_recorded_states_are_those_that_the_laws_came_from(pair, trace, prompts):
    states = np.concatenate([trace.optional["hidden"], trace.optional["rollout_hidden"]])
    steps = branches(trace, prompts)
    assert len(states) == len(steps) and len(trace.optional["rollout_hidden"]) > 20
    chosen = range(0, len(states), 3)
    for (before, _), state in ((steps[i], states[i]) for i in chosen):
        np.testing.assert_allclose(state.astype(float), state_after(pair, before).numpy(), atol=4e-3)


def test_a_trace_with_states_comes_back_from_disk_in_shards(pair, trace, prompts, tmp_path):
    other = record(pair, prompts, tmp_path / "t", max_candidates=5, max_new_tokens=20, top_k=8, timing_repeats=0,
                   batch_size=3, shard_size=5, store_hidden=True)  # fmt: skip
    again = load(tmp_path / "t")
    for key in ("hidden", "rollout_hidden"):
        assert again.optional[key].dtype == np.float16
        np.testing.assert_allclose(trace.optional[key], other.optional[key], atol=4e-3)
        np.testing.assert_array_equal(again.optional[key], other.optional[key])


@pytest.mark.parametrize("variant", ["matched", "published"])
def test_columns_are_the_scores_of_the_states_they_should_be(pair, trace, prompts, variant):
    head = a_head(variant, rejection_weight=3.0)
    scored = apply_head(head, trace).validate()
    columns = np.concatenate([scored.optional["head"], scored.optional["rollout_head"]])
    assert scored.head_lag == head.lag == (variant == "published")
    features = {name: np.concatenate([trace.features[name], trace.rollout_features[name]])
                for name in ("draft_prob", "entropy")}  # fmt: skip
    for i, (before, token) in list(enumerate(branches(trace, prompts)))[::3]:
        state = state_after(pair, [*before, token] if head.lag else before).half()
        wanted = float(head.score(state, {name: torch.tensor(values[i]) for name, values in features.items()}))
        if np.isnan(columns[i]):
            assert head.lag and following(trace)[i] == -1
        else:
            assert columns[i] == pytest.approx(wanted, abs=0.01)
    # what was not recorded: the last step of each rollout, drafts at the end of a path, drafted ends
    assert np.isnan(columns).any() == bool(head.lag) and np.isfinite(columns).mean() > 0.5


@pytest.mark.parametrize("variant", ["matched", "published"])
def test_a_live_scorer_shows_what_replay_shows(trace, variant):
    """A round on the path: candidate k comes with its own score, or a late head's of the one before."""
    head = a_head(variant)
    scored = apply_head(head, trace)
    run = next(i for i in range(trace.num_positions - 3) if trace.accepted[i : i + 3].all()
               and not np.isin(np.arange(i, i + 4), trace.offsets).any())  # fmt: skip
    sight, shown = Sight("specdecpp", 12, head=head), []
    for _ in range(2):  # a second round begins anew
        sight.restart()
        shown = []
        for i in range(run, run + 3):
            sight.update(
                {name: float(trace.features[name][i]) for name in LIVE}, torch.from_numpy(trace.optional["hidden"][i])
            )
            shown.append(sight.features["head"])
    column = scored.optional["head"][run : run + 3]
    wanted = [1.0, *column[:2]] if head.lag else column
    np.testing.assert_allclose(shown, wanted, atol=1e-6)


@pytest.mark.parametrize("variant", ["matched", "published"])
def test_live_rounds_under_a_head_are_those_of_replay(pair, prompts, tmp_path, variant):
    """Greedily: the head reads the draft's states in one place, the recorded ones in the other."""
    settings = {"max_candidates": 5, "max_new_tokens": 20, "top_k": 8, "temperature": 0}
    trace = record(pair, prompts, tmp_path, **settings, timing_repeats=0, store_hidden=True)
    head = a_head(variant, rejection_weight=3.0)
    policy = "specdecpp:threshold=0.5,least=0,lag=0"
    runs = decode_all(pair, prompts, policy, **settings, head=head)
    mine, theirs = round_log(runs), replay_rounds(apply_head(head, trace), policy)
    for column in dataclasses.fields(mine):
        np.testing.assert_array_equal(getattr(mine, column.name), getattr(theirs, column.name), err_msg=column.name)
    assert len(np.unique(mine.num_drafted)) > 2


def test_a_head_is_for_its_pair_and_needs_states(trace):
    other = a_head(models=load_pair("tiny:5", "tiny:1").provenance)
    with pytest.raises(ValueError, match="recorded with target tiny, not the head's tiny:5"):
        apply_head(other, trace)
    assert apply_head(a_head(models=trace.manifest["models"]), trace)
    bare = {key: value for key, value in trace.optional.items() if "hidden" not in key}
    with pytest.raises(ValueError, match="holds no hidden states; record it with --hidden"):
        apply_head(a_head(), dataclasses.replace(trace, optional=bare))
    old = bare | {"hidden": trace.optional["hidden"]}
    with pytest.raises(ValueError, match="no hidden states along its rollouts"):
        apply_head(a_head(), dataclasses.replace(trace, optional=old))
    wide = old | {"hidden": np.zeros((trace.num_positions, 7), np.float16), "rollout_hidden": np.zeros((0, 7))}
    with pytest.raises(ValueError, match="reads states of 32 numbers, this draft's have 7"):
        apply_head(a_head(), dataclasses.replace(trace, optional=wide, rollout_offsets=None))


# Training data


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


def test_safetensors_of_shared_blocks_hold_one(tmp_path):
    folder = save_head(a_head("published", layers=4), tmp_path / "head")
    module = a_head("published", layers=4).module
    apart = {key: value.clone() for key, value in module.state_dict().items()}
    assert (folder / "model.safetensors").stat().st_size < 0.5 * len(save(apart))
