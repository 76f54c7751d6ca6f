"""Files of other projects: what is read, what replay then does with it, and one line for each fault."""

import json

import chains
import numpy as np
import pytest

from mdp.cost import Affine
from mdp.importers import MAX_LINE_BYTES, guess, read_rounds, read_trace
from mdp.product_limit import product_limit
from mdp.trace import load, save
from simulate.audit import CLAIRVOYANT, audit
from simulate.replay import replay, replay_rounds

COST = Affine(draft_time=0.2, verify_time=1.0)
BENCH = [
    {"id": 7, "prompt_token_ids": [1, 2], "generated_token_ids": [3, 4, 5, 6, 7, 8],
     "acc_eagle": {"acc_len": [3, 1, 2, 4, 2, 1]}, "acc_ngram": {"acc_len": [1, 1, 1, 21, 20, 19]}},
    {"id": "b", "acc_eagle": {"acc_len": [1, 2]}, "acc_ngram": {"acc_len": [2, 1]}},
]  # fmt: skip
PLUSPLUS = [
    {"prompt": "a", "prefix": "[1, 2]", "tokens": "[5, 6, 7]", "draft": "[5, 6, 8]", "p_acc": "[1.0, 0.5, 0.0]"},
    {"tokens": [4, 4], "log_p_7b": "[-1.0, -2.0]", "log_p_70b": [-0.5, -2.5]},
]


def lines(path, entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")
    return path


@pytest.fixture
def bench(tmp_path):
    return lines(tmp_path / "bench.jsonl", BENCH)


def rounds(trace, policy, request=0):
    log = replay_rounds(trace, policy, requests=[request])
    columns = (log.start, log.num_drafted, log.num_accepted, log.num_emitted)
    return [tuple(map(int, row)) for row in zip(*columns, strict=True)]


# --- SpecDecode-Bench ---


def test_bench_is_replayed_by_hand(bench):
    trace = read_trace(bench, "specdecode-bench")
    assert trace.request_ids == ["7", "b"] and trace.max_candidates == 20
    # from 0 two are accepted, from 3 three: clamped where the text ends
    assert rounds(trace, "fixed:1") == [(0, 1, 1, 2), (2, 1, 1, 2), (4, 1, 1, 2)]
    assert rounds(trace, "fixed:2") == [(0, 2, 2, 3), (3, 2, 2, 3)]
    assert rounds(trace, "fixed:4") == [(0, 4, 2, 3), (3, 2, 2, 3)]
    assert rounds(trace, "oracle") == [(0, 2, 2, 3), (3, 2, 2, 3)]
    assert rounds(trace, chains.OneMore(1)) == [(0, 1, 1, 2), (2, 2, 1, 2), (4, 1, 1, 2)]
    other = read_trace(bench, "specdecode-bench", drafter="ngram")
    assert rounds(other, "fixed:20") == [(0, 5, 0, 1), (1, 4, 0, 1), (2, 3, 0, 1), (3, 2, 2, 3)]
    assert trace.manifest["drafter"] == "eagle" and len(trace.manifest["file_sha256"]) == 64


def test_bench_survives_a_folder_and_holds_no_text(bench, tmp_path):
    trace = read_trace(bench, "specdecode-bench")
    save(trace, tmp_path / "trace")
    again = load(tmp_path / "trace")
    assert rounds(again, "fixed:3") == rounds(trace, "fixed:3")
    assert set(again.optional) == {"run_length", "tested"} and not again.features


def test_rules_that_need_what_is_not_there_are_refused(bench):
    trace = read_trace(bench, "specdecode-bench")
    for policy in ("rejection:0.4", "lookahead:0.5,signal=entropy", "optimal"):
        with pytest.raises(ValueError, match="which this trace does not hold"):
            replay(trace, [policy], cost=COST)
    with pytest.raises(ValueError, match=r"policy 'fixed:21': length must be in 0..20 here"):
        replay(trace, ["fixed:21"], cost=COST)


def test_an_imported_trace_is_audited_against_the_clairvoyant(tmp_path):
    rng = np.random.default_rng(0)
    entries = [{"id": i, "acc_eagle": {"acc_len": rng.geometric(0.4, 60).clip(1, 21).tolist()}} for i in range(60)]
    result = audit(read_trace(lines(tmp_path / "a.jsonl", entries), "specdecode-bench"), "fixed:8", cost=COST)
    assert [rung.bound for rung in result.ladder] == ["lower"] * 3 + ["needs rollouts"] * 3 + ["upper"]
    assert result.ladder[-1].information == CLAIRVOYANT and result.between[0] > 0.05


# --- SpecDec++ ---


def test_specdecpp_reads_lists_written_as_strings(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(PLUSPLUS, indent=2))
    trace = read_trace(path, "specdec++")
    expected = [1.0, 0.5, 0.0, np.exp(0.0), np.exp(-0.5)]
    assert trace.features["token_accept_prob"] == pytest.approx(expected)
    assert set(trace.features) == {"token_accept_prob"}  # the first entry has no log_p_7b
    assert trace.accepted[[0, 2, 3]].tolist() == [True, False, True]
    assert trace.manifest["coupled"] is False and trace.manifest["seed"] == 0
    assert replay(trace, ["fixed:2"], cost=COST).num_requests == 2
    with pytest.raises(ValueError, match="no rollouts"):
        replay(trace, ["rejection:0.4"], cost=COST)


def test_specdecpp_coins_have_the_probability_and_the_seed(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"tokens": [1] * 4000, "p_acc": [0.3] * 4000}] * 2))
    first, same, other = (read_trace(path, "specdec++", seed=seed) for seed in (1, 1, 2))
    assert (first.accepted == same.accepted).all() and (first.accepted != other.accepted).any()
    assert abs(first.accepted.mean() - 0.3) < 5 * np.sqrt(0.21 / 8000)
    assert (first.accepted[:4000] != first.accepted[4000:]).any()


# --- rounds of one policy ---


def test_rounds_know_no_more_than_was_drafted(tmp_path):
    path = lines(
        tmp_path / "r.jsonl", [{"drafted": [3, 3, 2], "accepted": [3, 1, 0]}, {"drafted": [2], "accepted": [1]}]
    )
    trace = read_trace(path, "rounds")
    assert trace.num_positions == 7 + 2 and trace.max_candidates == 3
    # token 3 is a bonus: nothing is known of a round that starts there; from 4 one more was accepted and one rejected
    assert trace.optional["tested"].tolist() == [3, 2, 1, 0, 3, 2, 2, 2, 1]
    assert trace.optional["run_length"].tolist() == [3, 2, 1, 0, 1, 0, 0, 1, 0]
    assert rounds(trace, "fixed:3") == [(0, 3, 3, 4), (4, 2, 1, 2), (6, 0, 0, 1)]
    with pytest.raises(
        ValueError, match=r"a round of 3 candidates at token 3 of request 'line-1', where 0 were tested"
    ):
        replay(trace, [chains.OneMore(2), "fixed:2"], cost=COST)
    assert rounds(trace, "oracle") == [(0, 3, 3, 4), (4, 1, 1, 2), (6, 0, 0, 1)]
    short = read_trace(lines(tmp_path / "s.jsonl", [{"drafted": [2, 3], "accepted": [2, 1]}]), "rounds")
    with pytest.raises(
        ValueError, match=r"a round of 3 candidates at token 0 of request 'line-1', where 2 were tested"
    ):
        replay(short, ["oracle"], cost=COST)  # whether it would have gone on is not known
    with pytest.raises(ValueError, match=r"length must be in 0\.\.3 here"):
        replay(trace, ["fixed:4"], cost=COST)


def test_a_trace_of_rounds_is_not_audited(tmp_path):
    path = lines(tmp_path / "r.jsonl", [{"drafted": [3] * 5, "accepted": [3, 1, 3, 0, 2], "id": i} for i in range(9)])
    with pytest.raises(ValueError, match=r"the trace holds one policy's rounds|cannot be replayed"):
        audit(read_trace(path, "rounds"), "fixed:3", cost=COST)


def test_rounds_feed_the_product_limit(tmp_path):
    entries = [
        {"per_step_drafted": [1, 3], "per_step_accepted": [1, 1]},
        {"per_step_drafted": [3, 2], "per_step_accepted": [3, 0]},
    ]
    found = product_limit(*read_rounds(lines(tmp_path / "r.jsonl", entries)), max_candidates=4)
    assert found.accept_prob[:3].tolist() == [0.75, 0.5, 1.0] and found.unidentified == [4]
    assert found.num_clusters == 2


# --- guessing and faults ---


def test_the_format_is_guessed_from_the_first_entry(bench, tmp_path):
    assert guess(bench) == "specdecode-bench"
    (tmp_path / "data.json").write_text(json.dumps(PLUSPLUS))
    assert guess(tmp_path / "data.json") == "specdec++"
    assert guess(lines(tmp_path / "r.jsonl", [{"drafted": [1], "accepted": [0]}])) == "rounds"
    assert guess(lines(tmp_path / "x.jsonl", [{"acceptance": {}}])) is None
    (tmp_path / "y").write_bytes(b"\xff\xfe[")
    assert guess(tmp_path / "y") is None


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("specdecode-bench", "", "holds no requests"),
        ("specdecode-bench", "{", "line 1: not JSON"),
        ("specdecode-bench", '{"id": 1}', "line 1: acc_eagle: missing"),
        ("specdecode-bench", "[1]", r"line 1: must be an object, got \[1\]"),
        ("specdecode-bench", '\n{"acc_eagle": [1]}', "line 2: must be an object"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": []}}', r"line 1: acc_len: must be a list of numbers, got \[\]"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [0]}}', r"acc_len: must be whole numbers in 1..21, got 0"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [22]}}', r"must be whole numbers in 1..21, got 22"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [true]}}', "must be whole numbers in 1..21, got True"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [1.5]}}', "got 1.5"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [NaN]}}', "line 1: NaN is not a number in JSON"),
        ("specdecode-bench", '{"acc_eagle": {"acc_len": [1]}, "acc_eagle": 2}', "given twice"),
        ("specdecode-bench", "[" * 100000, "line 1: nested too deep"),
        ("specdec++", '{"a": 1}', "must be a list of objects"),
        ("specdec++", "[3]", "entry 1: must be an object, got 3"),
        ("specdec++", '[{"tokens": [1]}]', "entry 1: log_p_70b: missing"),
        ("specdec++", '[{"tokens": [1], "p_acc": "[1.5]"}]', r"entry 1: p_acc: must be numbers in 0..1, got 1.5"),
        ("specdec++", '[{"tokens": [1], "p_acc": "__import__(1)"}]', "entry 1: p_acc: not JSON"),
        ("specdec++", '[{"tokens": [1, 2], "p_acc": [1]}]', r"p_acc: must be as long as tokens \(2\), got 1"),
        ("specdec++", '[{"tokens": [1], "log_p_7b": [-1], "log_p_70b": [-1, -2]}]', "must be as long as log_p_7b"),
        ("rounds", '{"drafted": [1], "accepted": [2]}', "line 1: accepted: round 0 accepted 2 of 1"),
        ("rounds", '{"drafted": [1, 2], "accepted": [1]}', r"accepted: must be as long as drafted \(2\), got 1"),
        ("rounds", '{"drafted": [1], "accepted": [-1]}', r"must be whole numbers in 0..1024, got -1"),
        ("csv", "", "--format: must be one of specdecode-bench, specdec"),
    ],
)
def test_faults_are_one_line_that_names_file_and_place(tmp_path, format, content, message):
    path = tmp_path / "data"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(path, format)
    assert "\n" not in str(caught.value)
    assert format == "csv" or str(path) in str(caught.value)


def test_sizes_are_capped(tmp_path, monkeypatch):
    path = lines(tmp_path / "r.jsonl", [{"drafted": [1] * 20, "accepted": [0] * 20}])
    for name, limit, message in (
        ("MAX_FILE_BYTES", 50, "larger than 50 bytes"),
        ("MAX_LINE_BYTES", 50, "line 1: longer than 50 bytes"),
        ("MAX_POSITIONS", 19, "line 1: more than 19 positions in all"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"mdp.importers.{name}", limit)
            with pytest.raises(ValueError, match=message):
                read_trace(path, "rounds")
    assert MAX_LINE_BYTES >= 2**20
    with pytest.raises(ValueError, match="No such file"):
        read_trace(tmp_path / "none", "rounds")
