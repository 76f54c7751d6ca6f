"""`specstop train-head` and `replay --head`: keys, exit codes, one line of error, nothing half-written."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import itertools

from realmodels.pair import load_pair
from realmodels.record import record

GRID_KEYS = {
    "variant", "depth", "weight", "kl", "auroc", "ece", "kl_debiased", "ece_debiased", "mean_predicted", "mean_true",
    "throughput", "throughput_se", "best_threshold", "seconds",
}  # fmt: skip
SIZES = {"max_candidates": 5, "max_new_tokens": 24, "top_k": 8}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A trace of the tiny pair with hidden states, and the prompts it is from."""
    folder = tmp_path_factory.mktemp("heads")
    rng = np.random.default_rng(2)
    prompts = [rng.integers(2, 24, rng.integers(1, 6)).tolist() for _ in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in prompts))
    record(load_pair("tiny", "tiny:1"), prompts, folder / "trace", timing_repeats=1, store_hidden=True, **SIZES)
    return folder


@pytest.fixture(scope="module")
def head(recorded):
    from specstop.cli import main

    assert main(["train-head", "--trace", f"{recorded}/trace", "--out", f"{recorded}/head", "--cost", "0.2"]) == 0
    return recorded / "head"


def test_one_head_is_trained_judged_and_kept(recorded, lines, tmp_path):
    (row,) = lines("train-head", "--trace", recorded / "trace", "--out", tmp_path / "h", "--weight", 6, "--cost", 0.2)
    assert set(row) >= GRID_KEYS and (row["variant"], row["depth"], row["weight"]) == ("matched", 1, 6.0)
    assert row["cost_origin"] == "declared" and row["measured_throughput"] > 0
    assert row["best_fixed"]["policy"].startswith("fixed:")
    assert set(row["baselines"]) == {"constant", "draft_prob", "entropy", "token_accept_prob"}
    assert row["mean_predicted"] < row["mean_true"]  # the weight shifts it
    manifest = json.loads((tmp_path / "h" / "manifest.json").read_text())
    assert manifest["metrics"]["kl"] == row["kl"] and "seconds" not in manifest["metrics"]
    assert manifest["rejection_weight"] == 6.0 and manifest["models"]["draft"]["name"] == "tiny:1"
    assert not (tmp_path / "h" / "grid.json").exists()


def test_a_grid_holds_a_row_for_each_head_and_keeps_one(recorded, lines, tmp_path):
    (result,) = lines(
        "train-head", "--trace", recorded / "trace", "--out", tmp_path / "h", "--grid", "--depth", 1,
        "--prompts", recorded / "prompts.jsonl",
    )  # fmt: skip
    grid = json.loads((tmp_path / "h" / "grid.json").read_text())
    assert result == {"head": str(tmp_path / "h"), **grid}
    rows = grid["rows"]
    assert [(row["variant"], row["weight"]) for row in rows] == [
        (variant, weight) for variant in ("published", "matched") for weight in (1, 3, 6, 12)
    ]
    assert all(set(row) >= GRID_KEYS for row in rows) and grid["cost_origin"] == "measured"
    assert {"constant_kl", "best_fixed", "reliability"} <= set(grid)
    keys = {"variant", "depth", "weight", "debiased", "count", "predicted", "accepted"}
    assert all(set(line) == keys for line in grid["reliability"])
    kept = json.loads((tmp_path / "h" / "manifest.json").read_text())
    chosen = min(rows, key=lambda row: row["validation_kl"])
    assert grid["chosen"] == {key: chosen[key] for key in ("variant", "depth", "weight")}
    assert kept["variant"] == chosen["variant"] and kept["rejection_weight"] == chosen["weight"]
    # each weight shifts what is put out, and undoing it brings the mean back
    for row in rows:
        assert abs(row["mean_predicted_debiased"] - row["mean_true"]) < 0.12
    for some in (rows[:4], rows[4:]):
        assert all(a["mean_predicted"] > b["mean_predicted"] for a, b in itertools.pairwise(some))


def test_the_same_command_twice_gives_the_same_bytes(recorded, head, run, tmp_path):
    assert run("train-head", "--trace", recorded / "trace", "--out", tmp_path / "again", "--cost", 0.2)[0] == 0
    for file in sorted(head.iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_words_say_what_is_not_shown(recorded, text, tmp_path):
    out = text("train-head", "--trace", recorded / "trace", "--out", tmp_path / "h", "--cost", 0.2)
    assert "8 requests held out; thresholds were chosen on the other 8" in out
    assert "a perfect head, which nobody has" in out and "under measured times" in out


def test_replay_with_a_head(recorded, head, lines):
    policies = ["rejection:0.5,signal=head", "specdecpp:threshold=0.5,least=0,lag=0", "specdecpp", "fixed:2"]
    (result,) = lines("replay", recorded / "trace", "--head", head, "--cost", 0.2, "--policy", *policies)
    assert [row["policy"] for row in result["policies"]] == policies
    (without,) = lines("replay", recorded / "trace", "--cost", 0.2, "--policy", "rejection:0.5", "fixed:2")
    assert without["scored_on"] == "all" and result["scored_on"] == "test half"


def test_replay_of_a_published_head_without_a_manifest(recorded, lines, tmp_path):
    """As somebody else's checkpoint comes: config.json and weights, a candidate late, outputs as they are."""
    from realmodels.head import AcceptanceHead, Head, save_head

    folder = save_head(Head(AcceptanceHead(32, 3)), tmp_path / "head")
    (folder / "manifest.json").unlink()
    (result,) = lines(
        "replay", recorded / "trace", "--head", folder, "--cost", 0.2,
        "--policy", "specdecpp:least=0", "specdecpp:least=0,lag=0", "fixed:2",
    )  # fmt: skip
    first, second, _ = (row["throughput"] for row in result["policies"])
    assert first == second  # it is late by itself: the rule's own lag adds nothing


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("train-head --trace {plain} --out {new}", "record it with --hidden"),
        ("train-head --trace {trace} --out {trace}", "is there already"),
        ("train-head --trace {trace} --out {new} --variant published --prompts {few}", "requests are not among them"),
        ("train-head --trace {trace} --out {new} --variant published --draft tiny:2 --prompts {prompts}", "not this"),
        ("train-head --trace {hub} --out {new} --variant published --prompts {prompts}", "--target: give it"),
        ("train-head --trace {trace} --out {new} --variant mine", "invalid choice"),
        ("train-head --trace {trace} --out {new} --inputs token", "inputs must be hidden, then some of"),
        ("train-head --trace {trace} --out {new} --variant published --inputs entropy", "inputs must be hidden alone"),
        ("train-head --trace {trace} --out {new} --depth 65", "whole number in 0..64"),
        ("train-head --trace {trace} --out {new} --weight 0", "--weight"),
        ("train-head --trace {trace} --out {new} --cost -1", "--cost"),
        ("train-head --trace {new} --out {new}", "not a trace"),
        ("replay {trace} --head {new} --policy specdecpp", "not a head"),
        ("replay {trace} --head {trace} --policy specdecpp", "config.json: missing"),
        ("replay {plain} --head {head} --policy specdecpp", "record it with --hidden"),
        ("replay {other} --head {head} --policy specdecpp", "recorded with draft tiny:2, not the head's tiny:1"),
        ("replay {trace} --policy specdecpp", "needs head"),
    ],
)
def test_bad_input_is_one_line(recorded, head, trace, others, run, tmp_path, argv, said):
    names = {"plain": trace, "trace": recorded / "trace", "prompts": recorded / "prompts.jsonl", "head": head, **others}
    code, out, err = run(*argv.format(new=tmp_path / "new", **names).split())
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    record(load_pair("tiny", "tiny:2"), [[2], [3]], folder / "trace", timing_repeats=0, store_hidden=True, **SIZES)
    (folder / "few.jsonl").write_text('{"tokens": [5, 5, 5, 5]}\n')
    manifest = json.loads((folder / "trace" / "manifest.json").read_text())
    manifest["models"]["target"]["spec"] = "somebody/model"
    shutil.copytree(folder / "trace", folder / "hub")
    (folder / "hub" / "manifest.json").write_text(json.dumps(manifest))
    return {"hub": folder / "hub", "other": folder / "trace", "few": folder / "few.jsonl"}
