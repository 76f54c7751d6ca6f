"""Rules inside transformers' `generate`: its text and law are the target's, its rounds those of our own loop."""

from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mdp.entrants import Lacking  # noqa: E402
from mdp.fit import SignalModel  # noqa: E402
from mdp.policy import FixedLength, Policy, parse  # noqa: E402
from realmodels import hf  # noqa: E402
from realmodels.decode import decode, decode_all, total  # noqa: E402
from realmodels.hf import attach, detach, speculate  # noqa: E402
from realmodels.pair import ModelPair, load_pair  # noqa: E402
from tests.test_real_replay import two_token_law  # noqa: E402
from tests.test_real_verify import assert_two_token_law  # noqa: E402

torch.set_num_threads(1)

DEPTH, LENGTH = 5, 24
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}
OURS = {"max_candidates": DEPTH, "max_new_tokens": LENGTH, "temperature": 0}


@dataclass(frozen=True)
class Wary(Policy):
    """Drafts nothing after a rejected candidate: a rule with empty rounds."""

    def init(self):
        return 3

    def stop(self, state, observation):
        return state, observation.num_candidates >= state

    def end_round(self, state, outcome):
        return 3 if outcome.num_accepted == outcome.num_drafted else 0


def make_prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


@pytest.fixture(scope="module")
def shallow(pair):
    """The same target with a draft of one layer: another model altogether, seldom right."""
    config = transformers.LlamaConfig(**{**pair.target.config.to_dict(), "num_hidden_layers": 1})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        draft = transformers.LlamaForCausalLM(config).eval()
    draft.model.embed_tokens.weight.data = pair.target.model.embed_tokens.weight.data
    draft.lm_head.weight.data = pair.target.lm_head.weight.data
    return ModelPair(**{**vars(pair), "draft": draft})


@pytest.fixture(scope="module")
def plain(pair):
    """Prompts, and how the target alone goes on, by transformers' own greedy search."""
    prompts = make_prompts(16)
    return prompts, [generate(pair, prompt) for prompt in prompts]


def generate(pair, prompt, **options):
    text = pair.target.generate(torch.tensor([prompt]), **GREEDY | options)
    return text[0, len(prompt) :].tolist()


def calibrated(signal, curve):
    return SignalModel(signal, np.array([0.0, 1.0]), np.array(curve))


class StubHead:
    """Stands for a trained head: reads the state, the token's probability, and says so late or in time."""

    def __init__(self, lag):
        self.lag = lag

    def score(self, hidden, features):
        assert hidden.shape == (1, 32) and hidden.dtype == torch.float32
        assert set(features) == {"draft_prob", "top_prob", "entropy"}
        return torch.sigmoid(1.5 + hidden[:, 0] - features["entropy"])


RULES = {
    "fixed:3": {},
    "hf_confidence": {},
    "tapout": {},
    "hf_heuristic": {},  # its state goes from one prompt to the next
    "disco": {},
    "rejection:0.4": {"estimator": calibrated("draft_prob", [0.1, 1.0])},
    "specdecpp": {"head": StubHead(1)},
    "specdecpp:lag=0,least=1": {"head": StubHead(0)},
    "rejection:0.3": {"estimator": calibrated("head", [0.0, 1.0]), "head": StubHead(1)},
}


@pytest.mark.parametrize("policy", RULES)
def test_greedy_text_is_the_targets_and_the_rounds_are_those_of_decode(pair, plain, policy):
    prompts, wanted = plain
    with attach(pair.draft, policy, max_candidates=DEPTH, **RULES[policy]) as log:
        texts = [generate(pair, prompt, assistant_model=pair.draft) for prompt in prompts]
    ours = decode_all(pair, prompts, policy, **OURS, **RULES[policy])
    assert texts == wanted == [run.tokens for run in log] == [run.tokens for run in ours]
    assert [run.rounds for run in log] == [run.rounds for run in ours] and log.num_forced == 0
    if policy != "fixed:3":
        assert len({step.num_drafted for run in log for step in run.rounds}) > 2
    # All kinds of ends: end-of-text accepted inside a block, as the target's own token, and the maximum length.
    ended = {(run.tokens[-1] in pair.end_token_ids, run.rounds[-1].num_cut) for run in log}
    assert ended == {(True, 1), (True, 0), (False, 0)}
    assert any(run.rounds[-1] == (0, 0, 1, 0) for run in log) or policy != "hf_confidence"


@pytest.mark.parametrize("policy", ["fixed:3", "hf_confidence", "svip", "hf_heuristic"])
def test_our_loop_as_custom_generate_gives_the_targets_text(pair, plain, policy):
    prompts, wanted = plain
    options, log = {"custom_generate": speculate, "draft_model": pair.draft, "max_candidates": DEPTH}, []
    texts = [generate(pair, prompt, policy=policy, log=log, **options) for prompt in prompts]
    assert texts == wanted
    assert [run.rounds for run in log] == [run.rounds for run in decode_all(pair, prompts, policy, **OURS)]


@pytest.mark.parametrize("policy", ["fixed:2", "hf_confidence"])
def test_a_draft_of_another_depth_changes_nothing(shallow, plain, policy):
    prompts, wanted = plain
    with attach(shallow.draft, policy, max_candidates=DEPTH) as log:
        texts = [generate(shallow, prompt, assistant_model=shallow.draft) for prompt in prompts]
    ours = decode_all(shallow, prompts, policy, **OURS)
    assert texts == wanted == [run.tokens for run in ours]
    assert [run.rounds for run in log] == [run.rounds for run in ours]
    tally = total(log)
    assert 0 < tally.accept_rate_drafted < 0.5


def test_a_rule_that_wants_no_candidate_gets_one_and_that_is_counted(pair, plain):
    prompts, wanted = plain
    with attach(pair.draft, Wary(), max_candidates=DEPTH) as log:
        assert [generate(pair, prompt, assistant_model=pair.draft) for prompt in prompts] == wanted
    short = sum(step.num_drafted == 1 for run in log for step in run.rounds)
    assert 0 < log.num_forced <= short
    with pytest.raises(ValueError, match=r"policy 'fixed:0': transformers drafts at least one candidate a round"):
        attach(pair.draft, "fixed:0")


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_lengths_end_with_the_same_rounds(pair, length):
    """The last token at the maximum length is drafted for by nobody."""
    prompts = make_prompts(12, seed=4)
    with attach(pair.draft, "fixed:3") as log:
        texts = [generate(pair, p, assistant_model=pair.draft, max_new_tokens=length) for p in prompts]
    ours = decode_all(pair, prompts, "fixed:3", max_new_tokens=length, temperature=0)
    assert [(run.tokens, run.rounds) for run in log] == [(run.tokens, run.rounds) for run in ours]
    assert texts == [run.tokens for run in ours]
    assert any(run.rounds[-1] == (0, 0, 1, 0) for run in log)


def test_the_rounds_have_times(pair):
    with attach(pair.draft, "fixed:2") as log:
        generate(pair, [5, 9, 3], assistant_model=pair.draft)
    (run,) = log
    assert len(run.times) == len(run.rounds)
    assert all(spent.verify > 0 and (spent.draft > 0) == (step.num_drafted > 0)
               for spent, step in zip(run.times, run.rounds, strict=True))  # fmt: skip
    assert run.draft_time + run.verify_time <= run.time == run.tally.time


def test_all_is_put_back(pair):
    own, config = transformers.GenerationMixin.generate, pair.draft.generation_config.to_dict()
    with attach(pair.draft, "fixed:2", max_candidates=7):
        assert pair.draft.generation_config.num_assistant_tokens == 7
        assert pair.draft.generation_config.assistant_confidence_threshold == 0
        with pytest.raises(ValueError, match="attached already"):
            attach(pair.draft, "fixed:3")
        generate(pair, [4])  # calls without the draft as assistant are nobody's business
        pair.draft.generate(torch.tensor([[4]]), **GREEDY)
    log = attach(pair.draft, "fixed:2")
    generate(pair, [4], assistant_model=pair.draft)
    detach(pair.draft)
    detach(pair.draft)
    generate(pair, [4], assistant_model=pair.draft)
    assert len(log) == 1
    with pytest.raises(ZeroDivisionError), attach(pair.draft, "fixed:2"):
        raise ZeroDivisionError
    assert pair.draft.generation_config.to_dict() == config and "generate" not in vars(pair.draft)
    assert transformers.GenerationMixin.generate is own


def test_two_drafts_may_have_rules_at_once_and_leave_in_any_order(pair, shallow):
    own = transformers.GenerationMixin.generate
    first, second = attach(pair.draft, "fixed:1"), attach(shallow.draft, "fixed:3")
    for draft in (pair.draft, shallow.draft):
        generate(pair, [4, 7], assistant_model=draft)
    first.detach()
    generate(pair, [4, 7], assistant_model=shallow.draft)
    second.detach()
    assert (len(first), len(second)) == (1, 2) and transformers.GenerationMixin.generate is own
    assert second[0].rounds == second[1].rounds


@pytest.fixture(scope="module")
def endless(pair):
    """No token ends the text here, so that every continuation has two tokens."""
    return ModelPair(**{**vars(pair), "end_token_ids": ()})


PROMPT = [3, 6, 20]  # both laws have likely tokens behind it: dropping unlikely ones shows


def sampled(pair, count, **options):
    """The first two tokens of so many continuations by transformers, no token ending them."""
    torch.manual_seed(1)
    prompt = torch.tensor([PROMPT])
    kept = {"max_new_tokens": 3, "do_sample": True, "top_k": 4, "pad_token_id": 0, "eos_token_id": None}
    return np.array([pair.target.generate(prompt, **kept, **options)[0, 3:5].tolist() for _ in range(count)])


def sampled_under(pair, policy, count):
    config, ends = pair.target.generation_config, pair.target.generation_config.eos_token_id
    config.eos_token_id = None
    try:
        with attach(pair.draft, policy, max_candidates=3) as log:
            samples = sampled(pair, count, assistant_model=pair.draft)
    finally:
        config.eos_token_id = ends
    assert len({step.num_drafted for run in log for step in run.rounds}) > 1
    return samples


def test_sampled_text_has_the_targets_law(endless):
    assert_two_token_law(sampled_under(endless, "hf_confidence:threshold=0.3", 300), *two_token_law(endless, PROMPT, 4))


def test_the_check_catches_a_rule_that_drops_what_it_has_seen(endless, monkeypatch):
    honest = hf._Assisted.draft

    def dropping(self, generate, *args, **kwargs):
        """An unlikely last candidate is not submitted."""
        out = honest(self, generate, *args, **kwargs)
        last = torch.softmax(out.scores[-1], -1)[0, out.sequences[0, -1]]
        if len(out.scores) > 1 and last < 0.5:
            out.sequences, out.scores = out.sequences[:, :-1], out.scores[:-1]
            self.candidates.pop()
        return out

    monkeypatch.setattr(hf._Assisted, "draft", dropping)
    samples = sampled_under(endless, "hf_confidence:threshold=0.3", 300)
    with pytest.raises(AssertionError, match="emitted"):
        assert_two_token_law(samples, *two_token_law(endless, PROMPT, 4))


def test_features_of_a_sampling_run_are_those_of_the_warped_law(pair, monkeypatch):
    """Temperature, top-k and top-p of generation reach the rule: it sees what decode would show it."""
    seen, honest = [], hf.Sight.update

    def watch(self, features, hidden=None):
        seen.append(features)
        honest(self, features, hidden)

    monkeypatch.setattr(hf.Sight, "update", watch)
    sampling = hf.Sampling(temperature=0.7, top_k=6, top_p=0.8)
    torch.manual_seed(0)
    with attach(pair.draft, "disco", max_candidates=4):
        text = pair.target.generate(
            torch.tensor([PROMPT]), assistant_model=pair.draft, do_sample=True, temperature=0.7, top_k=6, top_p=0.8,
            max_new_tokens=8, pad_token_id=0,
        )  # fmt: skip
    with torch.inference_mode():
        law = sampling.feature_law(pair.draft(text[:, :3]).logits[0, -1:])
    first = seen[0]
    assert first["top_prob"] == pytest.approx(float(law.probs.max()), abs=1e-5)
    assert first["entropy"] == pytest.approx(float(torch.special.entr(law.probs).sum()), abs=1e-5)
    assert min(abs(first["draft_prob"] - float(p)) for p in law.probs[0] if p > 0) < 1e-5


def test_custom_generate_takes_its_settings_from_generation(pair):
    options = {"custom_generate": speculate, "draft_model": pair.draft, "policy": "fixed:2", "do_sample": True}
    options |= {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "max_new_tokens": 12}
    torch.manual_seed(2)
    texts = [generate(pair, PROMPT, **options) for _ in range(4)]
    torch.manual_seed(2)
    assert [generate(pair, PROMPT, **options) for _ in range(4)] == texts and len(set(map(tuple, texts))) > 1
    mine = decode(pair, PROMPT, "fixed:2", max_new_tokens=12, temperature=0.7, top_k=6, top_p=0.8, seed=9)
    assert generate(pair, PROMPT, **options, seed=9) == mine.tokens
    out = pair.target.generate(torch.tensor([PROMPT]), **GREEDY | options, seed=9, return_dict_in_generate=True)
    assert out.sequences[0, 3:].tolist() == mine.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_model": None}, "draft_model is missing"),
        ({"repetition_penalty": 1.3}, "logits processor RepetitionPenaltyLogitsProcessor is not supported"),
        ({"max_time": 9.0}, "stopping criterion MaxTimeCriteria is not supported"),
        ({"policy": "lookahead:0.4"}, "needs next_accept_prob"),
        ({"num_return_sequences": 2, "do_sample": True}, "one prompt at a time"),
    ],
)
def test_custom_generate_refuses_what_it_cannot_do(pair, options, message):
    kept = {"custom_generate": speculate, "draft_model": pair.draft, "policy": "fixed:2"}
    with pytest.raises(ValueError, match=message) as error:
        generate(pair, PROMPT, **kept | options)
    assert "\n" not in str(error.value)


def test_attach_refuses_what_it_cannot_show(pair):
    for policy, name in (("oracle", "next_accepted"), ("specdecpp", "head"), ("specdecpp_ideal", "token_accept_prob")):
        with pytest.raises(Lacking, match=f"needs {name}"):
            attach(pair.draft, policy)
    for policy, message in (("optimal", "not solved"), (parse("disco:fit=1"), "not fitted"), ("fixed:13", r"0\.\.12")):
        with pytest.raises(ValueError, match=message):
            attach(pair.draft, policy)
    assert "generate" not in vars(pair.draft)


@pytest.mark.parametrize("version", ["4.57.1", "5.2.0", "6.0.0.dev0"])
def test_other_versions_of_transformers_are_refused_in_one_line(pair, monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    for call in (lambda: attach(pair.draft, FixedLength(1)), lambda: generate(pair, [3], custom_generate=speculate)):
        with pytest.raises(ValueError, match=rf"transformers {version} is not supported here; needs 5\.3 <= ") as error:
            call()
        assert "\n" not in str(error.value)
