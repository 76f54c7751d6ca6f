"""One round of speculative decoding drawn to scale, and the table of all that was published, predicted and measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from simulate.figures.data import column, finish, label, one
from simulate.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, RED, WIDTH, styled

__all__ = ["round_", "summary"]

FATES = {"accepted": (GREEN, "", "accepted"), "rejected": (RED, "xxx", "rejected"),
         "behind": (GREY, "///", "discarded unseen")}  # fmt: skip


def _box(axes: Axes, x: float, y: float, width: float, colour: str, hatch: str, text: str, size: float) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.7, facecolor="white", edgecolor=colour, lw=1.3))
    if hatch:
        axes.add_patch(Rectangle((x, y), width, 0.7, fill=False, edgecolor=colour, lw=0, hatch=hatch, alpha=0.35))
    axes.text(x + width / 2, y + 0.35, text, ha="center", va="center", fontsize=size, clip_on=True,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip


def _shown(token: str | None, k: int) -> str:
    """A token as text that can be seen."""
    if token is None:
        return f"$x_{{{k}}}$"
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣").replace("$", r"\$")
    return text if len(text) <= 9 else f"{text[:8]}…"


@styled
def round_(data: Mapping[str, Any]) -> Figure:
    """Draft steps and the target's call on a time axis, what became of each candidate, and survival on the way."""
    about, entry, target = data["about"], one(data, "candidates"), one(data, "target")
    columns, step = entry["columns"], about["draft_time"]
    size = len(columns["k"])
    end = size * step + about["verify_time"]
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    lanes, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.25, 1])
    for i, token in enumerate(columns["token"]):
        text = _shown(token, i + 1)
        _box(lanes, i * step + 0.01, 2.1, step - 0.02, BLUE, "", text, 7.0 if len(text) < 7 else 5.6)
        colour, hatch, _ = FATES[columns["status"][i]]
        _box(lanes, i * step + 0.01, 0.0, step - 0.02, colour, hatch, text, 7.0 if len(text) < 7 else 5.6)
        lanes.annotate("", (i * step + step / 2, 0.72), (i * step + step / 2, 2.08),
                       arrowprops={"arrowstyle": "-", "color": "#CFCFCF", "lw": 0.8})  # fmt: skip
    text = f"one target call verifies all {size} at once"
    _box(lanes, size * step, 1.05, about["verify_time"], ORANGE, "", text, 8.0)
    kind, token = target["columns"]["kind"][0], _shown(target["columns"]["token"][0], size + 1)
    _box(lanes, size * step + 0.06, 0.0, step - 0.02, ORANGE, "", token, 7.0)
    lanes.text(size * step + step + 0.1, 0.35, f"{kind}: the target's own token.\nThe round adds "
               f"{target['columns']['num_emitted'][0]} tokens.", va="center", fontsize=7.5)  # fmt: skip
    for y, text in ((2.45, "draft"), (1.4, "target"), (0.35, "outcome")):
        lanes.text(-0.04, y, text, ha="right", va="center", fontsize=9)
    shown = dict.fromkeys(columns["status"])
    handles = [Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=FATES[s][0], hatch=FATES[s][1], label=FATES[s][2])
               for s in shown]  # fmt: skip
    lanes.legend(handles=handles, loc="upper right", ncols=3, fontsize=8)
    lanes.set_ylim(-0.1, 3.6)
    lanes.axis("off")
    lanes.axvline(0, color=BLACK, lw=0.8)
    survival = np.concatenate([[1.0], column(entry, "survival")])
    at = step * np.arange(size + 1)
    below.step([*at, end], [*survival, survival[-1]], where="post", color=BLUE, lw=1.2)
    below.plot(at, survival, color=BLUE, marker="o", ls="")
    for x, value in zip(at, survival, strict=True):
        below.annotate(f"{value:.2f}", (x, value), xytext=(3, 4), textcoords="offset points", fontsize=7.5)
    level = 1.0 - about["threshold"]
    below.axhline(level, color=RED, lw=1.0, ls="--")
    below.annotate(f"stop drafting below 1 − h = {level:.2f}", (end, level), xytext=(-4, 4),
                   textcoords="offset points", ha="right", fontsize=8, color=RED)  # fmt: skip
    below.set(ylim=(0, 1.18), xlim=(-0.02, end + 0.02), xlabel="time, in target calls", ylabel="survival, estimated")
    return finish(figure, data, f"{about['pair']['label']}; draft step {step:g} target calls, declared.")


TABLE_COLUMNS = ("published", "predicted", "replayed", "live")


@styled
def summary(data: Mapping[str, Any]) -> Figure:
    """All cells of the table on one page."""
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in data["series"]:
        names = list(entry["columns"])
        for values in zip(*entry["columns"].values(), strict=True):
            cell = dict(zip(names, values, strict=True)) | {"origin": entry["origin"], "tag": entry["tag"]}
            cells.setdefault((cell["quantity"], cell["pair"]), {})[cell["column"]] = cell
    pairs = ("Alpaca", "HumanEval", "GSM8K", "pair")
    keys = sorted(cells, key=lambda key: (data["about"]["order"].index(key[0]), pairs.index(key[1])))
    quantities = list(dict.fromkeys(quantity for quantity, _ in keys))
    lines = len(keys) + 1.55 * len(quantities) + 1
    figure = Figure(figsize=(WIDTH, 0.7 + 0.165 * lines), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    places = (0.0, 0.30, 0.46, 0.68, 0.90)
    for x, text in zip(places, ("", *TABLE_COLUMNS), strict=True):
        axes.text(x, 0, text, fontsize=8.5, weight="bold")
    y = 0.0
    for quantity in quantities:
        y += 1.55
        axes.text(0.0, y, quantity, fontsize=8.2, weight="bold", color=BLACK)
        axes.plot([0, 1.1], [y - 1.0, y - 1.0], color="#D8D8D8", lw=0.6, clip_on=False)
        for name, pair in (key for key in keys if key[0] == quantity):
            y += 1
            axes.text(0.015, y, label(data, pair), fontsize=7.8)
            for x, key in zip(places[1:], TABLE_COLUMNS, strict=True):
                text, colour = _cell(cells[name, pair].get(key))
                axes.text(x, y, text, fontsize=7.5, color=colour)
    axes.set(xlim=(0, 1.1), ylim=(y + 0.8, -0.9))
    return finish(figure, data, "\n( ): fitted or declared, no prediction; [ ]: derived; !: beyond its interval.")


def _cell(cell: Mapping[str, Any] | None) -> tuple[str, str]:
    if cell is None:
        return "·", "#B0B0B0"
    if cell["column"] == "published":
        text = f"{cell['value']:.4g}"
        return (f"[{text}]", GREY) if cell["origin"] == "derived" else (text, BLACK)
    if cell["fitted"] or cell["declared"]:
        return f"({cell['value']:.3f})", GREY
    text = f"{cell['value']:.3f}"
    if cell["low"] is not None:
        text += f"  {cell['low']:.3f}..{cell['high']:.3f}"
    return (f"{text} !", RED) if cell["within"] is False else (text, BLACK)
