"""A figure that is redrawn in place, fast enough to follow a slider.

A new matplotlib figure takes a few tenths of a second, most of it for axes, ticks and layout. Here they are drawn
once and kept as pixels; a new result moves the curves' points and draws these alone over the kept pixels. Only where
an axis takes a range it has not had lately is the rest of its panel drawn again. What is drawn depends on the last
result alone: the same result gives the same bytes. As in `simulate.figures` nothing is computed on the way.
"""

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from PIL import Image

from mdp.overview import Overview
from simulate.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, STYLE

__all__ = ["OverviewPicture"]

SIZE, DPI = (11.0, 3.9), 100
MARGINS = {"left": 0.055, "right": 0.985, "top": 0.92, "bottom": 0.27, "wspace": 0.23}
"""Set by hand: a layout engine draws everything several times, and moves the panels when a tick label grows."""
LEGEND = {"loc": "upper center", "ncols": 2, "bbox_to_anchor": (0.45, -0.17), "columnspacing": 1.0, "fontsize": 8.0}
MOST_KEPT = 32  # ranges a panel keeps pixels of, some .6 MB each
STOP = 1.1  # where "stop at every survival" stands on the axis of thresholds
_Ends = tuple[tuple[float, float], float]
STEPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 50.0)


class OverviewPicture:
    """Thresholds, speedup and frontier of an `Overview`, side by side.

    `figure` is the matplotlib figure, as last drawn; `num_full` counts panels drawn in full.
    """

    def __init__(self) -> None:
        self._moving: list[tuple[Axes, Artist]] = []
        with matplotlib.rc_context(dict(STYLE)):
            self.figure = Figure(figsize=SIZE, dpi=DPI)
            self._canvas = FigureCanvasAgg(self.figure)
            self._panels = [_Panel(*pair) for pair in enumerate(self.figure.subplots(1, 3, gridspec_kw=MARGINS))]
            self._make()

    @property
    def num_full(self) -> int:
        """Panels drawn in full so far, not from kept pixels."""
        return sum(panel.num_full for panel in self._panels)

    def _make(self) -> None:
        def line(axes: Axes, label: str | None = None, **look) -> Line2D:
            (drawn,) = axes.plot([], [], label=label, animated=True, **look)
            self._moving.append((axes, drawn))
            return drawn

        left, middle, right = (panel.axes for panel in self._panels)
        self._threshold, self._never = [], []
        for name, colour, marker, style in (("easy text", BLUE, "o", "-"), ("hard text", ORANGE, "s", "--")):
            self._threshold.append(line(left, f"behind {name}", color=colour, ls=style, marker=marker, markersize=4))
            self._never.append(line(left, color=colour, ls="", marker=marker, markersize=4, markerfacecolor="white"))
        left.set(title="When to draft one more", xlabel="candidates drafted so far, k",
                 ylabel="least survival that pays, S*(k, z)")  # fmt: skip
        left.set_yticks([*np.linspace(0, 1, 6), STOP], [*(f"{y:.1f}" for y in np.linspace(0, 1, 6)), "stop"])
        for axes in (left, middle):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.legend(**LEGEND)
        self._optimum = line(middle, "optimum", color=GREEN, ls="-", lw=1.8)
        self._level = line(middle, "best constant threshold", color=BLUE, ls="--")
        self._lengths = line(middle, "fixed length", color=BLACK, marker="o", markersize=3.5, lw=1.0)
        self._best = line(middle, color=BLACK, ls="", marker="o", markersize=9, markerfacecolor="none")
        middle.axhline(1.0, color=GREY, lw=0.8, ls=":")
        middle.set(title="How fast it is", xlabel="fixed length K", ylabel="speedup over plain decoding")
        middle.legend(**LEGEND)
        self._equal = line(right, "as fast as the optimum", color=GREEN, ls=":", lw=1.2)
        self._fixed = line(right, "fixed length", color=BLACK, marker="o", markersize=3.5, lw=1.0)
        self._rejection = line(right, "constant threshold", color=BLUE, ls="--")
        self._point = line(right, "optimum", color=GREEN, ls="", marker="*", markersize=11)
        right.set(title="What the speed is made of", xlabel="discarded candidates per token",
                  ylabel="target calls per token")  # fmt: skip
        right.legend(**LEGEND)

    def draw(self, result: Overview) -> bytes:
        """The picture as PNG."""
        self._move(result)
        panels = zip(self._panels, _ends(result), strict=True)
        kept = [panel.pixels(self._canvas, ends) for panel, ends in panels]
        for pixels in kept:
            self._canvas.restore_region(pixels)
        for axes, artist in self._moving:
            axes.draw_artist(artist)
        png = io.BytesIO()
        Image.fromarray(np.asarray(self._canvas.buffer_rgba())).convert("RGB").save(png, "png", compress_level=1)
        return png.getvalue()

    def _move(self, result: Overview) -> None:
        """Points of the curves."""
        depth = len(result.survival_threshold)
        for z, (line, never) in enumerate(zip(self._threshold, self._never, strict=True)):
            height, k = result.survival_threshold[:, z], np.arange(depth)
            stops = np.isinf(height)
            line.set_data(k[~stops], height[~stops])
            never.set_data(k[stops], np.full(stops.sum(), STOP))
        whole = (-1.0, depth + 1.0)
        self._optimum.set_data(whole, (result.optimum.speedup,) * 2)
        self._level.set_data(whole, (result.best_threshold[0],) * 2)
        self._lengths.set_data(result.fixed.threshold, result.fixed.speedup)
        speedup, length = result.best_fixed
        self._best.set_data([length], [speedup])
        ends = np.array([0.0, 1.05])
        self._equal.set_data(result.discard_rate_at(ends), ends)
        for line, family in ((self._fixed, result.fixed), (self._rejection, result.rejection)):
            line.set_data(family.discard_rate, family.verification_rate)
        self._point.set_data(
            [float(result.optimum.tally.discard_rate)], [float(result.optimum.tally.verification_rate)]
        )


class _Panel:
    """One third of the figure: what does not move in it, kept as pixels for each range that its axes have had."""

    def __init__(self, number: int, axes: Axes) -> None:
        self.axes, self.num_full = axes, 0
        whole = axes.figure.bbox
        self._third = Bbox.from_bounds(number * whole.width / 3, 0, whole.width / 3, whole.height)
        self._kept: dict[_Ends, Any] = {}

    def pixels(self, canvas: FigureCanvasAgg, ends: _Ends) -> Any:
        """What does not move, the axes set to this range; drawing it uses the canvas."""
        (left, right), top = ends
        self.axes.set(xlim=(left, right), ylim=(0.0, top))
        if ends not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                self._kept.pop(next(iter(self._kept)))
            with matplotlib.rc_context(dict(STYLE)):
                renderer = canvas.get_renderer()
                self.axes.figure.patch.draw(renderer)
                self.axes.draw(renderer)
            self._kept[ends] = canvas.copy_from_bbox(self._third)
            self.num_full += 1
        return self._kept[ends]


def _ends(result: Overview) -> tuple[_Ends, _Ends, _Ends]:
    """Range of x and top of y for each panel; those that follow the result do so in few steps."""
    depth = len(result.survival_threshold)
    discarded = max(float(result.optimum.tally.discard_rate), float(result.fixed.discard_rate[result.best_fixed[1]]))
    widest = _step(1.6 * discarded)
    return (
        ((-0.5, depth - 0.5), 1.16),
        ((-0.5, depth + 0.5), _step(1.08 * result.optimum.speedup)),
        ((-0.02 * widest, widest), 1.05),
    )


def _step(value: float) -> float:
    return next((step for step in STEPS if step >= value), float(np.ceil(value / 50.0) * 50.0))
