"""What can be typed: every verb and its options.

Nothing but the standard library is imported here: `specstop --help` answers at once.
"""

from collections.abc import Callable

from specstop.parser import Parser, fraction, not_negative, number, part, probability, seed, share, whole_number

__all__ = ["DTYPES", "STUDIES", "TEMPLATES", "build_parser"]

DTYPES = ("float32", "bfloat16", "float16")
TEMPLATES = ("chat", "plain", "llama2", "alpaca", "gsm8k", "human-eval")
STUDIES = ("paper", "phase", "information", "self-tuning")


def build_parser() -> Parser:
    """The parser of the whole command line."""
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

    for declare in (_theory, _recording, _traces, _live, _whole):
        declare(verb)
    verb("schema", "every kind and key that a problem file may hold")
    verb("policies", "the stopping rules and how to write them")
    return parser


def _theory(verb: Callable[..., Parser]) -> None:
    """Exact values, simulation and experiments on problem files."""
    solve = verb("solve", "optimal policy with bounds that enclose its throughput", "One line a file, in order.")
    solve.add_argument("problems", metavar="PROBLEM.json", nargs="+", help="problem files; see `specstop schema`")
    _precision(solve)
    solve.add_argument(
        "--method", choices=("auto", "policy_iteration", "value_iteration"), default="auto",
        help="default auto; value iteration is slower, with the same bounds",
    )  # fmt: skip
    solve.add_argument(
        "--num-tokens", metavar="N", type=whole_number(1, 10**6),
        help="also the least expected time until N tokens are out",
    )  # fmt: skip

    evaluate = verb("evaluate", "exact value of policies", "No sampling; `gap` is against the optimum's bounds.")
    _problem(evaluate)
    _policies(evaluate)
    _precision(evaluate)

    simulate = verb("simulate", "Monte Carlo of policies on the same coins")
    _problem(simulate)
    _policies(simulate)
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


def _recording(verb: Callable[..., Parser]) -> None:
    """A real pair's trace."""
    record = verb(
        "record", "run a real draft/target pair over prompts and keep everything a rule can meet",
        "A recording that was killed goes on where it was when the same command is given again. "
        "Needed are --target, --draft, --prompts and --out; or --logits and --out, a trace from logits along the "
        "target's text: a safetensors file with tokens [N], offsets [R+1], draft_logits and target_logits [N, V] (the "
        "law of each token before it is read). In the place of the last two each model's k most probable tokens will "
        "do: draft_top_ids, draft_top_logits, target_top_ids, target_top_logits [N, k] and, if wanted, "
        "draft_logsumexp, target_logsumexp [N]. More that may be there: end_token_ids, limit [R], prompts with "
        "prompt_offsets [R+1].",
    )  # fmt: skip
    _pair(record, required=False)
    _prompts(record, required=False)
    record.add_argument("--logits", metavar="FILE.safetensors", help="in the place of --target, --draft and --prompts")
    record.add_argument(
        "--impute", action="store_true", help="of --logits: make up features past a rejection; the trace says so"
    )
    record.add_argument("--out", metavar="DIR", help="the trace folder; must not hold a trace yet")
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
    _sampling(record)

    merge = verb("merge", "join the parts of a recording", "The trace is the one that a single process would write.")
    merge.add_argument("out", metavar="OUT", help="the trace folder; must not hold a trace yet")
    merge.add_argument("parts", metavar="PART", nargs="+", help="folders that `specstop record --shard I/N` wrote")


def _traces(verb: Callable[..., Parser]) -> None:
    """What traces are for, and heads, which are trained on them."""
    replay = verb("replay", "policies on a recorded trace, exactly, with no model call")
    _recorded(replay)
    _policies(replay)
    replay.add_argument(
        "--head",
        metavar="HEAD",
        help="a trained head, whose calibrated scores rules that read `head`, or signal=head, then see",
    )

    train = verb(
        "train-head", "train an acceptance head on a trace, and judge it on the held-out half",
        "The trace is recorded with --hidden. All is chosen on one half of the requests and judged on the other.",
    )  # fmt: skip
    train.add_argument("--trace", metavar="TRACE", required=True, help="trace folder with hidden states")
    train.add_argument("--out", metavar="HEAD", required=True, help="the head's folder; must not be there yet")
    train.add_argument(
        "--variant", choices=("published", "matched"),
        help="published: SpecDec++'s labels and mixed contexts, scores a candidate late; matched: those of inference, "
             "with the candidate's probability and the entropy, no lag (default matched; with --grid both)",
    )  # fmt: skip
    train.add_argument("--depth", type=whole_number(0, 64), help="residual blocks (published 3, matched 1)")
    train.add_argument(
        "--weight", type=number(1e-6, 1e6, "a number in (1e-6, 1e6)"), help="w on rejections (published 6, matched 1)"
    )
    train.add_argument(
        "--inputs", metavar="NAME", nargs="*",
        help="matched: beside the hidden state (default draft_prob entropy; top_prob; none given: the state alone)",
    )  # fmt: skip
    train.add_argument("--separate-blocks", action="store_true", help="each block with weights of its own")
    train.add_argument(
        "--grid", action="store_true", help="depths 0..4 x weights 1, 3, 6, 12; keeps the best, grid.json"
    )
    train.add_argument(
        "--prompts", default="human-eval", metavar="FILE.jsonl", help="published: those of the recording"
    )
    _pair(train, required=False)  # of the published variant; what is not typed is as the trace says
    train.set_defaults(dtype=None)
    train.add_argument("--cost", metavar="COST", help="declared times, as in `replay`; measured ones are shown beside")
    train.add_argument("--seed", type=seed, default=0, help="default 0")

    audit = verb(
        "audit",
        "how much a deployed policy leaves on a trace, with bounds",
        "Scored on half of the requests; rules are fitted and chosen on the other half.",
    )
    _recorded(audit)
    audit.add_argument("--policy", metavar="P", required=True, help="the rule that runs; see `specstop policies`")

    imported = verb("import", "a trace from a file of another project", "Prompts and tokens are not kept.")
    imported.add_argument("file", metavar="FILE", help="JSON lines, or SpecDec++'s JSON")
    imported.add_argument("--format", required=True, metavar="F", help="specdecode-bench, specdec++ or rounds")
    imported.add_argument("--out", required=True, metavar="DIR", help="the trace folder; must not hold a trace yet")
    imported.add_argument("--drafter", help="of specdecode-bench: eagle or ngram (default: the first the file holds)")
    imported.add_argument("--seed", type=seed, default=0, help="of the coins that specdec++ leaves out (default 0)")


def _live(verb: Callable[..., Parser]) -> None:
    """A real pair beside its trace, and at work."""
    validate = verb(
        "validate", "check files; or predict, replay and run live the same policies on a pair, side by side",
        "With files: traces, problem files and files to import are checked, one line each, in order. With --out: the "
        "report on a pair (bundled and rtn:bits=4,group=64, or the one given), one half of its requests training and "
        "the other one judging.",
    )  # fmt: skip
    validate.add_argument("paths", metavar="FILE_OR_DIR", nargs="*", help="what to check; all of it is read")
    validate.add_argument("--out", metavar="DIR", help="validation.json and report.md go there, and what was recorded")
    _pair(validate, required=False)
    validate.set_defaults(dtype=None, device=None)
    validate.add_argument(
        "--prompts", metavar="P", help="FILE.jsonl, or human-eval (default; a tiny pair draws its own)"
    )
    _template(validate)
    validate.set_defaults(template=None)
    validate.add_argument("--limit", type=whole_number(4, 10**9), help="use the first so many prompts (default 56)")
    validate.add_argument(
        "--trace", metavar="TRACE", help="a recorded trace of this pair and these prompts, used again"
    )
    validate.add_argument(
        "--policy", metavar="P", nargs="+", action="extend", dest="policies",
        help="stopping rules; without it five, with parameters chosen on the training half",
    )  # fmt: skip
    validate.add_argument(
        "--cost", metavar="COST",
        help="declared times as in `replay`, or measured; by default those measured with the trace, and .22 where the "
             "draft takes the target's own time",
    )  # fmt: skip
    validate.add_argument("--max-candidates", type=whole_number(1, 1024), help="K (default 12)")
    validate.add_argument("--max-new-tokens", type=whole_number(1, 10**6), help="default 64")
    validate.add_argument("--temperature", type=not_negative, help="0 is greedy (default 1)")
    validate.add_argument("--top-k", type=whole_number(0, 10**9), help="0 keeps all tokens (default 50)")
    validate.add_argument("--seed", type=seed, help="default 0")
    validate.add_argument("--level", type=fraction, help="of the intervals (default 0.95)")
    validate.add_argument("--quick", action="store_true", help="a small run that shows the same keys")
    validate.add_argument("--full", action="store_true", help="the open questions too: other pairs, prompts, contexts")

    decode = verb("decode", "continue prompts with a real pair under a policy", "The text has the target's law.")
    _pair(decode)
    decode.add_argument("--policy", metavar="P", required=True, help="a stopping rule; see `specstop policies`")
    said = decode.add_mutually_exclusive_group(required=True)
    said.add_argument("--prompt", metavar="TEXT", help="goes through the template")
    said.add_argument(
        "--prompts", metavar="FILE", help="a file of prompts as in `record`, or human-eval; one result each"
    )
    decode.add_argument("--limit", type=whole_number(1, 10**9), help="use the first so many prompts of the file")
    _template(decode)
    decode.add_argument(
        "--trace", help="recorded with this pair: calibrates the signal that the rule reads, fits or solves the rule"
    )
    decode.add_argument("--head", metavar="HEAD", help="a trained head's folder, for rules that read `head`")
    decode.add_argument(
        "--cost", metavar="COST",
        help="times that the rule is told in place of the clock's; as in `replay`",
    )  # fmt: skip
    decode.add_argument(
        "--score",
        action="store_true",
        help="show token_accept_prob, a perfect head, slowly; on if the rule's signal is that one",
    )
    decode.add_argument("--rounds", action="store_true", help="the counts and times of every round too")
    _sampling(decode)


def _whole(verb: Callable[..., Parser]) -> None:
    """From nothing to a report."""
    demo = verb("demo", "the main job end to end: solve, simulate, record a real pair, replay, report")
    demo.add_argument("--out", default="out", metavar="DIR", help="default out")
    demo.add_argument("--quick", action="store_true", help="a small run that shows the same files")

    figures = verb(
        "figures", "every figure and table of the paper again, with what theory and a real pair add",
        "Vector, PNG and the numbers behind each, index.html and report.md. What is not too old is used again.",
    )  # fmt: skip
    figures.add_argument("--out", required=True, metavar="DIR", help="made if need be")
    figures.add_argument("--quick", action="store_true", help="small sizes, and a tiny random pair (3 minutes)")
    figures.add_argument("--force", action="store_true", help="compute everything anew; a trace once recorded stays")
    figures.add_argument("--only", metavar="NAME", nargs="+", help="these figures alone, by the names of their files")
    figures.add_argument(
        "--trace", metavar="TRACE", help="of a real pair (default: out/trace of `make demo`, or one recorded now)"
    )


def _problem(out: Parser) -> None:
    out.add_argument("problem", metavar="PROBLEM.json", help="problem file; see `specstop schema`")


def _policies(out: Parser) -> None:
    out.add_argument(
        "--policy", metavar="P", nargs="+", action="extend", required=True, dest="policies",
        help="stopping rules, see `specstop policies`; all: every one of them",
    )  # fmt: skip


def _precision(out: Parser) -> None:
    out.add_argument("--tol", type=fraction, default=1e-6, help="relative width of the bounds (default 1e-6)")
    out.add_argument("--max-knots", type=whole_number(1, 2**24), help="give up beyond so many knots per depth")


def _sampling(out: Parser) -> None:
    out.add_argument("--max-candidates", type=whole_number(1, 1024), default=12, help="K (default 12)")
    out.add_argument("--max-new-tokens", type=whole_number(1, 10**6), default=128, help="default 128")
    out.add_argument("--temperature", type=not_negative, default=1.0, help="0 is greedy (default 1)")
    out.add_argument("--top-k", type=whole_number(0, 10**9), default=50, help="0 keeps all tokens (default 50)")
    out.add_argument("--top-p", type=share, default=1.0, help="mass kept after top-k (default 1: all)")
    out.add_argument("--seed", type=seed, default=0, help="default 0")


def _pair(out: Parser, required: bool = True) -> None:
    models = "gguf:FILE.gguf, a model folder, a hub id, or tiny"
    out.add_argument("--target", metavar="T", required=required, help=f"bundled, {models}")
    out.add_argument(
        "--draft", metavar="D", required=required,
        help="made of the target: rtn:bits=4,group=64 (rounded), exit:layers=8 (its first layers), "
             f"lookup:ngram=3 (no model: what followed the same words before); or {models}",
    )  # fmt: skip
    out.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    out.add_argument("--device", default="cpu", help="such as cuda:0 (default cpu)")
    out.add_argument("--device-map", choices=("auto",), help="auto: layers spread over all devices there are")
    out.add_argument("--quantise", choices=("4bit", "8bit"), help="weights in so many bits (needs bitsandbytes)")
    for role in ("target", "draft"):
        out.add_argument(f"--{role}-revision", metavar="R", help="branch, tag or commit of a hub id (default main)")
    out.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the Python code that comes with a model; says whose on stderr and in the manifest",
    )  # fmt: skip


def _template(out: Parser) -> None:
    out.add_argument(
        "--template", choices=TEMPLATES, default="chat",
        help="chat: the tokenizer's own (default); llama2: [INST] .. [/INST]; alpaca, gsm8k, human-eval: "
             "SpecDec++'s wordings in [INST] .. [/INST]; plain: the text as it is",
    )  # fmt: skip


def _prompts(out: Parser, required: bool = True) -> None:
    out.add_argument(
        "--prompts", required=required, metavar="FILE",
        help="objects with prompt, messages, tokens, instruction (and input) or question, one a line or in one "
             "JSON array; or human-eval",
    )  # fmt: skip
    out.add_argument("--limit", type=whole_number(1, 10**9), help="use the first so many prompts")
    _template(out)


def _recorded(out: Parser) -> None:
    out.add_argument("trace", metavar="TRACE", help="trace folder, made by `specstop record` or `import`")
    out.add_argument(
        "--cost", metavar="COST",
        help="declared times: a draft step's time in target calls, or a JSON object like the problem file's "
             "`cost`, or a file that holds one; without it the trace's measured times",
    )  # fmt: skip
    out.add_argument("--level", type=fraction, default=0.95, help="of the intervals (default 0.95)")
