"""Recording: the coupled trace against a naive recomputation, its laws, and its shape on disk."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.trace import FEATURES  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.reader import Reader  # noqa: E402
from realmodels.record import Plan, Settings, measure_times, record  # noqa: E402
from realmodels.sampling import Sampling  # noqa: E402
from realmodels.streams import request_id, request_ids, stream, uniforms  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits

SETTINGS = {"max_candidates": 5, "max_new_tokens": 20, "top_k": 8, "timing_repeats": 0}


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", "tiny")


def make_prompts(count, seed=0):
    """Prompts of unequal lengths, two of them equal."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(count)]
    prompts[count // 2] = prompts[0]
    return prompts


@pytest.fixture(scope="module")
def trace(pair, tmp_path_factory):
    return record(pair, make_prompts(24), tmp_path_factory.mktemp("trace"), **SETTINGS)


def law(model, tokens, top_k, temperature=1.0):
    """The warped next-token law after `tokens`, in plain NumPy, without cache, batch or padding."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, -1].double().numpy()
    kept = np.argsort(logits)[-top_k:]
    if temperature == 0:
        kept, temperature = kept[-1:], 1.0
    out = np.zeros(len(logits))
    out[kept] = np.exp((logits[kept] - logits[kept].max()) / temperature)
    return out / out.sum()


def naive_features(pair, tokens, drafted, top_k, temperature):
    p, q = (law(model, tokens, top_k, temperature) for model in (pair.target, pair.draft))
    shown = law(pair.draft, tokens, top_k, temperature or 1.0)
    positive = shown[shown > 0]
    return {
        "token_accept_prob": min(1.0, p[drafted] / q[drafted]),
        "step_accept_prob": np.minimum(p, q).sum(),
        "draft_prob": shown[drafted],
        "top_prob": shown.max(),
        "entropy": -(positive * np.log(positive)).sum(),
    }


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_every_recorded_number_equals_a_naive_recomputation(pair, tmp_path, temperature):
    prompts = make_prompts(6, seed=2)
    trace = record(pair, prompts, tmp_path, **{**SETTINGS, "temperature": temperature})
    x, y = trace.optional["token"], trace.optional["draft_token"]
    rolled, starts = trace.optional["rollout_draft_token"], trace.rollout_offsets
    steps = 0
    for r, prompt in enumerate(prompts):
        first, last = trace.offsets[r : r + 2]
        for i in range(first, last):
            before = [*prompt, *x[first:i].tolist()]
            wanted = naive_features(pair, before, y[i], SETTINGS["top_k"], temperature)
            for key in FEATURES:
                assert trace.features[key][i] == pytest.approx(wanted[key], abs=1e-5), (r, i, key)
            assert trace.accepted[i] == (x[i] == y[i])
            assert trace.drafts_end[i] == (y[i] in pair.end_token_ids)
            for step in range(starts[i], starts[i + 1]):
                steps += 1
                branch = [*before, int(y[i]), *rolled[starts[i] : step].tolist()]
                wanted = naive_features(pair, branch, rolled[step], SETTINGS["top_k"], temperature)
                for key in FEATURES:
                    assert trace.rollout_features[key][step] == pytest.approx(wanted[key], abs=1e-5), (r, i, step, key)
        assert trace.ends[r] == (x[last - 1] in pair.end_token_ids)
    assert steps > 30


def test_batching_and_sharding_change_nothing(pair, trace, tmp_path):
    prompts = make_prompts(24)
    for name, sizes in (("single", {"batch_size": 1}), ("odd", {"batch_size": 5, "shard_size": 7})):
        other = record(pair, prompts, tmp_path / name, **SETTINGS, **sizes)
        is_the_same(trace, other)


def is_the_same(trace, other):
    """Equal tokens and flags, and probabilities up to rounding."""
    for key in ("offsets", "accepted", "drafts_end", "ends", "rollout_offsets", "rollout_drafts_end"):
        np.testing.assert_array_equal(getattr(trace, key), getattr(other, key))
    for key in ("token", "draft_token", "rollout_draft_token"):
        np.testing.assert_array_equal(trace.optional[key], other.optional[key])
    for key in FEATURES:
        np.testing.assert_allclose(trace.features[key], other.features[key], atol=1e-5)
        np.testing.assert_allclose(trace.rollout_features[key], other.rollout_features[key], atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 0}, {"temperature": 0.0}], ids=["top-k", "whole vocabulary", "greedy"]
)
def test_how_much_is_read_at_a_time_changes_nothing(pair, tmp_path, monkeypatch, settings):
    """Little memory, one chunk at a time, and readers that cannot read some rows only."""
    prompts, settings = make_prompts(12, seed=3), {**SETTINGS, **settings}
    wanted = record(pair, prompts, tmp_path / "wanted", **settings)
    for name, value in (("LOGITS", 24 * 3), ("PROMPT_TOKENS", 7), ("CHUNK", 3)):
        monkeypatch.setattr(f"realmodels.coupled.{name}", value)
    is_the_same(wanted, record(pair, prompts, tmp_path / "little", **settings))
    monkeypatch.undo()
    monkeypatch.setattr("realmodels.pair.Reader", AllRows)
    is_the_same(wanted, record(pair, prompts, tmp_path / "all rows", **settings, store_hidden=True))


class AllRows(Reader):
    """A reader that offers nothing beyond the interface that every draft has."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.selects_rows = False

    def read(self, tokens, position, owner=None, fork=None, keep=None, keep_hidden=False):
        assert len(tokens) == len(self.owner)
        return super().read(tokens, position, owner, fork, keep, keep_hidden)


def test_rows_that_are_not_read_stay_as_they_are(pair):
    """A read of two of four rows, between reads of all, is seen by those two alone."""
    tokens = torch.tensor([[3, 4], [5, 6], [7, 8], [9, 10]])
    position = torch.arange(2).expand(4, 2)
    reader, plain = Reader(pair.target, 4, 24), Reader(pair.target, 4, 24)
    first, wanted = (each.read(tokens, position) for each in (reader, plain))
    torch.testing.assert_close(first, wanted)
    inside = reader.read(tokens[1:3, :1], position[1:3, :1] + 2, rows=slice(1, 3))
    reader.swap(0, 3)
    after = reader.read(tokens[:, 1:], position[:, :1] + 3)
    again = plain.read(tokens[:, :1], position[:, :1] + 2)
    torch.testing.assert_close(inside, again[1:3])
    torch.testing.assert_close(after[1:3], plain.read(tokens[:, 1:], position[:, :1] + 3)[1:3])
    alone = Reader(pair.target, 1, 24)
    alone.read(tokens[3:], position[3:])
    torch.testing.assert_close(after[0], alone.read(tokens[:1, 1:], position[:1, :1] + 3)[0])


def test_a_model_that_accelerate_spreads_out_is_recorded_alike(trace, tmp_path):
    """Weights that stay elsewhere until they are used, as behind `device_map`: here they are kept aside on the CPU."""
    from accelerate import cpu_offload

    spread = load_pair("tiny", "tiny")
    for model in (spread.target, spread.draft):
        cpu_offload(model, execution_device="cpu")
        assert model.get_input_embeddings().weight.device.type == "meta"
    is_the_same(trace, record(spread, make_prompts(24), tmp_path, **SETTINGS))


def test_what_was_read_can_be_left_out_of_rollouts(pair, trace, tmp_path):
    bare = record(pair, make_prompts(24), tmp_path, **SETTINGS, score_rollouts=False, shard_size=5)
    assert bare.manifest["rollouts_scored"] is False and trace.manifest["rollouts_scored"] is True
    assert set(bare.rollout_features) == {"draft_prob", "top_prob", "entropy"}
    assert "rollout_draft_top_ids" in bare.optional and "rollout_target_top_ids" not in bare.optional
    np.testing.assert_array_equal(bare.accepted, trace.accepted)
    np.testing.assert_array_equal(bare.optional["rollout_draft_token"], trace.optional["rollout_draft_token"])
    assert bare.manifest["recording"]["tokens"]["rollout_score"] == 0


def test_a_request_is_recorded_alike_whatever_stands_beside_it(pair, trace, tmp_path):
    prompts = make_prompts(24)
    alone = record(pair, [prompts[5]], tmp_path, **SETTINGS)
    first, last = trace.offsets[5:7]
    np.testing.assert_array_equal(alone.optional["token"], trace.optional["token"][first:last])
    np.testing.assert_array_equal(alone.accepted, trace.accepted[first:last])


def test_the_trace_meets_all_ends(trace):
    """Paths that end and paths at their limit, drafted end-of-text on the path and in rollouts, equal prompts."""
    lengths = np.diff(trace.offsets)
    assert trace.ends.any() and (lengths[~trace.ends] == SETTINGS["max_new_tokens"]).any()
    assert trace.drafts_end.any() and trace.rollout_drafts_end.any()
    assert (trace.accepted & trace.drafts_end).any()
    first, middle = trace.offsets[0], trace.offsets[12]
    assert trace.request_ids[0][:-1] == trace.request_ids[12][:-1]
    assert trace.optional["token"][first : first + 5].tolist() != trace.optional["token"][middle : middle + 5].tolist()


def test_rollouts_are_as_long_as_a_round_could_be(trace):
    steps = np.diff(trace.rollout_offsets)
    for r in range(trace.num_requests):
        for i in range(*trace.offsets[r : r + 2]):
            full = max(0, min(SETTINGS["max_candidates"] - 1, SETTINGS["max_new_tokens"] - 2 - (i - trace.offsets[r])))
            if trace.accepted[i] or trace.drafts_end[i]:
                assert steps[i] == 0
            elif steps[i] < full:
                assert trace.rollout_drafts_end[trace.rollout_offsets[i + 1] - 1]
            else:
                assert steps[i] == full


def test_coupling_has_both_laws(pair, tmp_path):
    """One prompt, recorded 3,000 times: x ~ p, y ~ q, accepted as often as the overlap, rollouts ~ the draft's law."""
    prompt, count = [7, 3, 11], 3000
    options = {**SETTINGS, "max_new_tokens": 3, "max_candidates": 2, "top_k": 6}
    trace = record(pair, [prompt] * count, tmp_path, **options, batch_size=500, shard_size=count, store_top=0)
    first = trace.offsets[:-1]
    x, y = trace.optional["token"][first], trace.optional["draft_token"][first]
    p, q = (law(model, prompt, 6) for model in (pair.target, pair.draft))
    for drawn, wanted in ((x, p), (y, q)):
        counts = np.bincount(drawn, minlength=len(wanted))
        assert not counts[wanted == 0].any()
        assert stats.chisquare(counts[wanted > 0], wanted[wanted > 0] * count).pvalue > 1e-3
    overlap = np.minimum(p, q).sum()
    error = np.sqrt(overlap * (1 - overlap) / count)
    assert 0.3 < overlap < 0.97
    assert abs(trace.accepted[first].mean() - overlap) < 4 * error
    observed, wanted = [], []
    begins = trace.rollout_offsets[first]
    rolled = trace.rollout_offsets[first + 1] > begins
    for token in np.unique(y[rolled]):
        after = law(pair.draft, [*prompt, int(token)], 6)
        counts = np.bincount(trace.optional["rollout_draft_token"][begins[rolled & (y == token)]], minlength=len(after))
        common = after * counts.sum() >= 5
        assert not counts[after == 0].any()
        observed += [*counts[common], counts[~common].sum()]
        wanted += [*(after[common] * counts.sum()), after[~common].sum() * counts.sum()]
    observed, wanted = (np.array(v)[np.array(wanted) > 0] for v in (observed, wanted))
    freedom = len(observed) - len(np.unique(y[rolled]))
    assert stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), freedom) > 1e-3


def test_acceptance_is_the_mean_overlap(pair, tmp_path):
    trace = record(pair, make_prompts(150, seed=4), tmp_path, **SETTINGS, batch_size=50, store_top=0)
    overlap = trace.features["step_accept_prob"].astype(float)
    error = np.sqrt((overlap * (1 - overlap)).sum()) / len(overlap)
    assert abs(trace.accepted.mean() - overlap.mean()) < 4 * error
    assert abs(trace.features["token_accept_prob"].mean() - overlap.mean()) < 4 * error
    assert trace.manifest["mean_acceptance"] == pytest.approx(overlap.mean())


def test_manifest_and_optional_arrays(pair, tmp_path):
    prompts = make_prompts(4)
    trace = record(
        pair, prompts, tmp_path / "full", **{**SETTINGS, "timing_repeats": 2}, store_top=3, store_hidden=True
    )
    manifest = json.loads((tmp_path / "full" / "manifest.json").read_text())
    for key in ("models", "dtype", "sampling", "seed", "prompts_sha256", "versions", "clamping", "replayable"):
        assert key in manifest
    assert manifest["draft_is_target_time"] is True and manifest["replayable"] is True
    measured = manifest["measured"]
    assert len(measured["verify_time"]) == SETTINGS["max_candidates"] + 1
    assert min(measured["verify_time"]) > 0 and measured["draft_time"] > 0 and measured["machine"]
    positions = trace.num_positions
    assert trace.optional["hidden"].shape == (positions, 32) and trace.optional["hidden"].dtype == np.float16
    assert trace.optional["draft_top_ids"].shape == (positions, 3)
    assert trace.optional["draft_top_ids"].dtype == np.uint16
    np.testing.assert_allclose(
        np.exp(trace.optional["draft_top_logprobs"][:, 0].astype(float)), trace.features["top_prob"], atol=2e-3
    )
    private = record(pair, prompts, tmp_path / "private", **SETTINGS, store_tokens=False, store_hidden=True)
    assert dict(private.optional) == {}
    np.testing.assert_array_equal(private.accepted, trace.accepted)


def test_top_p_is_part_of_what_is_recorded(pair, tmp_path):
    """On both sides, and in the manifest: with next to nothing kept both models are as if greedy."""
    trace = record(pair, make_prompts(4), tmp_path, **SETTINGS, top_p=1e-6)
    assert trace.manifest["sampling"]["top_p"] == 1e-6
    np.testing.assert_array_equal(trace.features["token_accept_prob"], trace.accepted)
    np.testing.assert_allclose(trace.features["draft_prob"], 1.0)


def test_whole_vocabulary_without_top_k(pair, tmp_path):
    trace = record(pair, make_prompts(3), tmp_path, **{**SETTINGS, "top_k": 0})
    assert trace.optional["draft_top_ids"].shape[1] == 24


def test_no_rollouts_when_nothing_fails(tmp_path):
    """A draft that is the target: all accepted, and the trace is still well formed."""
    pair = load_pair("tiny", "rtn:bits=16,group=8")
    trace = record(pair, make_prompts(3), tmp_path, **{**SETTINGS, "temperature": 0.0})
    assert trace.accepted.all() and len(trace.rollout_drafts_end) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_candidates": 0}, "max_candidates must be a whole number in 1..1024, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be 0 or"),
        ({"temperature": float("nan")}, "temperature must be 0 or"),
        ({"top_k": True}, "top_k must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"timing_repeats": -1}, "timing_repeats must be a whole number of at least 0, got -1"),
        ({"max_new_tokens": 600}, "positions, the models have 512"),
    ],
)
def test_bad_settings_are_refused_before_any_work(pair, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        record(pair, make_prompts(2), tmp_path / "out", **{**SETTINGS, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_typed_settings_are_those_that_are_read():
    made = [name for name, p in inspect.signature(Plan.make).parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert {*Settings.__annotations__, "about_prompts"} == {*made, *Sampling.__dataclass_fields__}


def test_a_draft_without_hidden_states_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="draft: prompt lookup has no hidden states"):
        record(load_pair("tiny", "lookup"), make_prompts(2), tmp_path / "out", **SETTINGS, store_hidden=True)
    assert not (tmp_path / "out").exists()


def test_foreign_files_are_not_touched(pair, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty \(holds thesis.txt\)"):
        record(pair, make_prompts(2), tmp_path, **SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="cannot make"):
        record(pair, make_prompts(2), tmp_path / "thesis.txt" / "out", **SETTINGS)
    with pytest.raises(ValueError, match=r"tokens must be whole numbers in 0\.\.23, got 24"):
        record(pair, [[24]], tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize(
    "name",
    ["shard-list.txt", "manifest.json.bak", ".shard-notes", "shard-00000.safetensors.old", "shard-1.safetensors"],
)
def test_files_that_are_merely_called_like_ours_are_not_touched(pair, tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / "shard-00000.safetensors").write_text("left by an unfinished recording")
    with pytest.raises(ValueError, match=rf"not empty \(holds {name}\)"):
        record(pair, make_prompts(2), tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["shard-00000.safetensors", name])
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/etc/hostname")], ids=["folder", "link"])
def test_only_regular_files_are_cleared(pair, tmp_path, make):
    make(tmp_path / "shard-00000.safetensors")
    with pytest.raises(ValueError, match=r"not empty \(holds shard-00000\.safetensors\)"):
        record(pair, make_prompts(2), tmp_path, **SETTINGS)
    assert os.path.lexists(tmp_path / "shard-00000.safetensors")


def test_scraps_of_an_unfinished_recording_are_cleared(pair, tmp_path):
    for name in (".shard-00000.safetensors.0123abcd", ".shard-00008.json.0123abcd", ".manifest.json.0123abcd"):
        (tmp_path / name).write_text("scrap")
    record(pair, make_prompts(2), tmp_path, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]


def test_measured_times(pair):
    times = measure_times(pair, 4, context_length=16, repeats=2)
    assert len(times["verify_time"]) == 5 and times["context_length"] == 16
    low, high = times["verify_time_quartiles"]
    assert all(a <= b <= c for a, b, c in zip(low, times["verify_time"], high, strict=True))
    assert [entry["context_length"] for entry in times["by_context"]] == [16]
    times = measure_times(pair, 2, context_length=[40, 8, 20, 8], repeats=1)
    assert [entry["context_length"] for entry in times["by_context"]] == [8, 20, 40]
    assert times["context_length"] == 20
    assert all(times[key] == times["by_context"][1][key] for key in times["by_context"][1])


def test_uniforms_are_addressed():
    a = uniforms(1, "r", "path", 4, 6)
    np.testing.assert_array_equal(a[:, :3], uniforms(1, "r", "path", 4, 3))
    np.testing.assert_array_equal(a[2], stream(1, "r", "path", 2).random(6))
    others = [uniforms(2, "r", "path", 4, 6), uniforms(1, "s", "path", 4, 6), uniforms(1, "r", "accept", 4, 6)]
    assert all(not np.isin(a, other).any() for other in others)
    assert request_ids([[1, 2], [3], [1, 2]]) == [request_id([1, 2]), request_id([3]), request_id([1, 2], 1)]
