"""Replay equals the live run: exactly at temperature 0, within sampling error at temperature 1.

Live decoding and the recording share no draws at temperature 1: they are two samples of one law.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import realmodels.decode  # noqa: E402
from mdp.fit import SignalModel, fit_signal, split_requests  # noqa: E402
from mdp.policy import (  # noqa: E402
    FixedLength,
    LookaheadThreshold,
    Observation,
    Oracle,
    Outcome,
    Policy,
    PolicySpec,
    RejectionThreshold,
    ThresholdTable,
)
from realmodels.decode import _Run, decode, decode_all, round_log, total  # noqa: E402
from realmodels.pair import ModelPair, load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from realmodels.verify import Law, verify  # noqa: E402
from simulate.replay import replay_rounds  # noqa: E402
from tests.test_real_verify import assert_two_token_law  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits

SETTINGS = {"max_candidates": 5, "max_new_tokens": 24}


@dataclass(frozen=True)
class MinimumProb(Policy):
    floor: float
    needs = ("draft_prob",)

    def stop(self, state, observation):
        return state, (observation.num_candidates > 0) & (observation.draft_prob < self.floor)


@dataclass(frozen=True)
class Adaptive(Policy):
    """One candidate more after a round accepted whole, one fewer after a rejection: a rule with a memory."""

    def init(self):
        return 2

    def stop(self, state, observation):
        return state, observation.num_candidates >= state

    def end_round(self, state, outcome):
        return np.clip(state + np.where(outcome.num_accepted == outcome.num_drafted, 1, -1), 1, 5)


POLICIES = {
    "plain": FixedLength(0),
    "fixed": FixedLength(3),
    "longest": FixedLength(5),
    "draft_prob": MinimumProb(0.4),
    "rejection": RejectionThreshold(0.5),
    "adaptive": Adaptive(),
}


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


def make_prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def greedy(pair, tmp_path_factory):
    prompts = make_prompts(24)
    return prompts, record(pair, prompts, tmp_path_factory.mktemp("t"), **SETTINGS, temperature=0, timing_repeats=0)


def rounds_of(log, request):
    mine = log.request == request
    columns = (log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut)
    return list(zip(*(column[mine].tolist() for column in columns), strict=True))


def played(trace, policy, request):
    """A replay written apart from `simulate.replay`: one request, plain loops over the trace's fields."""
    first, last = trace.offsets[request], trace.offsets[request + 1]
    start, state, rounds = first, policy.init(), []
    while start < last:
        most = min(trace.max_candidates, int(trace.limit[request] - (start - first)) - 1)
        failed, drafted, accepted, survival, ended = None, 0, 0, 1.0, False
        features = {"draft_prob": np.nan, "token_accept_prob": np.nan}
        while drafted < most and not ended:
            seen = Observation(drafted, survival=survival, **features)
            state, stop = policy.stop(state, seen)
            if stop:
                break
            if failed is None:
                i, source, ended = start + drafted, trace.features, trace.drafts_end[start + drafted]
                failed = None if trace.accepted[i] else i
                accepted += failed is None
            else:
                i, source = trace.rollout_offsets[failed] + drafted - (failed - start) - 1, trace.rollout_features
                ended = trace.rollout_drafts_end[i]
            features = {name: float(source[name][i]) for name in features}
            survival *= features["token_accept_prob"]
            drafted += 1
        cut = int(failed is None and ended)
        rounds.append((drafted, accepted, accepted + 1 - cut, cut))
        state = policy.end_round(state, Outcome(drafted, accepted))
        start += rounds[-1][2]
    return rounds


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_live_run_equals_replay_round_by_round(pair, greedy, name):
    prompts, trace = greedy
    policy, score = POLICIES[name], name == "rejection"
    runs = decode_all(pair, prompts, policy, **SETTINGS, temperature=0, score=score)
    log = replay_rounds(trace, policy, model=SignalModel() if score else None)
    for r, run in enumerate(runs):
        first, last = trace.offsets[r : r + 2]
        assert run.tokens == trace.optional["token"][first:last].tolist()
        assert run.rounds == rounds_of(log, r) == played(trace, policy, r), f"request {r}"


def test_the_live_log_is_that_of_replay_with_times(pair, greedy):
    prompts, trace = greedy
    runs = decode_all(pair, prompts, FixedLength(3), **SETTINGS, temperature=0)
    mine, theirs = round_log(runs), replay_rounds(trace, FixedLength(3))
    for column in fields(mine):
        np.testing.assert_array_equal(getattr(mine, column.name), getattr(theirs, column.name))
    for run in runs:
        assert len(run.times) == len(run.rounds)
        for step, spent in zip(run.rounds, run.times, strict=True):
            assert spent.verify > 0 and (spent.draft > 0) == (step.num_drafted > 0)
        assert run.draft_time + run.verify_time <= run.time


def test_the_greedy_prompts_meet_all_ends(pair, greedy):
    """End-of-text accepted inside a block, end-of-text as the correction, and the maximum length."""
    prompts, _ = greedy
    runs = decode_all(pair, prompts, FixedLength(4), **SETTINGS, temperature=0)
    ended = [run for run in runs if run.tokens[-1] in pair.end_token_ids]
    assert any(run.rounds[-1].num_cut == 1 for run in ended)
    assert any(run.rounds[-1].num_cut == 0 for run in ended)
    full = [run for run in runs if run not in ended]
    assert full and all(len(run.tokens) == SETTINGS["max_new_tokens"] for run in full)
    assert any(run.rounds[-1].num_drafted < 4 for run in full), "no round was clamped at the maximum length"


def test_greedy_live_output_is_that_of_the_target_alone(pair):
    for prompt in make_prompts(6, seed=9):
        wanted = list(prompt)
        with torch.inference_mode():
            while len(wanted) < len(prompt) + SETTINGS["max_new_tokens"]:
                wanted.append(int(pair.target(torch.tensor([wanted])).logits[0, -1].argmax()))
                if wanted[-1] in pair.end_token_ids:
                    break
        for policy in (FixedLength(3), MinimumProb(0.5)):
            assert decode(pair, prompt, policy, **SETTINGS, temperature=0).tokens == wanted[len(prompt) :]


def ratio(numerator, denominator):
    """Ratio of sums over requests and its standard error, clustered by request."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    value = numerator.sum() / denominator.sum()
    return value, np.sqrt(((numerator - value * denominator) ** 2).sum()) / denominator.sum()


def rates(rounds_by_request):
    """(block efficiency, discard rate), each with its standard error."""
    sums = np.array([[len(rounds), *np.sum(rounds, axis=0)] for rounds in rounds_by_request])
    calls, drafted, accepted, emitted, _ = sums.T
    return ratio(emitted, calls), ratio(drafted - accepted, emitted)


@pytest.fixture(scope="module")
def sampled(pair, tmp_path_factory):
    prompts = make_prompts(20) * 12
    return prompts, record(pair, prompts, tmp_path_factory.mktemp("t"), **SETTINGS, batch_size=100, shard_size=240,
                           seed=1, timing_repeats=0, store_top=0)  # fmt: skip


@pytest.mark.parametrize("name", ["fixed", "draft_prob", "rejection", "adaptive"])
def test_sampled_live_run_agrees_with_replay(pair, sampled, name):
    prompts, trace = sampled
    policy, score = POLICIES[name], name == "rejection"
    runs = decode_all(pair, prompts, policy, **SETTINGS, seed=2, score=score)
    log = replay_rounds(trace, policy, model=SignalModel() if score else None)
    live, replayed = rates([run.rounds for run in runs]), rates([rounds_of(log, r) for r in range(len(prompts))])
    for (a, a_error), (b, b_error) in zip(live, replayed, strict=True):
        assert abs(a - b) < 4 * np.hypot(a_error, b_error)
        assert np.hypot(a_error, b_error) < 0.1 * b
    assert total(runs).imbalance == 0
    # The rates tell rules apart: a replay of another rule is far off.
    other = rates([rounds_of(replay_rounds(trace, "fixed:1"), r) for r in range(len(prompts))])
    assert any(abs(a - b) > 6 * np.hypot(e, f) for (a, e), (b, f) in zip(other, live, strict=True))


def test_a_fitted_signal_means_the_same_live_and_replayed(pair, greedy, sampled):
    """One signal model, fitted on the sampled trace: survival and look-ahead from it agree round by round."""
    model = fit_signal(sampled[1], "draft_prob", split_requests(sampled[1])[0])
    prompts, trace = greedy
    for policy in (RejectionThreshold(0.45), LookaheadThreshold(0.6)):
        runs = decode_all(pair, prompts, policy, **SETTINGS, temperature=0, estimator=model)
        log = replay_rounds(trace, policy, model=model)
        assert [run.rounds for run in runs] == [rounds_of(log, r) for r in range(len(prompts))]
        assert len({run.rounds[0].num_drafted for run in runs}) > 1


def test_a_table_over_regimes_is_played_alike(pair, greedy, sampled):
    """What `optimal` is on a trace: a threshold table over the signal's regimes, shallower than the rounds."""
    model = fit_signal(sampled[1], "entropy", split_requests(sampled[1])[0])
    levels = np.linspace(0.9, 0.2, len(model.transition))
    table = ThresholdTable(np.array([levels * 0, levels, levels * 0.8, levels * 0.6]))
    prompts, trace = greedy
    runs = decode_all(pair, prompts, table, **SETTINGS, temperature=0, estimator=model)
    log = replay_rounds(trace, PolicySpec("table", table, "entropy"), model=model)
    assert [run.rounds for run in runs] == [rounds_of(log, r) for r in range(len(prompts))]
    assert len({round.num_drafted for run in runs for round in run.rounds}) > 2


def two_token_law(pair, prompt, top_k, temperature=1.0, top_p=1.0):
    """The target's law of the next two tokens, written apart from the product's warping."""

    def law(tokens):
        with torch.inference_mode():
            logits = pair.target(torch.tensor([tokens])).logits[0, -1].double().numpy()
        out = np.exp((logits - logits.max()) / temperature)
        ranked = np.argsort(logits)[::-1]
        out[ranked[top_k:]] = 0
        before = np.cumsum(out[ranked]) - out[ranked]  # the mass of all that is more probable
        out[ranked[before >= top_p * out.sum()]] = 0
        return out / out.sum()

    size = pair.vocab_size
    first = law(prompt)
    return first, np.array([law([*prompt, t]) if first[t] > 0 else np.full(size, 1 / size) for t in range(size)])


def live_samples(pair, prompt, policy, count, **options):
    options = {"max_candidates": 3, "max_new_tokens": 3, "top_k": 4} | options
    runs = decode_all(pair, [prompt] * count, policy, **options)
    return np.array([run.tokens[:2] for run in runs])


def correction_from_p(monkeypatch):
    monkeypatch.setattr(realmodels.decode, "verify", lambda *args: verify(*args, correct=lambda p, q: p))


def bonus_from_q(monkeypatch):
    honest = _Run.verify

    def wrong(self):
        law = self.sampling.law(self._read(self.drafter)[-1:])

        def cheat(p, *rest):
            p.probs[:, -1], p.ids[:, -1] = law.probs, law.ids
            return verify(p, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(realmodels.decode, "verify", cheat)
            return honest(self)

    monkeypatch.setattr(_Run, "verify", wrong)


def q_not_warped(monkeypatch):
    honest = _Run.draft

    def wrong(self):
        honest(self)
        everything = torch.arange(self.logits.shape[-1])[None]
        self.draft_laws[-1] = Law(torch.softmax(self.logits.double(), -1), everything)

    monkeypatch.setattr(_Run, "draft", wrong)


def target_not_warped(monkeypatch):
    """Only the target's side forgets top-p: tokens that must not come do come."""
    honest = _Run.verify

    def wrong(self):
        self.sampling = replace(self.sampling, top_p=1.0)
        return honest(self)

    monkeypatch.setattr(_Run, "verify", wrong)


LIVE_BUGS = (correction_from_p, bonus_from_q, q_not_warped)


@pytest.fixture(scope="module")
def endless(pair):
    """No token ends the text here, so that every continuation has two tokens."""
    return ModelPair(**{**vars(pair), "end_token_ids": ()})


def check_live_law(pair, policy, count):
    """Caches, crops and positions included."""
    prompt = [8, 4, 17]
    assert_two_token_law(live_samples(pair, prompt, policy, count), *two_token_law(pair, prompt, 4))


@pytest.mark.parametrize("policy", [FixedLength(1), MinimumProb(0.5)], ids=repr)
def test_live_text_has_the_targets_law(endless, policy):
    check_live_law(endless, policy, 1000)


def test_the_check_of_the_live_law_catches_a_bug(endless, monkeypatch):
    correction_from_p(monkeypatch)
    with pytest.raises(AssertionError, match="emitted"):
        check_live_law(endless, FixedLength(1), 1000)


WARPED = {"temperature": 0.7, "top_k": 6, "top_p": 0.8}


def check_warped_law(pair, count):
    prompt = [8, 4, 17]
    first, second = two_token_law(pair, prompt, **WARPED)
    assert 1 < (first > 0).sum() < WARPED["top_k"], "top-p removes nothing here"
    assert_two_token_law(live_samples(pair, prompt, MinimumProb(0.5), count, **WARPED), first, second)


def test_live_text_has_the_law_of_temperature_top_k_and_top_p(endless):
    check_warped_law(endless, 500)


def test_a_token_of_probability_zero_is_caught(endless, monkeypatch):
    target_not_warped(monkeypatch)
    with pytest.raises(AssertionError, match="a token of probability 0 was emitted"):
        check_warped_law(endless, 120)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [FixedLength(0), FixedLength(1), FixedLength(3), MinimumProb(0.5)], ids=repr)
def test_live_text_has_the_targets_law_in_many_samples(endless, policy):
    check_live_law(endless, policy, 4000)


@pytest.mark.slow
@pytest.mark.parametrize("plant", LIVE_BUGS)
def test_many_samples_catch_every_planted_bug(endless, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="emitted"):
        check_live_law(endless, FixedLength(1), 4000)


def test_draws_are_addressed_by_request(pair):
    prompts = make_prompts(4)
    runs = decode_all(pair, prompts, FixedLength(2), **SETTINGS)
    again = decode_all(pair, prompts[2:], FixedLength(2), **SETTINGS)
    assert [run.tokens for run in runs[2:]] == [run.tokens for run in again]
    assert decode(pair, prompts[0], FixedLength(2), **SETTINGS, seed=5).tokens != runs[0].tokens


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (Oracle(), {}, "needs next_accepted"),
        (RejectionThreshold(0.5), {}, "needs survival"),
        (LookaheadThreshold(0.5), {"score": True}, "needs next_accept_prob"),
        (RejectionThreshold(0.5), {"estimator": SignalModel()}, "needs token_accept_prob"),
        ("optimal", {"score": True}, "policy 'optimal': not solved"),
        ("fixed:6", {}, r"policy 'fixed:6': length must be in 0\.\.5"),
        (FixedLength(1), {"temperature": "hot"}, "temperature must be"),
        (FixedLength(1), {"top_p": 0}, "top_p must be"),
        (FixedLength(1), {"max_new_tokens": 507}, "the longest needs 513 positions, the models have 512"),
    ],
)
def test_what_a_live_run_cannot_show_is_refused(pair, policy, options, message):
    with pytest.raises(ValueError, match=message) as error:
        decode(pair, [3], policy, **{**SETTINGS, **options})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must not be empty"):
        decode(pair, [], FixedLength(1))
    with pytest.raises(ValueError, match=r"tokens must be whole numbers in 0\.\.23"):
        decode(pair, [24], FixedLength(1))
