"""`specstop decode`: a prompt continued by a real pair, with what its rule reads calibrated on a trace."""

import json

import pytest

from specstop.cli import main


@pytest.mark.slow
def test_decode_continues_a_prompt_with_the_bundled_pair(lines):
    pytest.importorskip("torch")
    sizes = ["--max-new-tokens", 8, "--max-candidates", 3, "--temperature", 0]
    (answer,) = lines("decode", "--target", "bundled", "--draft", "rtn", "--policy", "fixed:3", *sizes, "--prompt",
                      "What is the capital of France?")  # fmt: skip
    assert "Paris" in answer["text"] and answer["num_emitted"] == len(answer["tokens"]) <= 8
    spent = answer["num_drafted"] + answer["num_target_calls"]
    assert spent == answer["num_emitted"] + answer["num_discarded"] + answer["num_cut"]


@pytest.fixture(scope="module")
def speaking_tiny(tmp_path_factory):
    """The tiny target as a model folder whose tokenizer reads words."""
    pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from realmodels.tiny import tiny_target

    folder = tmp_path_factory.mktemp("speaking")
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(24)}, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_target(0).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spoken_trace(speaking_tiny):
    """A trace of that pair."""
    prompts = speaking_tiny / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{2 + r} w5"}) + "\n" for r in range(12)))
    pair, sizes = f"--target {speaking_tiny} --draft rtn:bits=3,group=8", "--max-new-tokens 24 --max-candidates 6"
    assert main(f"record {pair} --prompts {prompts} --out {speaking_tiny}/trace {sizes}".split()) == 0
    return speaking_tiny / "trace"


DECODE = ["--max-new-tokens", 8, "--max-candidates", 4, "--prompt", "w3 w5"]


@pytest.mark.parametrize(
    ("policy", "traced", "signal"),
    [
        ("fixed:2", False, None),
        ("fixed:2", True, None),  # reads no signal: the trace has nothing to calibrate
        ("rejection:0.4", False, "token_accept_prob"),
        ("rejection:0.4", True, "token_accept_prob"),
        ("lookahead:0.4", True, "token_accept_prob"),
        ("rejection:0.4,signal=entropy", True, "entropy"),
    ],
)
def test_decode_calibrates_what_the_rule_reads_and_nothing_else(
    lines, speaking_tiny, spoken_trace, policy, traced, signal
):
    trace = ["--trace", spoken_trace] if traced else []
    (answer,) = lines("decode", "--target", speaking_tiny, "--draft", "rtn:group=8,bits=3", "--policy", policy, *trace,
                      *DECODE)  # fmt: skip
    assert answer["policy"] == policy and answer["signal"] == signal and answer["num_emitted"] > 0


@pytest.mark.parametrize(("flag", "value"), [("--temperature", 0.5), ("--top-p", 0.9)])
def test_a_trace_that_was_sampled_otherwise_calibrates_nothing(run, speaking_tiny, spoken_trace, flag, value):
    rule = ["--policy", "rejection:0.4,signal=entropy", "--trace", spoken_trace]
    code, out, err = run(
        "decode", "--target", speaking_tiny, "--draft", "rtn:group=8,bits=3", *rule, flag, value, *DECODE
    )
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"was recorded with {flag[2:].replace('-', '_')} 1.0, not {value}" in err


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("lookahead:0.4", "needs next_accept_prob, which is fitted to a trace; give --trace"),
        ("rejection:0.4,signal=entropy", "give --trace"),
        ("oracle", "needs next_accepted, which this live run does not show\n"),
    ],
)
def test_decode_says_what_a_rule_lacks_in_the_commands_own_words(capsys, speaking_tiny, policy, message):
    argv = ["decode", "--target", speaking_tiny, "--draft", "rtn", "--policy", policy, *DECODE]
    assert main([*map(str, argv)]) == 2
    assert message in capsys.readouterr().err


def test_decode_of_many_prompts_says_what_happened_round_by_round(lines, text, trace, tmp_path):
    """The live log is that of the function, and a greedy one that of replay."""
    from mdp.trace import load
    from realmodels.decode import decode_all
    from realmodels.pair import load_pair

    file = tmp_path / "prompts.jsonl"
    prompts = [[2 + r, 5, 9] for r in range(4)]
    file.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in prompts))
    pair = ["--target", "tiny", "--draft", "tiny:1", "--prompts", file, "--limit", 3]
    sizes = ["--max-new-tokens", 8, "--max-candidates", 4, "--top-k", 6, "--top-p", 0.8, "--seed", 3]
    answers = lines("decode", *pair, *sizes, "--policy", "svip", "--rounds")
    settings = {"max_new_tokens": 8, "max_candidates": 4, "top_k": 6, "top_p": 0.8, "seed": 3}
    runs = decode_all(load_pair("tiny", "tiny:1"), prompts[:3], "svip", **settings)
    assert [answer["tokens"] for answer in answers] == [run.tokens for run in runs]
    for request, (answer, run) in enumerate(zip(answers, runs, strict=True)):
        counts = [tuple(step[name] for name in step if name.startswith("num_")) for step in answer["rounds"]]
        assert counts == run.rounds and answer["request"] == request and answer["text"] is None
        assert sum(step["verify_time"] for step in answer["rounds"]) == pytest.approx(answer["verify_time"])
    shown = text("decode", *pair, *sizes, "--policy", "svip")
    assert shown.count("\n") == 5 and "all" in shown
    assert "rounds" not in lines("decode", *pair, *sizes, "--policy", "fixed:1")[0]
    # whatever a trace can fit, solve or calibrate runs live
    depth = ["--max-new-tokens", 8, "--max-candidates", 4, "--trace", trace]
    measured = load(trace).manifest["measured"]
    assert len(measured["verify_time"]) == 7
    for policy in ("selftuned:signal=entropy", "disco:fit=1", "lookahead:0.4,signal=draft_prob"):
        assert all(answer["num_emitted"] > 0 for answer in lines("decode", *pair, *depth, "--policy", policy))
    told = lines("decode", *pair, *depth, "--policy", "selftuned:signal=entropy", "--cost", 0.2)
    assert {answer["signal"] for answer in told} == {"entropy"}


def test_decode_solves_for_a_trace(lines, trace, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [2, 5, 9]}\n')
    pair = ["--target", "tiny", "--draft", "tiny:1", "--prompts", tmp_path / "prompts.jsonl", "--trace", trace]
    (answer,) = lines("decode", *pair, "--policy", "optimal:signal=entropy", "--max-candidates", 4, "--cost", 0.2,
                      "--max-new-tokens", 8)  # fmt: skip
    assert answer["signal"] == "entropy" and answer["num_drafted"] > 0


def test_decode_takes_a_head(lines, run, tmp_path):
    torch = pytest.importorskip("torch")
    from realmodels.head import AcceptanceHead, Head, save_head
    from realmodels.pair import load_pair

    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(AcceptanceHead(32, 1), manifest={"models": load_pair("tiny", "tiny:1").provenance})
    folder = save_head(head, tmp_path / "head")
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [2, 5, 9]}\n')
    pair = ["--target", "tiny", "--draft", "tiny:1", "--prompts", tmp_path / "prompts.jsonl", "--head", folder]
    kept, dropped = (
        lines("decode", *pair, "--policy", f"specdecpp:least=1,threshold={threshold}", "--max-new-tokens", 8)[0]
        for threshold in (0, 1)
    )
    assert kept["num_drafted"] / kept["num_target_calls"] < dropped["num_drafted"] / dropped["num_target_calls"]
    code, out, err = run("decode", *pair, "--draft", "tiny:2", "--policy", "specdecpp", "--max-new-tokens", 8)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "was recorded with draft tiny:1, not this tiny:2" in err


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (["rtn:bits=4,group=8"], "was recorded with draft"),
        (None, "was recorded with target"),
    ],
)
def test_decode_refuses_a_trace_of_another_pair(capsys, speaking_tiny, spoken_trace, trace, draft, message):
    used = spoken_trace if draft else trace
    draft = draft[0] if draft else "rtn:bits=3,group=8"
    argv = ["decode", "--target", speaking_tiny, "--draft", draft, "--policy", "rejection:0.4", "--trace", used]
    capsys.readouterr()
    assert main([*map(str, argv + DECODE)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err and str(used) in err
