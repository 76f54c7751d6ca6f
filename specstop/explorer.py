"""The explorer: sliders for acceptance and times; policy, speedup and frontier follow.

    from specstop.explorer import explore
    explore()                                   # in a notebook
    explore(mean=0.7, draft_time=20.0)          # from these settings on

Three parts that know nothing of each other: `mdp.overview` computes (exact, some ten milliseconds, nothing compiled),
`simulate.figures.redraw` draws in place, and the widget here passes values from sliders to the one and pixels from the
other. While a slider is dragged, moves that arrive within `DELAY` become one redraw of the latest values, so a slow
machine shows fewer pictures, not old ones. What goes wrong is one line under the sliders; the last picture stays.

Without ipywidgets there is the picture of the settings given, and a line that says how to get the sliders.
"""

import asyncio
import html
import sys
from base64 import b64encode
from dataclasses import replace
from typing import Any, NamedTuple

from mdp.overview import RANGES, Overview, Settings, overview
from simulate.figures.redraw import OverviewPicture

__all__ = ["Explorer", "explore", "headline"]

DELAY = 0.03
"""Seconds from a slider's move to the redraw."""

NO_WIDGETS = "ipywidgets is missing, so this is a still picture; for sliders: pip install 'specstop[notebooks]'"


class Slider(NamedTuple):
    """How a setting is shown: its label, the slider's ends and step, what it means."""

    label: str
    low: float
    high: float
    step: float
    means: str


SLIDERS = {
    "mean": Slider("acceptance", 0.3, 0.98, 0.01, "mean probability that a candidate is accepted"),
    "dispersion": Slider("dispersion", 0.0, 1.0, 0.02, "0: all candidates alike; 1: the kind of text is the answer"),
    "persistence": Slider("persistence", 0.0, 0.98, 0.02, "probability that text stays easy, or hard, as it is"),
    "draft_time": Slider("draft step, ms", 1.0, 60.0, 0.5, "time to draft one candidate"),
    "verify_time": Slider("target call, ms", 10.0, 150.0, 1.0, "time of one target call without candidates, V(0)"),
    "verify_slope": Slider("  + per candidate", 0.0, 5.0, 0.1, "what each candidate adds to the target call, ms"),
    "max_candidates": Slider("most candidates", 1, 24, 1, "K: no round drafts more"),
}

GRID = ("mean", "draft_time", "max_candidates", "dispersion", "verify_time", "persistence", "verify_slope")
"""Row by row, three to a row: acceptance on the left, times in the middle; the reset button ends the second row."""


def headline(found: Overview) -> str:
    """The result in one sentence, for people."""
    (fixed, length), (threshold, h) = found.best_fixed, found.best_threshold
    best = found.optimum.speedup
    rule = f"h = {h:.2f}" if h >= 0 else "never draft"

    def less(speedup: float) -> str:
        loss = 100.0 * (1.0 - speedup / best)
        return "as good" if loss < 0.005 else f"{loss:.2f} % less"

    return (
        f"Optimum {best:.3f}x ({1000.0 * found.optimum.throughput:.1f} tokens/s); best constant threshold {rule}: "
        f"{threshold:.3f}x, {less(threshold)}; best fixed length K = {length}: {fixed:.3f}x, {less(fixed)}."
    )


def explore(**settings: Any) -> Any:
    """Sliders and figure, from these settings on: an `Explorer`, or without ipywidgets the matplotlib figure.

    Raises:
        ValueError: if a setting is out of its range, or there is none of that name.
    """
    unknown = [name for name in settings if name not in RANGES]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such setting; there are {', '.join(RANGES)}")
    start = Settings(**settings)
    try:
        import ipywidgets  # noqa: F401
    except ImportError:
        print(NO_WIDGETS, file=sys.stderr)
        found, picture = overview(start), OverviewPicture()
        picture.draw(found)
        print(headline(found))
        return picture.figure
    return Explorer(start)


class Explorer:
    """The widget; a notebook shows it where it is a cell's last line.

    Attributes:
        settings, result: what is shown now.
        sliders: by name of the setting; moving one by code redraws too.
        num_redraws: pictures drawn so far.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        import ipywidgets as widgets

        self.settings = self._start = settings or Settings()
        self._picture, self._pending = OverviewPicture(), None
        self.result = overview(self.settings)
        self.num_redraws = 0
        self.sliders = {name: _slider(widgets, name, getattr(self.settings, name)) for name in SLIDERS}
        self._image = widgets.Image(
            format="png", layout={"max_width": "1100px", "margin": "0", "object_fit": "contain"}
        )
        self._said = widgets.HTML()
        reset = widgets.Button(description="reset", tooltip="the settings at the start", layout={"width": "80px"})
        reset.on_click(lambda _: self.reset())
        for slider in self.sliders.values():
            slider.observe(self._moved, names="value")
        grid = [self.sliders[name] for name in GRID]
        grid.insert(grid.index(self.sliders["persistence"]), reset)
        narrow = {"max_width": "1100px", "overflow": "hidden"}  # no scroll bars for a margin of two pixels
        sliders = widgets.GridBox(grid, layout={"grid_template_columns": "repeat(3, minmax(0, 1fr))", **narrow})
        self.widget = widgets.VBox([sliders, self._said, self._image], layout=narrow)
        self.redraw()

    def reset(self) -> None:
        """Back to the settings at the start."""
        for name, slider in self.sliders.items():
            slider.value = getattr(self._start, name)

    def redraw(self) -> None:
        """Show what the sliders say, now; an error becomes the line above the picture."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        try:
            settings = replace(self._start, **{name: slider.value for name, slider in self.sliders.items()})
            result = overview(settings)
            picture = self._picture.draw(result)
        except Exception as error:  # nobody sees what a widget's callback raises
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            line = " ".join(f"{kind}{error}".split())
            self._said.value = f'<span style="color:#B00020">{html.escape(line)[:300]}</span>'
            return
        self.settings, self.result = settings, result
        self._image.value, self._said.value = picture, html.escape(headline(result))
        self.num_redraws += 1

    def _moved(self, _: Any) -> None:
        """A slider moved: redraw soon, once for all that moves until then; at once where no event loop runs."""
        if self._pending is not None:
            return
        try:
            self._pending = asyncio.get_running_loop().call_later(DELAY, self.redraw)
        except RuntimeError:
            self.redraw()

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget; where a saved notebook is read without a kernel, the picture and its sentence."""
        still = {"image/png": b64encode(self._image.value).decode(), "text/plain": headline(self.result)}
        return dict(self.widget._repr_mimebundle_(**kwargs) or {}) | still


def _slider(widgets: Any, name: str, value: float) -> Any:
    """The slider of one setting, wide enough for a value outside its usual ends."""
    shown = SLIDERS[name]
    whole = name == "max_candidates"
    kind = widgets.IntSlider if whole else widgets.FloatSlider
    return kind(
        value=value, min=min(shown.low, value), max=max(shown.high, value), step=shown.step,
        description=shown.label, tooltip=shown.means, continuous_update=True,
        readout_format="d" if whole else ".2f" if shown.high <= 1.0 else ".1f",
        style={"description_width": "112px"}, layout={"width": "auto"},
    )  # fmt: skip
