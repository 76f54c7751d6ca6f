"""The validation report on a tiny pair: its keys, its honesty, what a second run does again, and bugs that it sees."""

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import realmodels.decode  # noqa: E402
from mdp.cost import Affine  # noqa: E402
from mdp.fit import split_requests  # noqa: E402
from mdp.metrics import Tally  # noqa: E402
from mdp.trace import load  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from specstop.cli import main  # noqa: E402
from specstop.outcome import COST_RATIO  # noqa: E402
from specstop.validation import policies, three_ways  # noqa: E402
from specstop.validation.make import validate_pair  # noqa: E402
from specstop.validation.report import explain  # noqa: E402
from specstop.validation.settings import PROFILES, Settings  # noqa: E402
from specstop.validation.stages import Stages  # noqa: E402

torch.set_num_threads(1)

SMALL = Settings(**PROFILES[True, True] | {"target": "tiny:5", "draft": "tiny", "num_prompts": 64, "groups": 3,
                                          "rounds": 0, "max_new_tokens": 24})  # fmt: skip
RATES = ("throughput", "block_efficiency", "discard_rate", "verification_rate")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validation") / "out"
    validate_pair(SMALL, folder)
    return folder


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "validation.json").read_text(), parse_constant=pytest.fail)


def test_keys_and_balance(result):
    assert {"pair", "settings", "cost", "processes", "policies", "seconds", "versions", "questions"} <= set(result)
    names = [row["name"] for row in result["processes"]]
    assert names[:4] == ["iid", "position", "beta_mixture", "markov_modulated"] and "signal_chain:entropy" in names
    assert all({"name", "parameters", "heldout_loglik", "se"} <= set(row) for row in result["processes"])
    assert len(result["policies"]) == len({entry["policy"].partition(":")[0] for entry in result["policies"]}) == 5
    for entry in result["policies"]:
        assert {"policy", "predicted", "replayed", "live", "z_replay_live"} <= set(entry)
        for kind in ("predicted", "replayed", "live"):
            assert all(entry[kind][rate] is not None for rate in RATES)
            low, high = entry[kind]["interval"]
            assert low < entry[kind]["throughput"] < high
        for kind in ("replayed", "live"):
            count = entry[kind]
            left = count["num_drafted"] + count["num_target_calls"]
            assert left == count["num_emitted"] + count["num_discarded"] + count["num_cut"]
        assert entry["live"]["wall"]["throughput"] > 0


def test_replay_and_live_are_samples_of_one_law(result):
    assert all(abs(z) < 4 for entry in result["policies"] for z in entry["z"].values())


def test_the_report_can_be_read_alone(out, result):
    text = (out / "report.md").read_text()
    assert all(f"`{entry['policy']}`" in text for entry in result["policies"])
    assert all(words in text for words in ("predicted", "replayed", "live", "declared", "iid", "ends of texts"))
    for entry in result["policies"]:
        row = next(line for line in text.split("differences are made of")[1].splitlines() if entry["policy"] in line)
        off, *parts = (float(cell) for cell in row.split("|")[2:6])
        whole = 100 * (entry["predicted"]["throughput"] / entry["replayed"]["throughput"] - 1)
        assert off == pytest.approx(whole, abs=0.06) and sum(parts) == pytest.approx(off, abs=0.21)
    assert "nan" not in text and "None" not in text and "inf" not in text


def test_nothing_is_chosen_on_the_half_that_judges(out, result):
    trace = load(out / "trace")
    train, test = split_requests(trace)
    judged = np.repeat(np.isin(np.arange(trace.num_requests), test), np.diff(trace.offsets))
    features = {key: np.where(judged, values[::-1], values) for key, values in trace.features.items()}
    spoilt = replace(trace, accepted=np.where(judged, False, trace.accepted), features=features)
    chosen = [entry["policy"] for entry in result["policies"]]
    cost = Affine(COST_RATIO, 1.0)
    assert policies.choose(trace, cost, train) == chosen
    assert policies.choose(spoilt, cost, train) == chosen


def test_a_killed_run_goes_on(out, result, monkeypatch):
    kept = sorted((out / "stages").iterdir())
    kept[0].unlink()
    (out / "validation.json").unlink()
    decoded, honest = [], realmodels.decode.decode
    monkeypatch.setattr(realmodels.decode, "decode", lambda *a, **k: decoded.append(1) or honest(*a, **k))
    again = validate_pair(replace(SMALL, groups=2), out)
    assert len(decoded) == again["pair"]["num_held_out"] and again["pair"]["reused"]
    for one, other in zip(again["policies"], result["policies"], strict=True):
        assert one["replayed"] == other["replayed"] and one["z"] == other["z"]


def test_stages_are_kept_by_their_settings(tmp_path):
    stages, made = Stages(tmp_path / "s"), []
    for key in ("a", "a", "b"):
        assert stages.get("x", key, lambda: made.append(1) or {"value": 1.0}) == {"value": 1.0}
    assert len(made) == 2
    (tmp_path / "s" / "x.json").write_text("{half")
    assert stages.get("x", "b", lambda: 3) == 3


def test_differences_are_taken_apart():
    """Two points of ends, three of the halves, the rest is the process."""
    same = dict.fromkeys(RATES, 0.5)
    replayed = {"throughput": 1.0, "on_training_half": 1.03, "throughput_se": 0.01}
    ended = {"throughput": 1.08, "end_prob": 0.02}
    entry = {"predicted": {"throughput": 1.1, "with_ends": ended}, "replayed": replayed, "z": same,
             "z_predicted_replayed": 4.0}  # fmt: skip
    (text,) = explain(entry)
    assert all(
        part in text
        for part in ("+10.0 %", "+2.0 points are that texts start and end", "+3.0 the two halves", "+5.0 what the")
    )
    assert "more than chance" in text
    live = {"discard_rate": 0.4} | dict.fromkeys(RATES, 0.4)
    far = entry | {"z": same | {"discard_rate": -3.5}, "replayed": replayed | live, "live": live}
    assert "3.5 standard errors in discard rate" in explain(far)[1] and "fault" in explain(far)[1]
    near = {"predicted": {"throughput": 1.01, "with_ends": ended}, "replayed": replayed, "z": same,
            "z_predicted_replayed": 1.0}  # fmt: skip
    assert explain(near) == []


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


def run_one(trace, pair, text):
    """One policy replayed and live on the same prompts."""
    train, test = split_requests(trace)
    cost = Affine(0.22, 1.0)
    (ready,) = policies.make_ready(trace, [text], cost, train)
    prompts = three_ways.drawn_prompts(pair.vocab_size, trace.num_requests, SMALL.seed)
    sampling = dict(trace.manifest["sampling"]) | {"seed": 9}
    runs = policies.run_live(pair, [prompts[r] for r in test], ready, cost, sampling)
    return policies.replayed(trace, ready, cost, test), runs.tally(cost)


@pytest.mark.parametrize("text", ["banditspec", "selftuned:signal=draft_prob"])
def test_rules_told_of_times_are_told_the_same_live_as_in_replay(out, pair, text):
    """By the clock no two live runs would be the same, and neither would be a sample of what is replayed."""
    trace = load(out / "trace")
    (one, live), (_, again) = (run_one(trace, pair, text) for _ in range(2))
    assert live.num_drafted.tolist() == again.num_drafted.tolist()
    assert max(map(abs, policies.compare(one, live).values())) < 4


def test_a_live_run_that_drops_the_bonus_is_caught(out, pair, monkeypatch):
    trace, honest = load(out / "trace"), realmodels.decode.decode

    def short(*args, **options):
        """Where all candidates were accepted the target's own token is lost: it counts as cut."""
        run = honest(*args, **options)
        rounds = [
            step._replace(num_emitted=step.num_emitted - 1, num_cut=step.num_cut + 1)
            if 0 < step.num_drafted == step.num_accepted and step.num_cut == 0 else step
            for step in run.rounds
        ]  # fmt: skip
        return replace(run, rounds=rounds)

    assert abs(policies.compare(*run_one(trace, pair, "fixed:2"))["throughput"]) < 3
    monkeypatch.setattr(realmodels.decode, "decode", short)
    assert policies.compare(*run_one(trace, pair, "fixed:2"))["throughput"] > 3


def test_a_live_run_that_drafts_one_too_many_is_caught(out, pair, monkeypatch):
    from mdp.policy import FixedLength

    trace, replayed = load(out / "trace"), run_one(load(out / "trace"), pair, "fixed:2")[0]
    honest = FixedLength.stop
    monkeypatch.setattr(FixedLength, "stop", lambda self, s, o: honest(replace(self, length=self.length + 1), s, o))
    z = policies.compare(replayed, run_one(trace, pair, "fixed:2")[1])
    assert max(map(abs, z.values())) > 3


def test_equal_tallies_do_not_differ():
    one = Tally(*(np.array([3, 4]) for _ in range(3)), np.array([1, 2]), np.zeros(2), np.array([2.0, 3.0]))
    assert policies.compare(one, one) == dict.fromkeys(RATES, 0.0)


def test_policies_of_ones_own_and_what_cannot_be_predicted(out, capsys):
    command = ["validate", "--target", "tiny:5", "--draft", "tiny", "--trace", out / "trace",
               "--out", out.parent / "own", "--policy", "adaedl", "--cost", "0.1", "--quick", "--json"]  # fmt: skip
    assert main([*map(str, command)]) == 0
    stdout, stderr = capsys.readouterr()
    found = json.loads(stdout)
    assert stderr == "" and found["cost"]["draft_time"] == 0.1
    assert "remembers" in found["policies"][0]["predicted"]["why"]
    assert "none: it remembers" in (out.parent / "own" / "report.md").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["validate"], "give files to check, or --out"),
        (["validate", "x.json", "--out", "d"], "--out is for the report"),
        (["validate", "x.json", "--policy", "fixed:2"], "--policy is for the report"),
        (["validate", "--target", "tiny"], "give files to check, or --out"),
        (["validate", "--target", "tiny", "--out", "d", "--policy", "fixed:2", "what"], "unknown rule 'what'"),
        (["validate", "--target", "tiny", "--out", "d", "--cost", "-1"], "--cost"),
        (["validate", "--target", "tiny", "--out", "d", "--trace", "nowhere"], "not a trace"),
        (["validate", "--target", "tiny", "--out", "d", "--prompts", "none.jsonl"], "no such file"),
    ],
)
def test_one_line_for_what_is_wrong(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and words in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_trace_of_other_settings_is_not_touched(out, capsys):
    for option in (["--seed", "3"], ["--draft", "tiny:1"]):
        argv = ["validate", "--target", "tiny:5", "--limit", "64", "--quick", "--out", str(out), *option]
        assert main(argv) == 2
        assert "other settings" in capsys.readouterr().err
    assert main(["validate", "--target", "tiny:5", "--draft", "tiny", "--trace", str(out / "trace"), "--out",
                 str(out.parent / "x"), "--prompts", "human-eval"]) == 2  # fmt: skip


@pytest.mark.slow
def test_on_the_tiny_pair_all_five_agree_within_a_percent(tmp_path):
    """The sizes of `specstop validate --target tiny`: some minutes."""
    found = validate_pair(Settings(target="tiny", draft="tiny", **PROFILES[True, False]), tmp_path)
    assert all(entry["predicted"]["with_ends"]["throughput_se"] > 0 for entry in found["policies"])
    assert all(width <= 0.01 for width in found["half_widths"].values())
    assert len(found["policies"]) == 5
    assert all(abs(entry["z_replay_live"]) < 3 for entry in found["policies"])


@pytest.mark.slow
def test_the_open_questions_are_answered(tmp_path):
    settings = Settings(target="tiny", draft="tiny", **PROFILES[True, True])
    questions = validate_pair(settings, tmp_path, quick=True, full=True)["questions"]
    assert len(questions) == 3 and all(question["rows"] and question["answer"] for question in questions)
    assert "Open questions" in (tmp_path / "report.md").read_text()
