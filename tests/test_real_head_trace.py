"""Heads on a trace: the states that are recorded, columns of scores, and what a live run shows of them."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from heads import a_head, recorded, some_prompts, state_after, tiny_pair  # noqa: E402

from mdp.trace import load  # noqa: E402
from realmodels.decode import decode_all, round_log  # noqa: E402
from realmodels.head import apply_head, following  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from realmodels.sight import LIVE, Sight  # noqa: E402
from simulate.replay import replay_rounds  # noqa: E402

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
