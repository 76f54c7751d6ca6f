"""The code blocks of a Markdown page, so that the site's build and the tests run the same ones.

A block is run as it stands: `json` (and `jsonl`, `python` where a file is named) is written to the file that the line
above names (`` `problem.json`: ``), other `python` is executed, and each line of `sh` or `{run}` that starts with
`specstop` is a command. Commands that need the bundled model and minutes are parsed only.
"""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Block", "Command", "blocks", "commands"]

FENCE = re.compile(r"(?:^`(?P<file>[\w./-]+)`:\n\n)?^```(?P<language>\{?[\w-]+\}?)\n(?P<text>.*?)^```$", re.M | re.S)
LONG = ("merge", "record", "demo", "figures", "decode", "train-head", "study")
"""Verbs that load models or take minutes, unless the pair or the trace is a tiny one; `validate --out` always does."""


class Block(NamedTuple):
    """A fenced block: its language, its text and the file that it is the content of, if any."""

    language: str
    text: str
    file: str | None


class Command(NamedTuple):
    """One `specstop` command: its line, its arguments, the file its output goes to, and whether it is long."""

    line: str
    argv: list[str]
    target: str | None
    long: bool


def blocks(page: str) -> Iterator[Block]:
    """All blocks of a page, in order."""
    for found in FENCE.finditer(page):
        yield Block(found["language"], found["text"], found["file"])


def commands(text: str) -> Iterator[Command]:
    """The `specstop` commands among these lines; a backslash joins a line with the next one."""
    for line in text.replace("\\\n", " ").splitlines():
        line = " ".join(line.split())
        if line.startswith("specstop "):
            command, _, target = line.partition(" #")[0].partition(" > ")
            argv = shlex.split(command)[1:]
            tiny = "--quick" in argv if argv[0] == "study" else any(word.startswith("tiny") for word in argv)
            report = argv[0] == "validate" and "--out" in argv
            yield Command(line, argv, target.strip() or None, report or (argv[0] in LONG and not tiny))
