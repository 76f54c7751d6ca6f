"""Drafts made of the target: early exit and prompt lookup, recorded, replayed and decoded like any other pair."""

import json
from collections import Counter

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.fit import SignalModel  # noqa: E402
from mdp.metrics import Tally  # noqa: E402
from mdp.policy import FixedLength, RejectionThreshold  # noqa: E402
from realmodels.decode import decode_all  # noqa: E402
from realmodels.early_exit import early_exit, shared_states_cost  # noqa: E402
from realmodels.pair import ModelPair, load_pair  # noqa: E402
from realmodels.prompt_lookup import LookupReader, PromptLookup, continuations  # noqa: E402
from realmodels.reader import PADDING, PATH  # noqa: E402
from realmodels.record import record  # noqa: E402
from realmodels.sampling import Sampling  # noqa: E402
from realmodels.tiny import tiny_target  # noqa: E402
from simulate.replay import replay_rounds  # noqa: E402
from specstop.cli import main  # noqa: E402
from tests.test_real_replay import live_samples, two_token_law  # noqa: E402
from tests.test_real_verify import assert_two_token_law  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits

SETTINGS = {"max_candidates": 5, "max_new_tokens": 24}
DRAFTS = ("exit:layers=1", "lookup:ngram=2", "rtn:bits=3,group=8")
POLICIES = {"fixed": FixedLength(3), "rejection": RejectionThreshold(0.5)}


@pytest.fixture(scope="module", params=DRAFTS)
def greedy(request, tmp_path_factory):
    """A pair and its greedy trace, over prompts that repeat themselves."""
    pair = load_pair("tiny:5", request.param)
    rng = np.random.default_rng(0)
    prompts = [(2 * rng.integers(2, 24, rng.integers(1, 9)).tolist())[:12] for _ in range(8)]
    return (
        pair,
        prompts,
        record(pair, prompts, tmp_path_factory.mktemp("t"), **SETTINGS, temperature=0, timing_repeats=1),
    )


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_live_run_is_the_targets_own_text_and_equals_replay(greedy, name):
    pair, prompts, trace = greedy
    score = name == "rejection"
    runs = decode_all(pair, prompts, POLICIES[name], **SETTINGS, temperature=0, score=score)
    log = replay_rounds(trace, POLICIES[name], model=SignalModel() if score else None)
    columns = np.stack([log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut], 1)
    accepted = 0
    for r, run in enumerate(runs):
        first, last = trace.offsets[r : r + 2]
        assert run.tokens == trace.optional["token"][first:last].tolist()
        rounds = columns[log.request == r]
        assert [round[:4] for round in map(tuple, run.rounds)] == [tuple(row) for row in rounds.tolist()], r
        accepted += rounds[:, 1].sum()
        text = list(prompts[r])
        for token in run.tokens:
            with torch.inference_mode():
                assert token == int(pair.target(torch.tensor([text])).logits[0, -1].argmax())
            text.append(token)
    assert accepted > 0


def test_the_trace_has_measured_times_and_says_what_drafted(greedy):
    pair, _, trace = greedy
    kind = pair.provenance["draft"]["spec"].split(":")[0]
    assert trace.manifest["models"]["draft"]["name"] == f"tiny:5 {pair.provenance['draft']['spec']}"
    assert trace.manifest["measured"]["draft_time"] > 0
    assert trace.manifest["draft_is_target_time"] is (kind == "rtn")
    declared = trace.manifest["models"]["draft"].get("declared_cost")
    assert (declared is not None) == (kind == "exit")
    if declared:
        assert declared["draft_time"] == 0.5 and declared["verify_time"] == 1.0


@pytest.mark.parametrize("draft", ["lookup:ngram=2", pytest.param("exit:layers=1", marks=pytest.mark.slow)])
def test_the_text_has_the_targets_law(draft):
    pair = load_pair("tiny:5", draft)
    endless, prompt = ModelPair(**{**vars(pair), "end_token_ids": ()}), [8, 4, 8]
    assert_two_token_law(live_samples(endless, prompt, FixedLength(2), 500), *two_token_law(endless, prompt, 4))


def test_early_exit_shares_weights_and_computes_the_first_layers():
    target = tiny_target(5)
    draft = early_exit(target, 1)
    mine = {id(weight) for weight in target.parameters()}
    assert all(id(weight) in mine for weight in draft.parameters())
    assert len(draft.model.layers) == draft.config.num_hidden_layers == 1
    assert len(target.model.layers) == target.config.num_hidden_layers == 2
    tokens = torch.tensor([[5, 7, 8]])
    with torch.inference_mode():
        states = target(tokens, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(draft(tokens).logits, target.lm_head(target.model.norm(states)))
        last = draft(tokens, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(last, target.model.norm(states))


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("exit:layers=2", "exit:layers=2: the target has 2 layers, so choose from 1..1"),
        ("exit:layers=0", "layers must be a whole number in 1..1023"),
        ("exit:ngram=1", "unknown parameter 'ngram'; choose from layers"),
        ("lookup:ngram=0", "ngram must be a whole number in 1..64"),
    ],
)
def test_bad_specs_get_one_line(draft, message):
    with pytest.raises(ValueError, match=message):
        load_pair("tiny", draft)


def test_decoders_without_layers_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=8, n_layer=2, n_head=1))
    with pytest.raises(ValueError, match=r"needs a decoder with \.layers and \.norm, which GPT2LMHeadModel is not"):
        early_exit(model, 1)


def test_the_cost_of_re_used_states_is_kangaroos_and_dels_count():
    """Kangaroo: n + 1 shallow passes, n of the adapter, one deep pass. DEL: (L - e) + (k + 1) e of L layers."""
    layers, total, adapter = 3, 32, 0.05
    cost = shared_states_cost(layers, total, adapter_time=adapter)
    for k, time in enumerate(cost.round_times(8)):
        assert time == pytest.approx((k + 1) * layers / total + k * adapter + (total - layers) / total)
    bare = shared_states_cost(layers, total).round_times(8)
    np.testing.assert_allclose(bare, [((total - layers) + (k + 1) * layers) / total for k in range(9)])
    # each further position costs only what the deep layers add; the head's share cannot be skipped
    sloped = shared_states_cost(8, 32, head_time=0.2, verify_slope=0.1)
    assert sloped.draft_time == pytest.approx(0.8 / 4 + 0.2) and sloped.verify_slope == pytest.approx(0.075)
    for bad in ({"layers": 32}, {"layers": 0}, {"head_time": 1.0}, {"adapter_time": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            shared_states_cost(**{"layers": 3, "total": 32, **bad})


def naive_continuations(text, ngram):
    for size in range(min(ngram, len(text) - 1), 0, -1):
        found = [text[i + size] for i in range(len(text) - size) if text[i : i + size] == text[-size:]]
        if found:
            return found
    return text


def test_continuations_are_those_of_the_longest_suffix_that_occurred():
    rng = np.random.default_rng(1)
    lengths = Counter()
    for _ in range(300):
        text = rng.integers(0, 4, rng.integers(1, 30)).tolist()
        ngram = int(rng.integers(1, 5))
        got = continuations(text, ngram).tolist()
        assert got == naive_continuations(text, ngram)
        lengths[got == text] += 1
    assert min(lengths.values()) > 10


def test_lookup_reads_paths_branches_and_rows_apart():
    """A left-padded batch of two with a branch each gives the laws of the plain texts, and cropping forgets."""
    path, branch = [[5, 7, 8, 5], [9, 9, 4, 9]], [[7, 8], [9, 4]]

    def law(text):
        token, count = np.unique(continuations(text, 2), return_counts=True)
        out = torch.zeros(24)
        out[torch.from_numpy(token)] = torch.from_numpy(count / count.sum()).float()
        return out

    reader = LookupReader(PromptLookup(2), 2, 24)
    pad = torch.tensor([[PADDING] + [PATH] * 4] * 2)
    tokens = torch.tensor([[0, *row] for row in path])
    logits = reader.read(tokens, torch.tensor([[0, 0, 1, 2, 3]] * 2), pad)
    for r in range(2):
        for j in range(4):
            torch.testing.assert_close(torch.softmax(logits[r, j + 1], -1), law(path[r][: j + 1]))
    for step in range(2):
        at = torch.tensor([[2 + step]])
        for r in range(2):
            out = reader.read(torch.tensor([[branch[r][step]]]), at, torch.tensor([[3]]), torch.tensor([[2]]),
                              rows=slice(r, r + 1))  # fmt: skip
            torch.testing.assert_close(torch.softmax(out[0, 0], -1), law(path[r][:2] + branch[r][: step + 1]))
    reader.crop(5)
    reader.swap(0, 1)
    out = reader.read(torch.tensor([[9], [7]]), torch.tensor([[4], [4]]))
    for r in range(2):
        torch.testing.assert_close(torch.softmax(out[r, 0], -1), law([*path[1 - r], [9, 7][r]]))
    with pytest.raises(ValueError, match="prompt lookup has no hidden states"):
        reader.read(torch.tensor([[9], [7]]), torch.tensor([[5], [5]]), keep_hidden=True)


def test_lookup_says_how_sure_it_is():
    """One agreed continuation: certain. None before: the text's own tokens, with their entropy."""
    pair = load_pair("tiny:5", "lookup")
    reader, sampling = pair.reader("draft", 1), Sampling()
    text = torch.tensor([[5, 7, 8, 5, 7, 23]])
    law = sampling.feature_law(reader.read(text, torch.arange(6)[None])[0])
    certain, unsure = law.select(4), law.select(5)
    assert certain.prob(torch.tensor(8)) == 1 and torch.special.entr(certain.probs).sum() == 0
    assert unsure.probs.max() == pytest.approx(1 / 3) and torch.special.entr(unsure.probs).sum() > 1


def test_self_drafts_on_the_command_line(tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": [5, 7, 5, 7 + r]}) + "\n" for r in range(3)))
    sizes = "--max-new-tokens 8 --max-candidates 3 --seed 1"
    for draft in ("exit:layers=1", "lookup:ngram=3"):
        out = tmp_path / draft[:4]
        assert main(f"record --target tiny --draft {draft} --prompts {prompts} --out {out} {sizes} --json".split()) == 0
        assert json.loads(capsys.readouterr().out)["draft_time"] > 0
        assert main(["replay", str(out), "--policy", "fixed:2", "rejection:0.4,signal=top_prob", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["policies"]
        assert all(Tally(*(row[name] for name in ("num_target_calls", "num_drafted", "num_emitted", "num_discarded",
                                                  "num_cut")), 1.0).check_balance() for row in rows)  # fmt: skip
