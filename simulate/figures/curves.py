"""Curves: frontiers, throughput over K and h, heads, reliability, times, self-tuning."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulate.figures.comparisons import SIGNALS
from simulate.figures.data import PAIR, column, finish, label, one, pick, whiskers
from simulate.figures.style import BLACK, BLUE, GREEN, GREY, LOOKS, ORANGE, PURPLE, RED, SKY, WIDTH, styled

__all__ = [
    "frontiers", "head_weights", "heads", "reliability", "self_tuning", "throughput_by_length",
    "throughput_by_threshold", "time_regression",
]  # fmt: skip

PANELS = ("Alpaca", "HumanEval", "GSM8K", PAIR)

FRONTIER_LOOKS: Mapping[str, Mapping[str, Any]] = {
    "fixed K, digitised": {"color": BLACK, "marker": "o", "markerfacecolor": "white", "ls": ""},
    "fixed K, fitted": {"color": BLACK, "ls": "-", "lw": 1.0},
    "SpecDec++ rule": {"color": ORANGE, "ls": "--"},
    "optimum, same head": {"color": GREEN, "ls": "-."},
    "oracle": {"color": RED, "marker": "*", "markersize": 9, "ls": "", "clip_on": False},
    "fixed K": {"color": BLACK, "marker": "o", "ls": ""},
    "threshold on draft prob.": {"color": BLUE, "marker": "D", "markersize": 3.0, "ls": ""},
    "threshold, perfect head": {"color": GREEN, "marker": "^", "markersize": 3.0, "ls": ""},
    "optimum of its chain": {"color": SKY, "marker": "P", "markersize": 6.0, "ls": ":"},
    "optimum, perfect head": {"color": PURPLE, "marker": "X", "markersize": 6.0, "ls": ":"},
}


def _four(height: float) -> tuple[Figure, dict[str, Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, dict(zip(PANELS, figure.subplots(2, 2).ravel(), strict=True))


def _titled(axes: Axes, data: Mapping[str, Any], panel: str) -> None:
    axes.set_title(label(data, panel) + ("" if panel == PAIR else ": Llama-2 7B/70B"))


@styled
def frontiers(data: Mapping[str, Any]) -> Figure:
    """Discard rate over verification rate, with lines of equal speedup."""
    figure, panels = _four(7.0)
    for panel, axes in panels.items():
        entries = pick(data, panel=panel)
        for entry in entries:
            v, d = column(entry, "verification_rate"), column(entry, "discard_rate")
            look = FRONTIER_LOOKS[entry["name"]]
            axes.plot(v, d, label=f"{entry['name']} ({entry['origin']})", **look)
            if "K" in entry["columns"] and "marker" in look:
                for k, x, y in zip(entry["columns"]["K"], v, d, strict=True):
                    axes.annotate(f"{k}", (x, y), xytext=(6, 3), textcoords="offset points", fontsize=7, color=GREY,
                                  annotation_clip=True)  # fmt: skip
        shown = [entry for entry in entries if entry["name"] in ("fixed K, digitised", "fixed K")]
        points = np.concatenate([column(entry, "verification_rate") for entry in shown])
        rates = np.concatenate([column(entry, "discard_rate") for entry in shown])
        oracles = pick(data, "oracle", panel)
        least = min([points.min(), *(column(entry, "verification_rate").min() for entry in oracles)])
        right = float(np.sort(points)[-1] + 0.02) if panel != PAIR else 0.62
        axes.set_xlim(0.93 * least, max(right, 0.31 if panel != PAIR else 0.0))
        axes.set_ylim(-0.03, min(float(rates.max()) * 1.1, 1.75 if panel != PAIR else 2.2))
        _isolines(axes, data["about"]["declared" if panel == PAIR else "cost_ratio"])
        _titled(axes, data, panel)
        axes.set_xlabel("verification rate: target calls per token")
        axes.set_ylabel("discard rate: candidates per token")
        axes.grid(visible=False)
        if panel in ("Alpaca", PAIR):
            axes.legend(fontsize=7, loc="upper right", labelspacing=0.3)
    return finish(figure, data, "Numbers at points: K. Grey: equal speedup.")


def _isolines(axes: Axes, cost_ratio: float) -> None:
    """Lines of equal speedup 1 / (c (1 + d) + (1 - c) v)."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    for speedup in np.arange(1.2, 3.01, 0.2):
        v = np.array([left, right])
        d = (1.0 / speedup - (1.0 - cost_ratio) * v) / cost_ratio - 1.0
        axes.plot(v, d, color="#C8C8C8", lw=0.6, zorder=0, scalex=False, scaley=False)
        at = (1.0 / speedup - cost_ratio * (1.0 + low)) / (1.0 - cost_ratio)  # where it meets the bottom
        if left + 0.1 * (right - left) < at < right - 0.02 * (right - left):
            axes.annotate(f"{speedup:.1f}×", (at, low), xytext=(1, 2), textcoords="offset points", fontsize=6.5,
                          color="#8A8A8A")  # fmt: skip
    axes.set(xlim=(left, right), ylim=(low, high))


@styled
def throughput_by_length(data: Mapping[str, Any]) -> Figure:
    """Speedup of fixed lengths."""
    figure, panels = _four(5.2)
    for panel, axes in panels.items():
        fitted = one(data, "fitted", panel)
        axes.plot(column(fitted, "K"), column(fitted, "speedup"), color=BLUE, marker="D", markersize=3.5, lw=1.0,
                  label="independent acceptance (predicted)")  # fmt: skip
        if panel == PAIR:
            replayed = one(data, "replayed", panel)
            whiskers(axes, replayed, column(replayed, "K"), "speedup", color=ORANGE, marker="s", ls="",
                     label="fixed K (replayed)")  # fmt: skip
        else:
            points = one(data, "digitised rates, priced", panel)
            axes.plot(column(points, "K"), column(points, "speedup"), color=GREY, marker="o", markerfacecolor="white",
                      ls="", label="digitised rates, priced (derived)")  # fmt: skip
            best = one(data, "best fixed K", panel)
            axes.axhline(column(best, "speedup")[0], color=BLACK, lw=1.0, ls="--",
                         label=f"best fixed K ({best['origin']})")  # fmt: skip
        axes.axhline(1.0, color=GREY, lw=0.8, ls=":")
        _titled(axes, data, panel)
        axes.set_xlabel("candidates drafted each round, K")
        axes.set_ylabel("speedup")
        axes.set_ylim(0.3, 2.2)
        axes.set_xticks(range(0, 15, 2))
        axes.set_xlim(-0.5, 14.7)
        axes.legend(fontsize=7.5, loc="lower left")
    return finish(figure, data, "Dotted: plain decoding.")


@styled
def throughput_by_threshold(data: Mapping[str, Any]) -> Figure:
    """Speedup of thresholds on the estimated probability of a rejection."""
    figure, panels = _four(5.4)
    for panel, axes in panels.items():
        if panel == PAIR:
            for entry in pick(data, panel=panel):
                if "h" not in entry["columns"]:
                    axes.axhline(column(entry, "speedup")[0], color=BLACK, lw=1.0, ls="--",
                                 label="best fixed K (replayed)")  # fmt: skip
                    continue
                colour, marker, _ = SIGNALS[entry["name"]]
                h, speedup = column(entry, "h"), column(entry, "speedup")
                if entry["origin"] == "replayed":
                    axes.plot(h, speedup, color=colour, marker=marker, markersize=3.5, markevery=5, lw=1.2,
                              label=f"{entry['name']} (replayed)")  # fmt: skip
                else:
                    axes.plot(h, speedup, color=colour, ls=":", lw=1.1,
                              label="its chain (predicted)" if entry["name"] == "draft_prob" else None)  # fmt: skip
        else:
            rule, best = one(data, "SpecDec++ rule", panel), one(data, "unbiased head, no lag", panel)
            h = column(rule, "h")
            axes.plot(column(best, "h"), column(best, "speedup"), color=GREEN, ls="-.",
                      label="same head, unbiased, no lag (predicted)")  # fmt: skip
            axes.plot(h, column(rule, "speedup"), color=ORANGE, label="SpecDec++ rule, w = 6 (predicted)")
            axes.fill_between(h, column(rule, "low"), column(rule, "high"), color=ORANGE, alpha=0.25, lw=0)
            axes.axhline(column(one(data, "best fixed K", panel), "speedup")[0], color=BLACK, lw=1.0, ls="--",
                         label="best fixed K (predicted)")  # fmt: skip
            tuned = one(data, "SpecDec++, tuned h", panel)
            axes.plot(column(tuned, "h"), column(tuned, "speedup"), color=BLACK, marker="*", markersize=9, ls="",
                      label=f"SpecDec++ at h = .7 ({tuned['origin']})", zorder=4)  # fmt: skip
        _titled(axes, data, panel)
        axes.set_xlabel("threshold h on the rejection probability")
        axes.set_ylabel("speedup")
        axes.set_xlim(0, 1)
        if panel != PAIR:
            axes.set_ylim(1.0, 2.5)
        else:
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.8 * (high - low), high)
        if panel in ("Alpaca", PAIR):
            axes.legend(fontsize=7, loc="lower center", labelspacing=0.3)
    return finish(figure, data)


@styled
def head_weights(data: Mapping[str, Any]) -> Figure:
    """The weighted head's output over true acceptance, and speedup over h for each weight."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, panel, x, y in ((left, "output", "accept_prob", "output"), (right, "throughput", "h", "speedup")):
        for entry, (colour, marker, line) in zip(pick(data, panel=panel), LOOKS, strict=False):
            axes.plot(column(entry, x), column(entry, y), color=colour, ls=line, marker=marker, markevery=7,
                      markersize=4, label=entry["name"])  # fmt: skip
        axes.set_xlim(0, 1)
        axes.legend(title="weight on rejections", title_fontsize=8)
    about = data["about"]
    shown = 1.0 - about["threshold"]
    left.plot([1 - about["means"]], [shown], marker="o", markersize=8, markerfacecolor="none", color=BLACK)
    left.annotate(f"rejection {about['threshold']:g} shown,\n{about['means']:.2f} true", (1 - about["means"], shown),
                  xytext=(0.03, 0.43), fontsize=7.5,
                  arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.7})  # fmt: skip
    left.set(xlabel="true acceptance probability m", ylabel="the head's output", ylim=(0, 1))
    right.set(xlabel="threshold h on the rejection probability shown", ylabel="speedup, Alpaca")
    right.axvline(about["threshold"], color=GREY, lw=0.8, ls=":")
    right.legend(title="weight on rejections", title_fontsize=8, loc="lower center", ncols=2)
    return finish(figure, data)


@styled
def heads(data: Mapping[str, Any]) -> Figure:
    """KL, AUROC and speedup over depth, a line for each weight, a row for each variant."""
    variants = list(dict.fromkeys(entry["panel"] for entry in data["series"] if entry["panel"] != "all"))
    figure = Figure(figsize=(WIDTH, 0.8 + 2.3 * len(variants)), layout="constrained")
    grid = figure.subplots(len(variants), 3, squeeze=False, sharex=True, sharey="col")
    measures = (("kl", "KL to true acceptance"), ("auroc", "AUROC"), ("throughput", "speedup, best threshold"))
    levels = {"kl": pick(data, "constant", "all"), "throughput": pick(data, "best fixed K", "all")}
    for row, variant in zip(grid, variants, strict=True):
        for axes, (key, name) in zip(row, measures, strict=True):
            for number, (entry, look) in enumerate(zip(pick(data, panel=variant), LOOKS, strict=False)):
                colour, marker, line = look
                depth, value = column(entry, "depth"), column(entry, key)
                spread = column(entry, "throughput_se") if key == "throughput" else None
                axes.errorbar(depth + 0.06 * (number - 1.5), value, yerr=spread, color=colour, marker=marker, ls=line,
                              markersize=4, capsize=1.5, elinewidth=0.8, label=entry["name"])  # fmt: skip
            for level in levels.get(key, []):
                axes.axhline(column(level, key)[0], color=BLACK, lw=1.0, ls="--", label=level["name"])
            axes.set_title(f"{variant}: {name}" if len(variants) > 1 else name, fontsize=8.5)
            axes.set_xticks(sorted(set(depth.tolist())))
    for axes in grid[-1]:
        axes.set_xlabel("depth D of the head, blocks")
    for axes in grid[:, 1]:
        axes.set_ylim(0.5, max(0.75, axes.get_ylim()[1]))  # from chance on: what is noise looks like noise
    names = {text: handle for axes in grid[0] for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[0, 1].legend(names.values(), names.keys(), loc="upper left", ncols=2, fontsize=7.5)
    return finish(figure, data, "Whiskers: one standard error.")


@styled
def reliability(data: Mapping[str, Any]) -> Figure:
    """True acceptance over predicted, in bins; and KL, AUROC and calibration error of each prediction."""
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    left.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    for entry, (colour, marker, line) in zip(pick(data, panel="bins"), LOOKS, strict=False):
        left.plot(column(entry, "predicted"), column(entry, "accepted"), color=colour, marker=marker, ls=line,
                  markersize=4.5, label=entry["name"])  # fmt: skip
    left.set(xlabel="predicted acceptance, mean of a bin", ylabel="true acceptance, mean of the bin", xlim=(0, 1.02),
             ylim=(0, 1.02))  # fmt: skip
    left.legend(loc="lower right", fontsize=7)
    scores = one(data, "scores")
    names = scores["columns"]["signal"]
    places = np.arange(len(names))
    for i, (key, name) in enumerate((("kl", "KL (nats)"), ("ece", "calibration error"))):
        value = column(scores, key)
        right.barh(places + (i - 0.5) * 0.36, value, 0.32, color=(BLUE, ORANGE)[i], hatch=("", "...")[i],
                   edgecolor="white", lw=0, label=name)  # fmt: skip
    for place, area in zip(places, column(scores, "auroc"), strict=True):
        right.text(1.0, place, f"AUROC {area:.2f}", transform=right.get_yaxis_transform(), ha="right", va="center",
                   fontsize=7.5)  # fmt: skip
    right.set_yticks(places, [name.replace(", ", ",\n") for name in names], fontsize=8)
    right.set_ylim(len(names) - 0.3, -0.95)
    right.set_xlim(0, 1.5 * np.nanmax(column(scores, "kl")))
    right.grid(axis="y", visible=False)
    right.legend(fontsize=7.5, loc="upper right", ncols=2)
    right.set_xlabel("lower is better")
    return finish(figure, data, "Bins of equal size.")


@styled
def time_regression(data: Mapping[str, Any]) -> Figure:
    """Measured over fitted wall time, and the two times by three methods."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    runs = [entry for entry in data["series"] if entry["panel"] != "times"]
    most = max(column(entry, "seconds").max() for entry in runs)
    left.plot([0, most], [0, most], color=GREY, lw=0.8, ls=":")
    for entry, (colour, marker, _) in zip(runs, LOOKS, strict=False):
        left.plot(column(entry, "fitted"), column(entry, "seconds"), color=colour, marker=marker, ls="",
                  markerfacecolor="none", label=entry["name"])  # fmt: skip
    left.set(xlabel="t_draft × draft steps + t_target × target calls, seconds", ylabel="wall time measured, seconds",
             xlim=(0, None), ylim=(0, None))  # fmt: skip
    left.set_title(f"R² = {data['about']['r2']:.3f}, {data['about']['num_runs']} runs")
    left.legend(fontsize=7, loc="lower right")
    times = one(data, "times")
    methods = times["columns"]["method"]
    places = np.arange(len(methods))
    for i, (key, name) in enumerate((("draft_time", "t_draft"), ("target_time", "t_target"))):
        spread = 1000 * np.nan_to_num(column(times, f"{key}_se"))
        value = 1000 * column(times, key)
        right.barh(places + (i - 0.5) * 0.36, value, 0.32, xerr=spread, color=(ORANGE, BLUE)[i],
                   hatch=("...", "")[i], edgecolor="white", lw=0, label=name, error_kw={"elinewidth": 0.8})  # fmt: skip
        for place, shown in zip(places, value, strict=True):
            right.text(shown, place + (i - 0.5) * 0.36, f"    {shown:.3g}", va="bottom", fontsize=7)
    right.set_yticks(
        places,
        [name.replace(", ", ",\n").replace(" in ", "\nin ").replace(" of ", "\nof ") for name in methods],
        fontsize=8,
    )
    right.set_ylim(len(methods) - 0.4, -0.9)
    right.set_xlim(0, 1.25 * 1000 * max(np.nanmax(column(times, key)) for key in ("draft_time", "target_time")))
    right.grid(axis="y", visible=False)
    right.legend(fontsize=7.5, loc="upper right", ncols=2)
    right.set_xlabel("milliseconds a call")
    return finish(figure, data, "Dotted: measured = fitted. Whiskers: one standard error.")


@styled
def self_tuning(data: Mapping[str, Any]) -> Figure:
    """Throughput after n rounds, and where it settles."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes_of = dict(zip(("model", "counterexample"), figure.subplots(1, 2, width_ratios=[1.35, 1]), strict=True))
    for panel, axes in axes_of.items():
        played = pick(data, panel=panel, origin="simulated")
        for number, (entry, (colour, marker, line)) in enumerate(zip(played, LOOKS, strict=False)):
            rounds = column(entry, "rounds")
            axes.errorbar(rounds * 1.08 ** (number - (len(played) - 1) / 2), column(entry, "throughput"),
                          yerr=column(entry, "spread"), color=colour, marker=marker, ls=line, capsize=2,
                          elinewidth=0.8, label=entry["name"])  # fmt: skip
            (limit,) = [e for e in pick(data, entry["name"], panel, "predicted") if "limit" in e["columns"]]
            end = rounds.max()
            axes.plot([end * 1.8, end * 4.5], [column(limit, "limit")[0]] * 2, color=colour, ls=line, lw=2.0)
        for name, look in (("optimum", "-"), ("best of its family", "--")):
            for entry in pick(data, name, panel):
                axes.axhline(column(entry, "throughput")[0], color=BLACK, lw=0.9, ls=look, label=name, zorder=1)
        axes.set_xscale("log")
        axes.set_xlabel("rounds played; right: the limit")
        axes.set_ylabel("throughput so far")
        low, high = axes.get_ylim()
        axes.set_ylim(low - (0.5 if panel == "model" else 0.35) * (high - low), high)
        axes.set_title("two regimes" if panel == "model" else "where a heuristic settles below")
        axes.legend(fontsize=7, loc="lower right")
    return finish(figure, data, "Throughput: tokens per target call's time. Bars: one standard deviation of a replica.")
