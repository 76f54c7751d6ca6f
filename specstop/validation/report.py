"""A validation as text: predicted, replayed and live side by side, and a sentence on each larger difference."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specstop.output import table, write_file

__all__ = ["explain", "headline", "write_report"]

LARGE = 0.03
"""A prediction off by more, relatively, or by more than `NOTABLE` standard errors, gets a sentence."""

NOTABLE, ALARMING = 2.0, 3.0
LIVE = "Replay and live differ"  # how a sentence on these two begins
RATES = {
    "block_efficiency": "block efficiency (tokens per target call)",
    "discard_rate": "discard rate (discarded candidates per token)",
    "verification_rate": "verification rate (target calls per token)",
}


def explain(entry: Mapping[str, Any]) -> list[str]:
    """One sentence for each difference between two of the three that is larger than it need be."""
    out = []
    predicted, z = entry["predicted"], entry["z_predicted_replayed"]
    if "throughput" in predicted:
        off = predicted["throughput"] / entry["replayed"]["throughput"] - 1.0
        if abs(off) > LARGE or (z is not None and abs(z) > NOTABLE):
            out.append(_why_predicted(predicted, entry["replayed"], off, z))
    worst = max(entry["z"], key=lambda name: abs(entry["z"][name]))
    if abs(entry["z"][worst]) > NOTABLE:
        out.append(_why_live(entry, worst))
    return out


def _parts(predicted: Mapping[str, Any], replayed: Mapping[str, Any]) -> tuple[float, float, float]:
    """What a prediction's difference consists of: ends of texts, process, halves; % of the replayed throughput."""
    known, base = replayed["on_training_half"], replayed["throughput"]
    ended = predicted.get("with_ends", predicted)["throughput"]
    steps = ((predicted["throughput"], ended), (ended, known), (known, base))
    ends, process, halves = (100 * (one - other) / base for one, other in steps)
    return ends, process, halves


def _why_predicted(predicted: Mapping[str, Any], replayed: Mapping[str, Any], off: float, z: float | None) -> str:
    ends, process, halves = _parts(predicted, replayed)
    known, ended = replayed["on_training_half"], predicted.get("with_ends", {})
    parts = [f"{halves:+.1f} the two halves (the replay of the training one gives {known:.3f})",
             f"{process:+.1f} what the process leaves out"]  # fmt: skip
    if "end_prob" in ended:
        how = f"(the same process simulated with a chance of {ended['end_prob']:.3f} a token)"
        parts.insert(0, f"{ends:+.1f} points are that texts start and end {how}")
    chance = ""
    if z is not None:
        sure = "no more than chance gives." if abs(z) <= NOTABLE else "more than chance gives; the process is not all."
        chance = f" {'With ends it' if 'end_prob' in ended else 'It'} is off by {abs(z):.1f} standard errors: {sure}"
    return f"Predicted {100 * off:+.1f} % against the replay: {', '.join(parts)}.{chance}"


def _why_live(entry: Mapping[str, Any], worst: str) -> str:
    z, one, other = entry["z"][worst], entry["replayed"][worst], entry["live"][worst]
    text = f"{LIVE} by {abs(z):.1f} standard errors in {worst.replace('_', ' ')} ({one:.3f}, {other:.3f})"
    if abs(z) > ALARMING:
        return text + ": more than chance explains; look for a fault in the replay or in the live loop."
    return text + ": within what chance gives one of so many comparisons."


def headline(result: Mapping[str, Any], out: str | Path) -> str:
    """The table for the terminal."""
    rows = []
    for entry in result["policies"]:
        row = {"policy": entry["policy"]}
        for kind in ("predicted", "replayed", "live"):
            row[kind] = _number(entry[kind].get("throughput"), 4)
            if kind == "predicted":
                row["predicted, texts end"] = _number(entry[kind].get("with_ends", {}).get("throughput"), 4)
            if kind != "predicted":
                row[f"{kind} interval"] = _ends(entry[kind]["interval"], 3)
        rows.append(row | {"z": _number(entry["z_replay_live"], 2)})
    pair, widths = result["pair"], result["half_widths"]
    lines = [
        f"{pair['target']}, draft {pair['draft']}: {pair['num_training']} requests train, {pair['num_held_out']} "
        f"judge; throughput under {result['cost']['origin']} times",
        table(rows),
        "widest relative half-width: " + ", ".join(f"{kind} {_percent(value)}" for kind, value in widths.items()),
        f"report: {Path(out) / 'report.md'} ({result['seconds']['total']:.0f} s)",
    ]
    return "\n\n".join(lines)


def write_report(result: Mapping[str, Any], out: Path) -> None:
    """`report.md`, to be read on its own."""
    parts = [
        "# Predicted, replayed, live",
        _opening(result),
        "## The same policies three ways",
        _policies(result),
        _rates(result),
        "## What the differences are made of",
        _differences(result),
        "## Which process fits",
        _processes(result),
        *_questions(result),
        "## What to keep in mind",
        _caveats(result),
        _colophon(result),
    ]
    write_file(out / "report.md", "\n\n".join(parts) + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = ("rate", "draft", "prompts", "rule", "best fixed")
    align = ["---" if name in words or name == header[0] else "---:" for name in header]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in [header, align, *rows])


def _number(value: float | None, digits: int, sign: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no minus in front of what rounds to zero


def _ends(ends: Sequence[float | None] | None, digits: int, sign: str = "") -> str:
    if ends is None or None in ends:
        return "-"
    return f"[{', '.join(_number(end, digits, sign) for end in ends)}]"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _opening(result: Mapping[str, Any]) -> str:
    pair, settings, cost = result["pair"], result["settings"], result["cost"]
    sampling = settings["sampling"]
    again = " (an earlier recording of the same settings, used again)" if pair["reused"] else ""
    times = f"one draft step = {cost['draft_time'] / cost['verify_time'][0]:.3g} plain target calls"
    declared = ""
    if cost["origin"] == "declared" and pair["draft_is_target_time"]:
        declared = (
            " The draft is a changed copy of the target: candidates are accepted as a good draft's would be, but a "
            "draft step takes the target's own time. So throughput is under *declared* times, those of a smaller "
            "draft; the last column of the first table is what the clock said, with this slow draft."
        )
    what = (
        "What one half of the requests (the *training* half) says of a stopping policy, against what the other half "
        "(the *judging* half) shows:\n\n"
        "- *predicted*: computed exactly on an acceptance process fitted to the training half;\n"
        "- *replayed*: played on the judging half of the recorded trace, without a model call;\n"
        "- *live*: decoded with both models on the judging half's prompts, with random draws of its own.\n\n"
    )
    return what + (
        f"Target `{pair['target']}`, draft `{pair['draft']}`, prompts `{pair['prompts']}`. Temperature "
        f"{sampling['temperature']:g}, top-k {sampling['top_k']}, at most {sampling['max_new_tokens']} new tokens and "
        f"{sampling['max_candidates']} candidates a round. {pair['num_positions']:,} tokens were recorded{again} over "
        f"{pair['num_requests']} requests, which a hash of their ids splits in two: {pair['num_training']} train "
        f"(processes are fitted to them, every parameter of a policy is chosen on them), {pair['num_held_out']} judge. "
        f"Times ({cost['origin']}): {times}.{declared}"
    )


def _policies(result: Mapping[str, Any]) -> str:
    level = f"{100 * result['settings']['level']:g} %"
    rows = []
    for entry in result["policies"]:
        predicted, replayed, live = entry["predicted"], entry["replayed"], entry["live"]
        ended = predicted.get("with_ends", {})
        shown = f"{_number(predicted.get('throughput'), 3)} {_ends(predicted.get('interval'), 3)}"
        rows.append([
                        f"`{entry['policy']}`",
            shown if "throughput" in predicted else f"none: {predicted['why']}",
            _with_ends(ended, "throughput") + f" {_ends(ended.get('interval'), 3)}" * bool(ended),
            f"{_number(replayed['throughput'], 3)} {_ends(replayed['interval'], 3)}",
            f"{_number(live['throughput'], 3)} {_ends(live['interval'], 3)}", _number(entry["z_replay_live"], 2, "+"),
            f"{_number(live['wall']['throughput'], 2)} {_ends(live['wall']['interval'], 2)}",
        ])  # fmt: skip
    header = ("policy", "predicted", "predicted, texts end", "replayed", "live", "z, replay - live",
              "live, tokens/s by the clock")  # fmt: skip
    widths = ", ".join(f"{kind} {_percent(value)}" for kind, value in result["half_widths"].items())
    predictions = [entry["predicted"] for entry in result["policies"]]
    origins = sorted({predicted["process"] for predicted in predictions if "process" in predicted})
    plain = result["cost"]["verify_time"][0]
    unit = "tokens per plain target call: plain decoding makes 1" if plain == 1.0 else (
        f"tokens per unit of the {result['cost']['origin']} times: plain decoding makes {1.0 / plain:.4g}"
    )  # fmt: skip
    notes = [
        f"*predicted* is of endless text, on {', '.join(f'`{name}`' for name in origins)}. Its interval is the fit's "
        "sampling error alone (jackknife over groups of training requests)." if origins else "",
        "*predicted, texts end*: the same process simulated with texts at most as long as the trace's, which end "
        "by chance as often. This is the figure to hold against replay and live."
        if any("with_ends" in predicted for predicted in predictions) else "",
        "*z, replay - live*: the difference in standard errors, paired by request (same prompts, different draws).",
        "*live, tokens/s by the clock*: the wall time of the live runs on this machine, whatever times were declared.",
        f"Widest half-width of an interval, as a share of its throughput: {widths}.",
    ]  # fmt: skip
    return (
        f"Throughput ({unit}) with {level} intervals, clustered by request.\n\n"
        + _table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes if note)
    )  # fmt: skip


def _rates(result: Mapping[str, Any]) -> str:
    rows = []
    for entry in result["policies"]:
        for rate, words in RATES.items():
            cells = [
                f"{_number(entry[kind].get(rate), 3)} {_ends(entry[kind].get('intervals', {}).get(rate), 3)}"
                for kind in ("predicted", "replayed", "live")
            ]
            cells.insert(1, _with_ends(entry["predicted"].get("with_ends", {}), rate))
            rows.append([f"`{entry['policy']}`", words, *cells, _number(entry["z"][rate], 2, "+")])
    header = ("policy", "rate", "predicted", "predicted, texts end", "replayed", "live", "z, replay - live")
    return _table(header, rows)


def _with_ends(ended: Mapping[str, Any], rate: str) -> str:
    return _number(ended.get(rate), 3)


def _differences(result: Mapping[str, Any]) -> str:
    """Predictions as a table, whatever their size; replay against live in words where more than `NOTABLE`."""
    rows, lines = [], []
    for entry in result["policies"]:
        predicted, replayed = entry["predicted"], entry["replayed"]
        if "throughput" in predicted:
            parts = _parts(predicted, replayed)
            z = entry["z_predicted_replayed"]
            rows.append([f"`{entry['policy']}`", *(_number(x, 1, "+") for x in (sum(parts), *parts)),
                         _number(z, 1, "+")])  # fmt: skip
        lines += [f"- `{entry['policy']}`: {text}" for text in entry["differences"] if text.startswith(LIVE)]
    header = ("policy", "predicted - replayed, %", "ends of texts", "process", "halves", "z, texts end")
    parts = ["Predicted throughput minus the replayed one, in percent of the latter, is the sum of three parts: "
             "*ends of texts* (endless text minus the same process with texts that end), *process* (that minus the "
             "replay of the training half, to which it was fitted: what the process gets wrong), and *halves* (the "
             "training half's replay minus the judging half's: chance, and parameters that were chosen on the former). "
             "z is of the prediction with ends minus the replay, by both standard errors; beyond "
             f"{NOTABLE:g} it is more than chance gives.\n\n" + _table(header, rows)] if rows else []  # fmt: skip
    agree = f"Replay and live agree within {NOTABLE:g} standard errors in every rate."
    return "\n\n".join([*parts, "\n".join(lines) or agree])


def _processes(result: Mapping[str, Any]) -> str:
    rows = []
    for row in result["processes"]:
        seen = row["seen"] or {"heldout_loglik": None, "se": None}
        rows.append([
            f"`{row['name']}`", str(row["num_parameters"]),
            f"{_number(row['heldout_loglik'], 4)} ± {_number(row['se'], 4)}",
            f"{_number(row['over_iid']['value'], 4, '+')} ± {_number(row['over_iid']['se'], 4)}",
            "-" if row["seen"] is None else f"{_number(seen['heldout_loglik'], 4)} ± {_number(seen['se'], 4)}",
        ])  # fmt: skip
    header = ("process", "parameters", "of flags", "of flags, over iid", "of flags, signal seen")
    text = (
        "Held-out log-likelihood of the judging half's accept/reject flags, in nats per tested candidate (0 would be "
        "certainty, higher is better), ± one standard error clustered by request. The datum is the run length of "
        "rounds of full depth, so every flag is tested once (`mdp.likelihood`); *over iid* is paired by request.\n\n"
        "`iid`: one acceptance probability. `position`: one for each place in the round. `beta_mixture`: drawn afresh "
        "from a Beta law. `markov_modulated`: hidden regimes along the text, by EM. `signal_chain:s`: bins of the "
        "signal s as regimes; *signal seen* is its score where s may be looked at; the others are without.\n\n"
        + _table(header, rows)
    )
    unseen = [row for row in result["processes"] if row["sees"] is None and row["name"] != "iid"]
    best = max(unseen, key=lambda row: row["heldout_loglik"] if row["heldout_loglik"] is not None else -math.inf)
    gain = best["over_iid"]
    clear = gain["value"] > NOTABLE * gain["se"]
    text += f"\n\nOf those that see nothing `{best['name']}` does best, {_number(gain['value'], 4, '+')} over iid: " + (
        "clear of chance." if clear else "not clear of chance, so iid is not refuted here."
    )
    for row in result["processes"]:
        if row["name"] == "markov_modulated":
            number = len(row["parameters"]["accept_prob"])
            text += f" The number of regimes, {number}, is the best on training requests left out of the fit."
            if row["num_requests"] < result["pair"]["num_training"]:
                text += f" EM was given the first {row['num_requests']} training requests."
        if row["cells"]:
            more = row["cells"]["over_histogram"]
            text += (
                " A Beta mixture's flags are iid's, so the score above cannot tell the two apart; of the acceptance "
                f"probabilities themselves its law loses {_number(-more['value'], 4)} ± {_number(more['se'], 4)} nats "
                "a candidate to the training half's own histogram."
            )
    return text + " `token_accept_prob` is what a perfect head would see: a ceiling."


def _questions(result: Mapping[str, Any]) -> list[str]:
    if not result["questions"]:
        return []
    level = f"{100 * result['settings']['level']:g} %"
    parts = ["## Open questions", "Replayed: thresholds and lengths are chosen on the training half of each recording, "
             f"figures are of its judging half, with {level} intervals clustered by request. "
             "Losses and gains over the best fixed length are shares of the throughput: 0.05 is 5 %."]  # fmt: skip
    for question in result["questions"]:
        parts.append(f"### {question['question']}")
        parts.append(question["answer"])
        if question["rows"]:
            parts.append(_question_table(question))
    return parts


def _question_table(question: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{_number(value['value'], 3)} {_ends(value['interval'], 3)}"
        if isinstance(value, float):
            return _number(value, 3)
        return "-" if value is None else str(value)

    header = list(question["rows"][0])
    return _table(header, [[cell(row.get(name)) for name in header] for row in question["rows"]])


def _caveats(result: Mapping[str, Any]) -> str:
    points = [
        "A prediction is of a fitted process. Its interval says how sure the fit is, not how right the process is.",
        "Parameters were chosen on the training half, so predictions lean upwards by what was gained there by chance.",
        f"{len(result['policies'])} policies in four rates are {4 * len(result['policies'])} comparisons, and rules "
        "that are much alike err alike: a |z| above 2 now and then is expected.",
        "Live wall-clock speeds are of one request at a time on this machine, reading the prompt included.",
    ]
    if result["pair"]["num_held_out"] < 30:
        points.append(
            f"{result['pair']['num_held_out']} requests judge: Student intervals lean on a shape that few cannot check."
        )
    return "\n".join(f"- {point}" for point in points)


def _colophon(result: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return f"*Seconds: {seconds}. {versions}; seed {result['settings']['seed']}.*"
