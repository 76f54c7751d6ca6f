"""The demo at small size: the files it promises, nothing tuned on what it is scored on, a second run that reuses."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from mdp.fit import split_requests
from mdp.policy import parse
from mdp.problem import load as load_problem
from mdp.trace import load
from simulate.replay import replay
from specstop import demo
from specstop.cli import main
from specstop.outcome import COST_RATIO, QUICK, REGIMES

KEYS = ("synthetic", "replay", "pair", "cost", "seconds", "versions")
COST = demo.Affine(draft_time=COST_RATIO, verify_time=1.0)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def summary(out):
    return json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)


def test_summary_keeps_the_contract(summary):
    assert not [key for key in KEYS if key not in summary]
    simulated, replayed = summary["synthetic"], summary["replay"]
    assert simulated["rounds"] == QUICK.rounds and simulated["policies"] and simulated["differences"]
    assert {"num_requests", "level", "draft_time", "verify_time", "cost_origin"} <= set(replayed)
    assert set(summary["cost"]) == {"declared", "measured"}
    assert (replayed["cost_origin"], replayed["draft_time"]) == ("declared", COST_RATIO)
    assert summary["replay_measured"]["cost_origin"] == "measured"
    assert summary["replay_measured"]["draft_time"] == summary["cost"]["measured"]["draft_time"]
    assert all(len(entry["throughput_interval"]) == 2 for entry in replayed["policies"])


def test_the_same_policies_on_both_worlds(summary):
    synthetic = {entry["policy"] for entry in summary["synthetic"]["policies"]}
    assert {f"fixed:{k}" for k in range(13)} | {"optimal", "oracle"} <= synthetic
    kinds = {(entry["policy"].partition(":")[0], entry["signal"]) for entry in summary["replay"]["policies"]}
    signals = ("entropy", "draft_prob", "token_accept_prob")
    assert {(rule, s) for rule in ("rejection", "lookahead", "optimal") for s in signals} <= kinds
    assert {("fixed", None), ("oracle", None)} <= kinds
    for entry in summary["synthetic"]["policies"] + summary["replay"]["policies"]:
        parse(entry["policy"])
        left = entry["num_drafted"] + entry["num_target_calls"]
        assert left == entry["num_emitted"] + entry["num_discarded"] + entry["num_cut"]


def test_simulation_agrees_with_the_exact_values(summary):
    exact = {entry["policy"]: entry["throughput"] for entry in summary["predicted"]}
    for entry in summary["synthetic"]["policies"]:
        assert abs(entry["throughput"] - exact[entry["policy"]]) <= 5 * entry["throughput_se"] + 1e-12
    low, high = summary["solution"]["bounds"]
    assert low <= summary["solution"]["throughput"] <= high
    assert max(value for policy, value in exact.items() if policy != "oracle") <= high


def test_replay_equals_the_live_run(summary):
    assert len(summary["live"]) == 2
    assert all(entry["equal"] and entry["num_rounds"] > 10 for entry in summary["live"])


def test_report_can_be_read_alone(out, summary):
    report = (out / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", report)
    assert len(pictures) == 5
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for words in ("**declared**", "**measured**", "training half", "few", "ceiling", "bracket", "How to go on"):
        assert words in report
    assert all(f"`{entry['policy']}`" in report for entry in summary["replay"]["policies"])
    assert "nan" not in report and "None" not in report and "-0.00 " not in report and "-0.000" not in report


def test_problem_file_is_the_problem(out):
    assert load_problem(out / "problem.json").to_dict() == demo.synthetic_problem().to_dict()
    assert len(REGIMES) == demo.synthetic_problem().lower().num_regimes


def test_replay_of_the_trace_gives_the_same_numbers(out, summary):
    names = [entry["policy"] for entry in summary["replay"]["policies"]]
    assert replay(load(out / "trace"), names, cost=COST).to_dict() == summary["replay"]


def test_nothing_is_chosen_on_the_half_that_is_scored(out, summary):
    trace = load(out / "trace")
    _, test = split_requests(trace)
    scored = np.repeat(np.isin(np.arange(trace.num_requests), test), np.diff(trace.offsets))
    steps = np.repeat(scored, np.diff(trace.rollout_offsets))
    rng = np.random.default_rng(0)

    def spoil(features, mask):
        return {key: np.where(mask, rng.random(len(mask)).astype(values.dtype), values)
                for key, values in features.items()}  # fmt: skip

    spoilt = replace(
        trace,
        accepted=np.where(scored, False, trace.accepted),
        features=spoil(trace.features, scored),
        rollout_features=spoil(trace.rollout_features, steps),
    )
    chosen = [entry["policy"] for entry in summary["replay"]["policies"]]
    assert demo.choose(trace, COST) == chosen
    assert demo.choose(spoilt, COST) == chosen


def test_a_second_run_uses_the_trace_again(out, monkeypatch, capsys):
    from realmodels import record as recording

    original = recording.record

    def only_greedy(*args, temperature, **options):
        assert temperature == 0.0, "the trace was there"
        return original(*args, temperature=temperature, **options)

    monkeypatch.setattr(recording, "record", only_greedy)
    before = (out / "trace" / "manifest.json").read_bytes()
    assert main(["demo", "--quick", "--out", str(out), "--json"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == "" and json.loads(stdout)["pair"]["reused"] is True
    assert (out / "trace" / "manifest.json").read_bytes() == before
    assert "was used again" in (out / "report.md").read_text()


def test_a_trace_of_other_settings_is_not_touched(out, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK", replace(QUICK, seed=1))
    before = sorted(path.name for path in out.rglob("*"))
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and "other settings" in stderr
    assert sorted(path.name for path in out.rglob("*")) == before


def test_a_trace_of_before_top_p_was_a_setting_is_used_again(out, monkeypatch):
    from types import SimpleNamespace

    from mdp.trace import load
    from specstop import demo

    manifest = load(out / "trace").manifest
    kept = {name: value for name, value in manifest["sampling"].items() if name != "top_p"}

    def check(sampling):
        monkeypatch.setattr(demo, "load", lambda folder: SimpleNamespace(manifest=manifest | {"sampling": sampling}))
        demo._check_ready(demo.QUICK, out / "trace")

    check(kept)
    check(kept | {"top_p": 1.0})
    with pytest.raises(ValueError, match="trace of other settings"):
        check(kept | {"top_p": 0.9})


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"
