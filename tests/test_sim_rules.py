"""Published rules in the simulator and on traces: draft features of token pairs, times, states that persist."""

import json
from dataclasses import replace

import chains
import numpy as np
import pytest

from mdp.acceptance import IID, TokenPair
from mdp.cost import Affine, Table
from mdp.entrants import Lacking, catalogue
from mdp.evaluate import evaluate
from mdp.policy import RULES, Observation, parse
from mdp.problem import StoppingProblem
from mdp.solve import solve
from simulate.replay import check as check_trace
from simulate.replay import fitted, replay, replay_rounds
from simulate.rounds import check, simulate
from specstop.cli import main

DRAFT = np.array([[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.05, 0.85, 0.05, 0.05], [0.4, 0.1, 0.4, 0.1]])
TARGET = np.array([[0.6, 0.2, 0.1, 0.1], [0.05, 0.6, 0.05, 0.3], [0.05, 0.8, 0.1, 0.05], [0.7, 0.1, 0.1, 0.1]])
PAIR = chains.ChainPair(DRAFT, TARGET)
COST = Affine(draft_time=0.15, verify_time=1.0, verify_slope=0.02)
PROBLEM = StoppingProblem(TokenPair(PAIR.draft, PAIR.target), COST, 6)
FEATURE_RULES = ["hf_confidence", "kangaroo:threshold=0.5", "svip:scale=0.3", "bild", "disco", "llamacpp:p_min=0.3"]


@pytest.fixture(scope="module")
def trace():
    return chains.record(PAIR, 0, num_requests=60, limit=150, depth=6, measured=None)


# --- Draft features on a problem


def test_features_are_those_of_a_trace():
    features = PROBLEM.acceptance.features()
    accept_prob = PROBLEM.lower().accept_prob[0]
    for u in range(4):
        for v in range(4):
            seen = chains._features(PAIR, u, v)
            for name, values in features.items():
                assert values[4 * u + v] == pytest.approx(seen[name])
            assert accept_prob[4 * u + v] == pytest.approx(seen["token_accept_prob"])


def test_features_of_a_sure_draft():
    sure = TokenPair([[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]).features()
    assert sure["entropy"].tolist() == pytest.approx([0, 0, np.log(2), np.log(2)])
    assert sure["top_prob"].tolist() == [1, 1, 0.5, 0.5] and sure["draft_prob"].tolist() == [1, 0, 0.5, 0.5]


def test_simulated_feature_rules_agree_with_their_exact_value():
    result = simulate(PROBLEM, FEATURE_RULES, rounds=40_000, key=3)
    plain = evaluate(PROBLEM, "fixed:0").throughput
    for text, entry in zip(FEATURE_RULES, result.policies, strict=True):
        exact = evaluate(PROBLEM, text)
        assert abs(entry.throughput.value - exact.throughput) < 5 * entry.throughput.se, text
        mean = exact.to_dict()["mean_candidates"]
        assert 0 < mean < 6 and exact.throughput != plain
        assert entry.total.mean_candidates == pytest.approx(mean, rel=0.02)


def test_simulation_and_replay_of_the_same_pair_agree(trace):
    simulated = simulate(PROBLEM, FEATURE_RULES, rounds=40_000, key=4)
    replayed = replay(trace, FEATURE_RULES, cost=COST)
    for one, other in zip(simulated.policies, replayed.policies, strict=True):
        se = np.hypot(one.throughput.se, other.throughput.se)
        # a request's last rounds are cut short, an endless text has none
        assert abs(one.throughput.value - other.throughput.value) < 5 * se + 0.01 * one.throughput.value


def test_what_a_problem_does_not_show():
    iid = StoppingProblem(IID(0.8), COST, 4)
    check(PROBLEM, parse("svip"))
    with pytest.raises(Lacking, match=r"policy 'svip' needs entropy, which a problem does not show"):
        check(iid, parse("svip"))
    with pytest.raises(Lacking, match="needs head"):
        simulate(PROBLEM, ["specdecpp"], rounds=10, key=0)
    with pytest.raises(ValueError, match="fit=1 applies to traces"):
        simulate(PROBLEM, ["disco:fit=1"], rounds=10, key=0)
    with pytest.raises(ValueError, match="remembers past rounds"):
        evaluate(PROBLEM, "adaedl")


# --- What an observation and an outcome tell of times


class Watch(type(parse("selftuned").policy)):
    """Stops after two candidates and keeps the times it is shown."""

    needs = ("verify_time", "step_time")
    seen: list = []  # noqa: RUF012

    def stop(self, state, observation):
        Watch.seen.append((observation.num_candidates, observation.verify_time, observation.step_time))
        return state, observation.num_candidates >= 2

    def end_round(self, state, outcome):
        Watch.seen.append((outcome.num_drafted, outcome.draft_time, outcome.verify_time))
        return state


def test_replay_tells_the_declared_times():
    trace = chains.record(PAIR, 0, num_requests=1, limit=12, depth=3)
    Watch.seen = []
    replay_rounds(trace, Watch(), cost=Table(0.5, [1.0, 1.25, 2.0, 4.0]))
    (k, verify, step), *_ = Watch.seen
    assert (k, verify, step) == (0, 1.0, 0.75)
    assert Watch.seen[1] == (1, 1.25, 1.25)
    drafted, draft_time, verify_time = Watch.seen[3]
    assert (drafted[0], draft_time[0], verify_time[0]) == (2, 1.0, 2.0)
    with pytest.raises(ValueError, match="no measured times; declare a cost"):
        replay_rounds(trace, "banditspec")
    assert replay_rounds(trace, "svip").num_drafted.sum() > 0  # needs none


def test_simulation_tells_the_times_of_the_problem():
    # arms 1 and 2, always accepted: 2 tokens in 1 + .2 and 3 in 1 + .4 + 5: the first arm is better by far
    dear = StoppingProblem(IID(1.0), Table(0.2, [1.0, 1.0, 6.0]), 2)
    result = simulate(dear, ["banditspec:lengths=1/2,warmup=2,width=0.1"], rounds=20_000, key=0)
    assert result.policies[0].total.mean_candidates < 1.1
    cheap = StoppingProblem(IID(1.0), Table(0.2, [1.0, 1.0, 1.0]), 2)
    result = simulate(cheap, ["banditspec:lengths=1/2,warmup=2,width=0.1"], rounds=20_000, key=0)
    assert result.policies[0].total.mean_candidates > 1.9


@pytest.mark.parametrize("accept_prob", [0.5, 0.8])
def test_selftuned_finds_the_optimum_where_look_ahead_is_optimal(accept_prob):
    problem = StoppingProblem(IID(accept_prob), COST, 6)
    (earned,) = simulate(problem, ["selftuned"], rounds=100_000, key=1).policies
    best = solve(problem).throughput
    assert abs(earned.throughput.value - best) < 5 * earned.throughput.se + 0.002 * best


def test_ralmspec_settles_on_the_stride_of_its_objective():
    # the match rate capped at .6, a = .2, b = 1: 3 (by hand in test_mdp_rules_by_hand)
    problem = StoppingProblem(IID(1.0), Affine(0.2, 1.0), 6)
    (earned,) = simulate(problem, ["ralmspec"], rounds=10_000, key=1).policies
    assert earned.total.mean_candidates == pytest.approx(3, rel=0.02)


# --- Persisting states


def test_hf_heuristic_goes_on_in_the_next_request_and_transient_does_not():
    def step(accepted):
        shown = {"token_accept_prob": 0.5, "step_accept_prob": 0.5, "draft_prob": 0.5, "top_prob": 0.5, "entropy": 1.0}
        return {"accepted": accepted, "end": False, "rollout": [shown | {"end": False}] * (0 if accepted else 9),
                **shown}  # fmt: skip

    def request(accepted):
        steps = [step(accepted) for _ in range(6)]
        for j, position in enumerate(steps):
            position["rollout"] = position["rollout"][: max(0, min(3 - 1, 6 - 2 - j))]
        return steps

    trace = chains.assemble([request(True), request(True), request(False)], [6] * 3, 3, [False] * 3)

    def lengths(text):
        log = replay_rounds(trace, text)
        return [log.num_drafted[log.request == r].tolist() for r in range(3)]

    # 1 accepted: 3; drafted 3 of 3 (the room: 6 - 2 - 1): 5. Next request: 3 (the most), 7, then 1 (room), 9.
    # Third: 8 .. down by one a round, cut to 3 and to the room.
    assert lengths("hf_transient:length=1") == [[1, 3], [1, 3], [1, 1, 1, 1, 1, 0]]
    assert lengths("hf_heuristic:length=1") == [[1, 3], [3, 1], [3, 3, 3, 2, 1, 0]]
    only = replay_rounds(trace, "hf_heuristic:length=1", requests=[0, 2])
    assert only.num_drafted.tolist() == [1, 3, 3, 3, 3, 2, 1, 0]


# --- Everything in one table


def json_of(capsys, *argv):
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def everything(answer):
    return {entry["policy"] for entry in answer["policies"]}, {x["policy"]: x["why"] for x in answer["not_applicable"]}


def test_one_command_compares_every_rule_on_a_token_pair(tmp_path, capsys):
    path = tmp_path / "pair.json"
    small = chains.random_pair(1, size=2)
    path.write_text(json.dumps(StoppingProblem(TokenPair(small.draft, small.target), COST, 6).to_dict()))
    (answer,) = json_of(capsys, "simulate", path, "--policy", "all", "--rounds", 300)
    played, lacking = everything(answer)
    assert played | set(lacking) == {spec.text for spec in catalogue(6)}
    assert {text.partition(":")[0] for text in played | set(lacking)} == set(RULES)
    assert lacking == {"specdecpp": "needs head"}
    assert len(answer["differences"]) == len(played) - 1

    rows = json_of(capsys, "evaluate", path, "--policy", "all")
    assert {row["policy"] for row in rows} == played | set(lacking)
    why = {row["policy"]: row["why"] for row in rows if "why" in row}
    assert why["adaedl"] == "remembers past rounds; simulate it instead" and "svip" not in why


def test_a_rule_whose_field_is_not_there_says_which(tmp_path, capsys):
    path = tmp_path / "iid.json"
    path.write_text(json.dumps(StoppingProblem(IID(0.7), COST, 2).to_dict()))
    assert main(["evaluate", str(path), "--policy", "all"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "n/a (needs entropy" in rows["svip"] and "n/a (needs head" in rows["specdecpp"]
    assert "n/a" not in rows["hf_constant"] and "fixed:2" in rows  # not longer than rounds are here
    # asked for by name it is refused
    assert main(["simulate", str(path), "--policy", "svip", "--rounds", "50"]) == 2
    assert capsys.readouterr().err == "specstop: error: policy 'svip' needs entropy, which a problem does not show\n"


def test_one_command_compares_every_rule_on_a_trace(trace, tmp_path, capsys):
    from mdp.trace import save

    save(trace, tmp_path / "trace")
    (answer,) = json_of(capsys, "replay", tmp_path / "trace", "--policy", "all", "--cost", "0.2")
    played, lacking = everything(answer)
    assert played | set(lacking) == {spec.text for spec in catalogue(6, fits=True)}
    assert lacking == {"specdecpp": "needs head"}
    assert answer["scored_on"] == "test half"
    assert {entry["num_emitted"] for entry in answer["policies"]} == {30 * 150}


def test_without_rollouts_only_rules_that_look_at_nothing_are_left(trace):
    bare = replace(trace, rollout_offsets=None, rollout_drafts_end=None, rollout_features={})
    check_trace(bare, parse("hf_heuristic"))
    with pytest.raises(Lacking, match="needs entropy, along rollouts, and this trace has no rollouts"):
        check_trace(bare, parse("svip"))


def test_policies_are_listed_with_what_they_read_and_where_their_defaults_are_from(capsys):
    rows = {row["name"]: row for row in json_of(capsys, "policies")}
    assert set(rows) == set(RULES)
    keys = {"name", "usage", "does", "source", "evidence", "needs", "signals", "timed", "fits", "parameters"}
    assert all(set(row) == keys for row in rows.values())
    assert rows["adaedl"]["needs"] == ["entropy"] and rows["banditspec"]["timed"]
    assert rows["hf_confidence"]["parameters"] == [
        {"name": "threshold", "default": 0.4, "low": 0.0, "high": 1.0, "origin": "code"},
        {"name": "most", "default": 20, "low": 0, "high": 1024, "origin": "code"},
    ]
    assert rows["rejection"]["signals"][0] == "token_accept_prob" and rows["svip"]["signals"] == []
    assert main(["policies"]) == 0
    text = capsys.readouterr().out
    assert "defaults that no source gives" in text and "bild: threshold" in text and "token_accept_prob" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--policy", "disco:fit=1"], "policy 'disco:fit=1': fit=1 is fitted to a trace; give --trace"),
        (["decode", "--policy", "all"], "policy 'all': stands for all rules in evaluate, simulate and replay only"),
    ],
)
def test_what_a_live_run_refuses(capsys, argv, message):
    assert main([*argv, "--target", "tiny", "--draft", "tiny", "--prompt", "x"]) == 2
    assert capsys.readouterr() == ("", f"specstop: error: {message}\n")


def test_a_problem_has_no_training_half(tmp_path, capsys):
    path = tmp_path / "pair.json"
    path.write_text(json.dumps(PROBLEM.to_dict()))
    for verb in ("simulate", "evaluate"):
        assert main([verb, str(path), "--policy", "disco:fit=1"]) == 2
        assert "fit=1 is for traces; a problem has no training half" in capsys.readouterr().err


# --- Heads on a trace


def test_specdecpp_reads_the_head_of_a_trace(trace):
    truth, rolled = trace.features["token_accept_prob"], trace.rollout_features["token_accept_prob"]
    reported = {"head": truth / (truth + 6 * (1 - truth)), "rollout_head": rolled / (rolled + 6 * (1 - rolled))}
    headed = replace(trace, optional=reported).validate()
    # a head that reports what training with weight 6 makes of the truth is the ideal one
    for options in ("", ":weight=6", ":lag=0,least=1,threshold=0.5"):
        own, ideal = (replay_rounds(headed, name + options) for name in ("specdecpp", "specdecpp_ideal"))
        assert (own.num_drafted == ideal.num_drafted).all() and len(own.start) == len(ideal.start)
        assert 1 < own.num_drafted.mean() < 6
    # without bias, lag and bounds it is the threshold on survival
    bare = replay_rounds(headed, "specdecpp:lag=0,least=0,weight=6,threshold=0.4")
    rule = replay_rounds(headed, "rejection:0.4")
    assert (bare.num_drafted == rule.num_drafted).all()


# --- Fitted rules


def test_fitted_rules_are_scored_on_the_other_half(trace):
    texts = ["hf_confidence:fit=1", "disco:fit=1", "last_round:fit=1"]
    result = replay(trace, ["fixed:3", *texts], cost=COST)
    assert result.scored_on == "test half" and result.num_requests == 30
    for text, entry in zip(texts, result.policies[1:], strict=True):
        rule = fitted(trace, parse(text), cost=COST)
        assert type(rule) is type(parse(text).policy) and rule != parse(text).policy
        (alone,) = replay(trace, [rule, text], cost=COST).policies[:1]
        assert alone.total == entry.total


def test_the_climb_beats_every_fixed_length_on_its_training_half(trace):
    from mdp.fit import split_requests

    train = split_requests(trace)[0]

    def earned(policy):
        log = replay_rounds(trace, policy, requests=train)
        return log.num_emitted.sum() / COST.round_times(6)[log.num_drafted].sum()

    best = earned(fitted(trace, parse("last_round:fit=1"), cost=COST))
    assert best >= max(earned(f"fixed:{k}") for k in range(7)) - 1e-12
    dear = fitted(trace, parse("last_round:fit=1"), cost=Affine(5.0, 1.0))
    assert dear.lengths == (0,) * 5 and dear.first == 0


def test_observation_has_no_other_fields_than_the_worlds_know():
    assert set(Observation._fields) == {
        "num_candidates", "survival", "next_accept_prob", "regime", "token_accept_prob", "draft_prob", "top_prob",
        "entropy", "head", "next_accepted", "symbol", "verify_time", "step_time",
    }  # fmt: skip
