"""Traces from logits: the recording's own numbers from the pair's logits, what replays, and what is refused."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from mdp.cost import Affine  # noqa: E402
from mdp.trace import FEATURES, load  # noqa: E402
from realmodels.logits import record_logits  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from simulate.replay import replay, replay_rounds  # noqa: E402
from specstop.cli import main  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits

SETTINGS = {"max_candidates": 5, "top_k": 8, "seed": 4}
COST = Affine(draft_time=0.2, verify_time=1.0)


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


@pytest.fixture(scope="module")
def recorded(pair, tmp_path_factory):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 24, rng.integers(1, 7)).tolist() for _ in range(16)]
    folder = tmp_path_factory.mktemp("recorded")
    return prompts, record(pair, prompts, folder, **SETTINGS, max_new_tokens=20, timing_repeats=0)


@pytest.fixture(scope="module")
def arrays(pair, recorded):
    """What somebody with the models would have saved: each model's logits along the target's text."""
    prompts, trace = recorded
    logits = {"draft_logits": [], "target_logits": []}
    for r, prompt in enumerate(prompts):
        text = trace.optional["token"][trace.offsets[r] : trace.offsets[r + 1]].tolist()
        with torch.inference_mode():
            for role in ("draft", "target"):
                out = getattr(pair, role)(torch.tensor([[*prompt, *text]])).logits[0]
                logits[f"{role}_logits"].append(out[len(prompt) - 1 : -1])
    return {
        "tokens": torch.from_numpy(trace.optional["token"]).long(),
        "offsets": torch.from_numpy(trace.offsets),
        "end_token_ids": torch.tensor(pair.end_token_ids),
        "prompts": torch.tensor([token for prompt in prompts for token in prompt]),
        "prompt_offsets": torch.tensor(np.cumsum([0, *map(len, prompts)])),
        **{key: torch.cat(parts).clone() for key, parts in logits.items()},
    }


def written(path, arrays, **changes):
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    save_file({key: value.contiguous() for key, value in arrays.items()}, path, {"target": "T", "draft": "D"})
    return path


def topped(arrays, k):
    """The same file with each law's k most probable tokens, in any order."""
    out = {key: value for key, value in arrays.items() if not key.endswith("_logits")}
    for role in ("draft", "target"):
        logits = arrays[f"{role}_logits"]
        values, ids = logits.topk(k)
        out |= {f"{role}_top_ids": ids.int(), f"{role}_top_logits": values,
                f"{role}_logsumexp": logits.logsumexp(-1)}  # fmt: skip
    return out


@pytest.mark.parametrize("kept", [None, 8, 12])
def test_logits_give_what_the_recording_of_the_pair_gives(recorded, arrays, tmp_path, kept):
    _, trace = recorded
    file = written(tmp_path / "l.safetensors", arrays if kept is None else topped(arrays, kept))
    made = record_logits(file, tmp_path / "t", **SETTINGS)
    assert made.request_ids == trace.request_ids
    for key in ("offsets", "ends", "accepted", "drafts_end", "limit"):
        assert np.array_equal(getattr(made, key), getattr(trace, key)), key
    assert np.array_equal(made.optional["draft_token"], trace.optional["draft_token"])
    for key in FEATURES:
        np.testing.assert_allclose(made.features[key], trace.features[key], atol=1e-5, err_msg=key)
    assert made.rollouts == "none" and made.manifest["models"]["target"]["name"] == "T"
    for rule in ("fixed:3", "oracle"):
        # A round that meets an end of text behind a rejection would have stopped there: nothing is known of it.
        wanted, got = (replay_rounds(t, rule, cost=COST) for t in (trace, made))
        assert np.array_equal(wanted.num_accepted, got.num_accepted) and np.array_equal(wanted.start, got.start)
        if rule == "oracle":
            assert np.array_equal(wanted.num_drafted, got.num_drafted)
    assert load(tmp_path / "t").manifest["logits"]["sha256"]


def test_greedy_and_half_precision_ties(arrays, tmp_path):
    """At temperature 0 the text is each row's most probable token; where rounding makes two, the text's own wins."""
    greedy = arrays["target_logits"].argmax(-1)
    inside = torch.isin(greedy, arrays["end_token_ids"])
    logits = torch.where(inside[:, None] & (torch.arange(24) < 2), -50.0, arrays["target_logits"])
    tokens = logits.argmax(-1)
    logits = logits.scatter(-1, (tokens[:, None] + 1) % 24, logits.amax(-1, keepdim=True))  # a tie in each row
    file = written(tmp_path / "l.safetensors", arrays, tokens=tokens, target_logits=logits.half())
    made = record_logits(file, tmp_path / "t", max_candidates=5, temperature=0)
    draft = arrays["draft_logits"].argmax(-1)
    assert made.accepted.tolist() == (draft == tokens).tolist() and 0 < made.accepted.mean() < 1
    assert set(np.unique(made.features["token_accept_prob"])) == {0.0, 1.0}


def test_without_rollouts_rules_that_look_are_refused_unless_imputed(arrays, tmp_path):
    file = written(tmp_path / "l.safetensors", arrays)
    plain = record_logits(file, tmp_path / "plain", **SETTINGS)
    with pytest.raises(ValueError, match="this trace has no rollouts"):
        replay(plain, ["rejection:0.5"], cost=COST)
    filled = record_logits(file, tmp_path / "filled", **SETTINGS, impute=True)
    result = replay(filled, ["fixed:3", "rejection:0.5"], cost=COST)
    assert result.rollouts == result.to_dict()["rollouts"] == "imputed"
    assert replay(plain, ["fixed:3"], cost=COST).to_dict()["rollouts"] == "none"
    assert load(tmp_path / "filled").manifest["imputed"]["what"] == "rollouts"
    for rule in ("fixed:0", "fixed:3", "fixed:5", "oracle"):
        wanted, got = (replay_rounds(t, rule, cost=COST) for t in (plain, filled))
        assert all(np.array_equal(getattr(wanted, k), getattr(got, k)) for k in vars(got)), rule


def test_imputed_features_are_runs_of_the_traces_own_steps_behind_a_rejection(arrays, tmp_path):
    file = written(tmp_path / "l.safetensors", arrays)
    trace = record_logits(file, tmp_path / "a", **SETTINGS, impute=True)
    rows = {tuple(trace.features[key][i] for key in FEATURES): i for i in range(trace.num_positions)}
    behind = set(np.flatnonzero(~trace.accepted[:-1]) + 1) - set(trace.offsets.tolist())
    starts = 0
    for i in range(trace.num_positions):
        steps = range(*trace.rollout_offsets[i : i + 2])
        source = [rows[tuple(trace.rollout_features[key][s] for key in FEATURES)] for s in steps]
        for before, at in zip([None, *source], source, strict=False):
            assert not trace.drafts_end[at]
            starts += before is None
            if before is None or at != before + 1:
                assert at in behind
    assert starts > 20
    same = record_logits(file, tmp_path / "b", **SETTINGS, impute=True)
    other = record_logits(file, tmp_path / "c", **{**SETTINGS, "seed": 5}, impute=True)
    assert np.array_equal(trace.rollout_features["entropy"], same.rollout_features["entropy"])
    assert len(trace.rollout_features["entropy"]) != len(other.rollout_features["entropy"]) or not np.array_equal(
        trace.rollout_features["entropy"], other.rollout_features["entropy"]
    )


def test_mass_left_out_is_told(arrays, tmp_path):
    made = record_logits(written(tmp_path / "l.safetensors", topped(arrays, 8)), tmp_path / "t", **SETTINGS)
    probs = torch.softmax(arrays["target_logits"].double(), -1)
    outside = 1 - probs.topk(8).values.sum(-1).mean()
    assert made.manifest["logits"]["mass_left_out"]["target"] == pytest.approx(float(outside), abs=1e-6)


def shift(arrays, key, by):
    return {key: arrays[key] + by}


FAULTS = {
    "no tokens": (lambda a: {"tokens": None}, "lacks tokens"),
    "no target": (lambda a: {"target_logits": None}, "lacks target_logits"),
    "tokens as floats": (lambda a: {"tokens": a["tokens"].float()}, "tokens must hold whole numbers, not F32"),
    "logits as numbers": (lambda a: {"draft_logits": a["draft_logits"].int()}, "draft_logits must hold floats"),
    "too few rows": (lambda a: {"draft_logits": a["draft_logits"][1:]}, "draft_logits must be"),
    "two vocabularies": (lambda a: {"draft_logits": a["draft_logits"][:, 1:]}, "x 24, got"),
    "offsets": (lambda a: shift(a, "offsets", 1), "offsets must increase from 0"),
    "no such token": (lambda a: shift(a, "tokens", 24), "tokens must be in 0..23"),
    "another text": (lambda a: shift(a, "tokens", 0) | {"tokens": torch.roll(a["tokens"], 1), "end_token_ids": None},
                     "must be possible under the target's warped law"),
    "nan": (lambda a: {"target_logits": a["target_logits"] * torch.nan}, "finite, not so at token 0 of request 0"),
    "end inside": (lambda a: {"end_token_ids": torch.arange(24)}, "must be the last of its text"),
    "a short limit": (lambda a: {"limit": torch.ones(16).long()}, "limit must be at least the text's length"),
    "prompts without cuts": (lambda a: {"prompt_offsets": None}, "lacks prompt_offsets"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_file_at_fault_is_named_and_leaves_nothing(arrays, tmp_path, change, message):
    file = written(tmp_path / "l.safetensors", arrays, **change(arrays))
    with pytest.raises(ValueError, match=r"l\.safetensors: ") as error:
        record_logits(file, tmp_path / "t", **SETTINGS)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "t").exists()


TOP_FAULTS = {
    "twice": (lambda a: {"draft_top_ids": a["draft_top_ids"] * 0}, {}, "draft_top_ids holds a token twice"),
    "less than its parts": (lambda a: shift(a, "target_logsumexp", -3), {}, "less than that of its own top logits"),
    "k differs": (lambda a: {"draft_top_logits": a["draft_top_logits"][:, 1:]}, {}, "draft_top_logits must be"),
    "a wider law": (lambda a: {}, {"top_k": 9}, "top_k must be in 1..8"),
    "the whole law": (lambda a: {}, {"top_k": 0}, "top_k must be in 1..8"),
}


@pytest.mark.parametrize(("change", "options", "message"), TOP_FAULTS.values(), ids=TOP_FAULTS)
def test_top_tokens_at_fault(arrays, tmp_path, change, options, message):
    top = topped(arrays, 8)
    file = written(tmp_path / "l.safetensors", top, **change(top))
    with pytest.raises(ValueError, match=message):
        record_logits(file, tmp_path / "t", **{**SETTINGS, **options})


@pytest.mark.parametrize("content", [b"", b"no", b"\xff" * 64, None], ids=["empty", "text", "huge header", "cut"])
def test_damaged_files(arrays, tmp_path, content):
    file = written(tmp_path / "l.safetensors", arrays)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="not a safetensors file, or damaged") as error:
        record_logits(file, tmp_path / "t", **SETTINGS)
    assert "\n" not in str(error.value)


def test_on_the_command_line(arrays, tmp_path, capsys):
    file = written(tmp_path / "l.safetensors", arrays)
    options = f"--top-k 8 --max-candidates 5 --seed 4 --logits {file}".split()
    assert main(["record", *options, "--out", str(tmp_path / "t"), "--impute", "--json", "--no-tokens"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["rollouts"] == "imputed" and answer["num_requests"] == 16
    assert not load(tmp_path / "t").optional
    argv = ["replay", str(tmp_path / "t"), "--policy", "rejection:0.5", "--cost", "0.2"]
    assert main(argv) == 0
    assert "imputed" in capsys.readouterr().out
    for extra, message in (
        (["--target", "tiny"], "--target: does not go with --logits"),
        (["--max-new-tokens", "7"], "--max-new-tokens: does not go with --logits"),
        (["--out", str(tmp_path / "t")], "is not an empty folder"),
    ):
        assert main(["record", *options, "--out", str(tmp_path / "u"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["record", "--target", "tiny", "--draft", "tiny", "--prompts", "p", "--out", "o", "--impute"]) == 2
    assert "--impute: goes with --logits" in capsys.readouterr().err
