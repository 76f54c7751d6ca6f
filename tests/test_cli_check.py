"""`specstop check`: facts of a file, the gallery, the search."""

import json
from pathlib import Path

import pytest

from mdp.gallery import gallery
from specstop.cli import main

PROBLEM = Path(__file__).parent / "golden" / "problem.json"
IDS = [f"F{number}" for number in range(1, 9)]


def test_one_line_a_file_with_the_facts_in_order(run):
    code, out, err = run("check", PROBLEM, gallery()[0].path, "--json")
    assert (code, err) == (0, "")
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert [fact["id"] for fact in line["facts"]] == IDS
        for fact in line["facts"]:
            assert fact.keys() == {"id", "status", "numbers", "why"}
            assert fact["status"] in ("holds", "fails", "not applicable")
            assert fact["why"] and "\n" not in fact["why"]
    assert lines[1]["facts"][1]["numbers"]["loss"] == pytest.approx(2 / 301, abs=1e-12)


def test_a_table_for_people(run):
    code, out, _ = run("check", PROBLEM)
    assert code == 0
    for fact in IDS:
        assert f"\n{fact} " in out
    assert "the next acceptance varies" in out


def test_the_gallery_prints_what_is_broken(run):
    code, out, _ = run("check", "--gallery", "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["name"] for line in lines] == [entry.name for entry in gallery()]
    for line in lines:
        assert line["found"] == pytest.approx(line["expected"], abs=1e-9)
        assert Path(line["file"]).is_file()
    code, out, _ = run("check", "--gallery")
    assert "two_regimes: F2 fails, loss 2/301 = 0.00664452" in out


def test_the_search_says_what_it_found_and_finds_it_again(run):
    argv = ("check", "--search", "--family", "fixed", "threshold", "--regimes", "2", "--steps", "40", "--seed", "3",
            "--max-candidates", "4", "--json")  # fmt: skip
    code, out, _ = run(*argv)
    assert code == 0
    first = [json.loads(line) for line in out.splitlines()]
    assert [line["family"] for line in first] == ["fixed", "threshold"]
    for line in first:
        low, high = line["certificate"]
        assert low - 1e-9 <= line["loss"] <= high + 1e-9
        assert line["simple_loss"] >= 0.9 * line["loss"]
    assert run(*argv)[1] == out
    code, out, _ = run(*argv[:-1])
    assert code == 0 and "a simple case loses" in out


@pytest.mark.parametrize(
    ("argv", "part"),
    [((), "give problem files"), (("--gallery", "--search"), "give problem files"),
     ((str(PROBLEM), "--gallery"), "give problem files"), (("none.json",), "none.json: No such file"),
     (("--search", "--family", "best"), "--family: must be among"), (("--search", "--steps", "0"), "--steps"),
     (("--search", "--regimes", "9"), "--regimes")],
)  # fmt: skip
def test_bad_input_is_one_line(run, argv, part):
    code, out, err = run("check", *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and part in err


def test_hidden_regimes_are_checked_and_nothing_is_printed_before_all_are(tmp_path, capsys):
    problem = json.loads((Path(__file__).parent / "golden" / "problem.json").read_text())
    hidden = problem | {
        "acceptance": problem["acceptance"] | {"kind": "observed", "observation": [[0.9, 0.1], [0.2, 0.8]]}
    }
    hidden.pop("coupling", None)
    hidden["max_candidates"] = 4
    (tmp_path / "hidden.json").write_text(json.dumps(hidden))
    assert main(["check", "--json", str(tmp_path / "hidden.json")]) == 0
    (fact,) = [fact for fact in json.loads(capsys.readouterr().out)["facts"] if fact["status"] != "not applicable"]
    assert fact["id"] == "F8" and fact["status"] == "holds"
