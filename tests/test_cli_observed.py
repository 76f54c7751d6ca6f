"""Hidden regimes as files and on the command line: round trips, refusals, the saved rule."""

import json

import numpy as np
import pytest

from mdp.policy import BeliefRule, load_table, parse
from mdp.problem import loads, schema
from mdp.solve import solve
from specstop.cli import main

FILE = {
    "acceptance": {"kind": "observed", "transition": [[0.9, 0.1], [0.3, 0.7]], "accept_prob": [0.95, 0.4],
                   "initial": [0.8, 0.2], "observation": [[0.8, 0.2], [0.3, 0.7]]},
    "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0},
    "max_candidates": 6,
}  # fmt: skip


def changed(**fields):
    return {**FILE, "acceptance": {**FILE["acceptance"], **fields}}


def test_problem_files_go_round():
    problem = loads(json.dumps(FILE))
    again = loads(json.dumps(problem.to_dict()))
    assert again.to_dict() == problem.to_dict() and again.acceptance.num_symbols == 2
    assert schema()["acceptance"]["observed"] == ["transition", "accept_prob", "initial", "observation"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(observation=[[0.8, 0.2]]), r"acceptance\.observation: must have 2 rows \(regimes\), got 1"),
        (changed(observation=[[0.8, 0.1], [0.3, 0.7]]), r"acceptance\.observation: row 0 must sum to 1 .*sums to 0\.9"),
        (changed(observation=[[1.2, -0.2], [0.3, 0.7]]), r"acceptance\.observation: must lie in \[0, 1\], got 1\.2"),
        (changed(observation=[[1.0], [0.5, 0.5]]), r"acceptance\.observation: must be a list of equally long lists"),
        (changed(observation=[[True], [True]]), r"acceptance\.observation: must be a list"),
        (changed(transition=[[1.0]]), r"acceptance\.transition: must be 2 x 2, got 1 x 1"),
        (changed(channel=[[1.0], [1.0]]), r"acceptance\.channel: unknown key"),
        ({**FILE, "coupling": {"kind": "persistent", "rejection": [[1, 0], [0, 1]], "bonus": [[1, 0], [0, 1]]}},
         r"coupling\.kind: persistent is not for observed: .*POMDP on round-start beliefs"),
        (changed(accept_prob=[0.5] * 33, transition=np.eye(33).tolist(), initial=[1.0] + [0.0] * 32,
                 observation=[[1.0]] * 33), r"acceptance\.accept_prob: at most 32 hidden regimes, got 33"),
        (changed(observation=[[1.0] + [0.0] * 256] * 2), r"acceptance\.observation: at most 256 symbols, got 257"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        loads(json.dumps(data))
    assert "\n" not in str(caught.value)


def test_regimes_cannot_be_had_by_another_way():
    problem = loads(json.dumps(FILE))
    for show in (problem.lower, lambda: problem.bracket(255)):
        with pytest.raises(ValueError, match="hides its regimes"):
            show()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problem.json").write_text(json.dumps(FILE))
    return tmp_path


def command(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line_solves_evaluates_and_simulates(folder, capsys):
    code, out, err = command(capsys, "solve", "problem.json", "--json")
    assert (code, err) == (0, "")
    (folder / "solution.json").write_text(out)
    solution = json.loads(out)
    assert solution["survival_threshold"] is None and solution["status"] == "successful"
    code, out, _ = command(capsys, "solve", "problem.json")
    assert code == 0 and "regimes are hidden" in out and "belief_rule" not in out
    policies = ("optimal", "optimal:solution.json", "fixed:3", "oracle", "rejection:0.4")
    code, out, _ = command(capsys, "evaluate", "problem.json", "--json", "--policy", *policies)
    exact = {row["policy"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0 and exact["optimal"]["throughput"] == pytest.approx(solution["throughput"], rel=1e-9)
    assert exact["optimal:solution.json"]["throughput"] == exact["optimal"]["throughput"]
    arguments = ("simulate", "problem.json", "--json", "--rounds", "20000", "--seed", "1", "--policy", *policies)
    code, out, err = command(capsys, *arguments)
    assert (code, err) == (0, "")
    for row in json.loads(out)["policies"]:
        off = row["throughput"] - exact[row["policy"]]["throughput"]
        assert abs(off) < 5 * row["throughput_se"], row["policy"]


def test_a_limit_exits_with_3(folder, capsys):
    (folder / "long.json").write_text(json.dumps({**changed(accept_prob=[0.99, 0.7]), "max_candidates": 24}))
    code, out, err = command(capsys, "solve", "long.json", "--max-knots", "2", "--json")
    assert code == 3 and err == "" and json.loads(out)["status"] == "max_steps_reached"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rule: rule.pop("price"), "not a saved solution"),
        (lambda rule: rule.update(initial=[0.5]), "do not fit together"),
        (lambda rule: rule.update(price=[[[None]]]), "do not fit together"),
        (lambda rule: rule["initial"].__setitem__(0, -1.0), "must be finite and >= 0"),
        (lambda rule: rule["initial"].__setitem__(0, float("nan")), "must be finite and >= 0"),
        (lambda rule: rule["emitted"].__setitem__(0, "x"), "not a saved solution"),
    ],
)
def test_a_spoilt_rule_is_refused(tmp_path, spoil, message):
    saved = solve(loads(json.dumps(FILE))).to_dict()
    path = tmp_path / "solution.json"
    path.write_text(json.dumps(saved))
    rule = parse(f"optimal:{path}").policy
    assert isinstance(rule, BeliefRule)
    for name, value in saved["belief_rule"].items():
        np.testing.assert_array_equal(getattr(rule, name), value)
    spoil(saved["belief_rule"])
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message) as caught:
        load_table(path)
    assert "\n" not in str(caught.value)
