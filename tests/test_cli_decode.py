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
