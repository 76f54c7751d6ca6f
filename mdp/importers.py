r"""Traces from elsewhere: files of other projects, read by the user's leave, checked line by line.

`specdecode-bench`: JSON lines with `id` and `acc_eagle.acc_len` or `acc_ngram.acc_len`, one number a position of the
output: tokens that a round starting there emits when it drafts up to 20 candidates, the target's own one included. So
*any* length is replayed exactly (greedy decoding); nothing is known of what the draft saw.

`specdec++`: the JSON list of SpecDec++'s data scripts, whose lists are often written as strings: `tokens` (the target's
text), `p_acc` (min(1, p/q) of a token the draft drew behind each prefix) or the two `log_p_...` it is made of. The
draft's tokens were drawn without regard to the text, so the coins are tossed here, with a seed, and the text goes on as
it is whatever they say: an approximation. `p_acc` is of the raw laws, before temperature and top-k.

`rounds`: JSON lines with `drafted` and `accepted` (or `per_step_drafted`, `per_step_accepted`): the rounds of one
policy, as serving stacks log them. Of each position only what that policy drafted is known (and that only if the draft
depends on the text alone); a policy that goes deeper is refused by replay. `mdp.product_limit` estimates acceptance
from them.

Nothing is evaluated, sizes are capped, numbers are checked, and a fault is one line with file and line number. Prompts
and tokens are not kept.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mdp.problem import parse_json
from mdp.trace import Trace

__all__ = ["FORMATS", "guess", "read_rounds", "read_trace"]

MAX_FILE_BYTES, MAX_LINE_BYTES = 2**30, 2**26
MAX_POSITIONS = 10**8
LONGEST_ROUND = 20
MAX_CANDIDATES = 1024
DRAFTERS = ("eagle", "ngram")

Columns = dict[str, np.ndarray]


def read_trace(path: str | Path, format: str, *, drafter: str | None = None, seed: int = 0) -> Trace:
    """A trace from a file of another project.

    Args:
        path: the file.
        format: one of `FORMATS`.
        drafter: for `specdecode-bench`, whose lengths to read: `eagle` or `ngram`; by default the first entry's first.
        seed: for `specdec++`, of the coins.

    Raises:
        ValueError: one line that names the file, the line or entry, and the fault.
    """
    if format not in FORMATS:
        raise ValueError(f"--format: must be one of {', '.join(FORMATS)}, got {format!r:.40}")
    if drafter not in (None, *DRAFTERS):
        raise ValueError(f"--drafter: must be one of {', '.join(DRAFTERS)}, got {drafter!r:.40}")
    ids: list[str] = []
    parts: list[Columns] = []
    size = 0
    for where, entry in FORMATS[format][0](Path(path)):
        drafter = drafter or next((name for name in DRAFTERS if f"acc_{name}" in entry), DRAFTERS[0])
        try:
            parts.append(FORMATS[format][1](entry, drafter, seed, len(ids)))
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from None
        name = entry.get("id", f"{where.replace(' ', '-')}")
        ids.append(str(name)[:200])
        size += len(parts[-1]["accepted"])
        if size > MAX_POSITIONS:
            raise ValueError(f"{path}: {where}: more than {MAX_POSITIONS} positions in all")
    if not parts:
        raise ValueError(f"{path}: it holds no requests")
    held = [key for key in parts[0] if all(key in part for part in parts)]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in held}
    lengths = np.array([len(part["accepted"]) for part in parts])
    # A trace of flags alone shows candidates to any depth; a round is not often longer than this.
    depth = LONGEST_ROUND if "tested" not in joined else max(int(joined["tested"].max()), 1)
    manifest: dict[str, Any] = {
        "imported": format, "max_candidates": depth, "request_ids": ids, "file": Path(path).name,
        "file_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    }  # fmt: skip
    if format == "specdecode-bench":
        manifest["drafter"] = drafter
    if format == "specdec++":
        manifest |= {"seed": seed, "coupled": False}
    features = {key: joined.pop(key) for key in ("token_accept_prob", "draft_prob") if key in joined}
    accepted = joined.pop("accepted")
    return Trace(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        limit=lengths,
        ends=np.zeros(len(lengths), dtype=bool),
        accepted=accepted,
        drafts_end=np.zeros(len(accepted), dtype=bool),
        features=features,
        optional=joined,
        manifest=manifest,
    ).validate(str(path))


def read_rounds(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds of a `rounds` file for `mdp.product_limit`: drafted, accepted, and the request each belongs to.

    Raises:
        ValueError: one line that names the file, the line and the fault.
    """
    columns = []
    for number, (where, entry) in enumerate(_json_lines(Path(path))):
        try:
            drafted, accepted = _counts(entry)
        except ValueError as error:
            raise ValueError(f"{path}: {where}: {error}") from None
        columns.append((drafted, accepted, np.full(len(drafted), number)))
    if not columns:
        raise ValueError(f"{path}: it holds no requests")
    drafted, accepted, request = (np.concatenate(column) for column in zip(*columns, strict=True))
    return drafted, accepted, request


def guess(path: str | Path) -> str | None:
    """The format that a file's first entry looks like; None if it is none of these."""
    try:
        if _first_letter(Path(path)) == "[":
            entry = next(_json_list(Path(path)), ("", {}))[1]
        else:
            entry = next(_json_lines(Path(path)), ("", {}))[1]
    except ValueError:
        return None
    keys = set(entry)
    if {"acc_eagle", "acc_ngram"} & keys:
        return "specdecode-bench"
    if {"drafted", "accepted"} <= keys or {"per_step_drafted", "per_step_accepted"} <= keys:
        return "rounds"
    return "specdec++" if "tokens" in keys and ("p_acc" in keys or any(k.startswith("log_p_") for k in keys)) else None


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: No such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes")


def _first_letter(path: Path) -> str:
    _check_size(path)
    with path.open("rb") as file:
        return file.read(64).lstrip()[:1].decode("ascii", "replace")


def _object(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"must be an object, got {entry!r:.40}")
    return entry


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_size(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}: line {number}: longer than {MAX_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                yield f"line {number}", _object(parse_json(line.decode("utf-8")))
            except UnicodeDecodeError:
                raise ValueError(f"{path}: line {number}: not UTF-8 text") from None
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None


def _json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    _check_size(path)
    try:
        entries = parse_json(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be a list of objects, got {entries!r:.40}")
    for number, entry in enumerate(entries, 1):
        try:
            yield f"entry {number}", _object(entry)
        except ValueError as error:
            raise ValueError(f"{path}: entry {number}: {error}") from None


def _numbers(entry: dict[str, Any], key: str, low: float, high: float, whole: bool) -> np.ndarray:
    """A row of numbers, which may be written as a string."""
    if key not in entry:
        raise ValueError(f"{key}: missing")
    value = entry[key]
    if isinstance(value, str):
        if len(value) > MAX_LINE_BYTES:
            raise ValueError(f"{key}: longer than {MAX_LINE_BYTES} bytes")
        try:
            value = parse_json(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key}: must be a list of numbers, got {value!r:.40}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, kinds) or not low <= item <= high:
            what = "whole numbers" if whole else "numbers"
            raise ValueError(f"{key}: must be {what} in {low:g}..{high:g}, got {item!r:.40}")
    return np.array(value, dtype=np.int64 if whole else np.float64)


def _bench(entry: dict[str, Any], drafter: str, seed: int, index: int) -> Columns:
    field = f"acc_{drafter}"
    if field not in entry:
        raise ValueError(f"{field}: missing")
    runs = _numbers(_object(entry[field]), "acc_len", 1, LONGEST_ROUND + 1, whole=True) - 1
    return {"accepted": runs > 0, "run_length": runs, "tested": np.full(len(runs), LONGEST_ROUND)}


def _specdecpp(entry: dict[str, Any], drafter: str, seed: int, index: int) -> Columns:
    out: Columns = {}
    if "p_acc" in entry:
        accept = _numbers(entry, "p_acc", 0.0, 1.0, whole=False)
    else:
        target = next((key for key in ("log_p_70b", "log_p_13b") if key in entry), "log_p_70b")
        logs = [_numbers(entry, key, -1e6, 1e-3, whole=False) for key in (target, "log_p_7b")]
        if len(logs[0]) != len(logs[1]):
            raise ValueError(f"{target}: must be as long as log_p_7b")
        accept = np.exp(np.minimum(logs[0] - logs[1], 0.0))
    if "log_p_7b" in entry:
        out["draft_prob"] = np.exp(np.minimum(_numbers(entry, "log_p_7b", -1e6, 1e-3, whole=False), 0.0))
    tokens = _numbers(entry, "tokens", 0, 2**31, whole=True)
    for key, row in (("p_acc", accept), *out.items()):
        if len(row) != len(tokens):
            raise ValueError(f"{key}: must be as long as tokens ({len(tokens)}), got {len(row)}")
    coins = np.random.default_rng([seed, index]).random(len(accept))
    return {"accepted": coins < accept, "token_accept_prob": accept, **out}


def _counts(entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    prefix = "per_step_" if "per_step_drafted" in entry else ""
    drafted, accepted = (
        _numbers(entry, f"{prefix}{key}", 0, MAX_CANDIDATES, whole=True) for key in ("drafted", "accepted")
    )
    if len(drafted) != len(accepted):
        raise ValueError(f"{prefix}accepted: must be as long as {prefix}drafted ({len(drafted)}), got {len(accepted)}")
    bad = np.flatnonzero(accepted > drafted)
    if bad.size:
        raise ValueError(f"{prefix}accepted: round {bad[0]} accepted {accepted[bad[0]]} of {drafted[bad[0]]}")
    return drafted, accepted


def _rounds(entry: dict[str, Any], drafter: str, seed: int, index: int) -> Columns:
    drafted, accepted = _counts(entry)
    emitted = accepted + 1
    within = np.arange(emitted.sum()) - np.repeat(np.cumsum(emitted) - emitted, emitted)
    runs, tested = (np.repeat(counts, emitted) - within for counts in (accepted, drafted))
    return {"accepted": runs > 0, "run_length": runs, "tested": tested}


Read = Callable[[Path], Iterator[tuple[str, dict[str, Any]]]]
Convert = Callable[[dict[str, Any], str, int, int], Columns]

FORMATS: dict[str, tuple[Read, Convert]] = {
    "specdecode-bench": (_json_lines, _bench),
    "specdec++": (_json_list, _specdecpp),
    "rounds": (_json_lines, _rounds),
}
"""How a file of each format is read, and one of its entries turned into columns."""
