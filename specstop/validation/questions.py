r"""The open questions of a validation, each with a table and an honest sentence (`specstop validate --full`).

*Does one threshold suit several pairs and prompt sets?* Drafts made of the same target in four ways, each on the given
prompts and on chats whose user turns the target wrote itself (after Magpie, arXiv 2406.08464: the chat template cut
where the user's words would stand, and the target goes on). Two rules, one on the calibrated survival
(`rejection`, signal `draft_prob`) and one on the draft probability as it is (`hf_confidence`): on each case the
threshold that is best on its training half against the one that was best on the first case's. All under the times of
the report, so that what differs is acceptance.

*How do gains move with context length?* The same prompts alone and behind others, recorded anew; acceptance, measured
times and gains of each.

*What do richer inputs of a head buy?* `specstop.validation.head_inputs`.

Recordings are kept in `DIR/full`, answers in `DIR/stages`: a killed run goes on where it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mdp.cost import Cost
from mdp.fit import fit_signal, split_requests
from mdp.trace import Trace, load
from simulate.estimate import Estimate, paired, ratio
from simulate.quality import best_of, best_on, earned
from simulate.replay import measured_cost
from specstop.validation.policies import SIGNAL, THRESHOLDS, digest, with_interval

__all__ = ["Sizes", "answer"]

CONFIDENCES = tuple(f"{t:.2f}" for t in np.arange(0.0, 0.961, 0.04))
RULES = {
    "rejection": (f"rejection:{{}},signal={SIGNAL}", THRESHOLDS),
    "hf_confidence": ("hf_confidence:threshold={}", CONFIDENCES),
}
CHATS = "self-generated chats"
SENTINEL = "USERTURN"
LONG, LONG_BATCH = 512, 8
"""Prompts of more tokens are recorded so many at a time, to bound the memory of the caches."""


@dataclass(frozen=True)
class Sizes:
    """Of each recording that answers a question; `contexts` in tokens before the prompt itself."""

    num_prompts: int = 24
    max_new_tokens: int = 48
    num_long: int = 16
    contexts: tuple[int, ...] = (512, 1024)
    turn_tokens: int = 48

    @property
    def num_tokens(self) -> int:
        """Recorded for all questions, at most."""
        return self.max_new_tokens * (2 * NUM_DRAFTS * self.num_prompts + (1 + len(self.contexts)) * self.num_long)


NUM_DRAFTS = 4
QUICK = Sizes(num_prompts=8, max_new_tokens=16, num_long=6, contexts=(24,), turn_tokens=12)


def answer(work: Any, quick: bool) -> list[dict[str, Any]]:
    """All questions, in the order of the module docstring; a question that cannot be put says why."""
    from specstop.validation.head_inputs import ladder

    sizes = QUICK if quick else Sizes()
    work.progress.expect(work.progress.RECORDED * sizes.num_tokens)
    key = digest(asdict(work.settings), asdict(sizes), work.cost.verify_times(work.trace.max_candidates),
                 work.cost.draft_time, work.trace.manifest["shards"])  # fmt: skip
    asked: dict[str, Callable[[], Any]] = {
        "thresholds": lambda: _thresholds(work, sizes),
        "contexts": lambda: _contexts(work, sizes),
        "head-inputs": lambda: ladder(work.trace, work.cost, work.train, work.test, work.settings.level),
    }
    return [work.stages.get(f"question-{name}", key, ask) for name, ask in asked.items()]


def drafts_of(settings: Any, num_layers: int) -> list[str]:
    """The drafts compared, the report's own first."""
    others = [
        "rtn:bits=3,group=32",
        f"exit:layers={max(1, min(num_layers - 1, round(0.87 * num_layers)))}",
        "lookup:ngram=3",
    ]
    return [settings.draft, *(draft for draft in others if draft != settings.draft)]


def _thresholds(work: Any, sizes: Sizes) -> dict[str, Any]:
    from realmodels.pair import load_pair

    settings = work.settings
    prompts = {settings.prompts: work.prompts[: sizes.num_prompts], CHATS: chats(work.pair, sizes, settings.seed)}
    rows: list[dict[str, Any]] = []
    refused, common = [], {}
    for draft in drafts_of(settings, work.pair.target.config.num_hidden_layers):
        try:
            pair = work.pair if draft == settings.draft else load_pair(settings.target, draft, **settings.loading)
        except ValueError as error:
            refused.append(f"{draft} ({error})")
            continue
        for source, tokens in prompts.items():
            work.progress.tell(f"question 1: {draft} on {source}")
            trace = _recorded(work, pair, tokens, f"{draft}-{'chats' if source == CHATS else 'prompts'}", sizes)
            for rule in RULES:
                row = _own_and_common(trace, work.cost, rule, common, settings.level)
                rows.append({"draft": draft, "prompts": source, "rule": rule,
                             "acceptance": _acceptance(trace, settings.level)} | row)  # fmt: skip
    return {"question": "Does one threshold suit several pairs and prompt sets?",
            "answer": _one_threshold(rows, refused), "rows": rows}  # fmt: skip


def _own_and_common(trace: Trace, cost: Cost, rule: str, common: dict[str, str], level: float) -> dict[str, Any]:
    """The rule at its own best threshold and at the first case's, on the test half, paired by request."""
    train, test = split_requests(trace)
    model = fit_signal(trace, SIGNAL, train)
    pattern, grid = RULES[rule]
    reader = model if "signal" in pattern else None
    values = {pattern.format(value): value for value in grid}
    own = values[best_of(trace, values, train, cost, reader).policy]
    shared = common.setdefault(rule, own)
    mine, theirs = (earned(trace, pattern.format(value), test, cost, reader).tally for value in (own, shared))
    best_fixed = best_on(trace, [f"fixed:{k}" for k in range(trace.max_candidates + 1)], train, test, cost)
    fixed = best_fixed.tally
    return {
        "own threshold": own,
        "common threshold": shared,
        "own": with_interval(ratio(mine.num_emitted, mine.time), len(test), level),
        "common": with_interval(ratio(theirs.num_emitted, theirs.time), len(test), level),
        "lost by the common one": _relative(mine, theirs, len(test), level),
        "best fixed": best_fixed.policy,
        "own over best fixed": _relative(mine, fixed, len(test), level, of_second=True),
    }


def _acceptance(trace: Trace, level: float) -> dict[str, Any]:
    """Mean probability that the draft's next token is accepted, over all positions of the recording."""
    owner = np.repeat(np.arange(trace.num_requests), np.diff(trace.offsets))
    sums = np.bincount(owner, weights=trace.features["step_accept_prob"].astype(float))
    return with_interval(ratio(sums, np.diff(trace.offsets)), trace.num_requests, level)


def _relative(first: Any, second: Any, count: int, level: float, of_second: bool = False) -> dict[str, Any]:
    """Throughput of `first` minus that of `second` as a share of one of them, with its paired interval."""
    whole = second if of_second else first
    scale = float(whole.num_emitted.sum() / whole.time.sum())
    difference = paired(first, second)
    return with_interval(Estimate(difference.value / scale, difference.se / scale), count, level)


def _one_threshold(rows: Sequence[dict[str, Any]], refused: Sequence[str]) -> str:
    parts = []
    for rule in RULES:
        mine = [row for row in rows if row["rule"] == rule]
        if not mine:
            continue
        others = mine[1:] or mine  # the first case's own is the common one
        worst = max(others, key=lambda row: row["lost by the common one"]["value"])
        lost = worst["lost by the common one"]
        low, high = (100 * end for end in lost["interval"])
        clear = [row for row in mine if row["lost by the common one"]["interval"][0] > 0]
        own = sorted(float(row["own threshold"]) for row in mine)
        parts.append(
            f"`{rule}`: own thresholds run from {own[0]:g} to {own[-1]:g} over {len(mine)} cases; with that of the "
            f"first case for all of them the most is lost on {worst['draft']}, {worst['prompts']}: "
            f"{100 * lost['value']:.1f} % [{low:.1f}, {high:.1f}]; "
            + (f"clear of zero in {len(clear)} case(s)." if clear else "clear of zero nowhere.")
        )
    parts.append(
        "A threshold that was best on a few training requests is noise in part: a negative loss means that the common "
        "one was the better one on the requests that judge. All under the times of this report, so that cases differ "
        "in acceptance alone; a draft that is really cheaper, as prompt lookup is, would earn more than shown."
    )
    untried = [*refused, "a distilled draft (no recipe for one is run here)"]
    parts.append(f"Not tried: {'; '.join(untried)}.")
    return " ".join(parts)


def chats(pair: Any, sizes: Sizes, seed: int) -> list[list[int]]:
    """Prompts whose user turns the target wrote itself; pairs without a chat template go on from one drawn token."""
    from realmodels.decode import decode
    from realmodels.prompts import tokenise

    tokenizer = pair.tokenizer
    options: dict[str, Any] = {"max_candidates": 1, "max_new_tokens": sizes.turn_tokens, "seed": seed}
    if tokenizer is None or not tokenizer.chat_template:
        drawn = np.random.default_rng([seed, 11]).integers(2, pair.vocab_size, (sizes.num_prompts, 1)).tolist()
        runs = [decode(pair, p, "fixed:0", request=f"turn-{i}", **options) for i, p in enumerate(drawn)]
        return [
            [*p, *(t for t in run.tokens if t not in pair.end_token_ids)] for p, run in zip(drawn, runs, strict=True)
        ]
    text = tokenizer.apply_chat_template([{"role": "user", "content": SENTINEL}], tokenize=False)
    before = tokenizer(text.split(SENTINEL)[0], add_special_tokens=False).input_ids
    out: list[list[int]] = []
    attempt = 0
    while len(out) < sizes.num_prompts:
        run = decode(pair, before, "fixed:0", request=f"turn-{attempt}", **options)
        attempt += 1
        turn = tokenizer.decode([t for t in run.tokens if t not in pair.end_token_ids]).strip()
        if turn:
            out += tokenise([(f"chat {len(out)}", {"messages": [{"role": "user", "content": turn}]})], pair)
        elif attempt > 20 * sizes.num_prompts:
            raise ValueError("the target writes no user turns of its own")
    return out


def _recorded(
    work: Any, pair: Any, prompts: Sequence[Sequence[int]], name: str, sizes: Sizes, timing: int = 0
) -> Trace:
    """A recording of the question's size, made now unless it is there."""
    from realmodels.record import record
    from realmodels.streams import request_ids

    folder = Path(work.stages.folder).parent / "full" / name.replace(":", "-").replace("=", "").replace(",", "-")
    if (folder / "manifest.json").exists():
        trace = load(folder)
        pair.check_recorded(trace.manifest.get("models"), str(folder))
        if trace.request_ids == request_ids(prompts) and trace.manifest["max_new_tokens"] == sizes.max_new_tokens:
            return trace
        raise ValueError(f"--out: {folder} holds a trace of other settings; remove it or choose another --out")
    sampling = work.settings.sampling | {"max_new_tokens": sizes.max_new_tokens}
    long = max(map(len, prompts)) > LONG
    batch = min(work.settings.batch_size, LONG_BATCH) if long else work.settings.batch_size

    def tell(count: int) -> None:
        work.progress.tell(f"question on {name}", work.progress.RECORDED * count * sizes.max_new_tokens)

    return record(pair, prompts, folder, **sampling, batch_size=batch, timing_repeats=timing, store_top=0,
                  progress=tell)  # fmt: skip


def _contexts(work: Any, sizes: Sizes) -> dict[str, Any]:
    settings, rows = work.settings, []
    prompts = work.prompts[: sizes.num_long]
    for length in (0, *sizes.contexts):
        work.progress.tell(f"question 2: {length} tokens before each prompt")
        behind = [_behind(work.prompts, number, length) for number in range(len(prompts))]
        trace = _recorded(work, work.pair, behind, f"context-{length}", sizes, timing=settings.timing_repeats)
        rows.append(_of_context(trace, work.cost, behind, settings.level))
    return {"question": "How do gains move with context length?", "answer": _moves(rows), "rows": rows}


def _behind(prompts: Sequence[Sequence[int]], number: int, length: int) -> list[int]:
    """The prompt behind as many of the others as make up `length` tokens."""
    before: list[int] = []
    other = number
    while len(before) < length:
        other = (other + 1) % len(prompts)
        before += prompts[other]
    return [*before[len(before) - length :], *prompts[number]]


def _of_context(trace: Trace, cost: Cost, prompts: Sequence[Sequence[int]], level: float) -> dict[str, Any]:
    """Acceptance, times and gains of one recording; lengths and thresholds from its training half."""
    of_report = _own_and_common(trace, cost, "rejection", {}, level)
    times = measured_cost(trace)
    verify = times.verify_times(trace.max_candidates)
    own = _own_and_common(trace, times, "rejection", {}, level)
    return {
        "context": f"{np.mean([len(prompt) for prompt in prompts]):.0f} tokens",
        "acceptance": _acceptance(trace, level),
        "V(4)/V(0), measured": float(verify[min(4, len(verify) - 1)] / verify[0]),
        "draft step/V(0), measured": float(times.draft_time / verify[0]),
        "V(0), s": float(verify[0]),
        "best fixed": of_report["best fixed"],
        "rejection over best fixed": of_report["own over best fixed"],
        "the same under measured times": own["own over best fixed"],
    }


def _moves(rows: Sequence[dict[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    a, b = (row["acceptance"] for row in (first, last))
    apart = a["interval"][1] < b["interval"][0] or b["interval"][1] < a["interval"][0]
    gains = [row["rejection over best fixed"] for row in rows]
    shown = ", ".join(f"{100 * gain['value']:+.1f} %" for gain in gains)
    overlap = max(g["interval"][0] for g in gains) <= min(g["interval"][1] for g in gains)
    return (
        f"From {first['context']} to {last['context']} of context acceptance goes from {a['value']:.3f} to "
        f"{b['value']:.3f} ({'intervals apart' if apart else 'intervals overlap'}), V(4)/V(0) from "
        f"{first['V(4)/V(0), measured']:.2f} to {last['V(4)/V(0), measured']:.2f}. What a threshold gains over the "
        f"best fixed length under the report's times: {shown}; "
        + ("the intervals share a value, so no trend is shown." if overlap else "the intervals do not all overlap.")
    )
