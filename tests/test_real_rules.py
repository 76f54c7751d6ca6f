"""Every rule in the live loop: greedy runs equal the replay round by round."""

from dataclasses import dataclass, field, fields

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.cost import Affine  # noqa: E402
from mdp.entrants import Lacking, needs  # noqa: E402
from mdp.fit import SignalModel, fit_signal, split_requests  # noqa: E402
from mdp.policy import RULES, parse  # noqa: E402
from mdp.rules.heads import SpecDecPP  # noqa: E402
from realmodels.decode import decode, decode_all, round_log  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from simulate.replay import SIGNAL_FIELDS, fitted, replay_rounds  # noqa: E402

torch.set_num_threads(1)

SETTINGS = {"max_candidates": 5, "max_new_tokens": 24, "temperature": 0}
LIVE = {"draft_prob", "top_prob", "entropy"}
RULED = [name for name, rule in RULES.items() if rule.cls and name not in ("optimal", "oracle", "fixed")]
EXACT = [name for name in RULED if set(RULES[name].cls.needs) <= LIVE and not RULES[name].cls.timed]


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


@pytest.fixture(scope="module")
def recorded(pair, tmp_path_factory):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(10)]
    return prompts, record(pair, prompts, tmp_path_factory.mktemp("t"), **SETTINGS, timing_repeats=0)


def test_enough_rules_are_compared():
    assert {"hf_heuristic", "svip", "adaedl", "tapout", "disco", "sglang_ema", "hf_auto"} <= set(EXACT)


@pytest.mark.parametrize("text", [*EXACT, "adaedl:threshold=0.1,target=0.2,step=0.1", "svip:threshold=0.9"])
def test_greedy_live_run_equals_replay(pair, recorded, text):
    prompts, trace = recorded
    log = replay_rounds(trace, text)
    runs = decode_all(pair, prompts, text, **SETTINGS)
    for r, run in enumerate(runs):
        mine = log.request == r
        columns = (log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut)
        assert run.rounds == list(zip(*(column[mine].tolist() for column in columns), strict=True)), f"request {r}"


COST = Affine(0.2, 1.0)
INFORMED = ("fixed", "rejection", "lookahead", "banditspec", "ralmspec", "selftuned", "specdecpp_ideal")


@pytest.fixture(scope="module")
def model(recorded):
    return fit_signal(recorded[1], "draft_prob", split_requests(recorded[1])[0])


def test_every_rule_is_run_live_here():
    """But for the clairvoyant, which no live world can show; tables and the head's rule have tests of their own."""
    assert {*RULES} == {*EXACT, *INFORMED, "hf_heuristic", "optimal", "oracle", "specdecpp"}


@pytest.mark.parametrize("name", INFORMED)
def test_rules_that_read_survival_or_times_equal_replay(pair, recorded, model, name):
    """An estimator, a cost or the target's own scores show them; replay is shown the same."""
    prompts, trace = recorded
    text = RULES[name].example
    wanted = needs(parse(text).policy)
    model = model if wanted & SIGNAL_FIELDS else None
    scored = "token_accept_prob" in wanted
    runs = decode_all(pair, prompts, text, **SETTINGS, cost=COST, estimator=model, score=scored)
    mine, theirs = round_log(runs), replay_rounds(trace, text, cost=COST, model=model)
    for column in fields(mine):
        np.testing.assert_array_equal(getattr(mine, column.name), getattr(theirs, column.name), err_msg=column.name)


def test_timed_rules_go_by_the_clock_without_a_cost(pair, recorded):
    for policy in ("banditspec", "ralmspec"):
        assert decode(pair, recorded[0][0], policy, **SETTINGS).tally.num_emitted > 0
    with pytest.raises(Lacking, match=r"needs step_time, which this live run does not show \(a cost does\)"):
        decode(pair, recorded[0][0], "selftuned", **SETTINGS, estimator=SignalModel("entropy", transition=np.eye(1),
               regime_accept_prob=np.ones(1)))  # fmt: skip


class StubHead:
    """Stands for a trained head, and keeps what it is given."""

    lag = 0

    def __init__(self):
        self.given = []

    def score(self, hidden, features):
        self.given.append((hidden.clone(), {name: value.item() for name, value in features.items()}))
        return torch.sigmoid(1.5 + hidden[:, 0] - features["entropy"])


class LateHead(StubHead):
    lag = 1


@dataclass(frozen=True)
class Watched(SpecDecPP):
    """The rule, and a list of what it was shown."""

    shown: list = field(default_factory=list, compare=False)

    def stop(self, state, observation):
        self.shown.append((observation.num_candidates, observation.head))
        return super().stop(state, observation)


def test_a_late_head_is_shown_a_candidate_late(pair, recorded):
    """Its state is the one after the candidate; a head in time gets the one that the candidate's law came from."""
    prompt = next(p for p in recorded[0] if decode(pair, p, "fixed:5", **SETTINGS).rounds[0].num_drafted == 5)
    settings, shown, given = SETTINGS | {"max_new_tokens": 6}, [], []
    for head in (StubHead(), LateHead()):
        rule = Watched(least=5)
        decode(pair, prompt, rule, **settings, head=head)
        shown.append([value for k, value in rule.shown[:5] if k])
        given.append(head.given)
    assert len(shown[0]) == len(shown[1]) == 4 and shown[1][0] == 1.0
    with torch.inference_mode():
        for k in range(4):
            out = pair.draft(torch.tensor([prompt]), output_hidden_states=True)
            state, features = given[0][k]
            torch.testing.assert_close(state, out.hidden_states[-1][:, -1], atol=1e-5, rtol=1e-5)
            assert shown[0][k] == pytest.approx(torch.sigmoid(1.5 + state[0, 0] - features["entropy"]).item())
            if k:
                state, before = given[1][k - 1]
                torch.testing.assert_close(state, out.hidden_states[-1][:, -1], atol=1e-5, rtol=1e-5)
                assert before == given[0][k - 1][1]
                assert shown[1][k] == pytest.approx(torch.sigmoid(1.5 + state[0, 0] - before["entropy"]).item())
            prompt = [*prompt, int(out.logits[0, -1].argmax())]


def test_a_head_decides_through_specdecpp_and_through_survival(pair, recorded):
    prompts = recorded[0][:4]
    with pytest.raises(Lacking, match=r"needs head, .* \(a head does\)"):
        decode(pair, prompts[0], "specdecpp", **SETTINGS)
    for lag in (0, 1):
        head = (StubHead, LateHead)[lag]()
        # a rule's own lag of 1 is that of a late head; in time it comes on top
        same = [decode_all(pair, prompts, f"specdecpp:threshold=0.3,least=1,lag={own}", **SETTINGS, head=head)
                for own in (lag, 0)]  # fmt: skip
        assert [run.rounds for run in same[0]] == [run.rounds for run in same[1]]
        assert len({step.num_drafted for run in same[0] for step in run.rounds}) > 2
    signal = SignalModel("head", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    runs = decode_all(pair, prompts, "rejection:0.3", **SETTINGS, estimator=signal, head=StubHead())
    direct = decode_all(pair, prompts, "specdecpp:threshold=0.3,least=0,lag=0", **SETTINGS, head=StubHead())
    assert [run.rounds for run in runs] == [run.rounds for run in direct]


def test_a_fitted_rule_runs_live(pair, recorded):
    prompts, trace = recorded
    spec = parse("hf_confidence:fit=1")
    with pytest.raises(ValueError, match="not fitted"):
        decode(pair, prompts[0], spec, **SETTINGS)
    rule = fitted(trace, spec, cost=COST)
    assert rule.threshold != spec.policy.threshold
    assert decode(pair, prompts[0], rule, **SETTINGS).tally.num_emitted > 0
