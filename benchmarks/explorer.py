r"""How long the explorer takes to follow a slider: goal 200 ms a redraw after the first.

    python benchmarks/explorer.py [--quick] [--json] [--only compute|draw|redraw]

*compute*: `mdp.overview` at random settings, each once (nothing is remembered between them), against `mdp.solve` alone
on the same problems, which compiles where the form of the policy is not known beforehand. *draw*: in place
(`simulate.figures.redraw`) against a new figure each time. *redraw*: what a slider's move costs in the kernel, both and
the PNG, the whole widget included; the first one, imports of matplotlib and fonts apart, by itself. `worst` is over all
moves; `ratio` is peer_s / ours_s, or the goal over ours.
"""

import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

sys.path.append(sys.path.pop(0))  # in its folder is a file with a package's name

import numpy as np
from measure import options, printer

from mdp.overview import RANGES, Overview, Settings, overview
from mdp.solve import solve
from simulate.figures.redraw import OverviewPicture
from specstop.explorer import Explorer

GOAL = 0.2


def random_settings(count: int) -> list[Settings]:
    """Anywhere in all ranges."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        values = {name: float(rng.uniform(*ends)) for name, ends in RANGES.items()}
        values["max_candidates"] = round(values["max_candidates"])
        found.append(Settings(**values))
    return found


def timed(work: Callable, inputs: list) -> Iterator[float]:
    for given in inputs:
        begun = time.perf_counter()
        work(given)
        yield time.perf_counter() - begun


def bench_compute(emit: Callable, quick: bool) -> None:
    settings = random_settings(30 if quick else 300)
    first, *ours = timed(overview, settings)
    cold, *peers = timed(lambda chosen: solve(chosen.problem), settings)
    note = f"medians; first {first:.3f} s, worst {max(ours):.3f} s; solve worst, compiling: {max(cold, *peers):.2f} s"
    emit("compute", median(ours), "solve alone", median(peers), len(ours), note)


def bench_draw(emit: Callable, quick: bool) -> None:
    results = [overview(chosen) for chosen in random_settings(20 if quick else 100)]
    near = [overview(Settings(mean=mean)) for mean in np.linspace(0.8, 0.84, 20 if quick else 100)]
    OverviewPicture().draw(results[0])  # matplotlib's own first time

    def anew(result: Overview) -> bytes:
        return OverviewPicture().draw(result)

    picture = OverviewPicture()
    for name, inputs in (("draw, anywhere", results), ("draw, a slider dragged", near)):
        before = picture.num_full
        ours, peers = list(timed(picture.draw, inputs)), list(timed(anew, inputs[:20]))
        note = f"worst {max(ours):.3f} s; {picture.num_full - before} of {3 * len(inputs)} panels drawn in full"
        emit(name, median(ours), "a new figure", median(peers), len(ours), note)


def bench_redraw(emit: Callable, quick: bool) -> None:
    begun = time.perf_counter()
    explorer = Explorer()
    first = time.perf_counter() - begun
    emit("redraw, first", first, "goal", GOAL, 1, "the widget made and drawn")
    rng = np.random.default_rng(1)
    spent = []
    for _ in range(30 if quick else 300):
        name = str(rng.choice(list(explorer.sliders)))
        slider = explorer.sliders[name]
        value = round(rng.uniform(slider.min, slider.max) / slider.step) * slider.step
        before, begun = explorer.num_redraws, time.perf_counter()
        slider.value = value
        if explorer.num_redraws > before:  # no event loop here: it was drawn at once
            spent.append(time.perf_counter() - begun)
    tail = f"95 % within {np.quantile(spent, 0.95):.3f} s, worst {max(spent):.3f} s"
    emit("redraw, one slider moved", median(spent), "goal", GOAL, len(spent), tail)


PARTS = {"compute": bench_compute, "draw": bench_draw, "redraw": bench_redraw}

if __name__ == "__main__":
    chosen = options(__doc__ or "", list(PARTS))
    for name, part in PARTS.items():
        if chosen.only in (None, name):
            part(printer(chosen.json), chosen.quick)
