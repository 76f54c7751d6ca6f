"""The command line of recording: in parts, merged, gone on with, planned from."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from mdp.trace import load
from specstop.cli import main

PAIR = ["record", "--target", "tiny", "--draft", "tiny:1", "--prompts", "prompts.jsonl"]
SIZES = ["--max-new-tokens", "6", "--max-candidates", "4", "--shard-size", "2", "--batch-size", "2"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Exit code, stdout and stderr of one command line, in a folder with five prompts."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text("".join(json.dumps({"tokens": [2 + r, 7, 3]}) + "\n" for r in range(5)))

    def run(*argv):
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


def test_parts_and_merge(run):
    code, out, _ = run(*PAIR, *SIZES, "--out", "whole", "--json")
    whole = json.loads(out)
    assert code == 0 and whole["num_requests"] == 5 and whole["tokens_per_second"] > 0
    assert set(whole["seconds_per"]) >= {"target_path_token", "draft_step", "prompt_token"}
    assert whole["tokens"]["target_path"] == whole["num_positions"] and whole["peak_memory"]["process"] > 0
    for i in (1, 2):
        code, out, _ = run(*PAIR, *SIZES, "--out", f"part{i}", "--shard", f"{i}/2", "--json")
        assert code == 0 and json.loads(out) == {"part": f"part{i}", "shard": f"{i}/2"}
    code, out, _ = run("merge", "merged", "part1", "part2", "--json")
    merged = json.loads(out)
    assert code == 0 and set(merged) == set(whole)
    same = ("num_requests", "num_positions", "mean_acceptance", "tokens")
    assert all(merged[key] == whole[key] for key in same)
    for path in Path("whole").glob("*.safetensors"):
        assert path.read_bytes() == (Path("merged") / path.name).read_bytes()
    code, out, _ = run("merge", "again", "part1", "part2")
    assert code == 0 and "seconds per draft step" in out and " GB" in out


def test_the_same_command_goes_on_and_another_does_not(run, monkeypatch):
    run(*PAIR, *SIZES, "--out", "trace", "--shard", "2/2")
    code, out, err = run(*PAIR, *SIZES, "--out", "trace", "--temperature", "0.5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "with sampling.temperature 1.0, not 0.5; remove it or choose another folder" in err
    assert run(*PAIR, *SIZES, "--out", "trace")[0] == 0
    assert load("trace").num_requests == 5
    code, _, err = run(*PAIR, *SIZES, "--out", "trace")
    assert code == 2 and "already holds a trace" in err


def test_what_is_stored(run):
    options = ["--hidden", "--store-top", "3", "--no-rollout-scores"]
    assert run(*PAIR, *SIZES, "--out", "trace", *options)[0] == 0
    trace = load("trace")
    assert trace.optional["hidden"].shape[1] == 32 and trace.optional["draft_top_ids"].shape[1] == 3
    assert "token_accept_prob" not in trace.rollout_features
    code, _, err = run("replay", "trace", "--policy", "rejection:0.5", "--cost", "0.2")
    assert code == 2 and "token_accept_prob" in err
    assert run("replay", "trace", "--policy", "fixed:2", "--cost", "0.2")[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "--no-tokens"], "--hidden: hidden states tell the text"),
        (["--shard", "4/4"], "shard 4/4: there are 3 blocks of 2 requests"),
        (["--scheduler", "nowhere"], "scheduler: no answer from 'nowhere'"),
    ],
)
def test_refused_in_one_line(run, options, message):
    code, out, err = run(*PAIR, *SIZES, "--out", "trace", *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not Path("trace").exists()
