"""What the command line promises: exit codes, one line of error and nothing else, one JSON line a result."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specstop import verbs
from specstop.arguments import build_parser
from specstop.cli import function_of, main, spread_policies

PROBLEM = Path(__file__).parent / "golden" / "problem.json"
VERBS = (
    "solve", "evaluate", "simulate", "sweep", "check", "study", "record", "merge", "replay", "train-head", "audit",
    "import", "validate", "decode", "demo", "figures", "schema", "policies",
)  # fmt: skip


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """The golden problem in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("problem.json").write_text(PROBLEM.read_text())
    return "problem.json"


def is_one_line_of_error(answer, *parts):
    code, out, err = answer
    assert (code, out) == (2, ""), answer
    assert err.startswith("specstop: error: ") and err.endswith("\n") and err.count("\n") == 1, answer
    assert len(err) <= 520
    for part in parts:
        assert part in err


BAD = {
    "no verb": ([], "verb is missing"),
    "no such verb": (["solv", "problem.json"], "invalid choice: 'solv'"),
    "no such option": (["solve", "problem.json", "--jsn"], "unrecognized arguments: --jsn"),
    "no abbreviation": (["solve", "problem.json", "--js"], "unrecognized arguments: --js"),
    "option before the verb": (["--json", "solve", "problem.json"], "unrecognized arguments: --json"),
    "solve nothing": (["solve"], "required: PROBLEM.json"),
    "solve no such file": (["solve", "none.json"], "none.json: No such file"),
    "solve a folder": (["solve", "."], "Is a directory"),
    "solve a name with line breaks": (["solve", "no\nsuch\r\nfile.json"], "no such file.json: No such file"),
    "solve a name that cannot be one": (["solve", "a\0b"], "null"),
    "solve with a bad second file": (["solve", "problem.json", "bad.json"], "bad.json: "),
    "solve with a missing second file": (["solve", "problem.json", "none.json"], "none.json: "),
    "solve tol": (["solve", "problem.json", "--tol", "0"], "--tol: must be a number between 0 and 1"),
    "solve tol nan": (["solve", "problem.json", "--tol", "nan"], "--tol: must be"),
    "solve max-knots": (["solve", "problem.json", "--max-knots", "0"], "--max-knots: must be a whole number"),
    "evaluate no policy": (["evaluate", "problem.json"], "required: --policy"),
    "evaluate empty policy": (["evaluate", "problem.json", "--policy"], "--policy: expected at least one argument"),
    "evaluate no problem": (["evaluate", "--policy", "optimal", "fixed:4"], "required: PROBLEM.json"),
    "evaluate no rule": (["evaluate", "problem.json", "--policy", "fixed"], "policy 'fixed': expected fixed:K"),
    "evaluate no such rule": (["evaluate", "problem.json", "--policy", "fxed:4"], "unknown rule 'fxed'"),
    "evaluate empty rule": (["evaluate", "problem.json", "--policy", ""], "unknown rule ''"),
    "evaluate a bad second rule": (["evaluate", "problem.json", "--policy", "optimal", "fixed:x"], "fixed:x"),
    "evaluate too long": (["evaluate", "problem.json", "--policy", "fixed:13"], "length must be in 0..12"),
    "evaluate no number": (["evaluate", "problem.json", "--policy", "rejection:nan"], "must be a number in [0, 1]"),
    "evaluate threshold": (["evaluate", "problem.json", "--policy", "lookahead:1.5"], "must be a number in [0, 1]"),
    "evaluate signal": (["evaluate", "problem.json", "--policy", "rejection:.5,signal=entropy"], "is for traces"),
    "evaluate parameter": (["evaluate", "problem.json", "--policy", "rejection:.5,depth=2"], "unknown parameter"),
    "evaluate no table": (["evaluate", "problem.json", "--policy", "optimal:none.json"], "no such solution file"),
    "evaluate bad table": (["evaluate", "problem.json", "--policy", "optimal:problem.json"], "not a saved solution"),
    "simulate no policy": (["simulate", "problem.json"], "required: --policy"),
    "simulate bad problem": (["simulate", "bad.json", "--policy", "fixed:4"], "bad.json: "),
    "simulate bad policy": (["simulate", "problem.json", "--policy", "fixed:-1"], "must be a whole number in 0..1024"),
    "simulate signal": (["simulate", "problem.json", "--policy", "optimal:,signal=top_prob"], "signal=top_prob"),
    "replay no trace": (["replay", "none", "--policy", "fixed:4"], "none: not a trace"),
    "replay a file": (["replay", "problem.json", "--policy", "fixed:4"], "problem.json: not a trace"),
    "replay no policy": (["replay", "."], "required: --policy"),
    "replay bad policy": (["replay", ".", "--policy", "rejection:.5,signal=mood"], "signal=mood"),
    "replay cost": (["replay", ".", "--policy", "fixed:4", "--cost", "cheap"], "--cost: neither a number"),
    "replay cost zero": (["replay", ".", "--policy", "fixed:4", "--cost", "0"], "--cost: cost.draft_time: must be"),
    "replay cost nan": (["replay", ".", "--policy", "fixed:4", "--cost", "nan"], "--cost: cost.draft_time: must be"),
    "replay cost object": (["replay", ".", "--policy", "fixed:4", "--cost", '{"kind": "affine"}'], "missing"),
    "replay cost list": (["replay", ".", "--policy", "fixed:4", "--cost", "[1]"], "--cost: cost: must be an object"),
    "replay cost json": (["replay", ".", "--policy", "fixed:4", "--cost", "{"], "--cost: not JSON"),
    "replay cost in other digits": (["replay", ".", "--policy", "fixed:4", "--cost", "١"], "--cost: neither a number"),
    "replay cost file": (["replay", ".", "--policy", "fixed:4", "--cost", "bad.json"], "bad.json: cost: must be"),
    "replay level": (["replay", ".", "--policy", "fixed:4", "--level", "1"], "--level: must be a number between"),
    "record nothing": (["record"], "required: --target, --draft, --prompts, --out"),
    "record number": (["record", "--target", "tiny", "--draft", "tiny", "--prompts", "p", "--out", "o",
                       "--temperature", "-1"], "--temperature: must be a finite number >= 0"),
    "record text for a number": (["record", "--target", "tiny", "--draft", "tiny", "--prompts", "p", "--out", "o",
                                  "--top-k", "many"], "--top-k: must be a whole number"),
    "record shard": (["record", "--target", "tiny", "--draft", "tiny", "--prompts", "p", "--out", "o",
                      "--shard", "3/2"], "--shard: must be I/N with 1 <= I <= N"),
    "merge nothing": (["merge", "out"], "required: PART"),
    "merge no part": (["merge", "out", "."], ".: no part of a recording (no recording.json)"),
    "decode no prompt": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "fixed:2"],
                         "one of the arguments --prompt --prompts is required"),
    "decode optimal": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "optimal", "--prompt", "a"],
                       "optimal:FILE"),
    "decode signal": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "rejection:.5,signal=entropy",
                       "--prompt", "a"], "give --trace"),
    "decode trace": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "rejection:.5", "--prompt", "a",
                      "--trace", "none"], "none: not a trace"),
    "decode head": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "specdecpp", "--prompt", "a"],
                    "needs head, which this live run does not show; give --head"),
    "decode times": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "selftuned", "--prompt", "a"],
                     "give --trace"),
    "decode two prompts": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "fixed:2", "--prompt", "a",
                            "--prompts", "b"], "not allowed with argument"),
    "decode cost": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "fixed:2", "--prompt", "a",
                     "--cost", "cheap"], "--cost: neither a number"),
    "decode nucleus": (["decode", "--target", "tiny", "--draft", "tiny", "--policy", "fixed:2", "--prompt", "a",
                        "--top-p", "0"], "--top-p: must be a number in (0, 1]"),
    "demo argument": (["demo", "now"], "unrecognized arguments: now"),
    "schema argument": (["schema", "iid"], "unrecognized arguments: iid"),
    "policies argument": (["policies", "--policy", "fixed:4"], "unrecognized arguments: --policy"),
}  # fmt: skip
for option, bad in (
    ("--rounds", ("0", "-1", "1e6", "1.5", "1_000", "many", "", "nan", "٣", " 5", str(10**9 + 1), "9" * 400)),
    ("--seed", ("-1", "0.5", "x", str(2**63))),
):
    BAD |= {
        f"simulate {option} {value[:12]!r}": (
            ["simulate", "problem.json", "--policy", "fixed:4", f"{option}={value}"],
            f"argument {option}: must be a whole number",
        )
        for value in bad
    }


@pytest.mark.parametrize(("argv", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_on_stderr_and_nothing_on_stdout(run, problem, argv, message):
    Path("bad.json").write_text("[]")
    is_one_line_of_error(run(*argv), message)
    if argv:
        is_one_line_of_error(run(*argv, "--json") if "--json" not in argv else run(*argv))


RECORD = ["record", "--prompts", "prompts.jsonl", "--out", "trace"]
BAD_RECORDINGS = {
    "no such target": ["--target", "enormous", "--draft", "rtn"],
    "no such draft": ["--target", "tiny", "--draft", "enormous"],
    "draft of another family": ["--target", "bundled", "--draft", "tiny"],
    "rounding": ["--target", "tiny", "--draft", "rtn:bits=1"],
    "no prompts": ["--target", "tiny", "--draft", "tiny:1", "--prompts", "none.jsonl"],
    "bad prompts": ["--target", "tiny", "--draft", "tiny:1", "--prompts", "problem.json"],
    "text for a pair without tokenizer": ["--target", "tiny", "--draft", "tiny:1", "--prompts", "text.jsonl"],
    "a folder that is in use": ["--target", "tiny", "--draft", "tiny:1", "--out", "."],
}
REFUSED_WITHOUT_MODELS = {
    "no prompts": (["--prompts", "none.jsonl"], "no such file: none.jsonl"),
    "bad prompts": (["--prompts", "problem.json"], "problem.json: line 1: not JSON"),
    "a folder that is in use": (["--out", "."], "is not empty"),
    "a folder that cannot be one": (["--out", "problem.json"], "is not a folder"),
    "a temperature between greedy and warm": (["--temperature", "1e-5"], "temperature must be 0 or a number in"),
}


@pytest.mark.parametrize(("argv", "message"), REFUSED_WITHOUT_MODELS.values(), ids=REFUSED_WITHOUT_MODELS)
def test_what_needs_no_models_is_refused_before_they_are_loaded(run, problem, monkeypatch, argv, message):
    pytest.importorskip("torch")
    monkeypatch.setattr("realmodels.pair.load_pair", lambda **specs: pytest.fail("models were loaded"))
    Path("prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    pair = ["--target", "tiny", "--draft", "tiny:1"]
    is_one_line_of_error(run(*RECORD, *pair, *argv), message)
    if "--temperature" in argv:
        is_one_line_of_error(run("decode", *pair, "--policy", "fixed:2", "--prompt", "a", *argv), message)


def test_a_pair_without_tokenizer_cannot_read_a_prompt(run):
    pytest.importorskip("torch")
    answer = run("decode", "--target", "tiny", "--draft", "tiny:1", "--policy", "fixed:2", "--prompt", "hello")
    is_one_line_of_error(answer, "--prompt: this pair has no tokenizer")


@pytest.mark.parametrize("argv", BAD_RECORDINGS.values(), ids=BAD_RECORDINGS)
def test_a_bad_recording_is_refused_and_leaves_no_trace(run, problem, argv):
    pytest.importorskip("torch")
    Path("prompts.jsonl").write_text('{"tokens": [1, 2]}\n')
    Path("text.jsonl").write_text('{"prompt": "hello"}\n')
    is_one_line_of_error(run(*RECORD, *argv))
    assert not Path("trace/manifest.json").exists()


def test_a_line_of_error_quotes_no_more_than_fits(run, problem):
    Path("long.json").write_text(json.dumps({"x" * 10_000: 1}))
    is_one_line_of_error(run("solve", "long.json"), "long.json: xxx", " ...")


def test_an_escape_sequence_in_a_file_does_not_reach_the_terminal(run, problem):
    Path("ansi.json").write_text(json.dumps({"\x1b[31mred\x07\u202e": 1}))
    answer = run("solve", "ansi.json")
    is_one_line_of_error(answer, r"ansi.json: \x1b[31mred\x07\u202e")
    assert answer[2].removesuffix("\n").isprintable()


def test_a_missing_extra_is_named(run, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("realmodels")]:
        monkeypatch.delitem(sys.modules, name)
    is_one_line_of_error(run(*RECORD, "--target", "tiny", "--draft", "tiny"), "pip install 'specstop[models]'")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory; make the problem or the batch smaller"),
        (ValueError("first\nsecond"), 2, "first second"),
        (ValueError(), 2, "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "x.json: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
    ],
)
def test_what_can_go_wrong_outside_the_program_is_one_line(run, monkeypatch, error, code, message):
    def fail(args):
        raise error

    monkeypatch.setattr(verbs, "schema", fail)
    assert run("schema") == (code, "", f"specstop: error: {message}\n")


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(verbs, "schema", lambda args: {}["bug"])
    with pytest.raises(KeyError):
        main(["schema"])


def test_every_verb_has_a_function_and_json_and_help(run):
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for verb in VERBS:
        assert callable(function_of(verb)) and verb in out
        code, text, err = run(verb, "--help")
        assert (code, err) == (0, "") and "--json" in text
    (choices,) = [action.choices for action in build_parser()._actions if action.dest == "verb"]
    assert choices is not None and tuple(choices) == VERBS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--policy", "optimal", "fixed:4"], ["--policy=optimal", "--policy=fixed:4"]),
        (["--policy", "optimal", "problem.json", "--json"], ["--policy=optimal", "problem.json", "--json"]),
        (["problem.json", "--policy", "optimal:problem.json"], ["problem.json", "--policy=optimal:problem.json"]),
        (["--policy", "a", "--policy", "b", "--seed", "1"], ["--policy=a", "--policy=b", "--seed", "1"]),
        (["--policy", "--json"], ["--policy", "--json"]),
        (["--policy=a", "problem.json"], ["--policy=a", "problem.json"]),
        (["--policy", "optimal", "optimal"], ["--policy=optimal", "--policy=optimal"]),
    ],
)
def test_a_list_of_policies_ends_at_a_file(problem, typed, meant):
    Path("optimal").touch()  # a file that is called like a rule is no file here
    assert spread_policies(typed) == meant


def in_a_new_process(*argv, **options):
    return subprocess.run(
        [sys.executable, "-m", "specstop", *map(str, argv)], text=True, capture_output=True, **options
    )


def test_help_is_quick():
    def seconds():
        start = time.perf_counter()
        assert in_a_new_process("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("argv", [["--help"], ["solve", "--help"], ["--version"], ["solve"]])
def test_nothing_heavy_is_imported_before_there_is_work(argv):
    code = (
        "import sys\nfrom specstop.cli import main\n"
        f"main({argv!r})\n"
        "sys.exit(bool({'jax', 'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_a_process_keeps_the_contract(tmp_path):
    good = in_a_new_process("solve", PROBLEM, "--json")
    assert (good.returncode, good.stderr, good.stdout.count("\n")) == (0, "", 1)
    bad = in_a_new_process("solve", PROBLEM, tmp_path / "none.json")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("cache", ["/dev/null/cache", ""])
def test_no_place_for_a_cache_is_no_error(cache):
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"SPECSTOP_CACHE": cache, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/x"}
    answer = in_a_new_process("solve", PROBLEM, "--json", env=env)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("command", "closed", "code"),
    [
        ("--help", ">&-", 0), ("policies", ">&-", 0), ("schema --json", ">&-", 0), (f"solve {PROBLEM}", ">&-", 0),
        ("policies", ">&- 2>&-", 0), ("solve none.json", "2>&-", 2), ("solve none.json", ">&- 2>&-", 2),
    ],
)  # fmt: skip
def test_a_closed_stream_is_no_error_and_no_other_takes_its_text(command, closed, code):
    line = f"{sys.executable} -m specstop {command} {closed}"
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout, answer.stderr) == (code, "", "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a POSIX shell")
def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m specstop policies | true; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert answer.stderr == "" and answer.returncode in (0, 141)
