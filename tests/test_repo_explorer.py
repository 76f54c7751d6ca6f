"""The explorer without a browser: picture, widget and the still picture that stands in for it."""

import asyncio
import io
import sys
from base64 import b64decode

import numpy as np
import pytest

from mdp.overview import RANGES, Settings, overview
from simulate.figures.redraw import OverviewPicture
from specstop import explorer as module
from specstop.explorer import SLIDERS, explore, headline


@pytest.fixture(scope="module")
def picture():
    return OverviewPicture()


@pytest.fixture
def widget():
    pytest.importorskip("ipywidgets")
    return explore()


def pixels(png):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_picture_depends_on_its_result_alone(picture):
    shown = [Settings(), Settings(mean=0.95, max_candidates=20), Settings(draft_time=40.0), Settings()]
    first, *_, again = (picture.draw(overview(settings)) for settings in shown)
    assert first == again == OverviewPicture().draw(overview(Settings()))


def test_small_changes_draw_no_panel_anew_and_are_seen(picture):
    before = picture.draw(overview(Settings()))
    count = picture.num_full
    after = picture.draw(overview(Settings(mean=0.805)))
    assert picture.num_full == count and before != after
    assert pixels(after).shape == pixels(before).shape and pixels(after).std() > 10  # not a blank page


@pytest.mark.parametrize("end", [0, 1])
def test_the_ends_of_all_ranges_can_be_drawn(picture, end):
    for name, ends in RANGES.items():
        assert picture.draw(overview(Settings(**{name: ends[end]})))


def test_moving_a_slider_redraws(widget):
    before, said = widget.widget.children[2].value, widget.widget.children[1].value
    widget.sliders["mean"].value = 0.7
    assert widget.settings == Settings(mean=0.7) and widget.num_redraws == 2
    assert widget.widget.children[2].value != before and widget.widget.children[1].value != said
    assert headline(widget.result) == widget.widget.children[1].value
    widget.reset()
    assert widget.widget.children[2].value == before


def test_a_saved_notebook_shows_the_picture_to_readers_without_a_kernel(widget):
    bundle = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and bundle["text/plain"].startswith("Optimum")
    assert b64decode(bundle["image/png"]) == widget.widget.children[2].value


def test_that_check_can_fail(widget):
    before = widget.widget.children[2].value
    widget.sliders["mean"].unobserve_all("value")
    widget.sliders["mean"].value = 0.7
    assert widget.widget.children[2].value == before and widget.num_redraws == 1


def test_moves_that_come_together_are_one_redraw(widget):
    async def drag():
        for value in np.linspace(0.5, 0.9, 30):
            widget.sliders["mean"].value = float(value)
        assert widget.num_redraws == 1
        await asyncio.sleep(20 * module.DELAY)

    asyncio.run(drag())
    assert widget.num_redraws == 2 and widget.settings.mean == 0.9


def test_what_goes_wrong_is_one_line_and_the_picture_stays(widget, monkeypatch):
    before = widget.widget.children[2].value

    def broken(settings):
        raise ValueError("mean: <b>two</b>\nlines")

    monkeypatch.setattr(module, "overview", broken)
    widget.sliders["mean"].value = 0.7
    said = widget.widget.children[1].value
    assert "mean: &lt;b&gt;two&lt;/b&gt; lines" in said and "\n" not in said
    assert widget.widget.children[2].value == before and widget.settings == Settings()
    monkeypatch.undo()
    widget.sliders["mean"].value = 0.6
    assert widget.widget.children[1].value.startswith("Optimum") and widget.settings.mean == 0.6


def test_every_setting_has_a_slider_within_its_range():
    assert set(SLIDERS) == set(RANGES) == set(module.GRID)
    for name, slider in SLIDERS.items():
        assert RANGES[name][0] <= slider.low < slider.high <= RANGES[name][1]


def test_without_widgets_there_is_a_still_picture(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    figure = explore(mean=0.7)
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "ipywidgets is missing" in err and out.startswith("Optimum")
    page = io.BytesIO()
    figure.savefig(page, format="png")
    assert pixels(page.getvalue()).std() > 10


@pytest.mark.parametrize(("name", "value"), [("mean", 2.0), ("alpha", 0.5)])
def test_bad_settings_are_refused_before_anything_is_drawn(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        explore(**{name: value})
