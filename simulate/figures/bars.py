"""Bars: speedups of systems, the oracle, the parts of a token's time, counterexamples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulate.figures.data import ORIGIN_LOOKS, PAIR, column, finish, label, one, pick, whiskers
from simulate.figures.style import BLACK, BLUE, GREY, LOOKS, ORANGE, WIDTH, styled

__all__ = ["gallery", "oracle", "speedups", "time_decomposition"]

SMALL = 7.5
DATASETS = ("Alpaca", "HumanEval", "GSM8K")


def _grouped(axes: Axes, entries: Sequence[Mapping[str, Any]], systems: Sequence[str], value: str, digits: int) -> None:
    """Horizontal bars, one group a system, one bar an origin, with what it is written at its end."""
    kinds = list(dict.fromkeys(entry["origin"] for entry in entries))
    # an origin never has two bars for a system: what was read and what was derived from it share a place
    slots = {origin: i for i, origin in enumerate(k for k in kinds if k != "derived" or "published" not in kinds)}
    slots["derived"] = slots.get("derived", slots.get("published", 0))
    height = 0.8 / max(len(set(slots.values())), 1)
    most = max(np.nanmax(column(entry, value)) for entry in entries)
    for entry in entries:
        colour, _, hatch = ORIGIN_LOOKS[entry["origin"]]
        fitted = entry["columns"].get("fitted") or [False] * len(entry["columns"]["system"])
        for i, system in enumerate(entry["columns"]["system"]):
            place = systems.index(system) + (slots[entry["origin"]] - (len(set(slots.values())) - 1) / 2) * height
            length = column(entry, value)[i]
            hollow = fitted[i] or entry["origin"] == "derived"
            axes.barh(place, length, height * 0.88, facecolor="white" if hollow else colour, edgecolor=colour, lw=0.8,
                      hatch=hatch if hollow else None)  # fmt: skip
            if not hollow and hatch:
                axes.barh(place, length, height * 0.88, facecolor="none", edgecolor="white", lw=0, hatch=hatch)
            end = length
            if "low" in entry["columns"]:
                low, high = column(entry, "low")[i], column(entry, "high")[i]
                if high > low:
                    axes.errorbar(length, place, xerr=[[length - low], [high - length]], color=BLACK, capsize=1.5,
                                  elinewidth=0.8, capthick=0.8)  # fmt: skip
                    end = max(end, high)
            axes.text(end + 0.015 * most, place, f"{length:.{digits}f}", va="center", fontsize=6.5)
    axes.set_ylim(len(systems) - 0.45, -0.55)
    axes.set_xlim(0, 1.24 * most)
    axes.set_yticks(range(len(systems)), systems, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _key(figure: Figure, names: Mapping[str, str], fitted: bool) -> None:
    """One legend for all panels."""
    from matplotlib.patches import Patch

    handles = []
    for origin, name in names.items():
        colour, _, hatch = ORIGIN_LOOKS[origin]
        hollow = origin == "derived"
        handles.append(Patch(facecolor="white" if hollow else colour, edgecolor=colour if hollow else "white",
                             hatch=hatch, label=name, lw=0.8))  # fmt: skip
    if fitted:
        handles.append(Patch(facecolor="white", edgecolor=BLUE, label="fitted, no prediction"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8, handlelength=1.4,
                  columnspacing=1.2)  # fmt: skip


@styled
def speedups(data: Mapping[str, Any]) -> Figure:
    """Systems on the paper's datasets, on the recorded pair, and in wall time."""
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.15])
    top, bottom = halves
    for axes, panel in zip(top.subplots(1, 3, sharey=True), DATASETS, strict=True):
        systems = ["no speculation", "best fixed K", "SpecDec++", "optimum, same head", "oracle"]
        _grouped(axes, pick(data, panel=panel), systems, "speedup", 2)
        axes.set_title(f"{panel}: Llama-2 7B/70B")
        axes.set_xlabel("speedup over plain decoding")
    left, right = bottom.subplots(1, 2, width_ratios=[1.25, 1])
    entries = pick(data, panel=PAIR)
    systems = list(dict.fromkeys(name for entry in entries for name in entry["columns"]["system"]))
    order = one(data, "replayed", PAIR)["columns"]["system"]
    _grouped(left, entries, sorted(systems, key=order.index), "speedup", 2)
    left.set_title(f"{label(data, PAIR)}, draft step declared {data['about']['declared']:g}")
    left.set_xlabel("speedup over plain decoding")
    entries = pick(data, panel="wall clock")
    systems = list(dict.fromkeys(name for entry in entries for name in entry["columns"]["system"]))
    _grouped(right, entries, systems, "tokens_per_second", 1)
    right.set_title("the same pair, wall clock")
    right.set_xlabel("tokens per second on this machine")
    names = {"published": "published", "derived": "derived", "predicted": "predicted", "replayed": "replayed",
             "measured": "live"}  # fmt: skip
    _key(figure, names, True)
    return finish(figure, data)


@styled
def oracle(data: Mapping[str, Any]) -> Figure:
    """From the best fixed length to the oracle, on one dataset and on the recorded pair."""
    panels = ("Alpaca", PAIR)
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, 2), panels, strict=True):
        entries = pick(data, panel=panel)
        value: dict[str, float] = {}
        for entry in entries:
            for name, speedup in zip(entry["columns"]["system"], column(entry, "speedup"), strict=True):
                value[name] = max(value.get(name, 0.0), float(speedup))
        systems = sorted(value, key=lambda name: value[name])
        systems = [name for name in systems if "oracle" not in name] + [name for name in systems if "oracle" in name]
        for shift, origin in enumerate(("published", "predicted", "replayed")):
            colour, marker, _ = ORIGIN_LOOKS[origin]
            for number, entry in enumerate(e for e in entries if e["origin"] == origin):
                places = np.array([systems.index(name) for name in entry["columns"]["system"]])
                whiskers(axes, entry, places + 0.14 * (shift - 1), "speedup", vertical=False, color=colour,
                         marker=marker, ls="", markersize=8 if marker == "*" else None,
                         label=None if number else origin)  # fmt: skip
        axes.set_yticks(range(len(systems)), systems, fontsize=8)
        axes.set_ylim(-0.5, len(systems) - 0.5)
        axes.set_xlabel("speedup over plain decoding")
        axes.set_title(label(data, panel) + (": Llama-2 7B/70B" if panel != PAIR else ""))
        axes.legend(loc="lower right")
    return finish(figure, data)


@styled
def time_decomposition(data: Mapping[str, Any]) -> Figure:
    """Stacked bars: kept and discarded draft steps and target calls per token."""
    parts = (("target", "target calls", BLUE, ""), ("kept", "draft steps, kept", LOOKS[5][0], "..."),
             ("discarded", "draft steps, discarded", ORANGE, "///"),
             ("rest", "the loop itself", GREY, "xxx"))  # fmt: skip
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    top, bottom = halves
    axes_of = dict(zip(DATASETS, top.subplots(1, 3, sharex=True), strict=True))
    axes_of |= dict(zip((PAIR, "wall clock"), bottom.subplots(1, 2), strict=True))
    for panel, axes in axes_of.items():
        (entry,) = pick(data, panel=panel)
        rules = entry["columns"]["rule"]
        places, left = np.arange(len(rules)), np.zeros(len(rules))
        for key, _, colour, hatch in parts:
            if key in entry["columns"]:
                width = np.maximum(column(entry, key), 0.0)
                axes.barh(places, width, 0.7, left=left, color=colour, edgecolor="white", lw=0.5, hatch=hatch)
                left = left + width
        for place, total in zip(places, left, strict=True):
            axes.text(
                total + 0.02 * left.max(),
                place,
                f"{total:.3f}" if total < 10 else f"{total:.0f}",
                va="center",
                fontsize=6.5,
            )
        axes.set_xlim(0, 1.2 * left.max())
        axes.set_yticks(places, rules, fontsize=SMALL)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        units = "milliseconds / token" if panel == "wall clock" else "target calls / token"
        axes.set_xlabel(units)
        axes.set_title(f"{label(data, panel)} ({entry['origin'].replace('measured', 'live')})", fontsize=9)
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, edgecolor="white", hatch=hatch, label=name) for _, name, colour, hatch in parts]
    figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=8, handlelength=1.4, columnspacing=1.2)
    return finish(figure, data)


@styled
def gallery(data: Mapping[str, Any]) -> Figure:
    """What each counterexample loses, which fact it breaks and by which condition."""
    columns = one(data, "counterexamples")["columns"]
    size = len(columns["name"])
    facts = list(dict.fromkeys(columns["fact"]))
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * size), layout="constrained")
    axes = figure.subplots()
    for i in range(size):
        colour, _, _ = LOOKS[facts.index(columns["fact"][i])]
        value = columns["expected"][i]
        axes.barh(i, 100 * value, 0.62, color=colour)
        unit = "" if columns["number"][i] != "excess" else " over the bound"
        axes.text(100 * value + 0.4, i, f"{columns['exact'][i]}{unit}:  {columns['breaks'][i]}", va="center",
                  fontsize=SMALL)  # fmt: skip
    names = [f"{name.replace('_', ' ')}  {fact}" for name, fact in zip(columns["name"], columns["fact"], strict=True)]
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set_ylim(size - 0.4, -0.6)
    axes.set_xlim(0, 62)
    axes.set_xticks(range(0, 40, 5))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    told = "loss of the best throughput, %; beside each bar: exactly, and the condition that is broken"
    axes.set_xlabel(told, loc="left")
    facts_told = "F2 one threshold; F3 one-step look-ahead; F4 Theorem 3.1; F5 fixed length; F7 self-tuning."
    return finish(figure, data, facts_told)
