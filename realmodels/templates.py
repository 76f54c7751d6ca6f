"""Prompt templates: how a task becomes the text that a model reads.

`chat` is the tokenizer's own chat template and the default. The others are those of SpecDec++'s official code
(`data/gen_dataset.py` of Kaffaljidhmah2/SpecDec_pp, read): each task is put into words and stands between
`[INST]` and `[/INST]`, with blanks at its ends removed and no system message. Its wordings for HumanEval and GSM8K
are WizardCoder's and MetaMath's.

Alpaca's optional input is written "\\nInput: ..." behind the instruction, in every template. Where a template of no
task meets a HumanEval problem, the request "Complete the following Python function" is our wording.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFAULT", "TEMPLATES", "Template", "task_text", "used_template"]

DEFAULT = "chat"
_BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@dataclass(frozen=True)
class Template:
    """A template: its `wording` around {text} (None: the tokenizer's chat template), and where it is from.

    Attributes:
        inst: whether the whole stands between [INST] and [/INST].
        for_code: whether a HumanEval problem goes in as it stands.
    """

    wording: str | None
    source: str
    inst: bool = False
    for_code: bool = False

    def apply(self, task: str) -> str:
        """The text that the model reads, before the tokenizer's special tokens."""
        assert self.wording is not None
        before, _, after = self.wording.partition("{text}")  # not str.format: a task may hold braces
        text = before + task + after
        return f"[INST] {text.strip()} [/INST]" if self.inst else text


_CODE = "SpecDec++, data/gen_dataset.py"
TEMPLATES = {
    "chat": Template(None, "the tokenizer"),
    "plain": Template("{text}", "the text as it is", for_code=True),
    "llama2": Template("{text}", _CODE, inst=True),
    "alpaca": Template("{text}", _CODE, inst=True),
    "gsm8k": Template(
        f"{_BELOW}\n\n### Instruction:\n{{text}}\n\n### Response: Let's think step by step.",
        f"{_CODE}, after MetaMath",
        inst=True,
    ),
    "human-eval": Template(
        f"{_BELOW}\n\n\n### Instruction:\nCreate a Python script for this problem:\n{{text}}\n\n### Response:",
        f"{_CODE}, after WizardCoder",
        inst=True,
        for_code=True,
    ),
}
_COMPLETE = "Complete the following Python function:\n```python\n{}```"  # ours


def task_text(entry: dict[str, Any], template: str) -> str:
    """The task of an entry in words, checked to be text.

    Raises:
        ValueError: if a field is not text; the message starts with the field's name.
    """
    key = next(key for key in ("prompt", "instruction", "question", "code") if key in entry)
    parts = [key, "input"] if key == "instruction" and entry.get("input") is not None else [key]
    for part in parts:
        if not isinstance(entry[part], str):
            raise ValueError(f"{part} must be text")
    text = entry[key]
    if key == "code" and not TEMPLATES[template].for_code:
        return _COMPLETE.format(text)
    if len(parts) == 2 and entry["input"].strip():
        return f"{text}\nInput: {entry['input']}"
    return text


def used_template(name: str, tokenizer: Any) -> dict[str, str]:
    """Name and hash of the template that `name` comes to with a tokenizer, for the manifest.

    A tokenizer without a chat template reads plain text.

    Raises:
        ValueError: if there is no such template.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template: choose from {', '.join(TEMPLATES)}, got {name!r:.60}")
    if TEMPLATES[name].wording is not None:
        text = TEMPLATES[name].apply("{text}")
    elif chat := getattr(tokenizer, "chat_template", None):
        text = str(chat)
    else:
        name, text = "plain", "{text}"
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}
