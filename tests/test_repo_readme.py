"""The README's code and commands run as they stand, in order, in one folder."""

import json
import re
from pathlib import Path

from blocks import blocks, commands

from specstop.arguments import build_parser
from specstop.cli import spread_policies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ELSEWHERE = {("check", "--gallery"): "test_the_gallery_prints_what_is_broken"}
"""Commands that test_cli_check.py runs as they stand."""


def test_the_first_block_is_the_python_tour():
    found = list(blocks(README))
    assert found[0].language == "sh" and "make demo" in found[0].text
    first = next(block.text for block in found if block.language == "python")
    for call in ("StoppingProblem(", "solve(", "evaluate(", "simulate(", "replay("):
        assert call in first


def test_blocks_and_commands_run(recorded_folder, monkeypatch, run):
    monkeypatch.chdir(recorded_folder)
    namespace: dict = {}
    count = 0
    for block in blocks(README):
        if block.file:
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, "README.md", "exec"), namespace)
        elif block.language == "sh":
            for command in commands(block.text):
                build_parser().parse_args(spread_policies(command.argv))
                # what needs the bundled model and minutes is run by .ci/run and the slow tests
                if (command.long and command.argv[0] != "study") or tuple(command.argv) in ELSEWHERE:
                    continue
                code, out, err = run(*command.argv)
                assert code == 0 and out and not err, command.line
                if command.target:
                    Path(command.target).write_text(out)
                count += 1
    assert count >= 5
    assert namespace["solution"].status.name == "successful"


def test_the_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_is_left_out_here_is_run_elsewhere():
    tests = (ROOT / "tests" / "test_cli_check.py").read_text()
    for command, name in ELSEWHERE.items():
        body = tests.partition(f"def {name}(")[2].partition("\ndef ")[0]
        assert f"run({', '.join(map(json.dumps, command))})" in body
