"""Maps and ladders of the theory: thresholds, the theorem's bound, phases, information."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulate.figures.data import PAIR, column, finish, label, one, pick, whiskers
from simulate.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED, SKY, WIDTH, styled

__all__ = ["information", "phase", "theorem_bound", "threshold_map"]

COLOURS = "cividis"
"""A colour map that is even in grey and to colour-blind eyes."""


def _map(axes: Axes, values: np.ndarray, most: float, form: str, least: float = 0.0, colours: str = COLOURS) -> Any:
    """A grid of cells with its numbers written in."""
    image = axes.imshow(values, origin="lower", aspect="auto", cmap=colours, vmin=least, vmax=most)
    for (row, col), value in np.ndenumerate(values):
        if np.isfinite(value):
            share = (value - least) / max(most - least, 1e-12)
            axes.text(col, row, form.format(value), ha="center", va="center", fontsize=6.0,
                      color=BLACK if share > 0.55 else "white")  # fmt: skip
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


@styled
def threshold_map(data: Mapping[str, Any]) -> Figure:
    """S*(k, z) as a map, and the rejection probability at the stop against the bound for the same state."""
    entry = one(data, "S*(k, z)")
    k, accept, value, bound = (column(entry, name) for name in ("k", "accept_prob", "threshold", "bound"))
    depths, regimes = np.unique(k), np.unique(accept)
    table = np.full((len(regimes), len(depths)), np.nan)
    table[np.searchsorted(regimes, accept), np.searchsorted(depths, k)] = value
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    left.set_facecolor("#DDDDDD")
    image = _map(left, table, 1.0, "{:.2f}")
    left.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    left.set_yticks(range(len(regimes)), [f"{regime:g}" for regime in regimes])
    left.set(xlabel="candidates drafted so far, k", ylabel="acceptance a in the last candidate's regime")
    left.set_title("survival from which to draft on, S*(k, z)")
    figure.colorbar(image, ax=left, shrink=0.85, pad=0.01)
    right.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    shown = right.scatter(bound, 1.0 - value, c=k, cmap=COLOURS, s=14, edgecolor=BLACK, linewidth=0.3, zorder=3)
    figure.colorbar(shown, ax=right, shrink=0.85, pad=0.01, label="k")
    tightest = data["about"]["tightest"]
    right.axvline(tightest, color=RED, lw=1.0, ls="--")
    right.annotate("one Δ for\nall states", (tightest, 0.04), xytext=(4, 0), textcoords="offset points", fontsize=7.5,
                   color=RED)  # fmt: skip
    right.set(xlabel="bound of Theorem 3.1, tightest Δ of the state", ylabel="true threshold, 1 − S*(k, z)",
              xlim=(0, 1), ylim=(0, 1))  # fmt: skip
    right.set_title("on or below the diagonal: sufficient")
    return finish(figure, data)


@styled
def theorem_bound(data: Mapping[str, Any]) -> Figure:
    """True threshold, tightest bound and the bound without Delta, over independent acceptance."""
    lines, points = one(data, "independent acceptance"), one(data, "SpecDec++'s pairs")
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    looks = (("delta_zero_bound", "Theorem 3.1, Δ = 0", GREY, ":", "v"),
             ("tightest_bound", "Theorem 3.1, tightest Δ", ORANGE, "--", "s"),
             ("rejection_at_stop", "1 − S where the best fixed length stops", SKY, "-.", "P"),
             ("threshold", "true threshold, 1 − S*", BLUE, "-", "o"))  # fmt: skip
    for key, name, colour, line, marker in looks:
        axes.plot(column(lines, "mean"), column(lines, key), color=colour, ls=line, label=name)
        axes.plot(column(points, "mean"), column(points, key), color=colour, ls="", marker=marker, markersize=6,
                  markeredgecolor=BLACK, markeredgewidth=0.5)  # fmt: skip
    for mean, name in zip(column(points, "mean"), points["columns"]["dataset"], strict=True):
        axes.axvline(mean, color="#D0D0D0", lw=0.7, zorder=0)
        axes.annotate(name, (mean, 0.02), xycoords=("data", "axes fraction"), rotation=90, va="bottom",
                      ha="left" if name == "GSM8K" else "right", fontsize=7.5, color=GREY)  # fmt: skip
    axes.set(xlabel="acceptance probability of each candidate, independent", ylabel="rejection probability 1 − S",
             xlim=(column(lines, "mean").min(), column(lines, "mean").max()), ylim=(0, 1))  # fmt: skip
    axes.legend(loc="lower left")
    return finish(figure, data, f"Cost ratio {data['about']['cost_ratio']:.3f}; points: SpecDec++'s pairs.")


@styled
def phase(data: Mapping[str, Any]) -> Figure:
    """Gain of the optimum over the best fixed length, and loss of one threshold, for each cost ratio."""
    entry = one(data, "two regimes")
    dispersion, persistence, ratio = (column(entry, name) for name in ("dispersion", "persistence", "cost_ratio"))
    rows, cols, ratios = (np.unique(values) for values in (dispersion, persistence, ratio))
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    for line, key, title in ((0, "gain", "Gain of the optimum over the best fixed K, %"),
                             (1, "lost", "Loss of the best constant threshold against the optimum, %")):  # fmt: skip
        value = 100 * column(entry, key)
        most = max(float(np.nanmax(value)), 1e-3)
        image = None
        row = halves[line].subplots(1, len(ratios), squeeze=False, sharey=True)[0]
        for axes, c in zip(row, ratios, strict=True):
            table = np.full((len(rows), len(cols)), np.nan)
            chosen = ratio == c
            at = np.searchsorted(rows, dispersion[chosen]), np.searchsorted(cols, persistence[chosen])
            table[at] = np.maximum(value[chosen], 0.0)
            image = _map(axes, table, most, "{:.1f}" if line == 0 else "{:.2f}")
            axes.set_title(f"cost ratio {c:.3g}", fontsize=8.5)
            axes.set_xticks(range(len(cols)), [f"{x:g}" for x in cols], fontsize=7.5)
            axes.set_yticks(range(len(rows)), [f"{y:g}" for y in rows], fontsize=7.5)
            axes.set_xlabel("persistence", fontsize=8.5)
        row[0].set_ylabel("dispersion", fontsize=8.5)
        halves[line].colorbar(image, ax=list(row), shrink=0.9, pad=0.01)
        halves[line].suptitle(title, x=0.01, ha="left", fontsize=9, style="italic")
    return finish(figure, data, f"Mean acceptance {data['about']['mean']:g}.")


@styled
def information(data: Mapping[str, Any]) -> Figure:
    """The ladder of information in a model, and on the recorded pair."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    entry = one(data, panel="model")
    names = [name.replace("_", " ") for name in entry["columns"]["knows"]]
    places, value = np.arange(len(names)), column(entry, "speedup")
    left.plot(value, places, color=BLUE, lw=0.8, ls=":")
    left.plot(value, places, color=BLUE, marker="D", ls="")
    for place, x, extra in zip(places, value, column(entry, "extra_time"), strict=True):
        if np.isfinite(extra) and extra > 0:
            left.annotate(f"+{extra:.2g}", (x, place), xytext=(6, -3), textcoords="offset points", fontsize=7,
                          color=GREY)  # fmt: skip
    left.set_yticks(places, names, fontsize=8)
    left.set_title("two regimes (predicted)")
    left.margins(x=0.14)
    order: list[str] = []
    for found in pick(data, panel=PAIR):
        order += found["columns"]["knows"]
    for found, look in zip(pick(data, panel=PAIR), ((ORANGE, "s", ORANGE), (GREEN, "^", "white")), strict=True):
        colour, marker, face = look
        at = [order.index(name) for name in found["columns"]["knows"]]
        whiskers(right, found, at, "speedup", vertical=False, color=colour, marker=marker, markerfacecolor=face, ls="",
                 label=f"{found['name']} (replayed)")  # fmt: skip
    right.set_yticks(range(len(order)), order, fontsize=8)
    right.set_title(label(data, PAIR))
    right.legend(loc="upper left", fontsize=7.5)
    for axes in (left, right):
        axes.set_xlabel("speedup over plain decoding")
        axes.set_ylim(-0.6, None)
    return finish(
        figure, data, "+x: draft time, in target calls, that a rung is worth. Whiskers: clustered by request."
    )
