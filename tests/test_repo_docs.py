"""The pages of the site: their code runs, the tests they name exist, and what they generate covers the code."""

import ast
import re
from pathlib import Path

import pytest
from blocks import blocks, commands

from specstop.arguments import build_parser
from specstop.cli import main, spread_policies

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path for path in DOCS.rglob("*.md") if not {"_build", "notebooks"}.intersection(path.relative_to(DOCS).parts)
)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
RUN = [page for page in PAGES if any(block.language in ("sh", "{run}", "python") for block in blocks(page.read_text()))]
ELSEWHERE = ("gsm8k.jsonl", "test.json")
"""Files of other projects, which we do not have: commands that name one are parsed only."""


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs_in_order(page, recorded_folder, monkeypatch, run):
    monkeypatch.chdir(recorded_folder)
    namespace: dict = {}
    text = page.read_text()
    for block in blocks(text):
        if block.file:
            Path(block.file).write_text(block.text)
    for block in blocks(text):
        if block.language == "python" and not block.file:
            exec(compile(block.text, str(page), "exec"), namespace)
        elif block.language in ("sh", "{run}"):
            for command in commands(block.text):
                build_parser().parse_args(
                    spread_policies(command.argv)
                )  # exits, with its message, if it is out of date
                if command.long or set(ELSEWHERE).intersection(command.argv):
                    continue
                code, out, err = run(*command.argv)
                assert code == 0 and out and not err, (command.line, err)
                if command.target:
                    Path(command.target).write_text(out)


def test_the_pages_hold_commands_and_code():
    found = [command for page in RUN for block in blocks(page.read_text()) for command in commands(block.text)]
    assert len(found) >= 20 and any(command.long for command in found)
    verbs = {command.argv[0] for command in found}
    assert {"solve", "evaluate", "simulate", "record", "replay", "audit", "import", "validate", "sweep"} <= verbs


def inline_commands(text):
    """Commands in a running text, whole or as the name of a verb; those with an ellipsis are no commands."""
    fenced = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    for found in re.findall(r"`specstop ((?:[a-z-]+)[^`]*)`", fenced):
        if "..." not in found:
            yield found.split()


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_in_a_running_text_are_those_of_today(page):
    (verbs,) = [action.choices for action in build_parser()._actions if action.dest == "verb"]
    text = re.sub(r"^# ?", "", page.read_text(), flags=re.M) if page.suffix == ".py" else page.read_text()
    for argv in inline_commands(text):
        assert argv[0] in verbs
        if len(argv) > 1:
            build_parser().parse_args(spread_policies(argv))


def test_an_outdated_command_in_a_running_text_is_seen():
    (argv,) = inline_commands("use `specstop import rounds.jsonl --out trace`, or `specstop record ...`\n")
    with pytest.raises(ValueError, match="--format"):
        build_parser().parse_args(argv)


def test_every_verb_is_in_a_how_to_page_the_tutorial_or_the_theory():
    (verbs,) = [action.choices for action in build_parser()._actions if action.dest == "verb"]
    text = "\n".join(page.read_text() for page in PAGES)
    assert {verb for verb in verbs if f"specstop {verb}" not in text} == set()


def test_the_figures_that_a_page_names_are_those_there_are():
    from specstop.figures.make import RECIPES

    table = (DOCS / "guides" / "draw-the-figures.md").read_text().partition("| `--only` |")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1] if line else "")]
    assert sorted(named) == sorted(RECIPES)


def test_what_the_tutorial_sets_in_transformers_fixes_the_length(monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    from realmodels.pair import load_pair

    (row,) = re.findall(r"^\| transformers \|.*$", (DOCS / "tutorial.md").read_text(), flags=re.M)
    settings = dict(re.findall(r"(\w+) = ([\w.\"]+)", row))
    assert settings.pop("num_assistant_tokens") == "4"
    lengths, draw = [], AssistedCandidateGenerator.get_candidates

    def counted(self, input_ids, **more):
        drawn = draw(self, input_ids, **more)
        lengths.append(drawn[0].shape[1] - input_ids.shape[1])
        return drawn

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", counted)
    pair = load_pair("tiny", "tiny:1")

    def generate(**more):
        lengths.clear()
        pair.target.generate(torch.tensor([[5, 9, 3]]), assistant_model=pair.draft, max_new_tokens=40, do_sample=False,
                             pad_token_id=0, **more)  # fmt: skip
        return set(lengths[:-1])  # the last round may have room for fewer

    assert generate(num_assistant_tokens=4) != {4}  # what one would expect to work
    pair.draft.generation_config.num_assistant_tokens = 4
    for name, value in settings.items():
        setattr(pair.draft.generation_config, name, ast.literal_eval(value))
    assert generate() == {4}


NAMED = {
    name for page in PAGES for block in blocks(page.read_text()) if block.language == "{held-by}"
    for name in block.text.split()
}  # fmt: skip


def test_the_tests_that_a_page_names_exist():
    assert len(NAMED) >= 40
    for name in NAMED:
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


def test_every_fact_is_on_the_page_with_tests_that_hold_it():
    from mdp.theory import CLAIMS

    sections = re.split(r"^## ", (DOCS / "theory" / "facts.md").read_text(), flags=re.M)[1:]
    for fact in CLAIMS:
        (section,) = [text for text in sections if text.startswith(f"{fact}. ")]
        assert "**Condition.**" in section or fact in ("F4", "F6")
        assert "**Proof" in section and "{held-by}" in section, fact


def test_figures_of_the_gallery_in_the_text_are_those_of_the_gallery():
    from mdp.gallery import gallery

    text = (DOCS / "theory" / "false-claims.md").read_text()
    values = {case.name: str(case.value) for case in gallery()}
    told = re.findall(r"\{ref\}`([a-z_]+)\s+<[a-z_]+>`[^*{]*?\bloses (\d+/\d+)", text)
    assert len(told) >= 5 and all(values[name] == value for name, value in told)


def test_a_block_that_does_not_run_is_seen():
    page = "`a.json`:\n\n```json\n{}\n```\n\n```{run}\nspecstop solve \\\n  a.json > b.json  # here\n```\n"
    page += "\n```python\n1\n```\n"
    assert [(block.language, block.file) for block in blocks(page)] == [
        ("json", "a.json"), ("{run}", None), ("python", None),
    ]  # fmt: skip
    (command,) = [command for block in blocks(page) for command in commands(block.text)]
    assert (command.argv, command.target, command.long) == (["solve", "a.json"], "b.json", False)
    (record,) = commands("specstop record --target bundled --draft rtn --prompts p --out o\n")
    assert record.long and main(["solve", "there-is-no-such.json"]) == 2
