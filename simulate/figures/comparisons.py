"""Figures of a comparison: policies in one world, simulated or replayed, and the thresholds of a solution."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mdp.evaluate import Evaluation
from mdp.policy import FixedLength, Oracle, parse
from simulate.estimate import Comparison, Estimate, PolicyResult, TraceComparison, interval
from simulate.figures.style import BLACK, BLUE, GREEN, GREY, LOOKS, ORANGE, PURPLE, RED, SKY, heading, sign, styled

__all__ = ["ORACLE", "SIGNALS", "lengths", "policies", "rates", "thresholds"]

# What a rule looks at -> how it is drawn, and its name in words. Order: the more a rule knows, the later.
SIGNALS = {
    None: (BLACK, "o", "fixed length"),
    "entropy": (ORANGE, "s", "sees the draft's entropy"),
    "top_prob": (PURPLE, "v", "sees the draft's top probability"),
    "draft_prob": (BLUE, "D", "sees the token's draft probability"),
    "head": (SKY, "P", "sees an acceptance head"),
    "token_accept_prob": (GREEN, "^", "perfect head: the ceiling"),
}
SEES = {
    "top_prob": "top\nprob.",
    "draft_prob": "draft\nprob.",
    "token_accept_prob": "perfect\nhead\n(ceiling)",
}
ORACLE = (GREY, "$]$", "knows the future: no policy")
BIG = {"$]$": 9.0}  # markers that need more than the house's size


@styled
def lengths(
    comparison: Comparison,
    *,
    exact: Sequence[Evaluation] = (),
    bounds: tuple[float, float] | None = None,
    title: str = "Speedup against candidate length",
    note: str = "",
) -> Figure:
    """Speedup of `fixed:K` against K, and beside it the rules that adapt.

    Args:
        comparison: simulated or replayed policies; points with whiskers.
        exact: predicted values of some of the same policies; a line over K and bars beside it.
        bounds: proven lower and upper bound on the best speedup of any policy; a band.
        title: over the figure.
        note: added to the line that says where the numbers come from.
    """
    fixed, adaptive = _split(comparison)
    predicted = {entry.policy: entry.speedup for entry in exact}
    figure = Figure(figsize=(7.8, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False, width_ratios=[13, 1.0 + 2.0 * len(adaptive)])
    left, right = panels[0]
    right.set_visible(bool(adaptive))
    ks = [_rule(entry).length for entry in fixed]
    if exact:
        line = [(k, predicted[entry.policy]) for k, entry in zip(ks, fixed, strict=True) if entry.policy in predicted]
        left.plot(*np.array(line).T, color=BLUE, lw=1.2, label="predicted exactly")
    _whiskers(left, ks, fixed, comparison, vertical=True, color=BLACK, marker="o", label=f"{_world(comparison)}")
    for place, entry in enumerate(adaptive):
        colour, marker, _ = _look(entry)
        _whiskers(right, [place], [entry], comparison, vertical=True, color=colour, marker=marker)
        if entry.policy in predicted:
            right.hlines(predicted[entry.policy], place - 0.32, place + 0.32, color=BLUE, lw=1.2)
    for axes in (left, right):
        if bounds is not None:
            axes.axhspan(*bounds, color=GREEN, alpha=0.35, lw=0)
            text = f"no policy is better (proven; bounds {bounds[1] - bounds[0]:.0e} apart)"
            axes.axhline(bounds[1], color=GREEN, lw=1.0, ls="--", label=text if axes is left else None)
        axes.grid(axis="x", visible=False)
    left.axhline(1.0, color=GREY, lw=0.8, ls=":")
    right.axhline(1.0, color=GREY, lw=0.8, ls=":")
    left.annotate("plain decoding", (max(ks, default=1), 1.0), xytext=(0, 3), textcoords="offset points", ha="right",
                  color=GREY, fontsize=8)  # fmt: skip
    left.set(xlabel="fixed length: candidates drafted each round, K", ylabel="speedup over plain decoding", xticks=ks)
    left.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.1, labelspacing=0.25)
    several = len({entry.signal for entry in adaptive}) > 1
    names = ["\n".join((_short(entry, "\n"), *_sees(entry)[: 1 if several else 0])) for entry in adaptive]
    right.set_xticks(range(len(adaptive)), names, fontsize=8)
    right.set_xlim(-0.6, len(adaptive) - 0.4)
    right.tick_params(axis="y", left=False)
    right.set_title("rules that adapt", fontsize=9, loc="center")
    heading(figure, title)
    return _signed(figure, comparison, note)


@styled
def thresholds(
    survival_threshold: Sequence[Sequence[float | None]] | np.ndarray,
    *,
    names: Sequence[str] = (),
    title: str = "When to go on drafting",
    note: str = "",
) -> Figure:
    """Optimal thresholds S*(k, z): draft candidate k + 1 while survival is at or above the line of its regime.

    Args:
        survival_threshold: [K, Z]; null or inf, drawn hollow at "stop", means stop at every survival.
        names: of the regimes, for the legend.
        title: over the figure.
        note: where the numbers come from.
    """
    table = np.array([[np.inf if cell is None else cell for cell in row] for row in survival_threshold], dtype=float)
    never = 1.1
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    axes = figure.subplots()
    depth, num_regimes = table.shape
    k = np.arange(depth)
    for z in range(num_regimes):
        colour, marker, line = LOOKS[z % len(LOOKS)]
        height = np.where(np.isinf(table[:, z]), never, table[:, z])
        name = names[z] if z < len(names) else f"regime {z}"
        axes.plot(k, height, color=colour, ls=line, label=name, zorder=2)
        for shown, face in ((np.isfinite(table[:, z]), colour), (np.isinf(table[:, z]), "white")):
            axes.plot(k[shown], height[shown], ls="", marker=marker, color=colour, markerfacecolor=face, zorder=3)
    axes.set(xlabel="candidates drafted so far, k", ylabel="threshold on survival, S*(k, z)", xticks=k, ylim=(0, 1.16))
    axes.set_yticks([*np.linspace(0, 1, 6), never], [*(f"{height:.1f}" for height in np.linspace(0, 1, 6)), "stop"])
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", title="regime of the last candidate", title_fontsize=8.5, alignment="left")
    heading(figure, title)
    return _signed(figure, None, note)


@styled
def policies(comparison: Comparison, *, title: str = "Policies on one trace", note: str = "") -> Figure:
    """Each policy's speedup, and its difference from the first policy paired over clusters, with intervals.

    Rows are grouped by what a rule looks at; inside a group they stand in the order given. The dotted line is the
    best rule that sees true acceptance, the ceiling of every acceptance head. The oracle has no difference: nobody can
    run it.
    """
    rows = _grouped(comparison)
    differences = {entry.policy: entry.throughput_difference for entry in comparison.differences}
    baseline = comparison.policies[0]
    figure = Figure(figsize=(7.6, 1.5 + 0.235 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    ticks, names = [], []
    for place, row in enumerate(rows):
        if isinstance(row, str):
            left.text(-0.02, place, row, transform=left.get_yaxis_transform(), ha="right", va="center", fontsize=8,
                      style="italic", color=GREY)  # fmt: skip
            continue
        colour, marker, _ = _look(row)
        ticks.append(place)
        names.append(_short(row) + (" (baseline)" if row is baseline else ""))
        _whiskers(left, [place], [row], comparison, vertical=False, color=colour, marker=marker)
        if row.policy in differences and not isinstance(_rule(row), Oracle):
            _whisker(right, place, Estimate(*(row.plain_time * x for x in differences[row.policy])),
                     row.num_clusters, _level(comparison), colour, marker)  # fmt: skip
    ceiling = [row.speedup.value for row in rows if not isinstance(row, str) and row.signal == "token_accept_prob"]
    if ceiling:
        left.axvline(max(ceiling), color=GREEN, lw=1.0, ls=":")
    right.axvline(0.0, color=BLACK, lw=0.8)
    left.set_yticks(ticks, names)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("speedup over plain decoding")
    right.set_xlabel(f"difference from {_short(baseline)}, paired")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    heading(figure, title)
    return _signed(figure, comparison, note)


@styled
def rates(comparison: Comparison, *, title: str = "What a speedup is made of", note: str = "") -> Figure:
    """Verification rate against discard rate: target calls and thrown-away candidates per emitted token.

    Fixed lengths are joined by a line; whatever lies nearer the lower left corner is cheaper at any price.
    """
    fixed, adaptive = _split(comparison)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    x, y = ([getattr(entry.total, name) for entry in fixed] for name in ("discard_rate", "verification_rate"))
    axes.plot(x, y, color=BLACK, marker="o", markersize=3.5, lw=1.0, label="fixed length K")
    for entry, discard, calls in zip(fixed, x, y, strict=True):
        axes.annotate(str(_rule(entry).length), (discard, calls), xytext=(3, 3), textcoords="offset points",
                      fontsize=7.5, color=GREY)  # fmt: skip
    seen = set()
    for entry in adaptive:
        colour, marker, name = _look(entry)
        axes.plot(entry.total.discard_rate, entry.total.verification_rate, ls="", color=colour, marker=marker,
                  markersize=BIG.get(marker), clip_on=False, label=None if name in seen else name)  # fmt: skip
        seen.add(name)
    axes.set(xlabel="discarded candidates per emitted token", ylabel="target calls per emitted token")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05)
    axes.legend(loc="upper right")
    heading(figure, title)
    return _signed(figure, comparison, note, whiskers=False)


def _rule(entry: PolicyResult) -> Any:
    """The rule behind a result's policy string; None if it is no such string."""
    try:
        return parse(entry.policy).policy
    except ValueError:
        return None


def _split(comparison: Comparison) -> tuple[list[PolicyResult], list[PolicyResult]]:
    """Fixed lengths in ascending order, and all others in the order given."""
    fixed = [entry for entry in comparison.policies if isinstance(_rule(entry), FixedLength)]
    others = [entry for entry in comparison.policies if not isinstance(_rule(entry), FixedLength)]
    return sorted(fixed, key=lambda entry: _rule(entry).length), others


def _grouped(comparison: Comparison) -> list[PolicyResult | str]:
    """Results under headings, one heading a signal; fixed lengths first, the oracle last."""
    fixed, others = _split(comparison)
    rows: list[PolicyResult | str] = []
    rows += [SIGNALS[None][2], *fixed] if fixed else []
    oracles = [entry for entry in others if isinstance(_rule(entry), Oracle)]
    for signal, (_, _, name) in SIGNALS.items():
        group = [entry for entry in others if entry.signal == signal and entry not in oracles]
        if group:
            rows += ["other rules" if signal is None else name, *group]
    return rows + ([_foresight(comparison), *oracles] if oracles else [])


def _foresight(comparison: Comparison) -> str:
    """What to call the oracle's row: an upper bracket only if verification costs the same for every length and a
    candidate that will be accepted is worth its draft step (theory, §4)."""
    constant = isinstance(comparison, TraceComparison) and len(set(comparison.verify_time)) == 1
    best = max(entry.throughput.value for entry in comparison.policies)
    if constant and best * comparison.draft_time <= 1:  # type: ignore[union-attr]
        return "bracket: no policy is better"
    return ORACLE[2]


def _look(entry: PolicyResult) -> tuple[str, str, str]:
    """Colour, marker and name in words of a result."""
    rule = _rule(entry)
    if isinstance(rule, Oracle):
        return ORACLE
    if entry.signal is None and not isinstance(rule, FixedLength):
        return RED, "D", "rule that adapts"
    return SIGNALS.get(entry.signal, (RED, "X", str(entry.signal)))


def _sees(entry: PolicyResult) -> tuple[str, ...]:
    """What the rule looks at, short enough for a tick; nothing for a fixed length."""
    if isinstance(_rule(entry), Oracle):
        return ("(no policy)",)
    return () if entry.signal is None else (SEES.get(entry.signal, entry.signal),)


def _short(entry: PolicyResult, between: str = " ") -> str:
    """The policy string for people: no signal (headings say it), `h = 0.4` for a threshold."""
    try:
        spec = parse(entry.policy)
    except ValueError:
        return entry.policy
    name, _, value = spec.text.partition(",")[0].partition(":")
    value = "" if value.startswith("signal=") else value
    name = {"lookahead": "look-ahead"}.get(name, name)
    if isinstance(spec.policy, FixedLength):
        return f"K = {value}"
    return f"{name}{between}h = {value}" if value else name


def _level(comparison: Comparison) -> float:
    return getattr(comparison, "level", 0.95)


def _world(comparison: Comparison) -> str:
    return "replayed" if isinstance(comparison, TraceComparison) else "simulated"


def _whiskers(
    axes: Axes, places: Sequence[float], entries: Sequence[PolicyResult], comparison: Comparison, *, vertical: bool,
    color: str, marker: str, label: str | None = None,
) -> None:  # fmt: skip
    for place, entry in zip(places, entries, strict=True):
        _whisker(axes, place, entry.speedup, entry.num_clusters, _level(comparison), color, marker, vertical, label)
        label = None


def _whisker(
    axes: Axes, place: float, estimate: Estimate, num_clusters: int, level: float, color: str, marker: str,
    vertical: bool = False, label: str | None = None,
) -> None:  # fmt: skip
    low, high = interval(estimate, num_clusters, level)
    span = None if np.isnan(low) else [[estimate.value - low], [high - estimate.value]]
    where: dict[str, Any] = {"x": place, "y": estimate.value, "yerr": span}
    if not vertical:
        where = {"x": estimate.value, "y": place, "xerr": span}
    axes.errorbar(**where, color=color, marker=marker, markersize=BIG.get(marker), capsize=2.0, elinewidth=1.0, ls="",
                  label=label, zorder=3)  # fmt: skip


def _signed(figure: Figure, comparison: Comparison | None, note: str, whiskers: bool = True) -> Figure:
    """Put the origin of the numbers under the figure."""
    parts = []
    if isinstance(comparison, TraceComparison):
        parts.append(f"Replayed on {comparison.num_requests} requests, {comparison.cost_origin} times")
    elif comparison is not None:
        parts.append(f"Simulated, {comparison.rounds:,} rounds a policy")
    if comparison is not None and whiskers:
        clustered = ", clustered by request" if isinstance(comparison, TraceComparison) else ""
        parts.append(f"whiskers: {100 * _level(comparison):g} % intervals{clustered}")
    text = "; ".join(parts) + ("." if parts else "")
    return sign(figure, f"{text}  {note}")
