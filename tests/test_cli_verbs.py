"""What each verb answers: the keys of the JSON contract, numbers that agree with each other, a table for people."""

import json
import math
import re
import shutil
from pathlib import Path

import chains
import numpy as np
import pytest

from mdp.policy import parse
from mdp.problem import load
from mdp.trace import save
from specstop.cli import main
from specstop.output import emit, json_line, jsonable, table

PROBLEM = Path(__file__).parent / "golden" / "problem.json"
FIXED = [f"fixed:{k}" for k in range(13)]
SOLVE_KEYS = {"status", "throughput", "speedup", "bounds", "survival_threshold", "block_efficiency",
              "verification_rate", "discard_rate", "mean_candidates", "seconds", "method"}  # fmt: skip
EVALUATE_KEYS = {"policy", "throughput", "speedup", "block_efficiency", "verification_rate", "discard_rate",
                 "mean_candidates", "gap"}  # fmt: skip
SIMULATE_KEYS = {"policy", "throughput", "throughput_se", "speedup", "block_efficiency", "verification_rate",
                 "discard_rate", "num_emitted", "num_drafted", "num_discarded", "num_cut",
                 "num_target_calls"}  # fmt: skip


def test_solve_answers_one_line_a_file_in_order(lines, tmp_path):
    dear = json.loads(PROBLEM.read_text())
    dear["cost"]["draft_time"] = 50
    (tmp_path / "dear.json").write_text(json.dumps(dear))
    first, second = lines("solve", PROBLEM, tmp_path / "dear.json")
    for answer in (first, second):
        assert set(answer) == SOLVE_KEYS and answer["status"] == "successful"
        lower, upper = answer["bounds"]
        assert lower <= answer["throughput"] <= upper and upper - lower <= 1e-6 * lower
        assert len(answer["survival_threshold"]) == 12 and {len(row) for row in answer["survival_threshold"]} == {2}
        assert math.isclose(answer["block_efficiency"] * answer["verification_rate"], 1)
    assert first["throughput"] > 2.4
    # Nothing is worth drafting: plain decoding, and null where no survival is enough.
    assert second["throughput"] == pytest.approx(1) and second["mean_candidates"] == 0
    assert second["survival_threshold"][0] == [None, None]


def test_solve_that_does_not_converge_prints_what_it_has_and_exits_3(lines, text):
    (answer,) = lines("solve", PROBLEM, "--tol", "1e-15", "--max-knots", "1", code=3)
    assert set(answer) == SOLVE_KEYS and answer["status"] == "max_steps_reached"
    assert answer["bounds"][0] <= answer["throughput"] <= answer["bounds"][1]
    assert "not converged: " in text("solve", PROBLEM, "--tol", "1e-15", "--max-knots", "1", code=3)
    assert len(lines("evaluate", PROBLEM, "--policy", "fixed:1", "--tol", "1e-15", "--max-knots", "1", code=3)) == 1


def test_solve_says_how_and_takes_another_way(lines, text, tmp_path):
    iid = json.loads(PROBLEM.read_text()) | {"acceptance": {"kind": "iid", "accept_prob": 0.8}}
    (tmp_path / "iid.json").write_text(json.dumps(iid))
    first, second = lines("solve", PROBLEM, tmp_path / "iid.json")
    assert (first["method"], second["method"]) == ("policy_iteration", "fixed_length")
    again = lines("solve", PROBLEM, tmp_path / "iid.json", "--method", "value_iteration")
    for ours, theirs in zip((first, second), again, strict=True):
        assert theirs["method"] == "value_iteration"
        assert ours["throughput"] == pytest.approx(theirs["throughput"], rel=1e-6)
    assert "fixed_length" in text("solve", tmp_path / "iid.json")


def test_solve_tells_the_time_until_so_many_tokens_are_out(lines, text):
    (answer,) = lines("solve", PROBLEM, "--num-tokens", "50")
    horizon = answer["horizon"]
    assert set(answer) == SOLVE_KEYS | {"horizon"} and horizon["num_tokens"] == 50
    assert horizon["bounds"][0] <= horizon["expected_time"] <= horizon["bounds"][1]
    assert horizon["throughput"] * horizon["expected_time"] == pytest.approx(50)
    assert answer["throughput"] * 0.95 < horizon["throughput"] < answer["throughput"]
    assert "horizon expected_time" in text("solve", PROBLEM, "--num-tokens", "50")
    (open_one,) = lines("solve", PROBLEM, "--num-tokens", "5", "--tol", "1e-15", "--max-knots", "1", code=3)
    assert open_one["horizon"]["status"] == "max_steps_reached"


def test_solve_gives_people_the_best_fixed_length_to_paste(lines, text, monkeypatch, tmp_path):
    (best,) = re.findall(r"to paste: (fixed:\d+), .* \((\S+), 15 % below the optimum\)", text("solve", PROBLEM))
    answers = {x["policy"]: x["throughput"] for x in lines("evaluate", PROBLEM, "--policy", *FIXED)}
    assert max(answers, key=answers.__getitem__) == best[0]
    assert answers[best[0]] == pytest.approx(float(best[1]), rel=1e-4)
    iid = json.loads(PROBLEM.read_text()) | {"acceptance": {"kind": "iid", "accept_prob": 0.8}}
    (tmp_path / "iid.json").write_text(json.dumps(iid))
    assert "to paste: fixed:4, the best fixed length (1.8676, as good as the optimum)" in text(
        "solve", tmp_path / "iid.json"
    )
    # where a stationary law for each length would take long, none is named
    kept = {"kind": "persistent", "rejection": [[1, 0], [0, 1]], "bonus": [[0.5, 0.5], [0.5, 0.5]]}
    (tmp_path / "kept.json").write_text(json.dumps(json.loads(PROBLEM.read_text()) | {"coupling": kept}))
    assert "to paste: fixed:" in text("solve", tmp_path / "kept.json")
    monkeypatch.setattr("specstop.verbs.MOST_WORK", 0)
    assert "to paste" not in text("solve", tmp_path / "kept.json")


def test_what_a_continuous_process_cannot_have_is_refused_before_any_work(capsys, tmp_path):
    beta = {"kind": "beta_mixture", "mean": 0.7, "concentration": 3.0}
    (tmp_path / "beta.json").write_text(json.dumps(json.loads(PROBLEM.read_text()) | {"acceptance": beta}))
    for option in (["--num-tokens", "5"], ["--method", "value_iteration"]):
        capsys.readouterr()
        assert main(["solve", str(PROBLEM), str(tmp_path / "beta.json"), *option]) == 2
        out, err = capsys.readouterr()
        assert out == "" and f"beta.json: {option[0]} needs a finite process, beta_mixture is continuous" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "acceptance",
    [{"kind": "beta_mixture", "mean": 0.8, "concentration": 5},
     {"kind": "logit_ar", "logit_mean": 1.5, "logit_deviation": 1, "correlation": 0.5}],
    ids=lambda acceptance: acceptance["kind"],
)  # fmt: skip
def test_continuous_processes_come_through_the_problem_file(lines, text, tmp_path, acceptance, monkeypatch):
    monkeypatch.setattr("mdp.enclosed.NODES", (127, 255))
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(json.loads(PROBLEM.read_text()) | {"acceptance": acceptance, "max_candidates": 3}))
    (answer,) = lines("solve", path, "--tol", "1e-3")
    assert set(answer) == SOLVE_KEYS and len(answer["survival_threshold"]) == 3
    lower, upper = answer["bounds"]
    assert lower <= answer["throughput"] <= upper <= lower * 1.001
    (rough,) = lines("solve", path, "--tol", "1e-15", "--max-knots", "1", code=3)
    assert rough["bounds"][0] <= upper and lower <= rough["bounds"][1]
    shown = text("solve", path, "--tol", "1e-3")
    assert ("(9 of " in shown) == (len(answer["survival_threshold"][0]) > 9)
    (fixed,) = lines("evaluate", path, "--policy", "fixed:2", "--tol", "1e-3")
    assert set(fixed) == EVALUATE_KEYS and fixed["gap"][1] >= -1e-9
    found = lines("simulate", path, "--policy", "fixed:2", "lookahead:0.4", "--rounds", "2000", "--seed", "1")[0]
    assert abs(found["policies"][0]["throughput"] - fixed["throughput"]) <= 5 * found["policies"][0]["throughput_se"]


def test_evaluate_answers_one_line_a_policy_as_typed(lines, tmp_path):
    (solution,) = lines("solve", PROBLEM)
    saved = tmp_path / "solution.json"
    saved.write_text(json.dumps(solution))
    typed = ["optimal", "fixed:04", "rejection:0.40", f"optimal:{saved}", "fixed:0", "oracle"]
    answers = lines("evaluate", PROBLEM, "--policy", *typed)
    assert [answer["policy"] for answer in answers] == typed
    assert all(set(answer) == EVALUATE_KEYS for answer in answers)
    best, fixed, _, again, plain, oracle = answers
    assert best["throughput"] == pytest.approx(solution["throughput"], rel=1e-9)
    assert again["throughput"] == best["throughput"]
    assert max(map(abs, best["gap"])) < 1e-6 and fixed["gap"][0] > 0.1
    assert plain["throughput"] == pytest.approx(1 / load(PROBLEM).cost.verify_times(12)[0])
    assert oracle["gap"][1] < 0  # not clipped: the oracle beats every policy


def test_policies_may_be_listed_repeated_and_stand_before_the_problem(lines):
    listed = lines("evaluate", PROBLEM, "--policy", "fixed:2", "rejection:0.4")
    assert lines("evaluate", PROBLEM, "--policy", "fixed:2", "--policy", "rejection:0.4") == listed
    assert lines("evaluate", "--policy", "fixed:2", "rejection:0.4", PROBLEM) == listed
    assert lines("evaluate", "--policy=fixed:2", PROBLEM, "--policy", "rejection:0.4") == listed


def test_simulate_agrees_with_evaluate(lines):
    typed = ["optimal", "fixed:4", "rejection:0.4"]
    (answer,) = lines("simulate", PROBLEM, "--policy", *typed, "--rounds", 20_000, "--seed", 7)
    assert set(answer) == {"rounds", "seed", "policies", "differences"}
    assert (answer["rounds"], answer["seed"]) == (20_000, 7)
    assert [entry["policy"] for entry in answer["policies"]] == typed
    exact = lines("evaluate", PROBLEM, "--policy", *typed)
    for entry, truth in zip(answer["policies"], exact, strict=True):
        assert set(entry) == SIMULATE_KEYS
        assert abs(entry["throughput"] - truth["throughput"]) < 5 * entry["throughput_se"]
        assert entry["num_target_calls"] == 20_000
        spent = entry["num_drafted"] + entry["num_target_calls"]
        assert spent == entry["num_emitted"] + entry["num_discarded"] + entry["num_cut"]
    for difference, entry in zip(answer["differences"], answer["policies"][1:], strict=True):
        assert set(difference) == {"policy", "baseline", "throughput_difference", "se"}
        assert (difference["policy"], difference["baseline"]) == (entry["policy"], "optimal")
        gain = entry["throughput"] - answer["policies"][0]["throughput"]
        assert difference["throughput_difference"] == pytest.approx(gain)


def test_the_seed_decides_the_coins_and_its_high_bits_count(lines):
    def play(seed):
        return lines("simulate", PROBLEM, "--policy", "fixed:4", "--rounds", 500, "--seed", seed)[0]["policies"]

    assert play(3) == play(3)
    assert play(0) != play(2**32)
    assert play(2**63 - 1) != play(2**31 - 1)


def test_one_round_has_no_standard_error_and_says_null(lines):
    (answer,) = lines("simulate", PROBLEM, "--policy", "fixed:4", "--rounds", "1")
    assert answer["policies"][0]["throughput_se"] is None


def test_record_says_what_it_wrote(lines, trace, tmp_path):
    prompts = trace.parent / "prompts.jsonl"
    (answer,) = lines("record", "--target", "tiny", "--draft", "tiny:1", "--prompts", prompts, "--limit", 3, "--out",
                      tmp_path / "new", "--max-new-tokens", 8, "--max-candidates", 4, "--no-tokens")  # fmt: skip
    assert answer["num_requests"] == 3 and 3 <= answer["num_positions"] <= 24
    assert answer["draft_time"] > 0 and len(answer["verify_time"]) == 5
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_replay_scores_all_policies_on_the_same_requests(lines, trace):
    typed = ["fixed:3", "rejection:0.5", "lookahead:0.5,signal=entropy", "optimal", "oracle"]
    (answer,) = lines("replay", trace, "--policy", *typed, "--cost", "0.22", "--level", "0.9")
    assert [entry["policy"] for entry in answer["policies"]] == typed
    assert answer["cost_origin"] == "declared" and answer["draft_time"] == 0.22 and answer["verify_time"] == [1.0] * 7
    assert answer["num_requests"] == 6 and answer["level"] == 0.9
    for entry in answer["policies"]:
        low, high = entry["throughput_interval"]
        assert low < entry["throughput"] < high and set(entry) >= SIMULATE_KEYS
        spent = entry["num_drafted"] + entry["num_target_calls"]
        assert spent == entry["num_emitted"] + entry["num_discarded"] + entry["num_cut"]
    emitted = {entry["num_emitted"] for entry in answer["policies"]}
    assert len(emitted) == 1  # one text, whatever the policy


def test_replay_takes_times_as_measured_or_as_an_object_or_a_file(lines, trace, tmp_path):
    (measured,) = lines("replay", trace, "--policy", "fixed:3")
    assert measured["cost_origin"] == "measured" and measured["num_requests"] == 12
    cost = {"kind": "table", "draft_time": 0.1, "verify_time": [1, 1, 1, 1, 2, 2, 2]}
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    (given,) = lines("replay", trace, "--policy", "fixed:3", "--cost", json.dumps(cost))
    (read,) = lines("replay", trace, "--policy", "fixed:3", "--cost", tmp_path / "cost.json")
    assert given == read and given["verify_time"] == cost["verify_time"] and given["cost_origin"] == "declared"


def test_a_table_of_the_wrong_length_is_named_as_it_was_typed(capsys, trace, tmp_path):
    cost = json.dumps({"kind": "table", "draft_time": 0.1, "verify_time": [1, 1]})
    (tmp_path / "cost.json").write_text(cost)
    for typed, name in ((cost, "--cost"), (tmp_path / "cost.json", tmp_path / "cost.json")):
        capsys.readouterr()
        assert main(["replay", str(trace), "--policy", "fixed:3", "--cost", str(typed)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"specstop: error: {name}: cost.verify_time: must have max_candidates + 1 = 7 entries")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "not a trace"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not a trace manifest"),
        (lambda folder: (folder / "shard-00000.safetensors").unlink(), "shard-00000.safetensors: shard is missing"),
        (lambda folder: (folder / "shard-00000.safetensors").write_bytes(b"0"), "shard-00000.safetensors: shard is d"),
    ],
)
def test_a_damaged_trace_is_refused_in_one_line(capsys, trace, tmp_path, damage, message):
    folder = tmp_path / "trace"
    shutil.copytree(trace, folder)
    damage(folder)
    capsys.readouterr()
    assert main(["replay", str(folder), "--policy", "fixed:3", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("policy", ["fixed:7", "rejection:0.5,signal=head", "optimal:none.json"])
def test_a_policy_that_a_trace_cannot_hold_is_refused(capsys, trace, policy):
    capsys.readouterr()
    assert main(["replay", str(trace), "--policy", "fixed:1", policy]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and policy.removeprefix("optimal:") in err


def test_demo_says_what_it_found(text, lines, monkeypatch, tmp_path):
    monkeypatch.setattr("specstop.demo.run", lambda out, quick: {"out": str(out), "quick": quick})
    monkeypatch.setattr("specstop.report.headline", lambda summary, out: f"see {out}")
    assert text("demo", "--out", tmp_path).strip() == f"see {tmp_path}"
    assert lines("demo", "--out", tmp_path, "--quick") == [{"out": str(tmp_path), "quick": True}]


def test_schema_and_policies_list_what_can_be_typed(lines, text):
    (schema,) = lines("schema")
    assert schema["acceptance"]["iid"] == ["accept_prob"] and schema["max_candidates"] == [1, 1024]
    slope = schema["keys"]["cost"]["affine"]["verify_slope"]
    assert (slope["unit"], slope["low"], slope["default"], slope["required"]) == ("time", 0, 0, False)
    rows = [re.split(r"  +", line) for line in text("schema").splitlines()]
    assert ["cost", "affine", "verify_slope", "number", "time", ">= 0", "0", "what each candidate adds to V"] in rows
    assert ["cost", "overlapped", "overlap", "number", "-", "0..1", "1"] in [row[:7] for row in rows]
    assert ["cost", "table", "verify_time", "[K+1]", "time", "> 0", "none"] in [row[:7] for row in rows]
    assert all(len(row) == 8 for row in rows[: rows.index([""])])
    rules = lines("policies")
    assert {"fixed", "rejection", "lookahead", "optimal", "oracle"} <= {rule["name"] for rule in rules}
    assert all(rule["usage"] and rule["does"] for rule in rules)
    assert "markov_modulated" in text("schema") and "rejection:h" in text("policies")


def test_every_way_of_writing_a_rule_that_is_listed_can_be_typed(lines, tmp_path):
    table = tmp_path / "solution.json"
    table.write_text(json.dumps(lines("solve", PROBLEM)[0]))
    written = []
    for rule in lines("policies"):
        for usage in rule["usage"].split(" or "):
            head, bracket, option = usage.replace(":K", ":3").replace(":h", ":0.4").partition("[")
            for text in (head, head + option.removesuffix("]")) if bracket else (head,):
                written.append(text.replace("FILE", str(table)).replace("NAME", "entropy"))
    assert {"fixed:3", "rejection:0.4,signal=entropy", "optimal", "optimal:signal=entropy"} <= set(written)
    for text in written:
        assert parse(text).text == text


def test_people_get_tables(text, trace):
    solved = text("solve", PROBLEM)
    assert str(PROBLEM) in solved and "throughput" in solved and "regime 1" in solved
    evaluated = text("evaluate", PROBLEM, "--policy", "optimal", "fixed:4")
    assert [line.split()[0] for line in evaluated.splitlines()] == ["policy", "optimal", "fixed:4"]
    assert "throughput_se" in text("simulate", PROBLEM, "--policy", "fixed:4", "fixed:2", "--rounds", "100")
    replayed = text("replay", trace, "--policy", "rejection:0.5", "fixed:2", "--cost", "0.2")
    assert "token_accept_prob" in replayed and "declared" in replayed  # a perfect head is named as one


def test_a_line_of_json_holds_no_nan_and_any_array():
    value = {"a": np.float64("nan"), "b": [math.inf, 1], "c": np.arange(3), "d": (np.int64(2), "x", None, True)}
    assert json_line(value) == '{"a": null, "b": [null, 1], "c": [0, 1, 2], "d": [2, "x", null, true]}'
    assert jsonable(np.array([[np.nan, 0.5]])) == [[None, 0.5]]


def test_a_table_lines_up():
    rows = [{"policy": "fixed:4", "x": 1.0, "y": None}, {"policy": "a", "x": 12.5, "y": [0.1, None]}]
    assert table(rows).splitlines() == ["policy      x         y", "fixed:4     1         -", "a        12.5  [0.1, -]"]


def test_text_that_the_terminal_cannot_show_is_no_error(capsys):
    emit("file \udcff.json")
    assert capsys.readouterr().out == "file \\udcff.json\n"


def test_audit_prints_the_headline_the_ladder_and_the_setting(lines, text, tmp_path):
    trace = tmp_path / "trace"
    save(chains.record(chains.random_pair(3, size=3), 0, num_requests=80, limit=16, depth=4), trace)
    (answer,) = lines("audit", trace, "--policy", "rejection:0.9,signal=entropy", "--cost", "0.2")
    assert {"headline", "left", "between", "ceiling", "modelled", "deployed", "ladder", "setting"} <= set(answer)
    low, high = answer["between"]
    assert 0 <= low <= answer["left"] <= high < 1
    assert answer["headline"] == f"{100 * answer['left']:.1f} % left, between {100 * low:.1f} and {100 * high:.1f}"
    assert [rung["information"] for rung in answer["ladder"]][::7] == ["nothing", "clairvoyant"]
    parse(answer["setting"]["policy"])
    shown = text("audit", trace, "--policy", "rejection:0.9,signal=entropy", "--cost", "0.2")
    assert shown.startswith(answer["headline"]) and answer["setting"]["policy"] in shown


def test_audit_of_a_recorded_pair_has_its_ladder_in_order(lines, trace):
    (answer,) = lines("audit", trace, "--policy", "fixed:2", "--cost", "0.2", "--level", "0.99")
    steps = [rung["step"] for rung in answer["ladder"] if rung["step"] is not None]
    assert len(steps) == 6 and all(step["interval"][1] >= 0 for step in steps)
    ceiling, clairvoyant = answer["ladder"][-2:]
    assert all(rung["left"]["value"] < ceiling["left"]["value"] for rung in answer["ladder"][:4])
    assert ceiling["left"]["value"] < clairvoyant["left"]["value"]


def test_import_writes_a_trace_that_validate_and_replay_read(lines, text, tmp_path):
    file, out = tmp_path / "bench.jsonl", tmp_path / "imported"
    file.write_text('{"id": 1, "acc_ngram": {"acc_len": [3, 1, 2, 1]}}\n{"id": 2, "acc_ngram": {"acc_len": [1, 2]}}\n')
    (answer,) = lines("import", file, "--format", "specdecode-bench", "--out", out)
    assert answer["num_requests"] == 2 and answer["num_positions"] == 6 and answer["rollouts"] is False
    (replayed,) = lines("replay", out, "--policy", "fixed:2", "oracle", "--cost", "0.2")
    assert replayed["num_requests"] == 2
    kinds = [row["kind"] for row in lines("validate", out, file, PROBLEM)]
    assert kinds == ["trace", "specdecode-bench", "problem"]
    assert "specdecode-bench" in text("validate", file)
    rounds = tmp_path / "rounds.jsonl"
    rounds.write_text('{"drafted": [2, 4], "accepted": [2, 1]}\n{"drafted": [1], "accepted": [0]}\n')
    (answer,) = lines("import", rounds, "--format", "rounds", "--out", tmp_path / "rounds")
    assert answer["acceptance"]["unidentified"] == [3, 4] and answer["acceptance"]["accept_prob"][2] is None
    assert "acceptance by depth" in text("import", rounds, "--format", "rounds", "--out", tmp_path / "again")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["import", "bad.jsonl", "--format", "specdecode-bench", "--out", "new"], "bad.jsonl: line 1: not JSON"),
        (["import", "none.jsonl", "--format", "rounds", "--out", "new"], "none.jsonl: No such file"),
        (["import", "bad.jsonl", "--format", "csv", "--out", "new"], "--format: must be one of"),
        (["import", "bad.jsonl", "--format", "rounds", "--drafter", "x", "--out", "new"], "--drafter: must be one of"),
        (["import", "bad.jsonl", "--format", "rounds", "--out", "trace"], "--out: trace holds a trace already"),
        (["validate", "trace", "bad.jsonl"], "bad.jsonl: not JSON"),
        (["validate", "."], "not a trace (no manifest.json)"),
        (["audit", "trace", "--policy", "oracle", "--cost", "1"], "policy 'oracle' foresees"),
        (["audit", "trace", "--policy", "fixed:1"], "holds no measured times; declare a cost"),
        (["audit", "trace", "--policy", "fixed:1", "--cost", "x"], "--cost: neither a number"),
    ],
)
def test_what_cannot_be_imported_validated_or_audited_is_one_line(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{]\n")
    save(chains.record(chains.random_pair(3, size=3), 0, num_requests=8, limit=8, depth=3), tmp_path / "trace")
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and message in err
