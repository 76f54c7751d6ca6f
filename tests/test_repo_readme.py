"""The README's code and commands run as they stand, in order, in one folder."""

import re
import shlex
from pathlib import Path

import pytest

from specstop.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAMES = {
    text: name for name, text in re.findall(r"^`([\w.]+)`:\n\n```json\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
}
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as `make demo` leaves it, with a tiny pair's trace in the place of the real one."""
    pytest.importorskip("torch")
    from realmodels.pair import load_pair
    from realmodels.record import record

    folder = tmp_path_factory.mktemp("readme")
    prompts = [[1 + r % 7, 2, 3 + r % 5] for r in range(16)]
    record(load_pair("tiny", "tiny:1"), prompts, folder / "out" / "trace", max_new_tokens=24, progress=False)
    return folder


def test_the_first_block_is_the_python_tour():
    assert BLOCKS[0][0] == "sh" and "make demo" in BLOCKS[0][1]
    first = next(text for language, text in BLOCKS if language == "python")
    for call in ("StoppingProblem(", "solve(", "evaluate(", "simulate(", "replay("):
        assert call in first


def test_blocks_and_commands_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    namespace: dict = {}
    commands = 0
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), namespace)
        elif language == "json":
            Path(NAMES[text]).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                # record and demo need the bundled model and minutes; .ci/run and the slow tests run them
                if line.startswith("specstop ") and not line.startswith(("specstop record", "specstop demo")):
                    command, _, target = line.partition("#")[0].partition(">")
                    capsys.readouterr()
                    assert main(shlex.split(command)[1:]) == 0, line
                    out, err = capsys.readouterr()
                    assert out and not err, line
                    if target.strip():
                        Path(target.strip()).write_text(out)
                    commands += 1
    assert commands >= 5
    assert namespace["solution"].status.name == "successful"


def test_the_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README):
        assert (ROOT / target).exists(), target
