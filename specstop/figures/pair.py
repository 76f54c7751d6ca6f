"""Figures of the recorded pair: one of its rounds, its oracle, and how far prediction, replay and live run agree."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mdp.fit import fit_signal, split_requests
from mdp.policy import parse
from simulate.estimate import interval, ratio
from specstop.figures.recipe import Data, Recipe, series
from specstop.figures.sources import LIVE_SIGNAL, PLAIN
from specstop.figures.store import Store
from specstop.outcome import COST_RATIO
from specstop.paper import DATASETS, ORACLE
from specstop.prediction import FIRST

__all__ = ["PAIR", "RECIPES", "live_speedups", "predicted_systems", "replayed_row", "systems", "wall_speedups"]

PAIR = "pair"
"""The panel of the recorded pair."""


def systems(chosen: Sequence[str]) -> dict[str, str]:
    """What the bars are called, and the policy string behind each."""
    return {
        "no speculation": PLAIN,
        "best fixed K": chosen[0],
        "threshold, draft prob.": _chosen(chosen, "rejection", LIVE_SIGNAL),
        "optimum of its chain": f"optimal:signal={LIVE_SIGNAL}",
        "perfect head": _chosen(chosen, "rejection", "token_accept_prob"),
        "oracle": "oracle",
    }


def _chosen(chosen: Sequence[str], family: str, signal: str) -> str:
    return next(text for text in chosen if text.startswith(family) and text.endswith(f"signal={signal}"))


def replayed_row(row: Mapping[str, Any]) -> Data:
    """Speedup and interval of a replayed policy; declared times, in target calls."""
    low, high = row["throughput_interval"]
    return {"speedup": row["speedup"], "low": low, "high": high}


def predicted_systems(store: Store, panel: str) -> Iterator[Data]:
    """What the training half predicts of each system."""
    modelled, chosen = store.get("modelled"), store.get("replayed")["chosen"]
    length, named = parse(chosen[0]).policy, systems(chosen)
    rules = {text: value for found in modelled["signals"].values() for text, value in found["rules"].items()}
    values = {
        "no speculation": 1.0,
        "best fixed K": modelled["fixed"]["speedup"][length.length],  # type: ignore[union-attr]
        **{name: rules[text] for name, text in named.items() if text in rules},
        "oracle": modelled["oracle"],
    }
    yield series("predicted", "predicted", panel=panel, system=list(values), speedup=list(values.values()),
                 low=list(values.values()), high=list(values.values()), fitted=[False] * len(values))  # fmt: skip


def by_policy(live: Data) -> dict[str, dict[str, np.ndarray]]:
    """Columns of the live run for each policy, in the order played."""
    keys = [key for key in live["rows"][0] if key != "policy"]
    return {
        policy: {key: np.array([row[key] for row in live["rows"] if row["policy"] == policy]) for key in keys}
        for policy in live["policies"]
    }


def live_speedups(store: Store, panel: str) -> Iterator[Data]:
    """The live run's counts under the declared cost."""
    names = {policy: system for system, policy in systems(store.get("replayed")["chosen"]).items()}
    rows = []
    for policy, found in by_policy(store.get("live")).items():
        time = COST_RATIO * found["num_drafted"] + found["num_target_calls"]
        estimate = ratio(found["num_emitted"], time)
        rows.append((names[policy], policy, estimate.value, *interval(estimate, len(time))))
    columns = dict(zip(("system", "policy", "speedup", "low", "high"), zip(*rows, strict=True), strict=True))
    yield series("live", "measured", panel=panel, source="counts of the live run, times declared", **columns)


def wall_speedups(store: Store, panel: str) -> Iterator[Data]:
    """Tokens per second on this machine: the live run, and the replay under the times measured with the trace."""
    replayed = store.get("replayed")
    names = {policy: system for system, policy in systems(replayed["chosen"]).items()}
    live, rows = by_policy(store.get("live")), []
    for policy, found in live.items():
        estimate = ratio(found["num_emitted"], found["seconds"])
        rows.append((names[policy], policy, estimate.value, *interval(estimate, len(found["seconds"]))))
    keys = ("system", "policy", "tokens_per_second", "low", "high")
    timed = replayed["measured_times"]
    if timed:
        again = [(names[p], p, timed[p]["throughput"], *timed[p]["throughput_interval"]) for p in live]
        yield series("replayed", "replayed", panel=panel, source="times measured when the trace was recorded",
                     **dict(zip(keys, zip(*again, strict=True), strict=True)))  # fmt: skip
    yield series("live", "measured", panel=panel, **dict(zip(keys, zip(*rows, strict=True), strict=True)))


def _round(store: Store) -> Data:
    """A round of the trace under the chosen threshold: some candidates accepted, then a rejection."""
    from simulate.replay import replay_rounds

    trace, chosen = store.trace, store.get("replayed")["chosen"]
    train, test = split_requests(trace)
    policy = _chosen(chosen, "rejection", LIVE_SIGNAL)
    model = fit_signal(trace, LIVE_SIGNAL, train)
    log = replay_rounds(trace, policy, model=model, requests=test.tolist())
    # the round that shows most: accepted and discarded candidates, and neither at the end of its text
    room = log.start + log.num_drafted + 2 < np.diff(trace.offsets)[log.request]
    score = np.minimum(log.num_accepted, 4) + 2 * np.minimum(log.num_drafted - log.num_accepted, 2) + 10 * room
    at = int(score.argmax())
    request, start = int(log.request[at]), int(log.start[at])
    drafted, accepted = int(log.num_drafted[at]), int(log.num_accepted[at])
    first = int(trace.offsets[request]) + start
    values, shown, words = [], [], []
    tokens, rolled = trace.optional.get("draft_token"), trace.optional.get("rollout_draft_token")
    text = _reader(store)
    for i in range(drafted):
        on_path = i <= accepted
        place = first + i if on_path else int(trace.rollout_offsets[first + accepted]) + i - accepted - 1  # type: ignore[index]
        features = trace.features if on_path else trace.rollout_features
        shown.append(float(features[LIVE_SIGNAL][place]))
        values.append(float(model.accept_prob(shown[-1])))
        held = tokens if on_path else rolled
        words.append(None if held is None else text(int(held[place])))
    target = trace.optional.get("token")
    following = None if target is None else text(int(target[first + accepted]))
    status = ["accepted"] * accepted + ["rejected"] * (drafted > accepted) + ["behind"] * max(drafted - accepted - 1, 0)
    survival = np.cumprod(values)
    threshold = float(parse(policy).policy.threshold)  # type: ignore[union-attr]
    return {
        "series": [
            series("candidates", "replayed", policy=[policy] * drafted, k=range(1, drafted + 1), token=words,
                   draft_prob=shown, accept_prob=values, survival=survival, status=status),
            series("target", "replayed", token=[following], num_emitted=[accepted + 1],
                   kind=["correction" if accepted < drafted else "bonus"]),
        ],
        "about": {"threshold": threshold, "draft_time": COST_RATIO, "verify_time": 1.0, "request": request,
                  "start": start, "pair": store.get("replayed")["pair"]},
    }  # fmt: skip


def _reader(store: Store) -> Any:
    """Token id to text; the id itself where no tokenizer can be had without loading models."""
    spec = ((store.trace.manifest.get("models") or {}).get("target") or {}).get("spec")
    tokenizer = None
    if spec == "bundled":
        with suppress(Exception):  # the picture is the same with ids
            from transformers import AutoTokenizer

            from realmodels.gguf_file import BUNDLED_PACKAGE, converted, file_digest, find_gguf

            path = find_gguf(BUNDLED_PACKAGE)
            tokenizer = AutoTokenizer.from_pretrained(converted(path, file_digest(path)))
    return (lambda token: f"#{token}") if tokenizer is None else (lambda token: tokenizer.decode([token]))


def _round_caption(data: Data) -> str:
    about, target = data["about"], data["series"][1]["columns"]
    columns = data["series"][0]["columns"]
    accepted = columns["status"].count("accepted")
    return (
        f"One round of speculative decoding, *replayed* from the trace of {about['pair']['label']} (request "
        f"{about['request']}, {about['start']} tokens into its answer). The draft proposes candidates one at a time; "
        "the estimated probability that all of them will be accepted (survival) falls, and once that of a rejection "
        f"exceeds h = {about['threshold']:g} drafting stops. One pass of the target verifies all of them: "
        f"{accepted} of {len(columns['k'])} are accepted, the target's own token ({target['kind'][0]}) follows, and "
        f"the round adds {target['num_emitted'][0]} tokens. What stands behind the first rejection is discarded, "
        f"unseen. A draft step is drawn {about['draft_time']:g} target calls wide, declared."
    )


def _oracle(store: Store) -> Data:
    prediction, replayed, modelled = (store.get(name) for name in ("prediction", "replayed", "modelled"))
    data = DATASETS[FIRST]
    rows = {row["quantity"]: row for row in prediction["predicted"] if row["dataset"] == FIRST}
    read = [("best fixed K", data.best_fixed), ("SpecDec++", data.specdec), ("oracle", ORACLE.speedup)]
    out = [
        series("published", "published", panel=FIRST, tag=figure.tag, source=figure.source, system=[name],
               speedup=[figure.value], low=[figure.value - figure.rounding], high=[figure.value + figure.rounding])
        for name, figure in read
    ]  # fmt: skip
    names = {"optimum with the same head, no lag, no bias": "optimum, same head",
             "oracle speedup from the mean": "oracle",
             "oracle speedup at the published v": "oracle at the published v"}  # fmt: skip
    shown = [(name, rows[quantity]["predicted"], *rows[quantity]["interval"]) for quantity, name in names.items()]
    keys = ("system", "speedup", "low", "high")
    out.append(series("predicted", "predicted", panel=FIRST, **dict(zip(keys, zip(*shown, strict=True), strict=True))))
    rules = {name: policy for name, policy in systems(replayed["chosen"]).items() if name != "no speculation"}
    shown = [(name, *replayed_row(replayed["policies"][policy]).values()) for name, policy in rules.items()]
    out.append(series("replayed", "replayed", panel=PAIR, **dict(zip(keys, zip(*shown, strict=True), strict=True))))
    (predicted,) = predicted_systems(store, PAIR)
    kept = [i for i, name in enumerate(predicted["columns"]["system"]) if name != "no speculation"]
    predicted["columns"] = {key: [value[i] for i in kept] for key, value in predicted["columns"].items()}
    about = {"pair": replayed["pair"], "declared": COST_RATIO, "num_requests": replayed["num_requests"],
             "level": replayed["level"], "mean": modelled["mean"]}  # fmt: skip
    return {"series": [*out, predicted], "about": about}


def _oracle_caption(data: Data) -> str:
    about = data["about"]
    return (
        "How much of the oracle's gain can be had. The oracle drafts exactly what will be accepted: a bracket, no "
        f"rule. **{FIRST}**: *published* speedups (the oracle's was decoded greedily, the rest at temperature 1); "
        "*predicted*: what the head that was fitted could earn at best, and the oracle from the mean acceptance and at "
        f"its own published verification rate. **{about['pair']['label']}**: *replayed* on {about['num_requests']} "
        f"requests of the test half ({100 * about['level']:g} % intervals), a draft step declared "
        f"{about['declared']:g} target calls; *predicted* from the training half. A perfect head sees "
        "true acceptance, the most that a head can tell, and stays far below the oracle."
    )


RECIPES = (
    Recipe("round", "A round of speculative decoding", ("replayed",), _round, _round_caption),
    Recipe("oracle", "The oracle and what can be had of it", ("prediction", "replayed", "modelled"), _oracle,
           _oracle_caption),
)  # fmt: skip
